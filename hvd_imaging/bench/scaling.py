"""`bench scaling`: ranks against as many independent processes, and against TensorFlow's MultiWorkerMirroredStrategy.

Independent processes run at the same time on the same cores: memory bandwidth that all share is not counted as
communication. Weak scaling: 2 patches a rank. Strong scaling: the global batch stays.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import HvdImagingError
from . import mirrored_worker
from .report import Figure, Row, ratio
from .training import WARMUP, Times, Workshop, alone, ranks, slowest, workshop

BATCH = 2
PEER = "MultiWorkerMirroredStrategy"


def measure(quick: bool = False, on_run: Callable[[str], None] | None = None) -> tuple[list[Row], list[Figure]]:
    """Time training steps on 1 .. N ranks, N being the cores here.

    Raises:
        HvdImagingError: a process failed, or there are fewer than two cores.
    """
    cores = len(os.sched_getaffinity(0))
    if cores < 2:
        raise HvdImagingError(f"bench scaling: wants two cores at least, found {cores}")
    counts = [cores] if quick else [n for n in (2, 4, 8, 16, 32) if n <= cores]
    steps, rounds = (12, 1) if quick else (30, 3)
    collected: dict[tuple[str, str, str], list[float]] = {}

    def add(case: str, system: str, found: Times) -> None:
        for metric, name in (("step time", "steps"), ("input wait", "input"), ("compute", "compute"), ("exchange", "exchange")):
            collected.setdefault((case, system, metric), []).extend(1e3 * t for t in found[name])

    with workshop() as place:
        for turn in range(rounds):
            for count in counts:
                runs = [
                    ("independent", lambda n=count: add(f"weak, {n}", "independent processes", _independent(place, n, steps))),
                    ("ranks", lambda n=count: add(f"weak, {n}", "hvd_imaging ranks", _ranks(place, "weak", n, BATCH * n, steps))),
                    ("mirrored", lambda n=count: collected.setdefault((f"weak, {n}", PEER, "step time"), []).extend(
                        1e3 * t for t in _mirrored(n, steps))),
                ]  # fmt: skip
                if not quick:
                    runs.append(("strong", lambda n=count: add(
                        f"strong, {n}", "hvd_imaging ranks", _ranks(place, "strong", n, BATCH, steps))))  # fmt: skip
                    runs.append(("augmented", lambda n=count: add(
                        f"weak, {n}, augmented", "hvd_imaging ranks",
                        _ranks(place, "augmented", n, BATCH * n, steps, augment={}))))  # fmt: skip
                for name, run in runs if turn % 2 == 0 else list(reversed(runs)):
                    if on_run:
                        on_run(f"round {turn + 1} of {rounds}: {name}, {count}")
                    run()
            if not quick:
                if on_run:
                    on_run(f"round {turn + 1} of {rounds}: one process, alone on the machine")
                add("strong, 1", "hvd_imaging ranks", _independent(place, 1, steps))
    rows = [
        Row(case, system, metric, "ms", tuple(round(t, 2) for t in runs)) for (case, system, metric), runs in collected.items()
    ]
    return rows, figures(rows, counts[0])


def _config(place: Workshop, name: str, batch: int, steps: int, augment: object) -> Path:
    return place.config(
        name, "volumes", steps, train__batch_size=batch, data__augment=augment, data__patches_per_volume=4
    )


def _independent(place: Workshop, count: int, steps: int) -> Times:
    config = _config(place, "independent", BATCH, steps, None)
    return slowest(alone([place.worker(config, f"independent{i}") for i in range(count)]))


def _ranks(place: Workshop, name: str, count: int, batch: int, steps: int, augment: object = None) -> Times:
    return ranks(place.worker(_config(place, name, batch, steps, augment), name), count)


def _mirrored(count: int, steps: int) -> Sequence[float]:
    """The better of its two settings: without a slow link fewer threads can be faster."""
    task = mirrored_worker.Task(batch=BATCH, warmup=WARMUP, steps=steps)
    tried = [mirrored_worker.measure(each, count) for each in (task, replace(task, pack=0, interop=1))]
    return min(tried, key=statistics.median)


def figures(rows: Sequence[Row], count: int) -> list[Figure]:
    """Efficiency, the peer, and the wait for input; pure."""
    by = {(row.case, row.system, row.metric): row for row in rows}
    case = f"weak, {count}"
    ours = by[case, "hvd_imaging ranks", "step time"]
    peer = by.get((case, PEER, "step time"), Row(case, PEER, "step time", "ms"))
    return [
        Figure(
            f"weak scaling efficiency, {count} ranks / {count} independent processes",
            ratio(by[case, "independent processes", "step time"], ours), 0.97, "higher",
        ),
        Figure(f"speed / {PEER}, {count} ranks", ratio(peer, ours), 1.0, "higher"),
        Figure("input wait / step time", ratio(by[case, "hvd_imaging ranks", "input wait"], ours), 0.02, "lower"),
    ]  # fmt: skip
