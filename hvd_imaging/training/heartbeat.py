"""Signs of life of each rank, and the watchdog that ends a run whose ranks wait for one that does not come.

Every rank keeps ``RUN_DIR/ranks/rank-00000.json`` (on the filesystem that all see)::

    {"rank", "host", "pid", "event", "step", "seq", "since", "alive", "saving"}

``event`` is what the main thread does since ``since`` (s, Unix time); ``alive`` is the time of writing.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..texts import read_json
from ..world import World, host_name

FOLDER = "ranks"
WAITING = ("step", "agree", "validation sums")
"""Events in which a rank may be waiting for the others."""


@dataclass(frozen=True)
class Beat:
    """One rank's sign of life; the fields are those of the file."""

    rank: int
    host: str
    pid: int
    event: str
    step: int
    seq: int
    since: float
    alive: float
    saving: bool = False

    @property
    def reached(self) -> int | None:
        """The global step, None before the first one."""
        return None if self.event == "start" else self.step


_KINDS: dict[Any, Callable[[Any], Any]] = {"int": int, "str": str, "float": float, "bool": bool}


def path_of(run_dir: Path, rank: int) -> Path:
    """The file of one rank."""
    return run_dir / FOLDER / f"rank-{rank:05d}.json"


def read_beats(run_dir: Path) -> list[Beat]:
    """What all ranks wrote last, by rank; damaged files are left out."""
    beats = []
    for path in (run_dir / FOLDER).glob("rank-*.json"):
        with contextlib.suppress(OSError, ValueError):
            beats.append(parse(read_json(path)))
    return sorted((beat for beat in beats if beat is not None), key=lambda beat: beat.rank)


def parse(values: Any) -> Beat | None:
    """A file's content; None if it is not one of ours."""
    try:
        return Beat(**{field.name: _KINDS[field.type](values[field.name]) for field in fields(Beat)})
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def verdict(mine: Beat, beats: Sequence[Beat], size: int, now: float, patience: float) -> str:
    """Who keeps the ranks waiting; pure.

    A rank is missing if it left no sign, shows none any more (stopped, dead, its host gone), or is at an earlier place.
    """
    known = {beat.rank: beat for beat in beats}
    silent_after = max(min(patience / 2, 30.0), 3.0)
    missing = []
    for rank in range(size):
        beat = known.get(rank)
        if rank == mine.rank:
            continue
        if beat is None:
            missing.append(f"rank {rank}: no sign of life at all")
        elif now - beat.alive > silent_after:
            missing.append(f"rank {rank} on {beat.host}: last event '{beat.event}' of step {beat.step}, "
                           f"no sign of life for {now - beat.alive:.0f} s (stopped, or its host is gone)")  # fmt: skip
        elif beat.seq < mine.seq:
            missing.append(f"rank {rank} on {beat.host}: last event '{beat.event}' of step {beat.step}, "
                           f"since {now - beat.since:.0f} s")  # fmt: skip
    start = f"waited {now - mine.since:.0f} s for other ranks in '{mine.event}' of step {mine.step}; "
    if not missing:
        return start + f"all {size} are at the same place and alive: the network between them does not pass data"
    return start + "missing: " + "; ".join(missing)


class Heartbeat:
    """Writes this rank's file, and watches over the others' while this rank waits.

    Args:
        run_dir: an existing run folder.
        world: this rank.
        period: s between two writings.
        patience: s that this rank may wait in one event before ``on_stall(message)`` is called; 0: for ever.
        on_stall: called once, in the heartbeat's thread; has to end the process.
    """

    def __init__(
        self, run_dir: Path, world: World, period: float, patience: float, on_stall: Callable[[str], None]
    ) -> None:
        self._dir, self._world, self._period, self._patience, self._on_stall = run_dir, world, period, patience, on_stall
        now = time.time()
        self._beat = Beat(world.rank, host_name(), os.getpid(), "start", 0, 0, now, now)
        self._saving: Callable[[], bool] = lambda: False
        self._stop = threading.Event()
        (run_dir / FOLDER).mkdir(exist_ok=True)
        self._write()
        self._thread = threading.Thread(target=self._work, name="heartbeat", daemon=True)
        self._thread.start()

    def mark(self, event: str, step: int) -> None:
        """The main thread now begins ``event``; every rank makes the same calls."""
        beat = self._beat
        self._beat = Beat(beat.rank, beat.host, beat.pid, event, step, beat.seq + 1, time.time(), beat.alive)

    def watch_saving(self, saving: Callable[[], bool]) -> None:
        """Where to ask whether a checkpoint is being written."""
        self._saving = saving

    def close(self) -> None:
        """Say that this rank has ended, and stop."""
        self.mark("end", self._beat.step)
        self._stop.set()
        self._thread.join()
        self._write()

    def _work(self) -> None:
        while not self._stop.wait(self._period):
            self._write()
            beat, now = self._beat, time.time()
            # The lower ranks speak first, and their end ends the others.
            patience = self._patience + 0.5 * min(self._world.rank, 20)
            if self._patience and self._world.size > 1 and beat.event in WAITING and now - beat.since > patience:
                self._on_stall(verdict(beat, read_beats(self._dir), self._world.size, now, self._patience))
                return

    def _write(self) -> None:
        path = path_of(self._dir, self._world.rank)
        values = {**asdict(self._beat), "alive": time.time(), "saving": self._saving()}
        temporary = path.with_name(f".{path.name}")
        try:
            # Not synced to disk: this is a sign for the moment, and it comes every second.
            temporary.write_text(json.dumps(values), encoding="utf-8")
            os.replace(temporary, path)
        except OSError:
            pass  # a full disk is the checkpoint's to report
