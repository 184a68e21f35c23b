"""What run folders hold, read for a page. What is missing or damaged is named, and is no reason to show nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..cluster.slurm import Job
from ..cluster.status import Status, look, recent_events, summarize
from ..errors import RunError, masked
from ..monitoring.record import read
from ..texts import read_json, read_yaml
from ..training.events import last_records, read_events
from ..training.heartbeat import read_beats
from ..training.layout import CONFIG, RECORD

_CARD = "model_card.json"
_PICTURES = ("overlays", "confusion", "roc")


@dataclass(frozen=True)
class RunFiles:
    """What a run folder holds; what is missing or damaged is empty, and named in ``missing``."""

    directory: Path
    status: Status
    config: Mapping[str, Any]
    record: Mapping[str, Any]
    events: Sequence[Mapping[str, Any]]
    epochs: Sequence[Mapping[str, Any]]
    samples: Sequence[Mapping[str, Any]]
    evaluations: Mapping[str, Mapping[str, Any]]
    pictures: Sequence[Path]
    card: Mapping[str, Any] | None
    missing: Sequence[str]


def gather(run_dir: Path, card: Path | None = None, jobs: Mapping[str, Job] | None = None) -> RunFiles:
    """Read a run folder.

    Args:
        card: folder of `hvd-imaging compress`, or its model_card.json; None: looked for in the run folder.
        jobs: what Slurm knows; None: not asked.

    Raises:
        RunError: not a run folder; ``card`` holds none.
    """
    missing: list[str] = []
    try:
        status = look(run_dir, jobs)
    except RunError:
        if not (run_dir / CONFIG).is_file():
            raise
        missing.append("slurm/submit.json: damaged")
        status = summarize(str(run_dir), recent_events(run_dir), read_beats(run_dir), [], None, None, time.time())

    def parsed(path: Path, kind: Callable[[Path], Any] = read_json) -> Mapping[str, Any]:
        name = path.relative_to(run_dir) if path.is_relative_to(run_dir) else path
        try:
            value = kind(path)
        except FileNotFoundError:
            missing.append(f"{name}: not there")
        except (OSError, ValueError):
            missing.append(f"{name}: damaged")
        else:
            if isinstance(value, dict):
                return masked(value)
            missing.append(f"{name}: damaged")
        return {}

    config, record = parsed(run_dir / CONFIG, read_yaml), parsed(run_dir / RECORD)
    evaluations = {path.stem.removeprefix("evaluation-"): parsed(path) for path in sorted(run_dir.glob("evaluation-*.json"))}
    events, samples = read_events(run_dir), read(run_dir)
    if not events:
        missing.append("events.jsonl: not there, so nothing is known of the training")
    if not samples:
        missing.append("ranks/monitor-*.jsonl: not there, so nothing is known of the machines (monitor.seconds=0?)")
    if not evaluations:
        missing.append(f"evaluation-*.json: not there; `hvd-imaging evaluate {run_dir}` makes it")
    pictures = [path for kind in _PICTURES for path in sorted((run_dir / "plots").glob(f"{kind}*.png"))]
    found = _card(run_dir, card)
    return RunFiles(
        run_dir, status, config, record, events, last_records(events), samples, evaluations, pictures,
        parsed(found) if found else None, missing,
    )  # fmt: skip


def _card(run_dir: Path, given: Path | None) -> Path | None:
    if given is None:
        return next((path for path in (run_dir / "compressed" / _CARD, run_dir / _CARD) if path.is_file()), None)
    path = given / _CARD if given.is_dir() else given
    if not path.is_file():
        raise RunError(f"--card {given}: no {_CARD} there; `hvd-imaging compress {run_dir} --recipe recipe.yaml --out DIR` makes one")
    return path


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; pure."""
    if not isinstance(values, dict):
        return {prefix: values}
    return {key: value for name, inner in values.items() for key, value in flat(inner, f"{prefix}.{name}" if prefix else str(name)).items()}


def read_scaling(path: Path) -> dict[str, Any]:
    """JSON of a benchmark.

    Raises:
        RunError: not one.
    """
    try:
        value = read_json(path)
    except (OSError, ValueError):
        value = None
    if not isinstance(value, dict) or not isinstance(value.get("rows"), list):
        raise RunError(f"{path}: expected the JSON file of `hvd-imaging bench scaling --json FILE`")
    return value
