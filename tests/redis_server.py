"""A redis-server of a test's own."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Server:
    """A redis-server on loopback that keeps nothing; skips the test where there is none."""

    def __init__(self, folder: Path, *options: str, tls: bool = False):
        if shutil.which("redis-server") is None:
            pytest.skip("no redis-server on PATH (Debian: apt-get install redis-server)")
        self.folder, self.options, self.tls, self.port = folder, options, tls, free_port()
        self.start()

    def start(self) -> None:
        ports = ["--port", "0", "--tls-port", str(self.port)] if self.tls else ["--port", str(self.port)]
        fixed = ["--bind", "127.0.0.1", "--dir", str(self.folder), "--save", "", "--appendonly", "no"]
        command = ["redis-server", *ports, *fixed, "--daemonize", "no", *self.options]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            assert self.process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
