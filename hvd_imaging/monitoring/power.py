"""How much power a host takes: its own counters where they can be read, else a stated estimate."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

RAPL = Path("/sys/class/powercap")
CPU_IDLE_W, CPU_CORE_W = 40.0, 8.0
"""Where nothing is known of a host: what it takes idle, and what each busy core adds. A guess of the right size, no more."""


@dataclass(frozen=True)
class Guess:
    """Power of a host without counters.

    Attributes:
        idle_w, busy_w: with no core busy, and with all.
    """

    idle_w: float
    busy_w: float

    def watts(self, busy: float) -> float:
        """W with a share ``busy`` (0..1) of the cores at work."""
        return self.idle_w + (self.busy_w - self.idle_w) * min(max(busy, 0.0), 1.0)


def guess(cores: int, idle_w: float | None = None, busy_w: float | None = None) -> Guess:
    """The site's figures, or those of a usual server with so many cores."""
    idle = CPU_IDLE_W if idle_w is None else idle_w
    return Guess(idle, idle + CPU_CORE_W * cores if busy_w is None else busy_w)


def energy_counters(folder: Path = RAPL) -> dict[str, tuple[int, int]]:
    """(energy in uJ, where it begins anew) of each CPU package that can be read; often only root may."""
    found = {}
    for path in sorted(folder.glob("intel-rapl:[0-9]*")):
        # intel-rapl:0 is a package, intel-rapl:0:1 a part of it.
        if path.name.count(":") == 1:
            with contextlib.suppress(OSError, ValueError):
                energy = int((path / "energy_uj").read_text())
                found[path.name] = energy, int((path / "max_energy_range_uj").read_text())
    return found


def watts_between(
    before: Mapping[str, tuple[int, int]], after: Mapping[str, tuple[int, int]], seconds: float
) -> float | None:
    """Mean W between two readings; None without a counter in both. Pure."""
    both = before.keys() & after.keys()
    if not both or seconds <= 0:
        return None
    total = 0
    for name in both:
        (first, _), (last, limit) = before[name], after[name]
        total += last - first if last >= first else last - first + limit
    return total / 1e6 / seconds


class Power:
    """Power of this host from one call to the next."""

    def __init__(self, idle_w: float | None = None, busy_w: float | None = None, folder: Path = RAPL,
                 clock: Callable[[], float] = time.monotonic) -> None:  # fmt: skip
        self._guess = guess(os.cpu_count() or 1, idle_w, busy_w)
        self._folder, self._clock = folder, clock
        self._last, self._when = energy_counters(folder), clock()

    def watts(self, busy: float, gpus: float | None = None) -> tuple[float, str]:
        """(W since the last call, how it is known: rapl, nvml or estimate).

        Args:
            busy: share of all cores, for the estimate.
            gpus: W of the host's GPUs, measured.
        """
        last, when = energy_counters(self._folder), self._clock()
        measured = watts_between(self._last, last, when - self._when)
        self._last, self._when = last, when
        if measured is not None:
            return measured + (gpus or 0.0), "rapl+nvml" if gpus is not None else "rapl"
        return self._guess.watts(busy) + (gpus or 0.0), "estimate+nvml" if gpus is not None else "estimate"
