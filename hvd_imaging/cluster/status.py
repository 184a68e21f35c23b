"""How a run stands: from its own events and signs of life, and from what Slurm says of its jobs. Without Slurm the former alone.

`look` reads, `judge_state` and `summarize` are pure.
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..config import RunConfig, load
from ..errors import TRY_AGAIN, ConfigError, RunError
from ..texts import parse_json, read_json
from ..training.events import NAME as EVENTS
from ..training.events import sound
from ..training.heartbeat import Beat, read_beats
from ..training.layout import CONFIG, RECORD
from .render import FOLDER
from .slurm import ENDED, Job

SUBMITTED = "submit.json"
_MARKS = ("start", "resume", "end", "leave", "stall", "launch", "restart", "failure", "verdict")
_KINDS = (*_MARKS, "epoch", "straggler", "nonfinite", "checkpoint")
_SILENT_S = 30.0


@dataclass(frozen=True)
class Status:
    """What `hvd-imaging status` shows; ``None`` where nothing is known.

    Attributes:
        state: waiting, running, saving, stalled, silent, stopped, failed, done, new.
        why: in a sentence, "" if the state says it all.
        jobs: of Slurm, as dicts with their step.
        epoch, epochs: begun (from 1) of all.
        step, steps: done of all.
        ranks, hosts: of the newest start.
        metrics: the newest epoch's.
        samples_per_second: of the newest epoch.
        left_s: s to the end, at the newest epochs' pace.
        starts: how often ranks were started.
        stragglers: sentences on ranks slower than the others.
        checkpoint: step of the newest.
    """

    run_dir: str
    state: str
    why: str = ""
    jobs: tuple[dict[str, Any], ...] = ()
    epoch: int | None = None
    epochs: int | None = None
    step: int | None = None
    steps: int | None = None
    ranks: int | None = None
    hosts: tuple[str, ...] = ()
    metrics: dict[str, float] = field(default_factory=dict)
    samples_per_second: float | None = None
    left_s: float | None = None
    starts: int = 0
    stragglers: tuple[str, ...] = ()
    checkpoint: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def look(run_dir: Path, jobs: Mapping[str, Job] | None = None, now: float | None = None) -> Status:
    """The state of a run folder.

    Raises:
        RunError: neither a run nor one that was submitted.
    """
    if not (run_dir / CONFIG).is_file() and not (run_dir / FOLDER / SUBMITTED).is_file():
        raise RunError(
            f"{run_dir}: not a run folder (no {CONFIG}, no {FOLDER}/{SUBMITTED}); `hvd-imaging submit run.yaml` or `train` makes one"
        )
    try:
        config = load(RunConfig, run_dir / CONFIG) if (run_dir / CONFIG).is_file() else None
    except ConfigError:
        config = None
    return summarize(
        str(run_dir), recent_events(run_dir), read_beats(run_dir), submissions(run_dir), jobs, config, time.time() if now is None else now
    )


RUNS, DEPTH = "runs", 3
"""Where runs lie unless the configuration says otherwise, and how many levels below are looked at."""


def runs_below(folder: Path) -> list[Path]:
    """``folder`` if it is a run, and the runs at most `DEPTH` levels below ``folder/runs``, sorted; what lies in a run is its own."""

    def is_run(place: Path) -> bool:
        # A run.yaml alone may be what `init` wrote.
        return ((place / CONFIG).is_file() and (place / RECORD).is_file()) or (place / FOLDER / SUBMITTED).is_file()

    def below(place: Path, depth: int) -> list[Path]:
        if is_run(place):
            return [place]
        try:
            inside = sorted(entry for entry in place.iterdir() if entry.is_dir()) if depth else []
        except OSError:
            return []
        return [run for entry in inside for run in below(entry, depth - 1)]

    own = [folder] if is_run(folder) else []
    return own + (below(folder / RUNS, DEPTH) if (folder / RUNS).is_dir() else [])


def submissions(run_dir: Path) -> list[dict[str, Any]]:
    """Jobs of the newest submission, in the chain's order; empty without one."""
    path = run_dir / FOLDER / SUBMITTED
    try:
        return list(read_json(path)["submissions"][-1]["jobs"])
    except FileNotFoundError:
        return []
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise RunError(f"{path}: damaged; remove it, and ask squeue for the jobs") from error


def recent_events(run_dir: Path, epochs: int = 5) -> list[dict[str, Any]]:
    """All events of the kinds that matter here, of the numerous ones the newest few only: a long run has 100,000.

    A line is parsed only if it is wanted; half lines of a killed process are left out.
    """
    try:
        lines = (run_dir / EVENTS).read_bytes().splitlines()
    except OSError:
        return []
    many = {b'"epoch"': epochs, b'"checkpoint"': 1, b'"straggler"': 20, b'"nonfinite"': 5}
    markers = [json.dumps(kind).encode() for kind in _KINDS]
    found = []
    for line in reversed(lines):
        head = line[:120]
        kind = next((marker for marker in markers if b'"event": ' + marker in head), None)
        if kind is None:
            continue
        if kind in many:
            if not many[kind]:
                continue
            many[kind] -= 1
        try:
            event = parse_json(line)
        except ValueError:
            continue
        if sound(event) and "time" in event:
            found.append(event)
    return found[::-1]


def summarize(
    run_dir: str, events: Sequence[Mapping[str, Any]], beats: Sequence[Beat], submitted: Sequence[Mapping[str, Any]],
    jobs: Mapping[str, Job] | None, config: RunConfig | None, now: float,
) -> Status:  # fmt: skip
    """All figures of a status; pure.

    Args:
        jobs: what Slurm knows, by number; None: not asked.
        now: Unix time, s.
    """
    begins = [event for event in events if event["event"] in ("start", "resume")]
    newest = begins[-1] if begins else {}
    epochs = [event for event in events if event["event"] == "epoch"]
    last = epochs[-1] if epochs else {}
    # Beats of ranks that this start does not have are of an earlier, larger world.
    size = newest.get("world_size")
    alive = [beat for beat in beats if size is None or beat.rank < size]
    per_epoch = newest.get("steps_per_epoch")
    total = newest.get("last_step")
    step = max([beat.step for beat in alive if beat.reached is not None] + [int(last.get("step") or 0)], default=None) if newest else None
    state, why = judge_state(events, alive, now)
    rows = tuple(_job_row(entry, jobs) for entry in submitted)
    if jobs is not None and rows:
        state, why = with_slurm(state, why, rows)
    left = None
    if state in ("running", "saving") and epochs and total and per_epoch and step is not None:
        pace = [event["seconds"] / max(per_epoch, 1) for event in epochs[-3:] if event.get("seconds")]
        left = max(total - step, 0) * sum(pace) / len(pace) if pace else None
    epoch = None
    if step is not None and per_epoch:
        # The one that is begun; at the end the last one.
        epoch = -(-step // per_epoch) if total is not None and step >= total else step // per_epoch + 1
    names = ("loss", "accuracy", "val_loss", "val_dice", "val_accuracy")
    checkpoints = [event["step"] for event in events if event["event"] == "checkpoint"]
    since = newest.get("time", "")
    return Status(
        run_dir=run_dir, state=state, why=why, jobs=rows, epoch=epoch, epochs=config.train.epochs if config else None, step=step,
        steps=total, ranks=size, hosts=tuple(newest.get("hosts") or sorted({beat.host for beat in alive})),
        metrics={name: float(last[name]) for name in names if isinstance(last.get(name), int | float)},
        samples_per_second=last.get("samples_per_second"), left_s=left, starts=len(begins),
        stragglers=tuple(_straggler(event) for event in _newest_by_rank(events, since)), checkpoint=checkpoints[-1] if checkpoints else None,
    )  # fmt: skip


def judge_state(events: Sequence[Mapping[str, Any]], beats: Sequence[Beat], now: float) -> tuple[str, str]:
    """(state, why) from the run's own traces; pure."""
    last = next((event for event in reversed(events) if event["event"] in _MARKS), None)
    if last is None:
        return "new", "no rank has begun yet"
    kind, code = last["event"], last.get("code")
    if kind in ("launch", "restart"):
        return "starting", f"{last.get('np', '?')} ranks" + (f", start {last['attempt']}" if (last.get("attempt") or 1) > 1 else "")
    if kind == "end" or (kind == "verdict" and code == 0):
        return "done", "stopped early: no gain any more" if last.get("stopped_early") else ""
    if kind == "leave" or (kind == "verdict" and code == TRY_AGAIN):
        return "stopped", f"asked to leave at step {last.get('step')}; it goes on with --resume"
    began = datetime.datetime.fromisoformat(last["time"]).timestamp()
    current = [beat for beat in beats if beat.alive >= began - 60]
    silent = [beat for beat in current if now - beat.alive > _SILENT_S]
    if kind == "stall":
        return "failed", str(last.get("message", "a rank stood still"))
    if kind in ("verdict", "failure"):
        return "failed", str(last.get("reason") or "a rank has failed")
    if current and len(silent) == len(current):
        return "silent", f"no sign of life for {now - max(beat.alive for beat in current):.0f} s: killed, or its node is gone"
    if silent:
        names = ", ".join(f"rank {beat.rank} on {beat.host}" for beat in silent)
        return "stalled", f"{names}: no sign of life for {now - max(beat.alive for beat in silent):.0f} s"
    behind = [beat for beat in current if beat.seq < max(other.seq for other in current) and now - beat.since > _SILENT_S]
    if behind:
        names = ", ".join(f"rank {beat.rank} on {beat.host} in '{beat.event}' of step {beat.step}" for beat in behind)
        return "stalled", f"{names} for {now - min(beat.since for beat in behind):.0f} s, the others wait"
    return ("saving", "") if any(beat.event == "save" for beat in current) else ("running", "")


def with_slurm(state: str, why: str, rows: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Slurm knows better whether a job waits or has ended; the run knows better what it does meanwhile. Pure."""
    waiting = [row for row in rows if row["state"] in ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED")]
    running = [row for row in rows if row["state"] in ("RUNNING", "COMPLETING", "STOPPED", "SIGNALING", "STAGE_OUT")]
    failed = [row for row in rows if row["state"] in ENDED and row["state"] != "COMPLETED"]
    if rows and state == "new" and all(row["state"] == "COMPLETED" for row in rows):
        return "done", "all tasks have ended well; each is a run of its own below this folder" if any(row.get("tasks") for row in rows) else ""
    if running:
        steps = ", ".join(f"{row['step']} job {row['id']}" for row in running)
        if all(row["state"] == "COMPLETING" for row in running):
            return "ending", f"{steps}: Slurm clears up"
        if state == "done":
            return "ending", steps
        return ("starting", steps) if state in ("new", "stopped", "silent", "failed") else (state, why)
    if failed:
        row = failed[0]
        code = f", exit code {row['code']}" if row.get("code") else ""
        return ("stopped" if row["state"] == "CANCELLED" or row.get("code") == TRY_AGAIN else "failed"), (
            f"{row['step']} job {row['id']}: {row['state']}{code}" + (f"; {why}" if why and state in ("failed", "stopped") else "")
        )
    if waiting:
        row = waiting[0]
        again = f", queued again after {row['restarts']} start{'s' * (row['restarts'] != 1)}" if row.get("restarts") else ""
        return "waiting", f"{row['step']} job {row['id']}: {row['reason'] or row['state']}{again}" + (
            f", expected at {row['start']}" if row.get("start") else ""
        )
    return state, why


def _job_row(entry: Mapping[str, Any], jobs: Mapping[str, Job] | None) -> dict[str, Any]:
    id = str(entry["id"])
    row: dict[str, Any] = {"step": entry["step"], "id": id, "state": "UNKNOWN", "reason": "", "nodes": "", "left_s": None, "restarts": 0,
                           "start": "", "code": None, "tasks": {}}  # fmt: skip
    mine = [job for key, job in (jobs or {}).items() if key.split("_")[0] == id]
    if not mine:
        return row
    # Of an array the task that needs attention first speaks for all.
    order = ("FAILED", "NODE_FAIL", "TIMEOUT", "OUT_OF_MEMORY", "RUNNING", "COMPLETING", "PENDING")
    first = min(mine, key=lambda job: order.index(job.state) if job.state in order else len(order))
    row |= {"state": first.state, "reason": first.reason, "nodes": first.nodes, "left_s": first.left_s, "restarts": first.restarts,
            "start": first.start, "code": first.code}  # fmt: skip
    if len(mine) > 1:
        counts: dict[str, int] = {}
        for job in mine:
            counts[job.state] = counts.get(job.state, 0) + 1
        row["tasks"] = counts
    return row


def _newest_by_rank(events: Sequence[Mapping[str, Any]], since: str) -> list[Mapping[str, Any]]:
    found = {event.get("rank"): event for event in events if event["event"] == "straggler" and event.get("time", "") >= since}
    return [found[rank] for rank in sorted(found, key=str)]


def _straggler(event: Mapping[str, Any]) -> str:
    return f"rank {event.get('rank')} on {event.get('host')}: {float(event.get('ratio', 0)):.1f} x the others' time at step {event.get('step')}"
