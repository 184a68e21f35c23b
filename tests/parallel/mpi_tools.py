"""`mpirun` for tests: with a time limit that leaves no process behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

_HERE = Path(sys.executable).parent


def mpirun_path() -> str | None:
    """The site's or the environment's mpirun, None where there is none."""
    return shutil.which("mpirun", path=f"{_HERE}{os.pathsep}{os.environ.get('PATH', '')}")


def mpirun(
    np: int, args: Sequence[str | os.PathLike[str]], timeout: float = 120, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``mpirun -np NP args`` and return its exit code and output; more ranks than cores are fine.

    Args:
        args: the program and its arguments, such as ``[sys.executable, "-m", "hvd_imaging.cli.main", ...]``.
        timeout: seconds; then the whole process group is killed.
        env: changes to this process's environment.

    Raises:
        AssertionError: the time is over; holds what was printed so far.
    """
    process = start_mpirun(np, args, env)
    command = process.args
    try:
        out, err = process.communicate(timeout=timeout)
    except BaseException as error:
        # mpirun passes SIGTERM on to its ranks, which have process groups of their own; SIGKILL ends the rest.
        for number, patience in ((signal.SIGTERM, 10), (signal.SIGKILL, 5)):
            try:
                os.killpg(process.pid, number)
            except ProcessLookupError:
                break
            try:
                out, err = process.communicate(timeout=patience)
                break
            except subprocess.TimeoutExpired:
                out, err = "", "(no output: the ranks did not end)"
        if isinstance(error, subprocess.TimeoutExpired):
            raise AssertionError(f"{command} did not end within {timeout} s\n{out}\n{err}") from None
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def start_mpirun(
    np: int, args: Sequence[str | os.PathLike[str]], env: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start ``mpirun -np NP args`` in a session of its own; whoever calls ends it."""
    program = mpirun_path()
    assert program is not None, "no mpirun on PATH"
    # Variables of a launcher around the test run would make the ranks believe they are in another world.
    outer = ("OMPI_COMM_WORLD_", "PMI_", "PMIX_", "HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_", "SLURM_")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(outer)}
    environment |= {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
        "OMPI_MCA_hwloc_base_binding_policy": "none",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{_HERE}{os.pathsep}{os.environ.get('PATH', '')}",
        **(env or {}),
    }
    command = [program, "-np", str(np), *(os.fspath(arg) for arg in args)]
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
