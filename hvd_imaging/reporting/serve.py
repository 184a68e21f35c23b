"""A page on loopback, made anew for each request."""

from __future__ import annotations

import contextlib
import hmac
import secrets
import threading
import urllib.parse
from collections.abc import Callable
from html import escape

from .. import bounded_http
from ..errors import HvdImagingError, SetupError


def serve(page: Callable[[], str], port: int, said: Callable[[str], None]) -> None:
    """Answer on 127.0.0.1 until Ctrl-C, to those who know the address: its token keeps out the other users of a shared host.

    Args:
        page: makes the HTML.
        port: 0 takes any free one.
        said: called with the address.

    Raises:
        SetupError: the port is taken.
    """
    token = secrets.token_urlsafe(16)
    one_at_a_time = threading.Lock()

    class Handler(bounded_http.Handler):
        def do_GET(self) -> None:
            # A page of another site that has its name point here would read this one: only our own names are answered.
            if _host(self.headers.get("Host", "")) not in ("localhost", "127.0.0.1", "::1"):
                self.send_error(403)
                return
            if not hmac.compare_digest(self.path.encode(errors="replace"), f"/{token}/".encode()):
                self.send_error(404)
                return
            try:
                with one_at_a_time:
                    body, code = page().encode(), 200
            except HvdImagingError as error:
                body, code = f"<!DOCTYPE html><meta http-equiv=refresh content=5><title>error</title><p>{escape(str(error))}".encode(), 500
            self.reply(code, "text/html; charset=utf-8", body, Cache_Control="no-store", Referrer_Policy="no-referrer")

    try:
        server = bounded_http.Server(("127.0.0.1", port), Handler)
    except OSError as error:
        raise SetupError(f"--port {port}: {error.strerror}; give another one, or 0 for any that is free") from None
    with server:
        said(f"http://localhost:{server.server_address[1]}/{token}/")
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


def _host(text: str) -> str | None:
    try:
        return urllib.parse.urlsplit(f"//{text}").hostname
    except ValueError:
        return None
