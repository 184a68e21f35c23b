"""`bench spatial`: one volume on 1, 2 and 4 ranks: time of a step, memory and traffic of a rank, and a limit that only the split one keeps."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping

from ..errors import HvdImagingError
from . import memory_limit
from .report import Figure, Row, ratio
from .slow_link import mpirun_path
from .training import Times, alone, launch, parse

Say = Callable[[str], None]
LARGE, MIDDLE, SIDE, SMALL = 192, 160, 128, 48
LIMIT, AGAIN = "under a limit between the two", "train.recompute"


def measure(quick: bool = False, on_run: Say | None = None) -> tuple[list[Row], list[Figure]]:
    """Train on made volumes of ``SIDE``^3, ``MIDDLE``^3 and ``LARGE``^3 (quick: ``SMALL``^3).

    Raises:
        HvdImagingError: a process failed that should not, or there are fewer than two cores.
    """
    if len(os.sched_getaffinity(0)) < 2:
        raise HvdImagingError("bench spatial: wants two cores at least")
    say = on_run or (lambda text: None)
    sides, rounds, steps = ([SMALL], 1, 3) if quick else ([SIDE, MIDDLE, LARGE], 1, 3)
    found: dict[tuple[int, int], list[Times]] = {}
    again: dict[int, list[Times]] = {}
    for turn in range(rounds):
        for side in sides:
            for count in (1, 2, 4):
                if quick and count == 4:
                    continue
                say(f"round {turn + 1} of {rounds}: {side}^3 on {count} rank{'s' * (count > 1)}")
                found.setdefault((side, count), []).append(run(side, count, steps))
            say(f"round {turn + 1} of {rounds}: {side}^3 on 1 rank, {AGAIN}")
            again.setdefault(side, []).append(run(side, 1, steps, again=True))
    rows = rows_of({(name(side), system_of(count)): runs for (side, count), runs in found.items()})
    rows += rows_of({(name(side), f"1 rank, {AGAIN}"): runs for side, runs in again.items()})
    # The limit: half-way between what one rank and what each of two holds.
    whole, split = (max(times["peak"] for times in found[sides[0], count]) for count in (1, 2))
    for count in (1, 2):
        say(f"{sides[0]}^3 on {count} rank{'s' * (count > 1)}, {LIMIT}")
        rows.append(limited(sides[0], count, (whole + split) // 2))
    return rows, figures({(row.case, row.system, row.metric): row for row in rows}, sides)


def run(side: int, count: int, steps: int, limit: int | None = None, again: bool = False) -> Times:
    """Steps of one volume of ``side``^3 shared by ``count`` ranks of one core each; more ranks than cores take turns."""
    words = [sys.executable, "-m", "hvd_imaging.bench.spatial_worker", *map(str, (side, count, steps, int(again), *([limit] if limit else [])))]
    if count == 1:
        return alone([words], 1200)[0]
    program = mpirun_path()
    if program is None:
        raise HvdImagingError("bench: no mpirun on PATH; activate the environment of scripts/setup_env.sh")
    place = ["--bind-to", "core"] if count <= len(os.sched_getaffinity(0)) else ["--bind-to", "none", "--oversubscribe"]
    return parse(launch([program, "-np", str(count), *place, *words], 1200))


def limited(side: int, count: int, limit: int) -> Row:
    """Two steps where each rank may hold ``limit`` bytes: how many it did before the kernel killed it."""
    case, system, metric = name(side), system_of(count), f"steps with {limit / 1e9:.2f} GB a rank"
    reason = memory_limit.why_not()
    if reason is not None:
        return Row(case, system, metric, "", (), reason)
    try:
        return Row(case, system, metric, "", (1.0 + len(run(side, count, 1, limit)["steps"]),))
    except HvdImagingError as error:
        if "exit code -9" not in str(error) and "signal 9" not in str(error):
            raise
        return Row(case, system, metric, "", (0.0,))
    finally:
        memory_limit.sweep()


def name(side: int) -> str:
    """Of a case."""
    return f"3D U-Net, {side}^3, batch 1"


def system_of(count: int) -> str:
    """Of a row."""
    return "1 rank" if count == 1 else f"{count} ranks to a volume"


def rows_of(found: Mapping[tuple[str, str], list[Times]]) -> list[Row]:
    """Medians, and the rank with the most, of each case and system; pure."""
    rows = []
    for of, runs in found.items():
        # Ranks that take turns on a core tell of memory, not of time.
        if of[1] != system_of(4):
            rows.append(Row(*of, "step time", "s", tuple(round(step, 3) for times in runs for step in times["steps"])))
        rows.append(Row(*of, "peak memory a rank", "GB", tuple(round(times["peak"] / 1e9, 3) for times in runs)))
        if runs[0]["calls"]:
            rows.append(Row(*of, "sent a step and rank", "MB", tuple(round(times["sent"] / 1e6, 2) for times in runs)))
            rows.append(Row(*of, "exchanges a step", "", tuple(float(times["calls"]) for times in runs)))
        rows.append(Row(*of, "loss after the steps", "", tuple(round(times["loss"], 6) for times in runs)))
    return rows


def figures(rows: Mapping[tuple[str, str, str], Row], sides: list[int]) -> list[Figure]:
    """Ratios to the unsplit step; pure."""

    def of(side: int, count: int, metric: str) -> float | None:
        try:
            return ratio(rows[name(side), system_of(count), metric], rows[name(side), system_of(1), metric])
        except KeyError:
            return None

    steps = [row for (_, _, metric), row in rows.items() if metric.startswith("steps with")]
    whole, split = (next((row.value for row in steps if row.system == system_of(count)), None) for count in (1, 2))
    return [
        *(Figure(f"step time, {side}^3, 2 ranks / 1 rank", of(side, 2, "step time"), 0.7, "lower") for side in sides),
        *(
            Figure(f"peak memory a rank, {side}^3, {count} ranks / 1 rank", of(side, count, "peak memory a rank"), goal, "lower")
            for side in sides[-2:] for count, goal in ((2, 0.6), (4, 0.35))
        ),
        Figure("steps under the limit: 2 ranks", split, 2, "higher"),
        Figure("steps under the limit: 1 rank", whole, 0, "lower"),
    ]
