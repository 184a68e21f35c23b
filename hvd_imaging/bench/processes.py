"""Several processes that belong together: started at the same time, and ended together."""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import IO

from ..errors import HvdImagingError

# What a launcher or a user's shell sets would measure something else.
_DROPPED = ("TF_", "OMP_", "OMPI_", "ONEDNN_")


def clean_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """``environ`` without settings of TensorFlow, oneDNN and launchers; pure."""
    return {name: value for name, value in environ.items() if not name.startswith(_DROPPED)}


def run_at_once(commands: Sequence[Sequence[str]], environ: Mapping[str, str], timeout: float) -> list[str]:
    """Run the commands side by side.

    Args:
        commands: program and arguments of each.
        environ: the whole environment of all.
        timeout: seconds for all of them.

    Returns:
        What each wrote to stdout.

    Raises:
        HvdImagingError: one failed or the time is over; the others are ended then, for they wait for it.
    """
    end = time.monotonic() + timeout
    processes: list[subprocess.Popen[str]] = []
    with contextlib.ExitStack() as stack:
        outs, errs = ([stack.enter_context(tempfile.TemporaryFile("w+")) for _ in commands] for _ in range(2))
        stack.callback(_end, processes)
        for command, out, err in zip(commands, outs, errs, strict=True):
            processes.append(
                subprocess.Popen(command, env=dict(environ), stdin=subprocess.DEVNULL, stdout=out, stderr=err, text=True)
            )
        while (codes := [process.poll() for process in processes]) != [0] * len(commands):
            for number, code in enumerate(codes):
                if code:
                    reason = reason_of(_text(errs[number])) or f"exit code {code}"
                    raise HvdImagingError(f"process {number + 1} of {len(commands)} failed: {reason}")
            if time.monotonic() > end:
                raise HvdImagingError(f"{len(commands)} processes did not end within {timeout:g} s: {' '.join(commands[0])}")
            time.sleep(0.05)
        return [_text(out) for out in outs]


def reason_of(text: str) -> str:
    """The line of stderr that says most: an error of the program's own, before mpirun's words about it; pure."""
    lines = [line.strip() for line in text.splitlines() if line.strip(" -")]
    errors = [line for line in lines if re.match(r"hvd-imaging: error: |[\w.]*(Error|Exception|Interrupt)\b", line)]
    return (errors or lines or [""])[-1]


def _end(processes: Sequence[subprocess.Popen[str]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()


def _text(file: IO[str]) -> str:
    file.seek(0)
    return file.read()
