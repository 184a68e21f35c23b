"""`bench guarantees`: what the promises of training cost (checkpoints, the replica guard, exact bits, monitoring), and what balance gains."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence

from ..errors import HvdImagingError
from .report import Figure, Row
from .training import Times, Workshop, kill, ranks, workshop

CASE = "3D U-Net, 48^3, 2 ranks"
EVERY = 10
"""Steps between the checkpoints that are measured; GUARD: between comparisons of the ranks, as configured by default."""
GUARD = 100
SAMPLE_S, OFTEN_S = 10.0, 0.1
"""Pause between samples of the monitor: as configured by default, and as measured, so often that it shows."""


def measure(quick: bool = False, on_run: Callable[[str], None] | None = None) -> tuple[list[Row], list[Figure]]:
    """Time training with and without each guarantee, in turn.

    Raises:
        HvdImagingError: a process failed, or there are fewer than two cores.
    """
    if len(os.sched_getaffinity(0)) < 2:
        raise HvdImagingError("bench guarantees: wants two cores at least")
    rounds, steps = (1, EVERY + 2) if quick else (2, 3 * EVERY)
    times: dict[str, list[float]] = {}
    saves: list[float] = []
    guards: list[float] = []
    samples: list[float] = []

    def note(text: str) -> None:
        if on_run:
            on_run(text)

    with workshop() as place:
        for turn in range(rounds):
            cases: list[tuple[str, dict[str, object]]] = [
                ("plain", {}),
                ("checkpoints", {"train__checkpoint_steps": EVERY}),
                ("exact", {"train__reproducible": "exact"}),
                (f"a sample every {OFTEN_S} s", {"monitor__seconds": OFTEN_S}),
            ]
            if not quick:
                cases += [("reproducible", {"train__reproducible": True}), ("accumulate 2", {"train__accumulate": 2})]
            for name, changes in cases if turn % 2 == 0 else list(reversed(cases)):
                note(f"round {turn + 1} of {rounds}: {name}")
                guard = {"train__guard_steps": EVERY} if name == "plain" else {}
                found = _run(place, name.replace(" ", "_"), steps, **{"monitor__seconds": 0, **changes, **guard})
                # Means, not medians: a checkpoint every few steps is an outlier among the steps.
                times.setdefault(name, []).append(_per_step(found, found["guard"]))
                saves += [1e3 * t for t in found["save"][:-1]] if name == "checkpoints" else []
                guards += [1e3 * t for t in found["guard"][1:-1]] if name == "plain" else []
                samples += [1e3 * t for t in found.get("sample_cpu", ())]
            if not quick:
                for balance in ("equal", "auto"):
                    note(f"round {turn + 1} of {rounds}: balance={balance}, rank 1 at half speed")
                    times.setdefault(f"slow rank, {balance}", []).append(_slowed(place, balance, 20))
    rows = [Row(CASE, name, "mean step time", "ms", tuple(round(t, 2) for t in runs)) for name, runs in times.items()]
    rows.append(Row(CASE, "checkpoints", "stall of the main thread at a save", "ms", tuple(round(t, 2) for t in saves)))
    rows.append(Row(CASE, "plain", "one comparison of the ranks", "ms", tuple(round(t, 2) for t in guards)))
    rows.append(Row(CASE, f"a sample every {OFTEN_S} s", "CPU time of one sample", "ms", tuple(round(t, 3) for t in samples)))
    return rows, figures(times, guards, quick)


def figures(times: dict[str, list[float]], guards: Sequence[float], quick: bool) -> list[Figure]:
    """Costs as shares of a step; pure."""
    step = statistics.median(times["plain"])
    found = [
        Figure(f"time with a checkpoint every {EVERY} steps / without - 1", statistics.median(times["checkpoints"]) / step - 1, 0.02, "lower"),
        Figure(f"replica guard every {GUARD} steps, share of the time", statistics.median(guards) / (GUARD * step), 0.005, "lower"),
        # So many samples less often they take so much less.
        Figure(f"monitoring every {SAMPLE_S:.0f} s, share of the time",
               (statistics.median(times[f"a sample every {OFTEN_S} s"]) / step - 1) * OFTEN_S / SAMPLE_S, 0.005, "lower"),
    ]  # fmt: skip
    if not quick:
        gain = statistics.median(times["slow rank, equal"]) / statistics.median(times["slow rank, auto"])
        found.append(Figure("throughput with balance=auto / equal, one rank at half speed", gain, 1.25, "higher"))
    return found


def _run(place: Workshop, name: str, steps: int, **changes: object) -> Times:
    config = place.config(
        name, "volumes", steps, **{"train__batch_size": 4, "data__patches_per_volume": 4, **changes}
    )
    return ranks(place.worker(config, name), 2)


def _per_step(found: Times, outside: Sequence[float]) -> float:
    """ms of a step on average, without what is measured by itself."""
    inside = sum(outside[1:-1])
    return 1e3 * (sum(found["steps"]) - inside) / len(found["steps"])


def _slowed(place: Workshop, balance: str, steps: int) -> float:
    """ms of a step when another process takes half of the second core; once the parts have settled."""
    cores = sorted(os.sched_getaffinity(0))
    spin = subprocess.Popen(["taskset", "-c", str(cores[1]), sys.executable, "-c", "while True: pass"])
    try:
        found = _run(place, f"slow_{balance}", 45 + steps, train__balance=balance, train__batch_size=6)
    finally:
        kill(spin)
    return 1e3 * statistics.median(found["steps"][-steps:])
