"""A page on loopback that is made anew for every look."""

from __future__ import annotations

import contextlib
import http.server
import urllib.parse
from collections.abc import Callable
from html import escape

from ..errors import HvdImagingError, SetupError


def serve(page: Callable[[], str], port: int, said: Callable[[str], None]) -> None:
    """Answer on 127.0.0.1 until Ctrl-C; nobody else on the network sees it.

    Args:
        page: makes the HTML.
        port: 0 takes any free one.
        said: called with the address.

    Raises:
        SetupError: the port is taken.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # A page of another site that has its name point here would read this one: only our own names are answered.
            if urllib.parse.urlsplit(f"//{self.headers.get('Host', '')}").hostname not in ("localhost", "127.0.0.1", "::1"):
                self.send_error(403)
                return
            if self.path != "/":
                self.send_error(404)
                return
            try:
                body, code = page().encode(), 200
            except HvdImagingError as error:
                body, code = f"<!DOCTYPE html><meta http-equiv=refresh content=5><title>error</title><p>{escape(str(error))}".encode(), 500
            self.send_response(code)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    try:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise SetupError(f"--port {port}: {error.strerror}; give another one, or 0 for any that is free") from None
    with server:
        said(f"http://localhost:{server.server_address[1]}/")
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
