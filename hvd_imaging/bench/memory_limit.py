"""A real limit on a process's memory, by a control group of its own: what goes beyond it is killed by the kernel. Root on Linux."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from ..errors import SetupError

_STEM = "hvd_imaging_bench_"
# Version 1 of control groups, and version 2.
_PLACES = (
    (Path("/sys/fs/cgroup/memory"), ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes")),
    (Path("/sys/fs/cgroup"), ("memory.max", "memory.swap.max")),
)


def join(limit: int) -> None:
    """Put this process into a new group that may hold ``limit`` bytes, without swap; before it takes memory: what it has is not counted.

    Raises:
        SetupError: the machine does not allow it.
    """
    reason = "no memory controller"
    for root, (most, swap) in _PLACES:
        group = root / f"{_STEM}{os.getpid()}"
        try:
            group.mkdir()
            (group / most).write_text(str(limit))
            with contextlib.suppress(OSError):  # swap may not be counted, or there is none
                (group / swap).write_text(str(limit if "memsw" in swap else 0))
            (group / "cgroup.procs").write_text(str(os.getpid()))
            return
        except OSError as error:
            reason = str(error.strerror)
            with contextlib.suppress(OSError):
                group.rmdir()
    raise SetupError(f"no control group with a limit on memory ({reason}): wants root and the memory controller")


def sweep() -> None:
    """Remove the groups of processes that have ended."""
    for root, _ in _PLACES:
        for group in root.glob(f"{_STEM}*") if root.is_dir() else ():
            with contextlib.suppress(OSError):
                group.rmdir()


def why_not() -> str | None:
    """The reason why this machine cannot set a limit, None if it can. A child finds out."""
    child = os.fork()
    if not child:
        code = 1
        with contextlib.suppress(SetupError):
            join(1 << 30)
            code = 0
        os._exit(code)
    _, status = os.waitpid(child, 0)
    sweep()
    return None if status == 0 else "no control group with a limit on memory: wants root and the memory controller"
