"""A small HTTP server beside a training: few connections, none for long, so that nobody can take what the training needs."""

from __future__ import annotations

import contextlib
import http.server
import socket
import socketserver
import threading
from typing import Any

MOST_CONNECTIONS = 16
"""At a time; of one more the connection is closed at once."""
PATIENCE_S = 10.0
"""From the connection on, for the whole request, and again for the whole answer."""


class Server(http.server.ThreadingHTTPServer):
    """Answers `MOST_CONNECTIONS` at a time, each within `PATIENCE_S`."""

    daemon_threads = True
    request_queue_size = MOST_CONNECTIONS

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._free = threading.BoundedSemaphore(MOST_CONNECTIONS)
        self._waiting: dict[int, threading.Timer] = {}
        super().__init__(*args, **kwargs)

    def server_bind(self) -> None:
        """Without asking the name service for the host's own name: where that is slow, training would begin late."""
        socketserver.TCPServer.server_bind(self)

    def process_request(self, request: Any, client_address: Any) -> None:
        """In a thread of its own, if there is a place."""
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer, or cut off who does not ask in time: a timeout of the socket alone begins anew with each byte."""

        def cut() -> None:
            with contextlib.suppress(OSError):  # it has ended
                request.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(PATIENCE_S, cut)
        timer.daemon = True
        self._waiting[threading.get_ident()] = timer
        timer.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.asked()
            self._free.release()

    def asked(self) -> None:
        """The request of this thread is there: from now on it is our time."""
        if timer := self._waiting.pop(threading.get_ident(), None):
            timer.cancel()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is no news."""


class Handler(http.server.BaseHTTPRequestHandler):
    """One request a connection, and no log of it."""

    timeout = PATIENCE_S

    server: Server

    def parse_request(self) -> bool:
        """The first line and the headers."""
        found = super().parse_request()
        self.server.asked()
        return found

    def reply(self, code: int, kind: str, body: bytes, **headers: str) -> None:
        """Send an answer."""
        self.send_response(code)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing: a request is no news."""
