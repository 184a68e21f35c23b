"""`bench migrate`: the same data and the same configuration on one process and on several ranks, side by side.

What a step to a cluster should show: the training ends sooner, it learns the same, and what it takes of memory, CPU time and energy. All
times are from the runs' own files, so a run on Slurm is measured like one under mpirun.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..config import RunConfig, SplitConfig, check, load
from ..errors import ConfigError, HvdImagingError
from ..monitoring import record
from ..training.events import epoch_records, read_events
from .processes import reason_of
from .report import Figure, Row
from .training import environment, write_volumes

Say = Callable[[str], None]
ALONE, THREADS = "1 process, 1 thread", "1 process, all cores"
EFFICIENCY = 0.9
"""Goal: below it, more than a tenth of what the ranks cost is lost in waiting."""
SHOWN = ("dice", "hd95_mm", "accuracy", "auc")
"""Test figures that have rows; all of them are compared."""
_POLL_S, _LIMIT_S = 2.0, 3600.0


@dataclass(frozen=True)
class Plan:
    """What is compared.

    Attributes:
        config: run.yaml of all runs.
        changes: ``--set`` of all runs.
        ranks: of the run on several.
        exact: equal weights are promised.
        rounds: each run so often, in turn.
        slurm: the ranks are a Slurm job, one on each node.
    """

    config: Path
    changes: tuple[str, ...]
    ranks: int
    exact: bool
    rounds: int
    slurm: bool = False

    @property
    def system(self) -> str:
        """The name of the run on several ranks."""
        return f"{self.ranks} nodes by Slurm" if self.slurm else f"{self.ranks} ranks, 1 thread each"


@dataclass(frozen=True)
class Found:
    """A run, as its files tell it. Times in s.

    Attributes:
        wall: from the command to its end, or the job's.
        start: from the command to the start of training: processes, imports, the queue.
        epochs: of each epoch, without validation.
        rates: samples/s of each epoch.
        peak_bytes: resident memory by rank.
        cpu: CPU seconds of all ranks while they trained.
        watt_hours: of all hosts, idle power included.
        known: how the power is known.
        weights: SHA-256 of the final weights, "" if the run did not say it.
        test: figure -> value and, where there is one, 95% interval on the test split.
    """

    wall: float
    start: float
    epochs: tuple[float, ...]
    rates: tuple[float, ...]
    peak_bytes: tuple[int, ...]
    cpu: float
    watt_hours: float
    known: str
    weights: str
    test: Mapping[str, tuple[float, tuple[float, float] | None]]


def measure(
    config: Path | None = None, ranks: int = 2, quick: bool = False, slurm: bool = False, say: Say = lambda text: None,
    work: Path | None = None,
) -> tuple[list[Row], list[Figure], str]:  # fmt: skip
    """Train and evaluate on one process and on several ranks.

    Args:
        config: run.yaml of one's own; None: a small U-Net on made data.
        work: where runs stay; with ``slurm`` on a filesystem that the nodes share. None: a temporary place.

    Returns:
        Rows, figures, and the command that shows the runs side by side ("" if they are gone).

    Raises:
        ConfigError: fewer than two ranks, more than cores, runs already in ``work``, no ``work`` with ``slurm``.
        HvdImagingError: a command failed.
    """
    cores = len(os.sched_getaffinity(0))
    if ranks < 2:
        raise ConfigError(f"--ranks {ranks}: expected two or more, to be compared with one process")
    if slurm and work is None:
        raise ConfigError("--slurm: give --work DIR on a filesystem that the nodes share")
    if not slurm and ranks > cores:
        raise ConfigError(f"--ranks {ranks}: there are {cores} cores here; take fewer, or --slurm")
    with contextlib.ExitStack() as stack:
        keep = work is not None
        folder = work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hvd_imaging_bench.")))
        folder = folder.resolve()
        if (folder / "runs").exists():
            raise ConfigError(f"{folder / 'runs'}: holds runs already; give another --work, or remove it")
        folder.mkdir(parents=True, exist_ok=True)
        plan = make_plan(config or made(folder, quick, say), ranks, 1 if quick else 2, slurm)
        found: dict[str, list[Found]] = {}
        for turn in range(plan.rounds):
            for name, system, options in _runs(plan, quick, cores, turn):
                say(f"round {turn + 1} of {plan.rounds}: {system}")
                found.setdefault(system, []).append(_run(folder, plan, f"runs/{name}-{turn + 1}", options, system == plan.system))
        rows = [row for system, runs in found.items() for row in rows_of(system, runs)]
        last = f"{folder}/runs/{{}}-{plan.rounds}"
        command = f"hvd-imaging report {last.format('ranks')} --compare {last.format('one')}" if keep else ""
        return rows, figures(found, plan), command


def make_plan(config: Path, ranks: int, rounds: int, slurm: bool) -> Plan:
    """Exact bits where the configuration takes them, else what it says itself.

    Raises:
        ConfigError: the configuration is wrong.
    """
    settings = load(RunConfig, config)
    watched = f"monitor.seconds={min(settings.monitor.seconds or 1.0, 1.0):g}"
    parts = max(settings.train.exact_parts, ranks)
    exact = ("train.reproducible=exact", f"train.exact_parts={parts}", "train.balance=equal")
    if ranks & (ranks - 1) == 0:
        with contextlib.suppress(ConfigError):
            load(RunConfig, config, exact)
            return Plan(config.resolve(), (*exact, watched), ranks, True, rounds, slurm)
    return Plan(config.resolve(), (watched,), ranks, False, rounds, slurm)


def made(folder: Path, quick: bool, say: Say) -> Path:
    """A configuration, and its dataset: made volumes (quick), or synthetic chests through `ingest`."""
    dataset = folder / "dataset"
    if not dataset.exists():
        say("the dataset")
        if quick:
            write_volumes(dataset, 20, SplitConfig(val=0.15, test=0.25))
        else:
            _product(folder, ["phantom", "archive", "--patients", "60", "--seed", "1"])
            _product(folder, [
                "ingest", "archive", "dataset", "--task", "segmentation", "--set", "preprocess.spacing=[5,4,4]", "--set",
                "preprocess.crop=body", "--set", "split.val=0.1", "--set", "split.test=0.25",
            ])  # fmt: skip
    side = 32 if quick else 48
    values = {
        "data": {"dataset": str(dataset), "patch": [side] * 3, "patches_per_volume": 4 if quick else 1, "foreground": 0.8},
        "model": {"name": "unet3d", "filters": 8 if quick else 16, "depth": 3, "norm": "group"},
        "train": {"epochs": 3 if quick else 8, "batch_size": 4, "learning_rate": 3e-3},
        "output": {"tensorboard": False},
    }
    check(RunConfig, values, "bench migrate")
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def _runs(plan: Plan, quick: bool, cores: int, turn: int) -> Sequence[tuple[str, str, tuple[str, ...]]]:
    runs = [
        ("one", ALONE, ("parallel.threads_per_rank=1",)),
        ("ranks", plan.system, ("parallel.threads_per_rank=1",) if not plan.slurm else ()),
    ]
    if not quick:
        # What a workstation does by itself: all cores for one process. Other sums in other orders: its weights may differ.
        runs.append(("threads", THREADS, (f"parallel.threads_per_rank={cores}",)))
    return runs if turn % 2 == 0 else runs[::-1]


def _run(folder: Path, plan: Plan, name: str, options: Sequence[str], many: bool) -> Found:
    """Train and evaluate, then read what the run left."""
    sets = [word for change in (*plan.changes, *options) for word in ("--set", change)]
    words = ["train", str(plan.config), "--run-dir", name, *sets]
    began, clock = time.time(), time.monotonic()
    if many and plan.slurm:
        asked = ["submit", str(plan.config), "--nodes", str(plan.ranks), "--ntasks-per-node", "1", "--run-dir", name, *sets, "--json"]
        _product(folder, asked)
        try:
            _wait(folder, name, clock)
        except BaseException:
            # Nobody waits for the job any more.
            with contextlib.suppress(HvdImagingError):
                _product(folder, ["cancel", name])
            raise
    else:
        _product(folder, ["launch", "-np", str(plan.ranks), "--", *words] if many else words)
    wall = time.monotonic() - clock
    _product(folder, ["evaluate", name, "--no-plots"])
    return read_run(folder / name, began, wall)


def _wait(folder: Path, name: str, began: float) -> None:
    while (state := json.loads(_product(folder, ["status", name, "--json"]))["state"]) != "done":
        if state in ("failed", "stopped"):
            raise HvdImagingError(f"bench migrate: the job has {state}; see `hvd-imaging logs {folder / name}`")
        if time.monotonic() - began > _LIMIT_S:
            raise HvdImagingError(f"bench migrate: the job is still {state} after {_LIMIT_S:g} s; see `hvd-imaging status {folder / name}`")
        time.sleep(_POLL_S)


def read_run(run_dir: Path, began: float, wall: float) -> Found:
    """What a finished run left in its folder; ``began`` is Unix time, s.

    Raises:
        HvdImagingError: it has no events of start and end.
    """
    events = {event.get("event"): event for event in reversed(read_events(run_dir)) if event.get("event") in ("start", "end")}
    if set(events) != {"start", "end"}:
        raise HvdImagingError(f"{run_dir}: the run did not end; see its events.jsonl")
    started = datetime.datetime.fromisoformat(events["start"]["time"]).timestamp()
    epochs, samples = epoch_records(run_dir), record.read(run_dir)
    use = record.summary(samples)
    report = json.loads((run_dir / "evaluation-test.json").read_text(encoding="utf-8"))["mean"]
    return Found(
        wall=wall, start=started - began,
        epochs=tuple(float(epoch["seconds"]) for epoch in epochs), rates=tuple(float(epoch["samples_per_second"]) for epoch in epochs),
        peak_bytes=tuple(rank.peak_bytes for rank in use.ranks),
        cpu=sum(float(sample.get("cpu") or 0) * float(sample.get("seconds") or 0) for sample in samples),
        watt_hours=use.watt_hours, known=use.hosts[0].known if use.hosts else "", weights=str(events["end"].get("weights_sha256", "")),
        test=_figures_of(report),
    )  # fmt: skip


def _figures_of(report: Mapping[str, Any]) -> dict[str, tuple[float, tuple[float, float] | None]]:
    return {
        name: (float(one["value"]), tuple(one["interval"]) if one["interval"] else None)
        for name, one in report.items()
        if isinstance(one, dict) and one.get("value") is not None
    }


def rows_of(system: str, runs: Sequence[Found]) -> list[Row]:
    """All figures of a system; test figures and weights are of its last run; pure."""
    case, last = "same data, same configuration", runs[-1]

    def row(metric: str, unit: str, values: Sequence[float]) -> Row:
        return Row(case, system, metric, unit, tuple(round(value, 4) for value in values))

    rows = [
        row("wall time", "s", [run.wall for run in runs]),
        row("until training begins", "s", [run.start for run in runs]),
        row("epoch", "s", [value for run in runs for value in run.epochs]),
        row("samples/s", "1/s", [value for run in runs for value in run.rates]),
        row("CPU time of all ranks", "s", [run.cpu for run in runs]),
        row(f"energy of all hosts ({last.known or 'not known'})", "Wh", [run.watt_hours for run in runs if run.known]),
    ]
    for rank in range(len(last.peak_bytes)):
        peaks = [run.peak_bytes[rank] / 1e6 for run in runs if rank < len(run.peak_bytes)]
        rows.append(row(f"peak memory, rank {rank}", "MB", peaks))
    for name, (value, interval) in last.test.items():
        if name not in SHOWN:
            continue
        rows.append(row(f"test {name}", "", [value]))
        if interval:
            rows += [row(f"test {name}, 95% {word}", "", [edge]) for word, edge in zip(("from", "to"), interval, strict=True)]
    rows.append(Row(case, system, "weights, SHA-256", "", (), last.weights[:16] or "not told"))
    return rows


def figures(found: Mapping[str, Sequence[Found]], plan: Plan) -> list[Figure]:
    """Gain in time, equal weights, equal figures; pure."""
    one, many = found[ALONE], found[plan.system]

    def median(metric: str, runs: Sequence[Found]) -> float | None:
        return next(row.value for row in rows_of("", runs) if row.metric == metric)

    def gain(metric: str, runs: Sequence[Found]) -> float | None:
        slow, fast = median(metric, runs), median(metric, many)
        return slow / fast if slow and fast else None

    weights = {run.weights for run in (*one, *many)}
    apart = [abs(one[-1].test[name][0] - value) for name, (value, _) in many[-1].test.items() if name in one[-1].test]
    result = [
        Figure(f"epoch time, {ALONE} / {plan.system}", gain("epoch", one), EFFICIENCY * plan.ranks, "higher"),
        Figure("final weights are equal to the bit (1: yes)", float(len(weights) == 1) if plan.exact and "" not in weights else None, 1.0, "higher"),
        Figure("largest difference of a test figure", max(apart, default=None) if plan.exact else None, 0.0, "lower"),
    ]  # fmt: skip
    if plan.rounds > 1:
        result.insert(1, Figure(f"wall time, {ALONE} / {plan.system}", gain("wall time", one), 1.0, "higher"))
    if THREADS in found and not plan.slurm:
        result.append(Figure(f"epoch time, {THREADS} / {plan.system}", gain("epoch", found[THREADS]), 1.0, "higher"))
    return result


def _product(folder: Path, arguments: Sequence[str]) -> str:
    """What `hvd-imaging` prints in ``folder``.

    Raises:
        HvdImagingError: with the line of its own that says most.
    """
    environ = {key: value for key, value in environment().items() if not key.startswith("HVD_IMAGING_")}
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[2]), environ.get("PYTHONPATH")]))
    environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environ.get("PATH", "")])
    command = [sys.executable, "-m", "hvd_imaging.cli.main", *arguments]
    done = subprocess.run(command, cwd=folder, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise HvdImagingError(
            f"bench migrate: `hvd-imaging {arguments[0]}` failed: {reason_of(done.stderr) or f'exit code {done.returncode}'}"
        )
    return done.stdout
