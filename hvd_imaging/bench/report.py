"""The one form of all benchmarks: rows of measurements, figures against goals, a table and a JSON file."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .. import processor
from ..training.run import versions


@dataclass(frozen=True)
class Row:
    """One system in one case; ``value`` is the median of ``runs``, None with a ``reason`` if it was not measured."""

    case: str
    system: str
    metric: str
    unit: str
    runs: tuple[float, ...] = ()
    reason: str = ""

    @property
    def value(self) -> float | None:
        """Median of the runs."""
        return statistics.median(self.runs) if self.runs else None

    def to_json(self) -> dict[str, Any]:
        """As in the file."""
        row = {"case": self.case, "system": self.system, "metric": self.metric, "value": self.value, "unit": self.unit}
        return row | {"runs": list(self.runs)} | ({"reason": self.reason} if self.reason else {})


@dataclass(frozen=True)
class Figure:
    """A figure with a goal, computed from rows."""

    name: str
    value: float | None
    goal: float
    better: Literal["higher", "lower"]

    @property
    def reached(self) -> bool | None:
        """None if it could not be computed."""
        if self.value is None:
            return None
        return self.value >= self.goal if self.better == "higher" else self.value <= self.goal


def ratio(above: Row, below: Row) -> float | None:
    """Quotient of two medians, None if either is missing."""
    return above.value / below.value if above.value is not None and below.value else None


def machine() -> dict[str, Any]:
    """What the figures were measured on, without its name."""
    model, sets = platform.processor(), processor.instruction_sets()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
    except OSError:
        pass
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "instruction_sets": list(sets),
        "avx2": "avx2" in sets,
        "avx512": "avx512f" in sets,
    }


def result(bench: str, rows: Sequence[Row], figures: Sequence[Figure]) -> Mapping[str, Any]:
    """The JSON document."""
    return {
        "bench": bench,
        "machine": machine(),
        "versions": versions(),
        "rows": [row.to_json() for row in rows],
        "figures": [
            {"name": f.name, "value": f.value, "goal": f.goal, "better": f.better, "reached": f.reached} for f in figures
        ],
    }
