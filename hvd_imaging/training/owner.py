"""Who may write into a run folder: the newest start, and no older one that lives on.

A node that Slurm has given up may still compute: the job runs elsewhere by then, and two trainings would take turns in
writing checkpoints. Each start leaves its mark; a training that finds another one's before it saves, stops.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from ..errors import RunError
from ..files import write_json
from ..texts import read_json
from ..world import host_name

NAME = "owner.json"


class Owner:
    """Rank 0's claim on a run folder.

    Args:
        run_dir: exists.
        environ: SLURM_JOB_ID and SLURM_RESTART_COUNT are of interest.

    Raises:
        RunError: a later start of the same job owns the folder.
    """

    def __init__(self, run_dir: Path, environ: Mapping[str, str] | None = None) -> None:
        environ = os.environ if environ is None else environ
        self._path = run_dir / NAME
        job, count = environ.get("SLURM_JOB_ID"), int(environ.get("SLURM_RESTART_COUNT") or 0)
        before = self._read()
        if job is not None and before.get("job") == job and int(before.get("restart_count") or 0) > count:
            raise RunError(
                f"{run_dir}: belongs to start {int(before['restart_count']) + 1} of job {job} on {before.get('host')}; this is start "
                f"{count + 1}, on a node that was given up: it must not write"
            )
        self._token = secrets.token_hex(8)
        write_json(
            self._path,
            {"token": self._token, "host": host_name(environ), "pid": os.getpid(), "job": job, "restart_count": count},
        )

    def check(self) -> None:
        """Before something is written.

        Raises:
            RunError: another start has taken over.
        """
        now = self._read()
        # A file that cannot be read for a moment is no reason to stop.
        if now and now.get("token") != self._token:
            job = f", job {now['job']}" if now.get("job") else ""
            raise RunError(
                f"{self._path.parent}: another start on {now.get('host')} (process {now.get('pid')}{job}) has taken over this run; "
                "this one stops without writing"
            )

    def _read(self) -> dict[str, str]:
        try:
            values = read_json(self._path)
        except (OSError, ValueError):
            return {}
        return values if isinstance(values, dict) else {}
