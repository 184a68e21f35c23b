"""`bench predict`: the model of a step (planning/scaling.py) against steps on 2 to 4 ranks, over a link of 1 Gbit/s and in one machine.

What goes in is measured on processes that do not talk, one on each of two cores (two batch sizes: time of a sample, and what no rank
shortens), and by summing arrays of four sizes over two ranks (latency and rate of each link). What comes out is compared with the training itself.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import HvdImagingError
from ..planning.scaling import Job, Link, fit_link, step_seconds
from .report import Figure, Row
from .slow_link import slow_link, why_not
from .training import Workshop, alone, launch, parse, ranks, slowest, workshop

GOAL = 0.15
BATCH, SMALL = 4, 2
LINK, LOCAL = "1 Gbit/s", "one machine"


@dataclass(frozen=True)
class Case:
    """A network, ranks, and what joins them.

    Attributes:
        task: of the workshop: volumes (U-Net), images (VGG16 with its dense head).
        place: LINK or LOCAL.
    """

    task: str
    ranks: int
    place: str

    @property
    def name(self) -> str:
        """For the table."""
        return f"{'3D U-Net, 48^3' if self.task == 'volumes' else 'VGG16 dense head, 64^2'}, {self.ranks} ranks, {self.place}"


def cases(quick: bool) -> list[Case]:
    """What is compared; ``quick``: the U-Net on two ranks."""
    if quick:
        return [Case("volumes", 2, LOCAL), Case("volumes", 2, LINK)]
    found = [Case(task, 2, place) for task in ("volumes", "images") for place in (LOCAL, LINK)]
    return found + [Case("volumes", count, LOCAL) for count in (3, 4)]


def measure(quick: bool = False, on_run: Callable[[str], None] | None = None) -> tuple[list[Row], list[Figure]]:
    """Measure the parts, predict, measure the whole.

    Raises:
        HvdImagingError: a process failed, or there are fewer than two cores.
    """
    cores = len(os.sched_getaffinity(0))
    if cores < 2:
        raise HvdImagingError("bench predict: wants two cores at least")
    steps, rounds, repeats = (4, 1, 5) if quick else (12, 2, 15)
    wanted, reason = cases(quick), why_not()
    say = on_run or (lambda text: None)
    with workshop(volumes=12, images=32) as place:
        parts: dict[tuple[str, int], list[float]] = {}
        whole: dict[Case, list[float]] = {case: [] for case in wanted}
        points: dict[str, list[tuple[float, float]]] = {LOCAL: [], LINK: []}
        for turn in range(rounds):
            say(f"round {turn + 1} of {rounds}: links")
            worker = [sys.executable, "-m", "hvd_imaging.bench.link_worker", str(repeats)]
            points[LOCAL] += _points(ranks(worker, 2))
            if reason is None:
                with slow_link(1000) as cable:
                    points[LINK] += _points(parse(launch(cable.mpirun(worker), 600)))
            for task in dict.fromkeys(case.task for case in wanted):
                for batch in (SMALL, BATCH):
                    say(f"round {turn + 1} of {rounds}: {task}, batch {batch}, two processes that do not talk")
                    # Two side by side: neighbours share the memory's bandwidth, and a step of one alone knows nothing of that.
                    found = slowest(alone([_worker(place, f"{task}{batch}{at}", task, batch, steps) for at in "ab"]))
                    parts.setdefault((task, batch), []).append(statistics.median(found["steps"]))
            for case in wanted:
                say(f"round {turn + 1} of {rounds}: {case.name}")
                words = _worker(place, "whole", case.task, BATCH, steps)
                if case.place == LOCAL:
                    # More ranks than cores are not bound: they share all of them.
                    found = ranks(words, case.ranks) if case.ranks <= cores else _unbound(words, case.ranks)
                elif reason is None:
                    with slow_link(1000) as cable:
                        found = parse(launch(cable.mpirun(words), 600))
                else:
                    continue
                whole[case].append(statistics.median(found["steps"]))
        sizes = {task: _bytes(place, task) for task in dict.fromkeys(case.task for case in wanted)}
    links = {name: fit_link(found, 2) for name, found in points.items() if found}
    jobs = {task: job_of(statistics.median(parts[task, SMALL]), statistics.median(parts[task, BATCH]), sizes[task]) for task in sizes}
    rows, errors = [], {}
    for case in wanted:
        predicted = predict(case, jobs[case.task], links, cores)
        measured = tuple(round(1e3 * value, 1) for value in whole[case])
        rows.append(Row(case.name, "measured", "step time", "ms", measured, "" if measured else reason or ""))
        rows.append(Row(case.name, "predicted", "step time", "ms", () if predicted is None else (round(1e3 * predicted, 1),), reason or ""))
        if predicted is not None and measured:
            errors[case] = abs(predicted - statistics.median(whole[case])) / statistics.median(whole[case])
    for name, link in links.items():
        rows.append(Row(name, "link", "latency", "us", (round(1e6 * link.latency_s, 1),)))
        rows.append(Row(name, "link", "rate", "MB/s", (round(link.bytes_per_s / 1e6, 1),)))
    return rows, figures(errors)


def job_of(small_s: float, large_s: float, count: float) -> Job:
    """From the steps of two batch sizes on one rank: time of a sample, and the rest; pure."""
    sample = max((large_s - small_s) / (BATCH - SMALL), 0.0)
    return Job(sample_s=sample, samples=BATCH, message_bytes=count, fixed_s=max(large_s - BATCH * sample, 0.0))


def predict(case: Case, job: Job, links: Mapping[str, Link], cores: int) -> float | None:
    """s of a step; None without the link. Ranks that share cores compute by turns; pure."""
    if case.place not in links:
        return None
    inside = links[LOCAL]
    per_node = case.ranks if case.place == LOCAL else 1
    slowdown = max(case.ranks / cores, 1.0)
    return step_seconds(job, case.ranks, per_node, links[case.place], inside, "ring", slowdown) + job.fixed_s * (slowdown - 1)


def figures(errors: Mapping[Case, float]) -> list[Figure]:
    """The largest error, on all ranks and on two; pure."""
    two = [error for case, error in errors.items() if case.ranks == 2]
    return [
        Figure("largest error of a predicted step, 2 ranks", max(two, default=None), GOAL, "lower"),
        Figure("largest error of a predicted step, 2 to 4 ranks", max(errors.values(), default=None), GOAL, "lower"),
    ]  # fmt: skip


def _points(found: Mapping[str, Sequence[Sequence[float]]]) -> list[tuple[float, float]]:
    return [(float(count), float(seconds)) for count, seconds in found["points"]]


def _worker(place: Workshop, name: str, task: str, batch: int, steps: int) -> list[str]:
    config = place.config(name, task, steps, train__batch_size=batch, monitor__seconds=0)
    return place.worker(config, name)


def _unbound(words: Sequence[str], count: int) -> Mapping[str, Sequence[float]]:
    from .slow_link import mpirun_path

    return parse(launch([str(mpirun_path()), "-np", str(count), "--bind-to", "none", "--oversubscribe", *words], 600))


def _bytes(place: Workshop, task: str) -> float:
    from ..config import RunConfig, load
    from ..planning.memory import parameters

    return 4.0 * parameters(load(RunConfig, place.config("size", task, 1)), 1, 2)
