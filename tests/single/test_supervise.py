"""The launcher's decisions, what it understands of mpirun, and its processes, with a fake mpirun."""

import ast
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import click.testing
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_imaging.errors import ConfigError, SetupError
from hvd_imaging.training import notices, restart, supervise
from hvd_imaging.training.events import read_events
from hvd_imaging.training.heartbeat import Beat
from hvd_imaging.training.notices import Filter, Notice
from hvd_imaging.training.restart import Failure, Host, Policy, Start, Stop

DASHES = "-" * 74 + "\n"
PRIMARY = f"""{DASHES}Primary job  terminated normally, but 1 process returned
a non-zero exit code. Per user-direction, the job has been aborted.
{DASHES}"""
KILLED = f"""{DASHES}mpirun noticed that process rank 1 with PID 0 on node n2 exited on signal 9 (Killed).
{DASHES}"""
KILLED_5 = f"""{DASHES}prterun noticed that process rank 3 with PID 72 on node gpu-07 exited on
signal 11 (Segmentation fault).
{DASHES}"""
EXITED = f"""{DASHES}mpirun detected that one or more processes exited with non-zero status, thus causing
the job to be terminated. The first process to do so was:

  Process name: [[21847,1],1]
  Exit code:    4
{DASHES}"""
EXITED_5 = f"""{DASHES}prterun detected that one or more processes exited with non-zero status,
thus causing the job to be terminated. The first process to do so was:

   Process name: [prterun-vm-72@1,12]
   Exit code:    70
{DASHES}"""
ABORTED = f"""{DASHES}MPI_ABORT was invoked on rank 1 in communicator MPI_COMM_WORLD
with errorcode 7.

NOTE: invoking MPI_ABORT causes Open MPI to kill all MPI processes.
{DASHES}"""
LOST = f"""{DASHES}ORTE has lost communication with a remote daemon.

  HNP daemon   : [[22225,0],0] on node vm
  Remote daemon: [[22225,0],2] on node nodeB

This is usually due to either a failure of the TCP network
connection to the node, or possibly an internal failure of
the daemon itself. We cannot recover from this failure, and
therefore will terminate the job.
{DASHES}"""
NOWHERE = f"""{DASHES}mpirun was unable to launch the specified application as it could not access
or execute an executable:

Executable: /nonexist
Node: vm

while attempting to start process rank 0.
{DASHES}"""
ROOT = f"{DASHES}mpirun has detected an attempt to run as root.\n\nRunning as root is *strongly* discouraged\n{DASHES}"
SLOTS = f"{DASHES}There are not enough slots available in the system to satisfy the 20\nslots that were requested\n{DASHES}"
OTHER = f"{DASHES}A word of the network library.\n{DASHES}"


# What mpirun says


@pytest.mark.parametrize(
    ("banner", "notice", "shown"),
    [
        (PRIMARY, None, False),
        (KILLED, Notice("signal", 1, "n2", 9), False),
        (KILLED_5, Notice("signal", 3, "gpu-07", 11), False),
        (EXITED, Notice("exit", 1, None, 4), False),
        (EXITED_5, Notice("exit", 12, None, 70), False),
        (ABORTED, Notice("abort", 1, None, 7), False),
        (LOST, Notice("lost", None, "nodeB", None), False),
        (NOWHERE, Notice("start", None, "vm", None), True),
        (ROOT, Notice("root"), True),
        (SLOTS, Notice("slots"), True),
        (OTHER, None, True),
    ],
)
def test_banners_become_notices_and_only_those_about_ranks_are_held_back(banner, notice, shown):
    stream = Filter()
    out = stream.feed(b"before\n" + banner.encode() + b"after\n") + stream.release()
    assert out == b"before\n" + banner.encode() * shown + b"after\n"
    assert stream.notices == [notice] * (notice is not None)


PIECES = [KILLED, EXITED, PRIMARY, OTHER, "a line\n", "--\n", "\r 10% done", "\n", "mpirun: Forwarding signal 10 to job\n", "mpi\n"]


@given(st.lists(st.sampled_from(PIECES), max_size=8), st.data())
def test_the_stream_is_cut_anywhere_and_stays_the_same(pieces, data):
    # A banner begins a line: an unfinished one before it is a rank's, and swallows the first dashes.
    whole = "".join(piece if not piece.startswith("\r") else piece + "\n" for piece in pieces).encode()
    want = b"".join(
        piece.encode() + b"\n" * piece.startswith("\r")
        for piece in pieces
        if piece not in (KILLED, EXITED, PRIMARY) and "Forwarding" not in piece
    )
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=6)))
    stream = Filter(clock=lambda: 0.0)
    out = b"".join(stream.feed(whole[a:b]) for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True))
    assert out + stream.release() == want
    assert len(stream.notices) == sum(piece in (KILLED, EXITED) for piece in pieces)


def test_nothing_is_held_back_for_long():
    now = 0.0
    stream = Filter(clock=lambda: now)
    assert stream.feed(b"epoch 1") == b"epoch 1"  # an unfinished line of a rank, at once
    assert stream.feed(b"/3\n" + DASHES.encode() + b"a table of a rank\n") == b"/3\n"
    now = 5.0
    assert stream.feed(b"") == DASHES.encode() + b"a table of a rank\n"
    assert stream.feed(b"next\n") == b"next\n"
    assert stream.feed(b"---") == b""
    now = 10.0
    assert stream.feed(b"") == b"---"


def test_a_banner_with_lines_of_ranks_in_it_is_shown():
    mixed = KILLED.replace("mpirun noticed", "x\n" * 20 + "mpirun noticed")
    stream = Filter()
    assert stream.feed(mixed.encode()) == mixed.encode()
    assert stream.notices == [Notice("signal", 1, "n2", 9)]


# Who failed


def state(rank, alive, step=7, host=None):
    return Beat(rank, host or f"n{rank}", 100 + rank, "step", step, 1, 0.0, alive)


@pytest.mark.parametrize(
    ("alive", "found"),
    [([], None), ([5.0], None), ([5.0, 9.0], 0), ([9.0, 8.5], None), ([9.0, 3.0, 9.4], 1), ([9.0, 7.0, 13.0], None)],
)
def test_the_silent_rank_is_the_one_that_clearly_ended_first(alive, found):
    quiet = restart.silent({rank: state(rank, when) for rank, when in enumerate(alive)})
    assert (quiet.rank if quiet else None) == found


def test_files_of_an_earlier_start_are_not_of_this_one():
    old = {0: state(0, 1.0), 1: state(1, 1.0)}
    assert restart.fresh(old, {**old, 1: state(1, 8.0)}) == {1: state(1, 8.0)}


@pytest.mark.parametrize(
    ("code", "said", "ranks", "missing", "want"),
    [
        (137, [Notice("signal", 1, "n2", 9)], {}, (), "rank 1 (host n2) was killed by signal 9 before the first step"),
        (4, [Notice("exit", 1, None, 4)], {1: state(1, 5.0)}, (), "rank 1 (host n1) ended with exit code 4 at step 7"),
        (70, [], {0: state(0, 9.0, 8), 1: state(1, 5.0)}, (), "rank 1 (host n1) ended with exit code 70 at step 8"),
        (7, [Notice("exit", 0, None, 7)], {0: state(0, 9.0), 1: state(1, 9.1)}, (), "a rank ended with exit code 7 at step 7"),
        (7, [Notice("abort", 0, None, 7)], {0: state(0, 9.0), 1: state(1, 2)}, (), "rank 1 (host n1) ended with exit code 7 at step 7"),
        (205, [Notice("lost", None, "n1")], {0: state(0, 9.0)}, ("n1",), "host n1 was lost at step 7"),
        (255, [], {}, ("n1",), "host n1 was lost before the first step"),
        (132, [Notice("start", None, "n1")], {}, (), "the program did not start on host n1 before the first step"),
        (1, [], {}, (), "a rank ended with exit code 1 before the first step"),
    ],
)
def test_the_failure_is_told(code, said, ranks, missing, want):
    assert restart.describe(restart.attribute(code, said, ranks, None, missing)) == want


# What follows

TWO = (Host("n1", 2), Host("n2", 2))


@pytest.mark.parametrize(
    ("text", "hosts"), [(None, ()), ("a", (Host("a"),)), ("n1:2,n2:4", (Host("n1", 2), Host("n2", 4))), ("10.0.0.1:8", (Host("10.0.0.1", 8),))]
)
def test_hosts(text, hosts):
    assert restart.parse_hosts(text) == hosts


@pytest.mark.parametrize("text", ["", "a:", "a:0", "a:x", "a,,b", "-oProxyCommand=x:1", "a b", "a:1,a:2", "h;ls"])
def test_malformed_hosts(text):
    with pytest.raises(ConfigError, match="--hosts"):
        restart.parse_hosts(text)


@pytest.mark.parametrize(
    ("np", "least", "restarts", "shown"),
    [(0, 0, 3, "-np 0"), (2, 0, 3, "--min-np 0"), (2, 3, 3, "--min-np 3: more than -np 2"), (2, 1, -1, "--max-restarts")],
)
def test_impossible_policies(np, least, restarts, shown):
    with pytest.raises(ConfigError, match=shown):
        Policy(np, least, restarts)


def test_powers_of_two_are_asked_for_before_the_first_start():
    with pytest.raises(ConfigError, match="give -np 4 or -np 8, or permit fewer ranks with --min-np 4"):
        Policy(6, 6, powers_of_two=True)
    assert restart.size(Policy(6, 2, powers_of_two=True), ()) == 4


@given(st.integers(1, 64), st.lists(st.integers(1, 8), max_size=6), st.data(), st.booleans())
def test_the_size_is_the_largest_permitted(np, slots, data, powers):
    hosts = tuple(Host(f"n{i}", n) for i, n in enumerate(slots))
    left = tuple(host for host in hosts if data.draw(st.booleans()))
    found = restart.size(Policy(np, 1, hosts=hosts, powers_of_two=powers), left)
    room = np if left == hosts else min(np, sum(host.slots for host in left))
    assert 0 <= found <= room
    assert found == (max((p for p in (1, 2, 4, 8, 16, 32, 64) if p <= room), default=0) if powers else room)


@pytest.mark.parametrize("code", [1, 4, 7, 70, 130, 134, 137, 139, 205, 255])
def test_what_a_machine_may_have_done_is_tried_again(code):
    assert restart.decide(Policy(4, 4, hosts=TWO), [Failure(code, step=3)], TWO) == Start(4, TWO)


@pytest.mark.parametrize("code", [2, 3, 5, 6])
def test_what_the_user_has_to_mend_is_not_tried_again(code):
    verdict = restart.decide(Policy(4, 4), [Failure(code, rank=0)], ())
    assert isinstance(verdict, Stop) and verdict.code == code and "a restart does not help" in verdict.text


@pytest.mark.parametrize(("kind", "shown"), [("root", "OMPI_ALLOW_RUN_AS_ROOT=1"), ("slots", "--oversubscribe")])
def test_what_mpirun_refuses_is_not_tried_again(kind, shown):
    verdict = restart.decide(Policy(4, 4), [Failure(1, kind=kind)], ())
    assert isinstance(verdict, Stop) and verdict.code == 6 and shown in verdict.text


@pytest.mark.parametrize(
    ("before", "last", "again"),
    [
        (Failure(4, 1, "n2", 120, 100), Failure(4, 1, "n2", 120, 100), False),
        (Failure(4, 1, "n2", 120, 100), Failure(137, 0, "n1", 120, 100), False),
        (Failure(137), Failure(137), False),
        (Failure(4, 1, "n2", 120, 100), Failure(4, 1, "n2", 120, 110), True),
        (Failure(4, 1, "n2", 120, 100), Failure(4, 1, "n2", 121, 100), True),
        (Failure(205, None, "n2", 120, 100, "lost"), Failure(137, 1, "n1", 120, 100), True),
        (Failure(137, 1, "n2", 120, 100, missing=("n2",)), Failure(137, 1, "n1", 120, 100), True),
    ],
)
def test_the_same_step_twice_without_a_checkpoint_or_a_lost_host_is_the_end(before, last, again):
    verdict = restart.decide(Policy(2, 2), [before, last], ())
    assert isinstance(verdict, Start) == again
    if isinstance(verdict, Stop):
        assert verdict.code == last.code and verdict.text.startswith("the failure repeats ")


def test_the_verdict_names_step_rank_host_and_code():
    failure = Failure(4, 1, "n2", 120, 100)
    text = restart.decide(Policy(2, 2), [failure, failure], ()).text
    assert text == (
        "the failure repeats at step 120 (rank 1, host n2, exit code 4), a restart does not help; "
        "`hvd-imaging dataset verify DATASET` lists damaged shards"
    )
    text = restart.decide(Policy(2, 2), [Failure(4, 0, "n1", 120, 100), failure], ()).text
    assert "on another host: it is not the machine" in text


def test_the_restarts_are_counted_over_the_whole_run():
    failures = [Failure(137, 1, "n2", step, step) for step in (10, 20, 30)]
    assert restart.decide(Policy(2, 2, restarts=3), failures, ()) == Start(2)
    verdict = restart.decide(Policy(2, 2, restarts=2), failures, ())
    assert verdict.code == 137 and "all 2 restarts are used up" in verdict.text and "out of memory" in verdict.text
    assert "no restart is permitted" in restart.decide(Policy(2, 2, restarts=0), failures[:1], ()).text


def test_a_lost_host_means_fewer_ranks_or_the_end():
    failure = Failure(205, None, "n2", 120, 100, "lost", ("n2",))
    policy = Policy(4, 2, hosts=TWO)
    start = restart.decide(policy, [failure], TWO[:1])
    assert start == Start(2, TWO[:1])
    assert restart.announce(policy, [failure], start) == (
        "host n2 was lost at step 120; restart 1 of 3 with 2 ranks (without n2) from the checkpoint of step 100"
    )
    verdict = restart.decide(Policy(4, 3, hosts=TWO), [failure], TWO[:1])
    assert verdict.code == 6 and "2 ranks can run without n2, --min-np is 3" in verdict.text
    assert restart.decide(Policy(4, 1, hosts=TWO), [failure], ()).code == 6
    odd = (Host("n1", 3), Host("n2", 1))
    assert restart.decide(Policy(4, 1, hosts=odd, powers_of_two=True), [failure], odd[:1]) == Start(2, odd[:1])


def test_the_line_of_a_restart():
    failure = Failure(137, 1, "n2", 120, 100)
    assert restart.announce(Policy(2, 1), [failure], Start(2)) == (
        "rank 1 (host n2) was killed by signal 9 at step 120; restart 1 of 3 with 2 ranks from the checkpoint of step 100"
    )
    assert restart.announce(Policy(2, 1), [Failure(1)], Start(1)).endswith("with 1 rank from the beginning (no checkpoint yet)")


@pytest.mark.parametrize(
    ("code", "asked", "want"),
    [(0, False, 0), (0, True, 0), (75, False, 75), (75, True, 75), (138, True, 75), (70, True, 75), (5, True, None), (70, False, None)],
)
def test_ends_that_are_no_failure(code, asked, want):
    end = restart.ending(Failure(code), asked)
    assert (end.code if end else None) == want


TERM, INT, USR1 = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1


@pytest.mark.parametrize(
    ("earlier", "number", "now", "want"),
    [
        ([], TERM, 0, "stop"), ([], INT, 0, "stop"), ([], USR1, 0, "stop"),
        ([(USR1, 0)], USR1, 9, "ignore"), ([(USR1, 0)], TERM, 9, "ignore"), ([(USR1, 0), (TERM, 9)], TERM, 20, "kill"),
        ([(TERM, 0)], TERM, 0.1, "ignore"), ([(TERM, 0)], TERM, 1, "kill"), ([(INT, 0)], INT, 1, "kill"), ([(TERM, 0)], USR1, 9, "ignore"),
    ],
)  # fmt: skip
def test_signals(earlier, number, now, want):
    assert restart.react(earlier, number, now) == want


def test_the_command_line_of_mpirun():
    start = Start(4, TWO)
    assert restart.command("/m/mpirun", start, ["PATH"], ["--bind-to", "none"], ["py", "train", "a b.yaml"]) == [
        "/m/mpirun", "-np", "4", "-H", "n1:2,n2:2", "-x", "PATH", "--bind-to", "none", "py", "train", "a b.yaml",
    ]  # fmt: skip
    assert restart.command("mpirun", Start(1), [], [], ["py"]) == ["mpirun", "-np", "1", "py"]


def test_the_environment_of_mpirun():
    outer = {"OMPI_COMM_WORLD_RANK": "0", "PMIX_RANK": "0", "HOROVOD_RANK": "0", "HOROVOD_LOCAL_SIZE": "1", "OMPI_MCA_ess": "pmi"}
    kept = {"PATH": "/bin", "HOROVOD_CYCLE_TIME": "1", "OMPI_ALLOW_RUN_AS_ROOT": "1", "SLURM_JOB_ID": "3", "HOME": "/", "TF_X": ""}
    assert supervise.environment({**outer, **kept}) == kept
    assert supervise.passed(kept) == ["HOROVOD_CYCLE_TIME", "PATH", "TF_X"]


# Processes and files, with a fake mpirun

FAKE = """#!{python}
import os, sys
words = sys.argv[1:]
os.execv(words[2], words[2:])  # mpirun -np N program ...
"""
PROGRAM = """
import json, os, signal, sys, time
from pathlib import Path
run = Path(sys.argv[sys.argv.index("--run-dir") + 1])
plan = run.parent / "plan"
done = run.parent / "count"
n = int(done.read_text()) if done.exists() else 0
done.write_text(str(n + 1))
(run.parent / f"words{n}").write_text(json.dumps(sys.argv[1:]))
assert run.exists() == (n > 0), "the launcher has touched the folder"
step = json.loads(plan.read_text())[n]
(run / "ranks").mkdir(parents=True, exist_ok=True)
(run / "checkpoints").mkdir(exist_ok=True)
(run / "run.yaml").write_text("x")
(run / "ranks/rank-00001.json").write_text("{broken")
(run / "ranks/rank-00000.json").write_text(json.dumps(
    {"rank": 0, "host": "h", "pid": os.getpid(), "event": "step", "step": step["at"], "seq": 1, "since": 0, "alive": time.time(), "saving": False}))
if "checkpoint" in step:
    (run / f"checkpoints/step-{step['checkpoint']:08d}.npz").touch()
print("a line of the rank", file=sys.stderr, flush=True)
if "sleep" in step:
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
    (run / "ready").touch()
    time.sleep(step["sleep"])
if "signal" in step:
    os.kill(os.getpid(), step["signal"])
sys.exit(step.get("exit", 0))
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A function (plan of the starts, changes of Policy) -> Job, with a fake mpirun."""
    path = tmp_path / "mpirun"
    path.write_text(FAKE.format(python=sys.executable))
    path.chmod(0o755)
    monkeypatch.setattr(supervise, "_mpirun", lambda: str(path))
    (tmp_path / "program.py").write_text(PROGRAM)

    def job(plan, **changes):
        (tmp_path / "plan").write_text(json.dumps(plan))
        policy = Policy(**{"ranks": 2, "least": 2, **changes})
        words = ("train", "run.yaml", "--run-dir", str(tmp_path / "run"))
        return supervise.Job(words, tmp_path / "run", policy, [sys.executable, str(tmp_path / "program.py")], pause_s=0.0)

    return job


def words(folder, start):
    return json.loads((folder / f"words{start}").read_text())


def test_a_killed_run_goes_on_and_its_events_say_so(fake, tmp_path, capfd):
    assert supervise.supervise(fake([{"at": 7, "checkpoint": 5, "signal": 9}, {"at": 20}])) == 0
    err = capfd.readouterr().err
    assert err.count("a line of the rank\n") == 2
    assert (
        "hvd-imaging: launch: a rank was killed by signal 9 at step 7; restart 1 of 3 with 2 ranks from the checkpoint of step 5\n"
        in err
    )
    assert "--resume" not in words(tmp_path, 0) and words(tmp_path, 1)[-1] == "--resume"
    events = read_events(tmp_path / "run")
    assert [event["event"] for event in events] == ["launch", "failure", "restart", "verdict"]
    assert (events[1]["step"], events[1]["checkpoint"], events[1]["exit_code"]) == (7, 5, 137)
    assert events[3]["code"] == 0 and events[3]["restarts"] == 1


def test_a_failure_that_repeats_ends_with_its_code(fake, tmp_path, capfd):
    starts = [{"at": 7, "checkpoint": 5, "exit": 70}, {"at": 7, "exit": 70}]
    assert supervise.supervise(fake(starts)) == 70
    assert "the failure repeats at step 7 (exit code 70)" in capfd.readouterr().err
    assert read_events(tmp_path / "run")[-1]["event"] == "verdict"


def test_the_users_mistake_is_not_repeated(fake, capfd):
    assert supervise.supervise(fake([{"at": 0, "exit": 5}])) == 5
    assert "a restart does not help" in capfd.readouterr().err


def test_a_folder_that_training_has_refused_stays_as_it_is(fake, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.yaml").write_text("of another run")
    (tmp_path / "program.py").write_text("import sys; sys.exit(5)")
    assert supervise.supervise(fake([])) == 5
    assert os.listdir(tmp_path / "run") == ["run.yaml"]


def test_without_a_claimed_folder_there_is_none(fake, tmp_path):
    (tmp_path / "program.py").write_text("import sys; sys.exit(2)")
    assert supervise.supervise(fake([])) == 2
    assert not (tmp_path / "run").exists()


def test_handlers_come_back_and_an_exception_leaves_no_process(fake, tmp_path, monkeypatch):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    pids = []

    def broken(self, seconds):
        if (tmp_path / "run/ready").exists() and not pids:
            pids.append(self._popen.pid)
            raise RuntimeError("on purpose")
        time.sleep(0.01)

    monkeypatch.setattr(supervise._Process, "pump", broken)
    with pytest.raises(RuntimeError, match="on purpose"):
        supervise.supervise(fake([{"at": 1, "sleep": 60}]))
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_the_launcher_is_a_checkpoint_and_75(fake, tmp_path, number, capfd):
    job = fake([{"at": 3, "sleep": 60}])
    # A shell that waits for the ranks to be ready, then signals this process.
    script = f"for i in $(seq 300); do [ -e {tmp_path}/run/ready ] && break; sleep 0.1; done; kill -{int(number)} {os.getpid()}"
    helper = subprocess.Popen(["bash", "-c", script])
    try:
        assert supervise.supervise(job) == 75
    finally:
        helper.kill()
        helper.wait()
    assert "stopped as asked; go on with `--resume`" in capfd.readouterr().err
    assert read_events(tmp_path / "run")[-1]["code"] == 75


def test_without_mpirun_the_mend_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(supervise.shutil, "which", lambda *_, **__: None)
    with pytest.raises(SetupError, match=r"scripts/setup_env.sh"):
        supervise.supervise(supervise.Job(("train",), tmp_path / "run", Policy(1, 1)))


# The command


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["-np", "2"], "expected `-- train run.yaml ...` after the options, found nothing"),
        (["-np", "2", "--", "evaluate", "run"], "found 'evaluate'"),
        (["-np", "2", "--", "train", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["-np", "0", "--", "train", "RUN"], "-np 0: expected at least 1 rank"),
        (["-np", "2", "--min-np", "3", "--", "train", "RUN"], "--min-np 3: more than -np 2"),
        (["-np", "2", "--hosts", "a:b", "train", "RUN"], "--hosts a:b: expected names with slots"),
        (["-np", "2", "train", "RUN", "--set", "train.epoch=3"], "train.epoch: unknown key"),
    ],
)
def test_what_is_wrong_is_told_before_mpirun_starts(words, shown, tmp_path, monkeypatch):
    from hvd_imaging.cli.launch import command

    (tmp_path / "run.yaml").write_text("data: {dataset: d}\nmodel: {name: unet3d}\n")
    monkeypatch.setattr(supervise, "supervise", lambda job: pytest.fail("started"))
    words = [str(tmp_path / "run.yaml") if word == "RUN" else word for word in words]
    result = click.testing.CliRunner().invoke(command, words)
    assert isinstance(result.exception, ConfigError) and shown in str(result.exception)


def test_options_and_training_arguments_reach_the_supervisor(tmp_path, monkeypatch):
    from hvd_imaging.cli.launch import command

    path = tmp_path / "run.yaml"
    path.write_text("data: {dataset: d}\nmodel: {name: unet3d}\n")
    jobs = []
    monkeypatch.setattr(supervise, "supervise", lambda job: jobs.append(job) or 75)
    inner = ["train", str(path), "--set", "output.run_dir=here", "--json"]
    extra = ["--mpirun-arg", "--bind-to", "--mpirun-arg", "none", "--grace", "5", "--max-restarts", "1"]
    result = click.testing.CliRunner().invoke(command, ["-np", "3", "--hosts", "a:2,b", *extra, "--", *inner])
    assert result.exit_code == 75
    assert jobs[0].arguments == tuple(inner) and jobs[0].run_dir == Path("here") and jobs[0].grace_s == 5
    assert jobs[0].mpirun_args == ("--bind-to", "none")
    assert jobs[0].policy == Policy(3, 3, 1, (Host("a", 2), Host("b", 1)))
    click.testing.CliRunner().invoke(command, ["-np", "3", "--min-np", "1", *inner, "--run-dir", "there"])
    assert jobs[1].run_dir == Path("there") and jobs[1].policy.least == 1
    assert not jobs[1].policy.powers_of_two
    click.testing.CliRunner().invoke(command, ["-np", "2", *inner, "--set", "train.reproducible=exact"])
    assert jobs[2].policy.powers_of_two


def test_the_supervisor_needs_no_tensorflow_and_the_decisions_no_world():
    script = "import sys; import hvd_imaging.training.supervise; print({'tensorflow', 'horovod', 'mpi4py'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "set()", done.stderr
    for module in (restart, notices):
        tree = ast.parse(Path(module.__file__).read_text())
        names = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
        assert not names & {"os", "subprocess", "socket", "shutil"}


def test_a_lost_host_is_left_to_the_scheduler():
    policy = Policy(ranks=2, least=2, leave_lost=True)
    for failure in (Failure(255, host="n2", step=7, kind="lost"), Failure(137, 1, "n2", 7, missing=("n2",))):
        found = restart.decide(policy, [failure], ())
        assert isinstance(found, Stop) and found.code == 205 and found.text.endswith("; left to the scheduler")
    assert isinstance(restart.decide(policy, [Failure(137, 1, "n2", 7, 5)], ()), Start)  # a dead rank is started again here
    assert isinstance(restart.decide(Policy(ranks=2, least=2), [Failure(255, host="n2", step=7, kind="lost")], ()), Start)
