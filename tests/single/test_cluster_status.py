"""The state of a run from its traces and from what Slurm says."""

import json
import time

import pytest
from click.testing import CliRunner
from datasets import make_dataset
from runs import make_run

from hvd_imaging.cluster import logs
from hvd_imaging.cluster.slurm import Job
from hvd_imaging.cluster.status import judge_state, look, recent_events, summarize, with_slurm
from hvd_imaging.errors import RunError
from hvd_imaging.training.heartbeat import Beat

T0 = 1_800_000_000.0


def at(when, event, **values):
    import datetime

    return {"time": datetime.datetime.fromtimestamp(T0 + when, datetime.timezone.utc).isoformat(), "event": event, **values}


def beat(rank=0, event="step", step=40, seq=9, since=99.0, alive=99.5, **values):
    return Beat(rank, f"n{rank}", 1, event, step, seq, T0 + since, T0 + alive, **values)


START = at(0, "start", world_size=2, steps_per_epoch=10, last_step=100, hosts=["n1", "n2"])


@pytest.mark.parametrize(
    ("events", "beats", "expected"),
    [
        ([], [], ("new", "no rank has begun yet")),
        ([START], [beat(0), beat(1)], ("running", "")),
        ([START], [beat(0, "save"), beat(1)], ("saving", "")),
        ([START], [beat(0, alive=40), beat(1, alive=41)], ("silent", "no sign of life for 59 s: killed, or its node is gone")),
        ([START], [beat(0), beat(1, alive=40)], ("stalled", "rank 1 on n1: no sign of life for 60 s")),
        ([START], [beat(0, seq=10), beat(1, "input", seq=9, since=50)], ("stalled", "rank 1 on n1 in 'input' of step 40 for 50 s, the others wait")),
        ([START, at(50, "stall", message="rank 1 is missing")], [beat(0)], ("failed", "rank 1 is missing")),
        ([START, at(50, "leave", step=40)], [], ("stopped", "asked to leave at step 40; it goes on with --resume")),
        ([START, at(50, "end", stopped_early=False)], [], ("done", "")),
        ([START, at(50, "end", stopped_early=True)], [], ("done", "stopped early: no gain any more")),
        ([START, at(50, "failure", reason="rank 1 was killed")], [], ("failed", "rank 1 was killed")),
        ([START, at(50, "failure"), at(51, "restart", np=2, attempt=2)], [], ("starting", "2 ranks, start 2")),
        ([START, at(50, "verdict", code=5, reason="no")], [], ("failed", "no")),
        ([START, at(50, "end"), at(51, "verdict", code=0)], [], ("done", "")),
        ([START, at(50, "leave", step=40), at(51, "verdict", code=75, step=40)], [], ("stopped", "asked to leave at step 40; it goes on with --resume")),
    ],
)  # fmt: skip
def test_states(events, beats, expected):
    assert judge_state(events, beats, T0 + 100) == expected


def row(state, **values):
    return {"step": "train", "id": "7", "state": state, "reason": "", "nodes": "", "left_s": None, "restarts": 0, "start": "", "code": None} | values


@pytest.mark.parametrize(
    ("state", "rows", "expected"),
    [
        ("running", [row("RUNNING")], "running"),
        ("silent", [row("RUNNING")], "starting"),
        ("done", [row("RUNNING")], "ending"),
        ("stopped", [row("PENDING", reason="BeginTime", restarts=1)], "waiting"),
        ("silent", [row("PENDING")], "waiting"),
        ("running", [row("NODE_FAIL")], "failed"),
        ("stopped", [row("FAILED", code=75)], "stopped"),
        ("stopped", [row("CANCELLED")], "stopped"),
        ("done", [row("COMPLETED")], "done"),
        ("done", [row("COMPLETED"), row("RUNNING", step="evaluate")], "ending"),
        ("new", [row("COMPLETED", tasks={"COMPLETED": 2})], "done"),
        ("done", [row("COMPLETED"), row("FAILED", step="evaluate", code=4)], "failed"),
    ],
)
def test_slurm_knows_of_the_queue(state, rows, expected):
    assert with_slurm(state, "", rows)[0] == expected


def test_figures():
    epochs = [at(10 * n, "epoch", epoch=n, step=10 * (n + 1), loss=1 / (n + 1), seconds=20.0, samples_per_second=4.0, val_dice=0.5) for n in range(4)]
    slow = at(30, "straggler", rank=1, host="n2", ratio=1.4, step=35)
    status = summarize("runs/a", [START, *epochs, slow, at(35, "checkpoint", step=40)], [beat(0, step=45), beat(1, step=44), beat(7, step=99)],
                       [{"step": "train", "id": "7"}], {"7": Job("7", "RUNNING", nodes="n[1-2]", left_s=60.0, restarts=2)}, None, T0 + 100)  # fmt: skip
    assert (status.state, status.step, status.steps, status.epoch, status.ranks, status.hosts) == ("running", 45, 100, 5, 2, ("n1", "n2"))
    assert status.left_s == pytest.approx(55 * 2.0) and status.metrics == {"loss": 0.25, "val_dice": 0.5}
    assert status.stragglers == ("rank 1 on n2: 1.4 x the others' time at step 35",) and status.checkpoint == 40
    assert status.jobs[0]["restarts"] == 2 and status.samples_per_second == 4.0


def test_an_array_says_what_needs_attention():
    jobs = {"7_0": Job("7_0", "COMPLETED"), "7_1": Job("7_1", "FAILED", code=4), "7_2": Job("7_2", "PENDING")}
    status = summarize("runs/a", [], [], [{"step": "train", "id": "7"}], jobs, None, T0)
    assert status.jobs[0]["state"] == "FAILED" and status.jobs[0]["tasks"] == {"COMPLETED": 1, "FAILED": 1, "PENDING": 1}


def test_a_long_run_is_not_read_whole(tmp_path):
    with open(tmp_path / "events.jsonl", "w", encoding="utf-8") as file:
        file.write(json.dumps(START) + "\n")
        for n in range(100_000):
            file.write(json.dumps(at(n, "epoch", epoch=n, step=10 * n, loss=0.5, seconds=1.0)) + "\n")
        file.write('{"time": "x", "event": "epoch", "half')
    (tmp_path / "run.yaml").write_text("rubbish: [")
    found = recent_events(tmp_path)
    assert [event["event"] for event in found] == ["start", *["epoch"] * 4] and found[-1]["epoch"] == 99_999
    assert look(tmp_path, now=T0 + 10).state == "running"


def test_the_command_says_it_for_one_and_for_several(tmp_path):
    from hvd_imaging.cli.status import command

    make_dataset(tmp_path / "data", samples=3)
    make_run(tmp_path / "runs/a", tmp_path / "data")
    (tmp_path / "runs/other").mkdir()
    result = CliRunner().invoke(command, [str(tmp_path / "runs/a")], catch_exceptions=False)
    assert result.exit_code == 0 and "runs/a: new (no rank has begun yet)" in result.stdout and "loss 0.2500" in result.stdout
    result = CliRunner().invoke(command, [*map(str, (tmp_path / "runs").iterdir()), "--json"], catch_exceptions=False)
    assert [status["state"] for status in json.loads(result.stdout)] == ["new"]
    result = CliRunner().invoke(command, [*map(str, (tmp_path / "runs").iterdir())], catch_exceptions=False)
    assert "0.2500" in result.stdout
    with pytest.raises(RunError, match="not a run folder"):
        CliRunner().invoke(command, [str(tmp_path / "runs/other")], catch_exceptions=False)
    (tmp_path / "runs/a/slurm").mkdir()
    (tmp_path / "runs/a/slurm/submit.json").write_text("{}")
    with pytest.raises(RunError, match="submit.json: damaged"):
        CliRunner().invoke(command, [str(tmp_path / "runs/a")], catch_exceptions=False)


def test_without_a_name_all_runs_of_this_place_are_told(tmp_path, monkeypatch):
    from hvd_imaging.cli.status import command

    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match="no runs below runs/.*name a RUN_DIR.*hvd-imaging train run.yaml"):
        CliRunner().invoke(command, [], catch_exceptions=False)
    (tmp_path / "run.yaml").write_text("data: {dataset: data}\n")  # as `init` writes it: no run
    make_dataset(tmp_path / "data", samples=3)
    for name in ("runs/b", "runs/group/deeper/c", "runs/group/a", "runs/b/compressed/model", "runs/1/2/3/too-deep", "elsewhere/d"):
        make_run(tmp_path / name, tmp_path / "data")
    (tmp_path / "runs/queued/slurm").mkdir(parents=True)
    (tmp_path / "runs/queued/slurm/submit.json").write_text('{"submissions": [{"jobs": []}]}')
    result = CliRunner().invoke(command, ["--json"], catch_exceptions=False)
    assert [status["run_dir"] for status in json.loads(result.stdout)] == ["runs/b", "runs/group/a", "runs/group/deeper/c", "runs/queued"]
    table = CliRunner().invoke(command, [], catch_exceptions=False).stdout
    assert "runs/group/deeper/c" in table and "0.2500" in table
    # from inside of a run: this one; a list even so
    monkeypatch.chdir(tmp_path / "runs/b")
    assert [status["run_dir"] for status in json.loads(CliRunner().invoke(command, ["--json"], catch_exceptions=False).stdout)] == ["."]


def test_logs(tmp_path):
    with pytest.raises(RunError, match="no output of a job"):
        logs.files(tmp_path)
    with pytest.raises(RunError, match="no log of rank 3"):
        logs.files(tmp_path, 3)
    folder = tmp_path / "slurm"
    folder.mkdir()
    old, new = folder / "train-1.out", folder / "train-2.out"
    old.write_text("".join(f"line {n}\n" for n in range(20_000)))
    lines, end = logs.tail(old, 3)
    assert lines == ["line 19997", "line 19998", "line 19999"] and end == old.stat().st_size
    assert logs.tail(old, 0)[0] == [] and len(logs.tail(old, 10**6)[0]) == 20_000

    seen, turns = [], iter(range(100))

    def ended():
        turn = next(turns)
        if turn == 1:
            with open(old, "a") as file:
                file.write("more\nhalf")
        if turn == 2:
            with open(old, "a") as file:
                file.write(" line\n")
        if turn == 3:
            time.sleep(0.01)
            new.write_text("next job\nend")
        return turn == 5

    for line in logs.follow(tmp_path, old, end, ended, pause_s=0):
        seen.append(line)
    assert seen == ["more", "half line", "next job", "end"]


def test_without_slurm_it_is_said(tmp_path, monkeypatch):
    from hvd_imaging.cluster import slurm
    from hvd_imaging.errors import SetupError

    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SetupError, match="squeue: not on this machine, so there is no Slurm to talk to"):
        slurm.jobs(["1"])
