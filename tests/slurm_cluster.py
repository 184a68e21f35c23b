"""A Slurm of a test's own: two nodes on this machine, by scripts/virtual_slurm.sh."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "virtual_slurm.sh"
COMMAND = [sys.executable, "-m", "hvd_imaging.cli.main"]


class Cluster:
    """Skips the test where there is no Slurm, or no root to start it."""

    def __init__(self, folder: Path):
        self.folder = folder
        path = f"{os.environ['PATH']}:/usr/sbin"
        missing = [name for name in ("slurmctld", "slurmd", "munged") if shutil.which(name, path=path) is None]
        if missing:
            pytest.skip(f"no {', '.join(missing)} (Debian: apt-get install slurm-wlm munge)")
        if os.getuid() != 0:
            pytest.skip("slurmd and munged of another user need root")
        done = self._script("up")
        assert done.returncode == 0, (done.stdout, done.stderr)
        self.environ = {
            **os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "HVD_IMAGING_SLURM": "", "XDG_CONFIG_HOME": str(folder / "no-site"),
        }  # fmt: skip

    def _script(self, action: str, *words: str) -> subprocess.CompletedProcess[str]:
        # The daemons inherit no pipe: whoever reads it would wait for their end.
        with open(self.folder.with_suffix(".out"), "w+") as out:
            done = subprocess.run([SCRIPT, action, self.folder, *words], stdout=out, stderr=out, timeout=60)
            out.seek(0)
            return subprocess.CompletedProcess(done.args, done.returncode, out.read(), "")

    def kill(self, node: str) -> None:
        """The node and all that runs on it dies."""
        assert self._script("kill", node).returncode == 0

    def start(self, node: str) -> None:
        """It comes back."""
        assert self._script("start", node).returncode == 0

    def close(self) -> None:
        """All daemons and jobs end."""
        self._script("down")

    def call(self, *words: str | os.PathLike[str], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """One of Slurm's programs."""
        return subprocess.run([os.fspath(word) for word in words], capture_output=True, text=True, timeout=60, env=self.environ, cwd=cwd)

    def hvd(self, *words: str | os.PathLike[str], cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
        """``hvd-imaging`` with this Slurm."""
        done = self.call(*COMMAND, *words, cwd=cwd)
        assert done.returncode == code, (done.args, done.returncode, done.stdout, done.stderr)
        return done

    def status(self, run_dir: str, cwd: Path) -> dict[str, Any]:
        """``hvd-imaging status --json``."""
        return json.loads(self.hvd("status", run_dir, "--json", cwd=cwd).stdout)

    def wait(self, run_dir: str, cwd: Path, when: Callable[[dict[str, Any]], bool], seconds: float = 90) -> list[dict[str, Any]]:
        """All different things that ``status`` said until ``when`` was true of one."""
        seen: list[dict[str, Any]] = []
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            seen.append(self.status(run_dir, cwd))
            if when(seen[-1]):
                return seen
            time.sleep(0.3)
        out = [path.read_text() for path in (cwd / run_dir).glob("slurm/*.out")]
        raise AssertionError(f"not within {seconds} s; {[(s['state'], s['why'], s['step']) for s in seen[-5:]]}\n{out}\n{self.call('squeue').stdout}")
