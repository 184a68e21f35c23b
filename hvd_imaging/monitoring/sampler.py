"""What a rank and its host do at the moment: CPU, memory, disk, network, GPU, power."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import psutil

from ..world import World
from .network import devices, rdma_counters
from .power import Power


class Sampler:
    """Rates between one call and the next. Values of the whole host come from one rank of it, so that sums over ranks are right.

    Args:
        world: this rank.
        host: its name.
        power: of the host.
    """

    def __init__(self, world: World, host: str, power: Power, clock: Callable[[], float] = time.monotonic) -> None:
        self._world, self._host, self._power, self._clock = world, host, power, clock
        self._speaks = world.local_rank == 0
        self._process = psutil.Process()
        self._gpus = open_gpus() if self._speaks else None
        self._before = self._counters()

    def sample(self) -> dict[str, Any]:
        """Plain values; None for what this rank does not tell, or what the machine does not."""
        before, now = self._before, self._counters()
        self._before = now
        seconds = max(now["when"] - before["when"], 1e-9)

        def rate(name: str) -> float | None:
            return round(max(now[name] - before[name], 0) / seconds, 3) if now.get(name) is not None and before.get(name) is not None else None

        values: dict[str, Any] = {
            "rank": self._world.rank, "host": self._host, "pid": self._process.pid, "cpu": rate("cpu"), "threads": self._process.num_threads(),
            "rss_bytes": self._process.memory_info().rss, "disk_read_bps": rate("read"), "disk_write_bps": rate("written"),
            "host_cpu": None, "host_memory": None, "net_in_bps": None, "net_out_bps": None, "lo_bps": None,
            "rdma_in_bps": None, "rdma_out_bps": None, "gpu": [], "watts": None, "watts_from": None,
        }  # fmt: skip
        if not self._speaks:
            return values
        gpus = self._gpus() if self._gpus is not None else []
        total, idle = now["total"] - before["total"], now["idle"] - before["idle"]
        busy = min(max(1 - idle / total, 0.0), 1.0) if total > 0 else 0.0
        watts, known = self._power.watts(busy, sum(gpu["watts"] for gpu in gpus) if gpus else None)
        return values | {
            "host_cpu": round(busy, 4), "host_memory": round(psutil.virtual_memory().percent / 100, 4), "net_in_bps": rate("in"),
            "net_out_bps": rate("out"), "lo_bps": rate("lo"), "rdma_in_bps": rate("rdma_in"), "rdma_out_bps": rate("rdma_out"),
            "gpu": gpus, "watts": round(watts, 1), "watts_from": known,
        }  # fmt: skip

    def _counters(self) -> dict[str, Any]:
        own = self._process.cpu_times()
        found: dict[str, Any] = {"when": self._clock(), "cpu": own.user + own.system}
        # Inside some containers these cannot be read.
        with contextlib.suppress(psutil.Error, OSError):
            io = self._process.io_counters()
            # What passed the disk's door, not the page cache's.
            found |= {"read": io.read_bytes, "written": io.write_bytes}
        if self._speaks:
            times = psutil.cpu_times()
            # Linux counts the time of virtual machines as user time too.
            twice = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
            found |= {"total": sum(times) - twice, "idle": times.idle + getattr(times, "iowait", 0.0)}
            with contextlib.suppress(OSError):
                cards = psutil.net_io_counters(pernic=True)
                outside = [cards[name] for name in devices(cards)]
                found |= {"in": sum(card.bytes_recv for card in outside), "out": sum(card.bytes_sent for card in outside)}
                found["lo"] = cards["lo"].bytes_sent if "lo" in cards else None
            if (rdma := rdma_counters()) is not None:
                found["rdma_in"], found["rdma_out"] = rdma
        return found


def visible_gpus(environ: Mapping[str, str]) -> list[int] | None:
    """Numbers of the host's GPUs that the job was given; None: not known. Pure."""
    # A rank may be bound to one of its host's GPUs; the one rank that speaks for the host tells all of the job's.
    text = environ.get("SLURM_JOB_GPUS") or environ.get("CUDA_VISIBLE_DEVICES")
    parts = [part.strip() for part in (text or "").split(",")]
    return [int(part) for part in parts] if all(part.isdigit() for part in parts) else None


def open_gpus() -> Callable[[], list[dict[str, Any]]] | None:
    """A function that tells this host's GPUs through NVML; None where there are none, or no nvidia-ml-py."""
    try:
        import pynvml
    except ImportError:
        return None
    cards = {}
    try:
        pynvml.nvmlInit()
        for index in range(pynvml.nvmlDeviceGetCount()):
            with contextlib.suppress(pynvml.NVMLError):  # of another job
                cards[index] = pynvml.nvmlDeviceGetHandleByIndex(index)
    except pynvml.NVMLError:
        return None
    # Where the job sees its own GPUs only, they are numbered anew.
    wanted = [index for index in visible_gpus(os.environ) or () if index in cards] or list(cards)

    def read() -> list[dict[str, Any]]:
        found = []
        for index in wanted:
            card = cards[index]
            with contextlib.suppress(pynvml.NVMLError):
                found.append({
                    "index": index, "util": pynvml.nvmlDeviceGetUtilizationRates(card).gpu / 100,
                    "memory_bytes": int(pynvml.nvmlDeviceGetMemoryInfo(card).used), "watts": pynvml.nvmlDeviceGetPowerUsage(card) / 1000,
                })  # fmt: skip
        return found

    return read if wanted else None
