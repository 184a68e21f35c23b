"""The launcher under a real mpirun, with a stand-in for training: killed ranks, lost hosts, signals, no orphans."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from mpi_tools import mpirun_path

from hvd_imaging.training.events import read_events

pytestmark = [pytest.mark.mpi, pytest.mark.skipif(mpirun_path() is None, reason="no mpirun")]

# Training as the launcher sees it: claims its folder, takes steps, writes checkpoints and heartbeats, goes on with --resume.
# The ranks take each step together. What happens to rank 1 at step 6 is the fourth argument.
PROGRAM = """
import json, os, signal, socket, sys, time
from pathlib import Path
tag, run, steps, how = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
rank, size = (int(os.environ[f"OMPI_COMM_WORLD_{name}"]) for name in ("RANK", "SIZE"))
resume = "--resume" in sys.argv
stop = []
signal.signal(signal.SIGUSR1, lambda *_: stop.append(1))
if how == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
start = 0
if rank == 0:
    assert resume or not run.exists(), "not an empty folder"
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    (run / "run.yaml").write_text(f"size: {size}")
    print(f"{size} ranks", flush=True)
while not (run / "checkpoints").exists():
    time.sleep(0.02)
start = max([int(path.stem[5:]) for path in (run / "checkpoints").iterdir()], default=0)
(run / "ranks").mkdir(exist_ok=True)
def save(step):
    if rank == 0:
        (run / f"checkpoints/step-{step:08d}.npz").touch()
for step in range(start, steps):
    part = run / f"ranks/.{rank}"
    part.write_text(json.dumps({"rank": rank, "host": f"host-{rank}", "pid": os.getpid(), "event": "step", "step": step,
                                "seq": step, "since": time.time(), "alive": time.time(), "saving": False}))
    os.replace(part, run / f"ranks/rank-{rank:05d}.json")
    if step == 6 and rank == 1:
        if how == "always":
            os.kill(os.getpid(), 9)
        if how == "once" and not resume:
            time.sleep(0.5)
            os.kill(os.getpid(), 9)
        if how == "host" and not resume:
            (run.parent / "dead").touch()
            os.kill(os.getppid(), 9)  # the daemon of this host, and with it
            os.kill(os.getpid(), 9)
    # All ranks meet after each step, as in a sum of gradients.
    mine = run.parent / f"{os.environ['PMIX_NAMESPACE']}-{rank}-{step}"
    mine.touch()
    while not stop and not all(mine.with_name(f"{mine.name.split('-')[0]}-{r}-{step}").exists() for r in range(size)):
        time.sleep(0.005)
    if stop and how != "deaf":
        save(step)
        time.sleep(0.5)
        sys.exit(75)
    if step and step % 4 == 0:
        save(step)
    time.sleep(0.05)
save(steps)
"""
# What `hvd-imaging launch` does after it has read its options.
LAUNCHER = """
import sys
from pathlib import Path
from hvd_imaging.training.restart import Policy, parse_hosts
from hvd_imaging.training.supervise import Job, supervise
folder, ranks, least, hosts, grace, *words = sys.argv[1:]
folder = Path(folder)
program = [sys.executable, str(folder / "program.py"), folder.name]
policy = Policy(int(ranks), int(least), hosts=parse_hosts(hosts or None))
agent = ["--mca", "plm_rsh_agent", str(folder / "agent")] if hosts else []
sys.exit(supervise(Job([str(folder / "run"), *words], folder / "run", policy, program, agent, float(grace), 0.1)))
"""
# Stands for ssh: runs the command here, unless the host is dead. A host of its own has a TMPDIR of its own: two of Open MPI's
# daemons that start at once in one TMPDIR may trip over each other's session folder.
AGENT = """#!/usr/bin/env bash
while [[ $1 == -* ]]; do shift; done
host=$1; shift
if [[ $host == nodeB && -e {folder}/dead ]]; then echo "ssh: connect to host $host: no route to host" >&2; exit 255; fi
export TMPDIR={hosts}/$host
mkdir -p "$TMPDIR"
exec bash -c "$*"
"""


def starts(out: str) -> list[int]:
    """Ranks of each start. Where a host dies, Open MPI's daemons may add words of their own."""
    return [int(number) for number in re.findall(r"^(\d+) ranks$", out, re.MULTILINE)]


class Launch:
    """A launcher under test; at the end of the block nothing of it is left."""

    def __init__(self, folder: Path, *words: object, ranks: int = 2, least: int = 2, hosts: str = "", grace: float = 60):
        self.folder = folder
        (folder / "program.py").write_text(PROGRAM)
        self.hosts = tempfile.mkdtemp(dir="/tmp")  # a short path: Open MPI puts sockets there
        (folder / "agent").write_text(AGENT.format(folder=folder, hosts=self.hosts))
        (folder / "agent").chmod(0o755)
        (folder / "launcher.py").write_text(LAUNCHER)
        environ = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "OMPI_COMM_WORLD_"))}
        environ |= {
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            "OMPI_MCA_rmaps_base_oversubscribe": "1",
            "OMPI_MCA_hwloc_base_binding_policy": "none",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            # Stale variables of a launcher around this one: mpirun must not see them.
            "PMIX_RANK": "0",
            "PMIX_NAMESPACE": "nowhere",
        }
        command = [sys.executable, folder / "launcher.py", folder, ranks, least, hosts, grace, *words]
        self.process = subprocess.Popen(
            [str(word) for word in command], env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        for process in self.left():
            process.kill()
        self.process.communicate()
        shutil.rmtree(self.hosts, ignore_errors=True)

    def left(self) -> list[psutil.Process]:
        """Processes of this test: they have its folder in their command line."""
        found = []
        for process in psutil.process_iter(["cmdline", "status"]):
            words = process.info["cmdline"] or []
            if process.pid != self.process.pid and any(str(self.folder) in word for word in words):
                found.append(process)
        return [process for process in found if process.info["status"] != psutil.STATUS_ZOMBIE]

    def end(self, timeout: float = 60) -> tuple[int, str, str]:
        """Exit code, stdout, stderr; asserts that no process is left."""
        out, err = self.process.communicate(timeout=timeout)
        assert self.left() == []
        return self.process.returncode, out, err

    def wait_for_step(self) -> None:
        """All ranks take steps."""
        self.wait(lambda: (self.folder / "run/ranks/rank-00001.json").exists())

    def wait(self, done, timeout: float = 30) -> None:
        until = time.monotonic() + timeout
        while not done():
            assert time.monotonic() < until, "the time is over"
            time.sleep(0.05)


def test_a_killed_rank_is_followed_by_a_restart_from_the_checkpoint(tmp_path):
    with Launch(tmp_path, 12, "once") as launch:
        code, out, err = launch.end()
    assert code == 0, err
    assert out == "2 ranks\n2 ranks\n"
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err  # no banner of mpirun
    assert lines[0].startswith("hvd-imaging: launch: rank 1 (host ")
    assert lines[0].endswith(") was killed by signal 9 at step 6; restart 1 of 3 with 2 ranks from the checkpoint of step 4")
    events = read_events(tmp_path / "run")
    assert [event["event"] for event in events] == ["launch", "failure", "restart", "verdict"]
    assert (events[1]["rank"], events[1]["step"], events[1]["exit_code"]) == (1, 6, 137)
    assert (tmp_path / "run/checkpoints/step-00000012.npz").exists()


def test_a_failure_that_repeats_ends_with_a_verdict(tmp_path):
    with Launch(tmp_path, 12, "always") as launch:
        code, _, err = launch.end()
    assert code == 137
    assert err.count("restart 1 of 3") == 1 and "restart 2" not in err
    assert "the failure repeats at step 6 (rank 1, host " in err and "killed by signal 9" in err
    assert read_events(tmp_path / "run")[-1]["code"] == 137


def test_a_lost_host_is_left_out(tmp_path):
    with Launch(tmp_path, 12, "host", hosts="nodeA:1,nodeB:1", least=1) as launch:
        code, out, err = launch.end(120)
    assert code == 0, err
    assert starts(out) == [2, 1]
    assert "host nodeB) was lost at step 6" in err or "host nodeB was lost at step 6" in err
    assert "restart 1 of 3 with 1 rank (without nodeB) from the checkpoint of step 4" in err
    assert "lost communication" not in err
    failure = read_events(tmp_path / "run")[1]
    assert failure["missing"] == ["nodeB"] and failure["host"] == "nodeB"


def test_too_few_hosts_end_the_run(tmp_path):
    with Launch(tmp_path, 12, "host", hosts="nodeA:1,nodeB:1", least=2) as launch:
        code, _, err = launch.end(120)
    assert code == 6
    assert "1 rank can run without nodeB, --min-np is 2" in err


def test_a_host_that_never_answers_is_left_out(tmp_path):
    (tmp_path / "dead").touch()
    with Launch(tmp_path, 8, "well", hosts="nodeA:1,nodeB:1", least=1) as launch:
        code, out, err = launch.end(120)
    assert code == 0, err
    assert starts(out) == [1]
    assert "host nodeB was lost before the first step; restart 1 of 3 with 1 rank (without nodeB) from the beginning" in err


@pytest.mark.parametrize(("number", "hosts"), [(signal.SIGTERM, ""), (signal.SIGUSR1, ""), (signal.SIGTERM, "nodeA:1,nodeB:1")])
def test_a_signal_is_a_checkpoint_and_75(tmp_path, number, hosts):
    with Launch(tmp_path, 2000, "well", hosts=hosts) as launch:
        launch.wait_for_step()
        launch.process.send_signal(number)
        code, _, err = launch.end()
    assert code == 75, err
    assert "asked to stop" in err and "stopped as asked; go on with `--resume`" in err and "mpirun" not in err
    assert len(list((tmp_path / "run/checkpoints").iterdir())) >= 1
    assert read_events(tmp_path / "run")[-1]["code"] == 75


def test_ranks_that_do_not_leave_are_ended_after_the_grace(tmp_path):
    with Launch(tmp_path, 2000, "deaf", grace=1) as launch:
        launch.wait_for_step()
        launch.process.send_signal(signal.SIGTERM)
        code, _, err = launch.end()
    assert code == 75, err
    assert "have not left after 1 s (--grace)" in err


def test_a_second_signal_ends_all_at_once(tmp_path):
    with Launch(tmp_path, 2000, "deaf") as launch:
        launch.wait_for_step()
        launch.process.send_signal(signal.SIGINT)
        time.sleep(1)
        launch.process.send_signal(signal.SIGINT)
        code, _, err = launch.end()
    assert code == 130, err
    assert "ended at once" in err


@pytest.mark.parametrize("hosts", ["", "nodeA:1,nodeB:1"])
def test_a_killed_launcher_leaves_no_rank(tmp_path, hosts):
    with Launch(tmp_path, 2000, "well", hosts=hosts) as launch:
        launch.wait_for_step()
        assert len(launch.left()) >= 3  # mpirun and two ranks
        launch.process.kill()
        launch.wait(lambda: launch.left() == [])


def test_a_killed_mpirun_leaves_no_rank_and_is_started_again(tmp_path):
    with Launch(tmp_path, 60, "well") as launch:
        launch.wait_for_step()
        (mpirun,) = psutil.Process(launch.process.pid).children()
        mpirun.kill()
        code, out, err = launch.end()
    assert code == 0, err
    assert out == "2 ranks\n2 ranks\n" and "restart 1 of 3" in err
