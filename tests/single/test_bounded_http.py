"""The servers beside a training: whatever clients do, few connections stand, none for long, and others are answered."""

from __future__ import annotations

import os
import socket
import threading
import time
import urllib.request

import pytest

from hvd_imaging import bounded_http
from hvd_imaging.monitoring.prometheus import Exporter, Target


@pytest.fixture
def exporter():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    made = Exporter(Target(port=port), "run", 0, 0)
    made.publish({"step": 7, "rank": 0})
    yield port
    made.close()


def scrape(port: int) -> bytes:
    with urllib.request.urlopen(f"http://localhost:{port}/metrics", timeout=10) as answer:
        return answer.read()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_idle_connections_do_not_take_the_trainings_descriptors(exporter, monkeypatch):
    monkeypatch.setattr(bounded_http, "PATIENCE_S", 2.0)
    before, threads, clients = descriptors(), threading.active_count(), []
    for _ in range(258):
        clients.append(socket.create_connection(("127.0.0.1", exporter), timeout=10))
    time.sleep(1)
    # The clients' own ends are ours too, in this test.
    assert descriptors() - before - len(clients) <= bounded_http.MOST_CONNECTIONS + 1
    assert threading.active_count() - threads <= 2 * bounded_http.MOST_CONNECTIONS
    deadline = time.monotonic() + 60
    while True:  # answered again once the first ones were cut off
        try:
            assert b"hvd_imaging_step" in scrape(exporter)
            break
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.2)
    for client in clients:
        client.close()


@pytest.mark.parametrize("sent", [b"", b"G", b"GET /metrics HTTP/1.1\r\nX: "])
def test_who_sends_a_byte_now_and_then_is_cut_off(exporter, monkeypatch, sent):
    monkeypatch.setattr(bounded_http, "PATIENCE_S", 1.0)
    with socket.create_connection(("127.0.0.1", exporter), timeout=10) as client:
        client.sendall(sent)
        with pytest.raises(OSError):
            for _ in range(300):
                client.sendall(b"x")
                time.sleep(0.1)
    assert b"hvd_imaging_step" in scrape(exporter)


def test_long_headers_are_refused(exporter):
    with socket.create_connection(("127.0.0.1", exporter), timeout=10) as client:
        try:
            client.sendall(b"GET / HTTP/1.1\r\nX: " + b"x" * 100_000)
            answer = client.recv(100)
        except ConnectionError:
            answer = b""
    assert b"200" not in answer and b"hvd_imaging_step" in scrape(exporter)
