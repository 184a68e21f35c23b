"""From a configuration to jobs in the queue: scripts are written into the run folder, judged, and handed to sbatch."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import RunConfig, load
from ..errors import ConfigError, DatasetError, RunError
from ..files import write_json, write_text
from ..planning.memory import rank_bytes
from ..shards import manifest as manifests
from ..texts import TextError, read_json, read_yaml
from . import slurm
from .judge import Finding, Need, judge
from .render import FOLDER, Array, Script, Wish, chain_script
from .request import Request
from .status import SUBMITTED, recent_events, submissions


def read_array(path: Path, run_dir: Path, config: Path, at_once: int = 0) -> Array:
    """Hyper-parameters of a file: a list of rows ``{key: value}``, or ``{key: [values]}`` for every combination.

    Raises:
        ConfigError: neither, or a row that the configuration does not take.
    """
    try:
        values = read_yaml(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML ({error if isinstance(error, TextError) else type(error).__name__})") from None
    if isinstance(values, dict) and values and all(isinstance(value, list) and value for value in values.values()):
        rows = [dict(zip(values, row, strict=True)) for row in itertools.product(*values.values())]
    elif isinstance(values, list) and values and all(isinstance(row, dict) and row for row in values):
        rows = values
    else:
        raise ConfigError(
            f"{path}: expected a list of rows such as '- train.learning_rate: 0.01', or lists of values for keys such as "
            "'train.learning_rate: [0.1, 0.01]'"
        )
    found = []
    for index, row in enumerate(rows):
        words = [word for key, value in row.items() for word in ("--set", f"{key}={json.dumps(value)}")]
        load(RunConfig, config, words[1::2])  # every row is judged before anything is queued
        found.append(("--run-dir", f"{run_dir}/{index:03d}", *words))
    return Array(path.name, tuple(found), at_once)


def needs(step: str, config: RunConfig, request: Request, run_dir: Path) -> Need:
    """What is known of a step before it runs; an estimate that cannot be made is left out."""
    if step != "train":
        return Need(gpu=step != "ingest")
    memory = None
    try:
        manifest = manifests.load(config.data.dataset)
        memory = rank_bytes(config, manifest.channels, max(len(manifest.classes), 1), request.ranks).total
    except (DatasetError, ConfigError):
        pass  # the dataset comes with this chain, or the network is one of the user's own
    return Need(memory, config.train.batch_size, checkpoint_seconds(config, run_dir))


def checkpoint_seconds(config: RunConfig, run_dir: Path) -> float | None:
    """s between checkpoints: as configured by the clock, or from the pace of the run's earlier epochs; None unknown."""
    train = config.train
    known = [60 * train.checkpoint_minutes] if train.checkpoint_minutes else []
    events = recent_events(run_dir)
    epochs = [event["seconds"] for event in events if event.get("event") == "epoch" and event.get("seconds")]
    steps = [event["steps_per_epoch"] for event in events if event.get("steps_per_epoch")]
    if epochs:
        known.append(epochs[-1] * train.checkpoint_epochs)
        if train.checkpoint_steps and steps:
            known.append(epochs[-1] / steps[-1] * train.checkpoint_steps)
    return min(known, default=None)


def findings(scripts: Sequence[Script], config: RunConfig, run_dir: Path) -> list[Finding]:
    """What speaks against the jobs, as Slurm stands now.

    Raises:
        SetupError: no Slurm here.
    """
    partitions, nodes = slurm.partitions(), slurm.nodes()
    return [
        finding
        for script in scripts
        for finding in judge(script.step, script.request, needs(script.step, config, script.request, run_dir), partitions, nodes)
    ]


def refuse_second(run_dir: Path) -> None:
    """Two trainings in one folder would overwrite each other.

    Raises:
        RunError: a job of this run is queued or running.
    """
    before = submissions(run_dir)
    if not before:
        return
    alive = [job for job in slurm.jobs([str(row["id"]) for row in before]).values() if job.state not in slurm.ENDED]
    if alive:
        raise RunError(
            f"{run_dir}: job {alive[0].id} of this run is {alive[0].state} still; wait for it, end it (hvd-imaging cancel {run_dir}), or "
            "choose another --run-dir"
        )


def write_scripts(scripts: Sequence[Script], wish: Wish, config: Path, folders: Sequence[Path] = ()) -> dict[str, Path]:
    """The scripts, a copy of the configuration, and the chain as one shell script, in the run folder; step -> script."""
    folder = wish.folder / wish.run_dir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    if (wish.folder / config).resolve() != (wish.folder / wish.config).resolve():
        # The job reads a copy: what is changed in the file while it waits is for the next job.
        shutil.copyfile(config, wish.folder / wish.config)
    files = {}
    for script in scripts:
        files[script.step] = folder / f"{script.step}.sbatch"
        write_text(files[script.step], script.text)
    if len(scripts) > 1:
        write_text(folder / "chain.sh", chain_script(scripts, files, folders))
    return files


def submit(scripts: Sequence[Script], files: Mapping[str, Path], run_dir: Path, words: Sequence[str], now: str) -> list[dict[str, Any]]:
    """Queue the jobs, each after the one before; what was queued is recorded even if a later one is refused.

    Args:
        words: the command line, for the record.
        now: ISO 8601.

    Raises:
        RunError: sbatch refuses one.
    """
    path = run_dir / FOLDER / SUBMITTED
    before = read_json(path)["submissions"] if path.is_file() else []
    jobs: list[dict[str, Any]] = []
    try:
        for script in scripts:
            after = next((job["id"] for job in jobs if job["step"] == script.after), None)
            id = slurm.submit(files[script.step], after)
            jobs.append({"step": script.step, "id": id, "after": after, "script": str(files[script.step]),
                         "request": script.request.model_dump(mode="json", exclude_unset=True)})  # fmt: skip
    finally:
        if jobs:
            write_json(path, {"submissions": [*before, {"time": now, "words": list(words), "jobs": jobs}]})
    return jobs
