"""`bench dense`: VGG16 with its dense head on four ranks over a link of 1 Gbit/s: dense layers on every rank, or shared out."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from ..errors import HvdImagingError
from ..training import checkpoint
from .report import Figure, Row, ratio
from .slow_link import slow_link, why_not
from .training import WARMUP, Times, launch, parse, workshop

RANKS, BATCH = 4, 4
WAYS = ("replicated", "sharded")
STEP, SENT = "step time", "sent over the link a step"


def measure(quick: bool = False, on_run: Callable[[str], None] | None = None) -> tuple[list[Row], list[Figure]]:
    """Train both ways from the same start, and compare times, bytes on the cable, and weights.

    Raises:
        HvdImagingError: a process failed, or there are fewer than two cores.
    """
    if len(os.sched_getaffinity(0)) < 2:
        raise HvdImagingError("bench dense: wants two cores at least")
    say = on_run or (lambda text: None)
    side, steps, rounds = (64, 3, 1) if quick else (224, 5, 2)
    case, reason = f"VGG16 dense head, {side}^2, batch {BATCH}, {RANKS} ranks, 1 Gbit/s", why_not()
    times: dict[str, list[Times]] = {way: [] for way in WAYS}
    weights: dict[str, list[np.ndarray]] = {}
    if reason is None:
        with workshop(volumes=0, images=16, side=side) as place:
            for turn in range(rounds):
                for way in WAYS:
                    say(f"round {turn + 1} of {rounds}: dense layers {way}")
                    config = place.config(
                        way, "images", steps, data__patch=[1, side, side], train__batch_size=BATCH, monitor__seconds=0, parallel__dense=way
                    )
                    with slow_link(1000) as cable:
                        times[way].append(parse(launch(cable.mpirun(place.worker(config, way), RANKS), 900)))
                    weights[way] = _weights(place.folder / way)
    rows = rows_of(case, times, reason)
    if weights:
        rows.append(Row(case, WAYS[1], f"difference of the weights after {WARMUP + steps} steps", "", (difference(*(weights[w] for w in WAYS)),)))
    return rows, figures({(row.system, row.metric): row for row in rows}, rows[-1] if weights else None)


def rows_of(case: str, times: Mapping[str, list[Times]], reason: str | None) -> list[Row]:
    """Medians of the steps, and of what left rank 0's host; pure."""
    return [
        Row(case, way, metric, unit, tuple(round(scale * statistics.median(found[key]), 2) for found in runs), "" if runs else reason or "")
        for way, runs in times.items() for metric, unit, key, scale in ((STEP, "ms", "steps", 1e3), (SENT, "MB", "sent", 1e-6))
    ]  # fmt: skip


def figures(rows: Mapping[tuple[str, str], Row], apart: Row | None) -> list[Figure]:
    """Dense layers on every rank over dense layers shared out; pure."""
    return [
        Figure("bytes a step, replicated / sharded", ratio(rows[WAYS[0], SENT], rows[WAYS[1], SENT]), 5, "higher"),
        Figure("step time, replicated / sharded", ratio(rows[WAYS[0], STEP], rows[WAYS[1], STEP]), 2, "higher"),
        Figure("relative difference of the weights", apart.value if apart else None, 1e-4, "lower"),
    ]


def difference(ours: list[np.ndarray], theirs: list[np.ndarray]) -> float:
    """Norm of the difference over the norm; pure."""
    apart = sum(float(np.sum((a.astype(np.float64) - b) ** 2)) for a, b in zip(ours, theirs, strict=True))
    return (apart / sum(float(np.sum(a.astype(np.float64) ** 2)) for a in ours)) ** 0.5


def _weights(run_dir: Path) -> list[np.ndarray]:
    state, _ = checkpoint.load_newest(run_dir)
    if state is None:
        raise HvdImagingError("bench dense: a training left no checkpoint")
    return list(state.weights)
