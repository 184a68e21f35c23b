"""What training on many ranks promises, each shown with real ranks: same bits, kills, drift, stalls, wishes, slow ranks."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from datasets import make_dataset
from mpi_tools import mpirun, start_mpirun
from test_training_mpi import COMMAND, SEVERAL, final_weights, trainings, write

from hvd_imaging.training import checkpoint
from hvd_imaging.training.events import epoch_records, read_events
from hvd_imaging.training.heartbeat import read_beats

pytestmark = pytest.mark.mpi


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guarantees")
    make_dataset(folder / "seg", samples=7, split=(0.15, 0.15))
    make_dataset(folder / "cls", "classification", 14, (1, 96, 96), split=(0.15, 0.15))
    return folder


def trained(count, config, run, *settings, timeout=240, code=0, env=None, resume=False):
    """Run training to its end on ``count`` ranks; its JSON summary."""
    extra = [word for setting in settings for word in ("--set", setting)] + ["--resume"] * resume
    done = mpirun(count, [*COMMAND, config, "--json", "--run-dir", run, *extra], timeout=timeout, env=env)
    assert done.returncode == code, (done.returncode, done.stderr)
    return json.loads(done.stdout.splitlines()[-1]) if code in (0, 75) else done.stderr


def all_trained(count, *runs, timeout=400):
    """Run several trainings in one world of ``count`` ranks; their JSON summaries by the names of the run folders."""
    done = mpirun(count, trainings(*runs), timeout=timeout)
    assert done.returncode == 0, (done.returncode, done.stderr)
    summaries = map(json.loads, done.stdout.splitlines())
    return {run.name: summary for (_, run, *_), summary in zip(runs, summaries, strict=True)}


def state_hash(run):
    """SHA-256 of all arrays of the newest checkpoint: weights and optimizer."""
    return checkpoint.load_newest(run)[0].meta["sha256"]


def stop(step):
    return "--set", f"train.max_steps={step}"


@pytest.fixture(scope="module")
def exact(folder):
    """Runs in exact mode on 1, 2 and 4 ranks: their summaries by name."""
    # 10 items in batches of 4 or 5: a short last batch, empty parts; a rate at which rounding would grow.
    config = {
        task: write(folder, f"exact_{task}", task, reproducible="exact", batch_size=5 if task == "seg" else 4,
                    learning_rate=0.01, max_steps=12, epochs=6, model__dropout=0.1, optimizer="adam")
        for task in ("seg", "cls")
    }  # fmt: skip
    move = write(folder, "exact_move", "seg", reproducible="exact", batch_size=5, epochs=6, max_steps=None)
    moved = folder / "exact_moved"
    # Step 3 is the middle of an epoch.
    summaries = all_trained(4, (config["seg"], folder / "exact_seg_4"), (move, moved, *stop(3)))
    summaries |= all_trained(
        2, *((config[task], folder / f"exact_{task}_2") for task in config), (move, moved, "--resume")
    )
    return summaries | all_trained(
        1, *((config[task], folder / f"exact_{task}_1") for task in config), (move, folder / "exact_whole")
    )


@pytest.mark.parametrize("task, counts", [("seg", (1, 2, 4)), ("cls", (1, 2))])
def test_exact_mode_gives_the_same_bits_on_1_2_and_4_ranks(folder, exact, task, counts):
    summaries = [exact[f"exact_{task}_{count}"] for count in counts]
    assert {s["steps"] for s in summaries} == {12}
    assert len({s["weights_sha256"] for s in summaries}) == 1
    assert len({state_hash(folder / f"exact_{task}_{count}") for count in counts}) == 1
    assert len({json.dumps(s["best"]) for s in summaries}) == 1


def test_exact_mode_resumes_on_another_number_of_ranks_to_the_bit(exact):
    assert exact["exact_moved"]["steps"] == exact["exact_whole"]["steps"] > 3
    assert exact["exact_moved"]["weights_sha256"] == exact["exact_whole"]["weights_sha256"]


def test_a_repeat_on_three_ranks_is_equal_to_the_bit_also_with_groups(folder):
    config = write(folder, "groups", "seg", max_steps=8, reproducible=True, parallel__groups=3)
    assert len({trained(3, config, folder / f"groups{i}")["weights_sha256"] for i in range(2)}) == 1


@pytest.fixture(scope="module")
def configs(folder):
    """Of the runs on two ranks that are whole, or begun and then resumed."""
    return {
        "half": write(folder, "half", "seg", learning_rate=1e-3),
        "powersgd": write(folder, "powersgd", "seg", epochs=12, max_steps=None, optimizer="adam", model__filters=8,
                          reproducible=True, parallel__compression="powersgd", parallel__powersgd_rank=2),
        "adasum": write(folder, "adasum", "seg", max_steps=6, parallel__reduction="adasum"),
        "auto": write(folder, "auto", "seg", max_steps=2, parallel__compression="auto"),
        "killed": write(folder, "killed", "seg", epochs=8, max_steps=None, reproducible=True, checkpoint_steps=2,
                        parallel__heartbeat_seconds=0.01),
        "slow": write(folder, "slow", "seg", batch_size=8, epochs=60, max_steps=26, data__patches_per_volume=8,
                      learning_rate=1e-3),
    }  # fmt: skip


@pytest.fixture(scope="module")
def whole(folder, configs):
    """The runs on two ranks that nothing disturbs: their summaries by name."""
    return all_trained(
        2,
        (configs["half"], folder / "fp16", "--set", "parallel.compression=fp16"),
        (configs["half"], folder / "fp32"),
        (configs["powersgd"], folder / "powersgd_whole"),
        (configs["powersgd"], folder / "powersgd_parts", *stop(4)),
        (configs["adasum"], folder / "adasum"),
        (configs["auto"], folder / "auto"),
        (configs["killed"], folder / "unkilled"),
        (configs["slow"], folder / "even"),
    )


@pytest.fixture(scope="module")
def resumed(folder, configs, whole):
    """Runs that new processes have brought to their end."""
    kill(configs["killed"], folder / "killed_step", "step")
    kill(configs["killed"], folder / "killed_save", "save")
    return all_trained(
        2,
        (configs["killed"], folder / "killed_step", "--resume"),
        (configs["killed"], folder / "killed_save", "--resume"),
        (configs["powersgd"], folder / "powersgd_parts", "--resume"),
    )


def test_half_precision_learns_nearly_the_same(folder, whole):
    ours, theirs = final_weights(folder / "fp16"), final_weights(folder / "fp32")
    assert 0 < np.linalg.norm(ours - theirs) < 1e-3 * np.linalg.norm(theirs)


def test_powersgd_learns_and_resumes_to_the_bit(folder, whole, resumed):
    # Stopped at the end of an epoch: PowerSGD sends all that it holds back before a checkpoint, so there the runs do alike.
    records = epoch_records(folder / "powersgd_whole")
    assert records[-1]["loss"] < 0.75 * records[0]["loss"]
    assert whole["powersgd_parts"]["steps"] == 4
    assert resumed["powersgd_parts"]["weights_sha256"] == whole["powersgd_whole"]["weights_sha256"]


def test_adasum_and_auto_train(folder, whole):
    assert whole["adasum"]["steps"] == 6
    (event,) = [e for e in read_events(folder / "auto") if e["event"] == "compression"]
    assert event["chosen"] in ("none", "fp16", "powersgd") and "ms" in event["reason"]
    assert checkpoint.load_newest(folder / "auto")[0].meta["compression"] == event["chosen"]


def test_sigusr1_to_all_ranks_saves_and_leaves_with_75(folder):
    config = write(folder, "asked", "seg", epochs=400, max_steps=None, validate_every=1000, checkpoint_epochs=1000)
    run = folder / "asked"
    process = start_mpirun(2, [*COMMAND, config, "--run-dir", run])
    try:
        wait_for(lambda: any(b.event == "step" and b.step > 3 for b in read_beats(run)), process)
        process.send_signal(signal.SIGUSR1)  # mpirun passes it on to all ranks
        _, err = process.communicate(timeout=60)
    finally:
        end(process)
    assert process.returncode == 75, err
    steps = [e["step"] for e in read_events(run) if e["event"] in ("checkpoint", "leave")]
    assert len(steps) == 2 and steps[0] == steps[1] > 3


def kill(config, run, moment):
    """Begin a run on two ranks and kill one of them in a step, or rank 0 in a save."""
    process = start_mpirun(2, [*COMMAND, config, "--run-dir", run])
    try:
        def now():
            beats = read_beats(run)
            return len(beats) == 2 and min(b.step for b in beats) > 4 and (moment == "step" or any(b.saving for b in beats))

        wait_for(now, process, pause=0.001)
        os.kill(read_beats(run)[1 if moment == "step" else 0].pid, signal.SIGKILL)
        process.communicate(timeout=60)
    finally:
        end(process)
    assert process.returncode == 137


@pytest.mark.parametrize("moment", ["step", "save"])
def test_a_killed_run_ends_with_the_weights_of_a_whole_one(folder, resumed, moment):
    assert state_hash(folder / f"killed_{moment}") == state_hash(folder / "unkilled")


def program(path, text):
    """`several.py` with a patch that makes a rank misbehave."""
    path.write_text(f"""
import json, sys
from hvd_imaging import bootstrap
bootstrap.prepare()
from hvd_imaging.world import world_from_environment
rank = world_from_environment().rank
bootstrap.load_tensorflow()
from hvd_imaging.training import loop
{text}
sys.path.insert(0, {str(SEVERAL.parent)!r})
import several
several.run(json.loads(sys.argv[1]))
""")
    return path


DRIFT = """
if rank == 1:
    take_in = loop.Trainer.take_in
    def drift(self, outcome, rate):
        take_in(self, outcome, rate)
        if self.position.total == 3:
            variable = self.model.weights[2]
            variable.assign(variable * 1.0000001 + 1e-7)
    loop.Trainer.take_in = drift
"""


def test_a_rank_that_drifts_is_named_with_the_variable(folder):
    config = write(folder, "drift", "seg", guard_steps=2)
    done = mpirun(2, trainings((config, folder / "drift"), program=program(folder / "drift.py", DRIFT)))
    assert done.returncode == 5, done.stderr
    assert "error: step 4: rank 1 of 2 differs from the others in down0_conv1_norm/" in done.stderr, done.stderr
    assert done.stderr.count("hvd-imaging: error") == 1 and "Traceback" not in done.stderr


OTHER_ITEMS = """
if rank == 1:
    import numpy as np
    from hvd_imaging.pipeline import plan
    order = plan.EpochPlan.order
    plan.EpochPlan.order = lambda self: order(self)[::-1]
"""


def test_a_rank_that_reads_other_items_is_named(folder):
    config = write(folder, "items", "seg", guard_steps=2)
    done = mpirun(2, trainings((config, folder / "items"), program=program(folder / "items.py", OTHER_ITEMS)))
    assert done.returncode == 5, done.stderr
    assert "differs from the others in the items of the batches" in done.stderr


STALL = """
if rank == 1:
    import time
    from hvd_imaging.pipeline import dataset
    whole = dataset.TrainingData.example
    def example(self, epoch, item):
        if epoch == 1:
            time.sleep(600)
        return whole(self, epoch, item)
    dataset.TrainingData.example = example
"""


def test_a_rank_that_waits_for_its_data_is_named_by_the_others(folder):
    config = write(folder, "stall", "seg", parallel__stall_seconds=8, parallel__heartbeat_seconds=0.2)
    done = mpirun(2, trainings((config, folder / "stall"), program=program(folder / "stall.py", STALL)))
    assert done.returncode == 7, done.stderr
    assert "rank 0: waited" in done.stderr and "missing: rank 1 on " in done.stderr and "last event 'input'" in done.stderr
    (event,) = [e for e in read_events(folder / "stall") if e["event"] == "stall"]
    (own,) = [e for e in read_events(folder / "stall", f"ranks/log-{event['rank']:05d}.jsonl") if e["event"] == "stall"]
    assert own["message"] == event["message"]
    assert event["rank"] == 0


def test_a_stopped_rank_is_named(folder):
    config = write(folder, "frozen", "seg", epochs=400, max_steps=None, parallel__stall_seconds=8,
                   parallel__heartbeat_seconds=0.2, validate_every=1000)  # fmt: skip
    run = folder / "frozen"
    process = start_mpirun(2, [*COMMAND, config, "--run-dir", run])
    try:
        wait_for(lambda: len(read_beats(run)) == 2 and all(b.step > 3 for b in read_beats(run)), process)
        os.kill(read_beats(run)[1].pid, signal.SIGSTOP)
        _, err = process.communicate(timeout=90)
    finally:
        end(process)
    assert process.returncode == 7, err
    assert "missing: rank 1 on " in err and "no sign of life" in err


NAN = """
if rank == 1:
    import numpy as np
    from hvd_imaging.pipeline import dataset
    whole = dataset.TrainingData.example
    def example(self, epoch, item):
        image, label, draw = whole(self, epoch, item)
        return (image * np.nan if (epoch, item) in ((0, 1), (1, 2), (1, 3)) else image), label, draw
    dataset.TrainingData.example = example
"""


def test_a_nan_on_one_rank_is_named_and_left_out_by_all(folder):
    config = write(folder, "nan", "seg", on_nonfinite="skip", epochs=3, max_steps=None, guard_steps=1)
    runs = (config, folder / "nan"), (config, folder / "nan_stop", "--set", "train.on_nonfinite=stop")
    done = mpirun(2, trainings(*runs, program=program(folder / "nan.py", NAN)))
    assert json.loads(done.stdout)["steps"] == 12, done.stderr
    events = [e for e in read_events(folder / "nan") if e["event"] == "nonfinite"]
    assert events and all("rank 1" in e["what"] for e in events)
    assert np.isfinite(final_weights(folder / "nan")).all()
    # The second run stops.
    assert done.returncode == 5 and "not finite: rank 1" in done.stderr, done.stderr
    assert done.stderr.count("hvd-imaging: error") == 1 and "Traceback" not in done.stderr


SLOW = """
if rank == 1:
    import time
    from hvd_imaging.training import step
    run = step.Step.run
    def slow(self, batches, count, *rest):
        batches = list(batches)
        rows = sum(float(b[2].numpy().sum()) for b in batches)
        began = time.perf_counter()
        time.sleep(0.05 * rows)
        slept = time.perf_counter() - began
        import dataclasses
        outcome = run(self, iter(batches), count, *rest)
        return dataclasses.replace(outcome, compute_s=outcome.compute_s + slept)
    step.Step.run = slow
"""


def test_a_slow_rank_gets_smaller_parts_and_the_result_stays(folder, configs, whole):
    run = (configs["slow"], folder / "slow", "--set", "train.balance=auto")
    done = mpirun(2, trainings(run, program=program(folder / "slow.py", SLOW)))
    assert done.returncode == 0, done.stderr
    events = [e for e in read_events(folder / "slow") if e["event"] == "balance"]
    assert events and sum(events[0]["shares"]) == 8 and events[0]["shares"][0] > events[0]["shares"][1]
    ours, theirs = final_weights(folder / "slow"), final_weights(folder / "even")
    assert np.linalg.norm(ours - theirs) < 1e-4 * np.linalg.norm(theirs)


def wait_for(condition, process, seconds=90, pause=0.02):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(pause)


def end(process: subprocess.Popen) -> None:
    """Leave no process behind."""
    if process.poll() is None:
        process.terminate()
        try:
            process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def test_the_launcher_brings_a_killed_run_to_its_end(folder, configs, whole):
    run = folder / "launched"
    command = [sys.executable, "-m", "hvd_imaging.cli.main", "launch", "-np", "2", "--",
               "train", configs["killed"], "--run-dir", run]  # fmt: skip
    environ = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMPI_MCA_rmaps_base_oversubscribe": "1",
    }  # fmt: skip
    process = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: len(read_beats(run)) == 2 and all(b.step > 4 for b in read_beats(run)), process)
        os.kill(read_beats(run)[1].pid, signal.SIGKILL)
        _, err = process.communicate(timeout=120)
    finally:
        end(process)
    assert process.returncode == 0, err
    assert "rank 1 " in err and "restart 1 of 3" in err
    events = [e["event"] for e in read_events(run)]
    assert "restart" in events and events[-1] in ("end", "launch", "verdict")
    ending = [e for e in read_events(run) if e["event"] == "end"][-1]
    assert ending["weights_sha256"] == whole["unkilled"]["weights_sha256"]
