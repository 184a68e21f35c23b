"""Which ranks compute more slowly than the others: pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

RATIO = 1.25
LEAST_S = 1.0
"""Of computing: less than that says nothing about a rank."""


@dataclass(frozen=True)
class Straggler:
    """A rank and how slow it is.

    Attributes:
        seconds, typical_seconds: of computing one sample, this rank's and the others' median.
        ratio: of the two.
    """

    rank: int
    host: str
    seconds: float
    typical_seconds: float
    ratio: float


def stragglers(compute_s: Sequence[float], samples: Sequence[int], hosts: Sequence[str]) -> list[Straggler]:
    """Ranks that take more than ``RATIO`` x the others' median for a sample; lists by rank."""
    each = {rank: s / n for rank, (s, n) in enumerate(zip(compute_s, samples, strict=True)) if n}
    found = []
    for rank, seconds in each.items():
        others = [value for other, value in each.items() if other != rank]
        if not others or compute_s[rank] < LEAST_S:
            continue
        typical = statistics.median(others)
        if typical > 0 and seconds > RATIO * typical:
            found.append(Straggler(rank, hosts[rank], seconds, typical, seconds / typical))
    return found
