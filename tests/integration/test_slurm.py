"""On a real Slurm of two nodes: submitted, preempted, a node lost, at the time limit, and the same weights in the end."""

import contextlib
import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
from mpi_tools import mpirun
from slurm_cluster import COMMAND, Cluster

from hvd_imaging.training.events import read_events

# Long enough to be interrupted three times, small enough to end within half a minute.
SETTINGS = {
    "data.patch": "[8,16,16]", "data.patches_per_volume": "4", "train.epochs": "150", "train.validate_every": "50",
    "train.checkpoint_epochs": "10", "train.reproducible": "true", "output.tensorboard": "false", "parallel.heartbeat_seconds": "0.3",
    "model.filters": "4", "model.depth": "2",
}  # fmt: skip
SET = [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")]

URGENT = "#!/bin/sh\n#SBATCH --partition=urgent --nodes=1 --exclusive --time=1 --output=/dev/null\nsleep 3\n"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    cluster = Cluster(tmp_path_factory.mktemp("slurm") / "cluster")
    yield cluster
    cluster.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory, cluster):
    """A folder whose name asks for quotes, with an archive, a dataset and a configuration."""
    folder = tmp_path_factory.mktemp("site") / 'radiology "B" $HOME'
    folder.mkdir()
    cluster.hvd("phantom", "archive", "--patients", "6", cwd=folder)
    cluster.hvd("ingest", "archive", "dataset", "--task", "segmentation", "--set", "preprocess.spacing=[8,6,6]", cwd=folder)
    cluster.hvd("init", "segmentation", "--dataset", "dataset", "-o", "run.yaml", cwd=folder)
    return folder


def digest(run_dir):
    return [event["weights_sha256"] for event in read_events(run_dir) if event["event"] == "end"]


def running_beyond(step):
    return lambda status: status["state"] == "running" and (status["step"] or 0) > step


@contextlib.contextmanager
def standing(run_dir, rank):
    """A rank of the run's newest start does not move; gives a function that waits until it was sent SIGUSR1."""
    pid = [event["pid"] for event in read_events(run_dir, f"ranks/log-{rank:05d}.jsonl") if event["event"] == "start"][-1]
    os.kill(pid, signal.SIGSTOP)

    def asked(seconds):
        until = time.monotonic() + seconds
        pending = re.compile(r"^ShdPnd:\s*(\w+)", re.MULTILINE)
        while not int(pending.search(Path(f"/proc/{pid}/status").read_text())[1], 16) >> (signal.SIGUSR1 - 1) & 1:
            assert time.monotonic() < until, f"not asked to leave within {seconds} s"
            time.sleep(0.2)

    try:
        yield asked
    finally:
        os.kill(pid, signal.SIGCONT)


@pytest.mark.long
def test_preempted_killed_and_at_its_limit_a_job_ends_with_the_same_weights(cluster, site):
    done = mpirun(2, [sys.executable, "-m", "hvd_imaging.cli.main", "train", site / "run.yaml", "--run-dir", site / "plain",
                      "--set", f"data.dataset={json.dumps(str(site / 'dataset'))}", *SET])  # fmt: skip
    assert done.returncode == 0, (done.stdout, done.stderr)
    (expected,) = digest(site / "plain")

    run = "runs/it's 100%j"
    cluster.hvd("submit", "run.yaml", "--nodes", "2", "--time", "10", "--signal-seconds", "50", "--job-name", """a 'b' "c" %x""",
                "--run-dir", run, *SET, cwd=site)  # fmt: skip
    again = cluster.hvd("submit", "run.yaml", "--run-dir", run, *SET, cwd=site, code=5).stderr
    assert "of this run is" in again and "hvd-imaging cancel" in again
    name = cluster.call("squeue", "-h", "-o", "%j").stdout.strip()
    assert name == """a 'b' "c" %x"""

    # Preempted: asked for a checkpoint, queued again, waits for the urgent job.
    cluster.wait(run, site, running_beyond(10))
    (site / "urgent.sh").write_text(URGENT)
    assert cluster.call("sbatch", "urgent.sh", cwd=site).returncode == 0
    seen = cluster.wait(run, site, lambda status: status["state"] == "waiting")
    assert seen[-1]["jobs"][0]["restarts"] == 1 and "queued again after 1 start" in seen[-1]["why"]
    assert all(status["state"] in ("running", "saving", "stopped", "starting", "ending", "waiting") for status in seen)
    left = read_events(site / run)[-1]
    at = seen[-1]["step"]
    assert left["event"] in ("leave", "verdict") and seen[-1]["checkpoint"] == at

    # A node dies in the middle, and comes back.
    seen = cluster.wait(run, site, running_beyond(at + 20))
    assert seen[-1]["jobs"][0]["nodes"] == "n[1-2]" and seen[-1]["starts"] == 2
    cluster.kill("n2")
    seen = cluster.wait(run, site, lambda status: status["state"] == "waiting")
    assert not any(status["state"] in ("done", "failed") for status in seen)
    cluster.start("n2")

    # At its time limit, which is now near: it stands still until Slurm has asked it to leave, however fast this machine is.
    cluster.wait(run, site, running_beyond(at + 20))
    (job,) = [job["id"] for job in cluster.status(run, site)["jobs"]]
    with standing(site / run, rank=1) as asked:
        assert cluster.call("scontrol", "update", f"job={job}", "TimeLimit=1").returncode == 0
        restarts = cluster.status(run, site)["jobs"][0]["restarts"]
        asked(90)
    seen = cluster.wait(run, site, lambda status: status["jobs"][0]["restarts"] > restarts or status["state"] == "done")
    assert seen[-1]["jobs"][0]["restarts"] == restarts + 1
    assert cluster.call("scontrol", "update", f"job={job}", "TimeLimit=10").returncode == 0

    last = cluster.wait(run, site, lambda status: status["state"] == "done")[-1]
    assert last["jobs"][0]["state"] == "COMPLETED" and last["step"] == last["steps"] and last["left_s"] is None
    # On a machine so busy that Slurm takes a node for lost, the start before may have come to its end as well.
    assert set(digest(site / run)) == {expected}
    shown = cluster.hvd("status", run, cwd=site).stdout
    assert f"{run}: done" in shown and "COMPLETED, n[1-2]" in shown and "started" in shown
    lines = cluster.hvd("logs", run, "--follow", "-n", "1000", cwd=site).stdout
    assert lines.count("queued again") == 2 + lines.count("ended with code 255") + lines.count("ended with code 205")
    assert "done: " in lines and "start 4" in lines


def test_a_chain_runs_in_order_and_is_cancelled_with_a_checkpoint(cluster, site):
    words = ["submit", "run.yaml", "--nodes", "2", "--time", "10", "--signal-seconds", "30", "--run-dir", "runs/chain", *SET,
             "--set", "train.epochs=100000", "--for", "evaluate:nodes=1", "--chain", "train,evaluate"]  # fmt: skip
    shown = json.loads(cluster.hvd(*words, "--json", cwd=site).stdout)
    train, evaluate = shown["jobs"]
    assert evaluate["after"] == train["id"] and not shown["findings"]
    seen = cluster.wait("runs/chain", site, running_beyond(5))[-1]
    assert [job["state"] for job in seen["jobs"]] == ["RUNNING", "PENDING"] and seen["jobs"][1]["reason"] == "Dependency"
    out = cluster.hvd("cancel", "runs/chain", cwd=site).stdout
    assert f"taken from the queue: {evaluate['id']}" in out and "left with a checkpoint" in out
    seen = cluster.wait("runs/chain", site, lambda status: status["state"] == "stopped")[-1]
    assert seen["checkpoint"] == seen["step"] > 5
    assert "ended already" in cluster.hvd("cancel", "runs/chain", cwd=site).stdout
    # The same command goes on from there, and now to the end.
    epochs = str(seen["step"] // 4 + 2)
    cluster.hvd(*words, "--set", f"train.epochs={epochs}", cwd=site)
    last = cluster.wait("runs/chain", site, lambda status: status["state"] == "done" and status["jobs"][1]["state"] == "COMPLETED")[-1]
    assert (site / "runs/chain/evaluation-test.json").is_file() and last["starts"] == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--partition", "gpu"], "partition 'gpu' does not exist; there are batch, urgent, short"),
        (["--partition", "short", "--time", "01:00:00"], "--time 01:00:00 is longer than partition 'short' permits (10 min)"),
        (["--nodes", "3"], "3 nodes asked for, at most 2 of partition 'batch' fit; give --nodes 2 or fewer"),
        (["--gres", "gpu:1"], "1 GPU asked for on each node, the largest node of partition 'batch' has 0 GPUs"),
        (["--time", "3"], "--time 3 ends before anything is learned: 180 s before the limit a checkpoint is asked for"),
        (["--mem", "900T"], "900T of memory asked for on each node, the largest node of partition 'batch' has"),
    ],
)  # fmt: skip
def test_what_can_not_run_is_not_queued(cluster, site, words, message):
    done = cluster.hvd("submit", "run.yaml", "--run-dir", "runs/none", *words, cwd=site, code=2)
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (site / "runs/none").exists()


def test_what_slurm_refuses_is_passed_on(cluster, site):
    done = cluster.hvd("submit", "run.yaml", "--run-dir", "runs/refused", "--option=--reservation=nobody", cwd=site, code=5)
    assert "sbatch: error:" in done.stderr and "Traceback" not in done.stderr


def test_without_a_controller_the_reason_is_told(cluster, site, tmp_path):
    conf = (cluster.folder / "slurm.conf").read_text().replace("SlurmctldPort=", "SlurmctldPort=1")
    (tmp_path / "slurm.conf").write_text(conf)
    environ = {**cluster.environ, "SLURM_CONF": str(tmp_path / "slurm.conf")}
    import subprocess

    done = subprocess.run([*COMMAND, "submit", "run.yaml"], cwd=site, env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 6 and "is slurmctld up? (scontrol ping)" in done.stderr
