"""`events.jsonl`: what happened in a run, one JSON object a line, only ever appended to."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..texts import parse_json

NAME = "events.jsonl"


class EventLog:
    """Writer of rank 0; on the other ranks ``write`` does nothing.

    Args:
        name: of another file in the run folder: each rank has a log of its own, see `rank_log`.
    """

    def __init__(self, run_dir: Path, active: bool = True, name: str = NAME) -> None:
        self._path = run_dir / name
        self._active = active
        if active and self._path.exists():
            data = self._path.read_bytes()
            if data and not data.endswith(b"\n"):
                # A killed process left half a line: close it, so that the next event starts its own.
                with open(self._path, "ab") as file:
                    file.write(b"\n")

    def write(self, event: str, **values: Any) -> None:
        """Append one event with the time in UTC; on disk when this returns to the operating system."""
        if not self._active:
            return
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"time": now, "event": event, **values}) + "\n")


def rank_log(run_dir: Path, rank: int) -> EventLog:
    """``ranks/log-00000.jsonl``: what this rank alone has to say: its own times, warnings, and how it ended."""
    return EventLog(run_dir, name=f"ranks/log-{rank:05d}.jsonl")


_WHOLE = ("step", "epoch", "world_size", "steps_per_epoch", "last_step", "rank", "restart_count", "attempt")
_NUMBERS = ("seconds", "samples_per_second", "ratio", "loss", "val_loss", "learning_rate")
_TIMES = ("input_seconds", "compute_seconds", "exchange_seconds")
_NEEDED = {"epoch": ("epoch",), "checkpoint": ("step",), "straggler": ("rank",), "ranks": ("hosts", *_TIMES)}


def sound(event: Any) -> bool:
    """Whether a parsed line is an event: with a name, a time that can be read if it has one, and values that its readers can calculate with. Pure."""
    if not (isinstance(event, dict) and isinstance(event.get("event"), str)):
        return False
    try:
        aware = "time" not in event or datetime.datetime.fromisoformat(event["time"]).tzinfo is not None
    except (TypeError, ValueError):
        return False
    of_ranks = event["event"] == "ranks"
    return (
        aware
        and all(event.get(key) is not None for key in _NEEDED.get(event["event"], ()))
        and all(isinstance(event.get(key), int | None) for key in _WHOLE)
        and all(isinstance(event.get(key), int | float | None) for key in (*_NUMBERS, *(() if of_ranks else _TIMES)))
        and isinstance(event.get("hosts"), list | None)
        and (not of_ranks or all(isinstance(event[key], list) and all(isinstance(v, int | float) for v in event[key]) for key in _TIMES))
    )


def read_events(run_dir: str | Path, name: str = NAME) -> list[dict[str, Any]]:
    """All whole events of a run, or of another log of it; half lines of a killed process are left out."""
    events = []
    path = Path(run_dir) / name
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                event = parse_json(line)
            except ValueError:
                continue
            if sound(event):
                events.append(event)
    return events


def epoch_records(run_dir: str | Path) -> list[dict[str, Any]]:
    """The last record of each epoch in order: a resumed run repeats the epoch that it was killed in."""
    return last_records(read_events(run_dir))


def last_records(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """`epoch_records` of events that were read already; pure."""
    records = {event["epoch"]: event for event in events if event["event"] == "epoch"}
    return [records[epoch] for epoch in sorted(records)]
