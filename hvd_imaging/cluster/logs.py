"""The output of a run's jobs: the newest lines, and what comes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import RunError
from .render import FOLDER


def files(run_dir: Path, rank: int | None = None) -> list[Path]:
    """The output of jobs, the newest last; or the log of one rank.

    Raises:
        RunError: there is none.
    """
    if rank is not None:
        path = run_dir / "ranks" / f"log-{rank:05d}.jsonl"
        if not path.is_file():
            raise RunError(f"{path}: no log of rank {rank}; expected a run that has begun, with more than {rank} ranks")
        return [path]
    found = sorted((run_dir / FOLDER).glob("*.out"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise RunError(
            f"{run_dir}: no output of a job (no {FOLDER}/*.out); it was not started by `hvd-imaging submit`, or waits still: "
            f"hvd-imaging status {run_dir}"
        )
    return found


def tail(path: Path, count: int) -> tuple[list[str], int]:
    """(the last ``count`` lines, where they end in bytes); reads no more of the file than that takes."""
    with open(path, "rb") as file:
        end = file.seek(0, 2)
        position, data = end, b""
        while position and data.count(b"\n") <= count:
            step = min(1 << 16, position)
            position -= step
            file.seek(position)
            data = file.read(step) + data
    lines = data.decode(errors="replace").splitlines()
    return lines[-count:] if count else [], end


def follow(run_dir: Path, path: Path, position: int, ended: Callable[[], bool], rank: int | None = None, pause_s: float = 0.5) -> Iterator[str]:
    """Lines as they come, of the newest file, until ``ended()`` and nothing is left."""
    rest = ""
    while True:
        over = ended()
        with open(path, "rb") as file:
            if file.seek(0, 2) < position:
                position = 0  # begun anew
            file.seek(position)
            data = file.read()
        position += len(data)
        *lines, rest = (rest + data.decode(errors="replace")).split("\n")
        yield from lines
        newest = files(run_dir, rank)[-1]
        if newest != path:
            # The next job of a chain has begun to write.
            path, position, rest = newest, 0, ""
            continue
        if over:
            if rest:
                yield rest
            return
        time.sleep(pause_s)
