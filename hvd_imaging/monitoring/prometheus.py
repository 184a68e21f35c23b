"""The newest sample of a rank as Prometheus reads it: a file for the node exporter, or a small server."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import bounded_http
from ..errors import ConfigError
from ..files import write_text

_METRICS = {
    # key of a sample: (metric, what it is)
    "cpu": ("hvd_imaging_cpu_cores", "cores that the rank keeps busy"),
    "rss_bytes": ("hvd_imaging_resident_bytes", "resident memory of the rank"),
    "disk_read_bps": ("hvd_imaging_disk_read_bytes_per_second", "read from disk by the rank"),
    "disk_write_bps": ("hvd_imaging_disk_written_bytes_per_second", "written to disk by the rank"),
    "host_cpu": ("hvd_imaging_host_cpu_ratio", "busy share of the host's cores"),
    "host_memory": ("hvd_imaging_host_memory_ratio", "used share of the host's memory"),
    "net_in_bps": ("hvd_imaging_host_received_bytes_per_second", "received by the host"),
    "net_out_bps": ("hvd_imaging_host_sent_bytes_per_second", "sent by the host"),
    "watts": ("hvd_imaging_host_power_watts", "power of the host"),
    "rdma_in_bps": ("hvd_imaging_host_rdma_received_bytes_per_second", "received by the host's RDMA adapters"),
    "rdma_out_bps": ("hvd_imaging_host_rdma_sent_bytes_per_second", "sent by the host's RDMA adapters"),
    "step": ("hvd_imaging_step", "global step"),
    "unix": ("hvd_imaging_sample_time_seconds", "when the sample was taken, Unix time; an old one: the rank has died"),
}


@dataclass(frozen=True)
class Target:
    """Where to: a folder of text files, or an address and port."""

    folder: Path | None = None
    address: str = "127.0.0.1"
    port: int = 0


def parse_target(text: str) -> Target:
    """``textfile:/folder``, ``port:9400`` (loopback) or ``port:0.0.0.0:9400``.

    Raises:
        ConfigError: none of these.
    """
    kind, _, rest = text.partition(":")
    if kind == "textfile" and rest:
        return Target(folder=Path(rest))
    address, _, port = rest.rpartition(":")
    if kind == "port" and port.isdigit() and 0 < int(port) < 65000:
        return Target(address=address or "127.0.0.1", port=int(port))
    raise ConfigError(f"monitor.prometheus: expected textfile:/folder, port:9400 or port:0.0.0.0:9400, found '{text}'")


def page(sample: Mapping[str, Any], run: str) -> str:
    """The text format, version 0.0.4. Pure."""
    labels = ",".join(f'{name}="{_escaped(value)}"' for name, value in (("run", run), ("rank", sample.get("rank", 0)), ("host", sample.get("host", ""))))
    lines = []
    for key, (name, text) in _METRICS.items():
        if isinstance(value := sample.get(key), int | float):
            lines += [f"# HELP {name} {text}", f"# TYPE {name} gauge", f"{name}{{{labels}}} {value}"]
    return "\n".join(lines) + "\n"


def _escaped(value: object) -> str:
    return str(value).replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ")


class Exporter:
    """Publishes what it is given.

    Args:
        target: where to.
        run: name of the run.
        rank, local_rank: of this rank; ranks of one host listen on ports in a row.

    Raises:
        OSError: the port is taken, the folder cannot be written.
    """

    def __init__(self, target: Target, run: str, rank: int, local_rank: int) -> None:
        self._run, self._text = run, ""
        # Several runs may share a host.
        name = re.sub(r"[^\w.-]", "_", f"hvd_imaging-{run}-{rank:05d}.prom")
        self._file = target.folder / name if target.folder is not None else None
        self._server: bounded_http.Server | None = None
        if self._file is None:
            self._server = bounded_http.Server((target.address, target.port + local_rank), _handler(lambda: self._text))
            threading.Thread(target=self._server.serve_forever, name="prometheus", daemon=True).start()

    def publish(self, sample: Mapping[str, Any]) -> None:
        """The newest sample."""
        self._text = page(sample, self._run)
        if self._file is not None:
            write_text(self._file, self._text)

    def close(self) -> None:
        """Withdraw it: a rank that has ended has no power and no memory."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
        if self._file is not None:
            self._file.unlink(missing_ok=True)


def _handler(text: Callable[[], str]) -> type[bounded_http.Handler]:
    class Handler(bounded_http.Handler):
        def do_GET(self) -> None:
            if self.path not in ("/", "/metrics"):
                self.send_error(404)
                return
            self.reply(200, "text/plain; version=0.0.4; charset=utf-8", text().encode())

    return Handler
