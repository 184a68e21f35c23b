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
from test_training_mpi import COMMAND, final_weights, write

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


def state_hash(run):
    """SHA-256 of all arrays of the newest checkpoint: weights and optimizer."""
    return checkpoint.load_newest(run)[0].meta["sha256"]


@pytest.mark.parametrize("task, rate", [("seg", 0.01), ("cls", 0.01)])
def test_exact_mode_gives_the_same_bits_on_1_2_and_4_ranks(folder, task, rate):
    # 10 items in batches of 4 or 5: a short last batch, empty parts; a rate at which rounding would grow.
    config = write(folder, f"exact_{task}", task, reproducible="exact", batch_size=5 if task == "seg" else 4,
                   learning_rate=rate, max_steps=12, epochs=6, model__dropout=0.1, optimizer="adam")  # fmt: skip
    counts = (1, 2, 4) if task == "seg" else (1, 2)
    summaries = [trained(count, config, folder / f"exact_{task}_{count}") for count in counts]
    assert len({s["weights_sha256"] for s in summaries}) == 1
    assert len({state_hash(folder / f"exact_{task}_{count}") for count in counts}) == 1
    assert len({json.dumps(s["best"]) for s in summaries}) == 1


def test_exact_mode_resumes_on_another_number_of_ranks_to_the_bit(folder):
    config = write(folder, "exact_move", "seg", reproducible="exact", batch_size=5, epochs=6, max_steps=None)
    whole = trained(1, config, folder / "exact_whole")
    for count, stop in ((4, 3), (2, None)):  # 3 is the middle of an epoch
        settings = [f"train.max_steps={stop}"] if stop else []
        moved = trained(count, config, folder / "exact_moved", *settings, resume=True)
    assert moved["weights_sha256"] == whole["weights_sha256"]


def test_a_repeat_on_three_ranks_is_equal_to_the_bit_also_with_groups(folder):
    config = write(folder, "groups", "seg", max_steps=8, reproducible=True, parallel__groups=3)
    assert len({trained(3, config, folder / f"groups{i}")["weights_sha256"] for i in range(2)}) == 1


def test_half_precision_learns_nearly_the_same(folder):
    config = write(folder, "fp16", "seg", learning_rate=1e-3)
    trained(2, config, folder / "fp16", "parallel.compression=fp16")
    trained(2, config, folder / "fp32")
    ours, theirs = final_weights(folder / "fp16"), final_weights(folder / "fp32")
    assert 0 < np.linalg.norm(ours - theirs) < 1e-3 * np.linalg.norm(theirs)


def test_powersgd_learns_and_resumes_to_the_bit(folder):
    # Stopped at the end of an epoch: PowerSGD sends all that it holds back before a checkpoint, so there the runs do alike.
    config = write(folder, "powersgd", "seg", epochs=12, max_steps=None, optimizer="adam", model__filters=8,
                   reproducible=True, parallel__compression="powersgd", parallel__powersgd_rank=2)  # fmt: skip
    whole = trained(2, config, folder / "powersgd_whole")
    trained(2, config, folder / "powersgd_parts", "train.max_steps=4", resume=True)
    parts = trained(2, config, folder / "powersgd_parts", resume=True)
    records = epoch_records(folder / "powersgd_whole")
    assert records[-1]["loss"] < 0.75 * records[0]["loss"]
    assert parts["weights_sha256"] == whole["weights_sha256"]


def test_adasum_and_auto_train(folder):
    config = write(folder, "adasum", "seg", max_steps=6, parallel__reduction="adasum")
    assert trained(2, config, folder / "adasum")["steps"] == 6
    config = write(folder, "auto", "seg", max_steps=2, parallel__compression="auto")
    trained(2, config, folder / "auto")
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


@pytest.mark.parametrize("moment", ["step", "save"])
def test_a_killed_run_ends_with_the_weights_of_a_whole_one(folder, moment):
    config = write(folder, "killed", "seg", epochs=8, max_steps=None, reproducible=True, checkpoint_steps=2,
                   parallel__heartbeat_seconds=0.01)  # fmt: skip
    if not (folder / "unkilled").exists():
        trained(2, config, folder / "unkilled")
    run = folder / f"killed_{moment}"
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
    trained(2, config, run, resume=True)
    assert state_hash(run) == state_hash(folder / "unkilled")


def program(path, text):
    path.write_text(f"""
import sys
from hvd_imaging import bootstrap
bootstrap.prepare()
from hvd_imaging.world import world_from_environment
rank = world_from_environment().rank
bootstrap.load_tensorflow()
from hvd_imaging.training import loop
{text}
from hvd_imaging.cli.main import main
main()
""")
    return [sys.executable, path, "train"]


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
    done = mpirun(2, [*program(folder / "drift.py", DRIFT), config, "--run-dir", folder / "drift"], timeout=120)
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
    done = mpirun(2, [*program(folder / "items.py", OTHER_ITEMS), config, "--run-dir", folder / "items"], timeout=120)
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
    done = mpirun(2, [*program(folder / "stall.py", STALL), config, "--run-dir", folder / "stall"], timeout=120)
    assert done.returncode == 7, done.stderr
    assert "rank 0: waited" in done.stderr and "missing: rank 1 on " in done.stderr and "last event 'input'" in done.stderr
    (event,) = [e for e in read_events(folder / "stall") if e["event"] == "stall"]
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
    script = program(folder / "nan.py", NAN)
    config = write(folder, "nan", "seg", on_nonfinite="skip", epochs=3, max_steps=None, guard_steps=1)
    done = mpirun(2, [*script, config, "--run-dir", folder / "nan"], timeout=120)
    assert done.returncode == 0, done.stderr
    events = [e for e in read_events(folder / "nan") if e["event"] == "nonfinite"]
    assert events and all("rank 1" in e["what"] for e in events)
    assert np.isfinite(final_weights(folder / "nan")).all()
    done = mpirun(2, [*script, config, "--run-dir", folder / "nan_stop", "--set", "train.on_nonfinite=stop"], timeout=120)
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
        time.sleep(0.15 * rows)
        slept = time.perf_counter() - began
        import dataclasses
        outcome = run(self, iter(batches), count, *rest)
        return dataclasses.replace(outcome, compute_s=outcome.compute_s + slept)
    step.Step.run = slow
"""


def test_a_slow_rank_gets_smaller_parts_and_the_result_stays(folder):
    script = program(folder / "slow.py", SLOW)
    config = write(folder, "slow", "seg", batch_size=8, epochs=60, max_steps=26, data__patches_per_volume=8, learning_rate=1e-3)
    done = mpirun(2, [*script, config, "--run-dir", folder / "slow", "--set", "train.balance=auto"], timeout=200)
    assert done.returncode == 0, done.stderr
    events = [e for e in read_events(folder / "slow") if e["event"] == "balance"]
    assert events and sum(events[0]["shares"]) == 8 and events[0]["shares"][0] > events[0]["shares"][1]
    trained(2, config, folder / "even")
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


def test_the_launcher_brings_a_killed_run_to_its_end(folder):
    config = write(folder, "launched", "seg", epochs=8, max_steps=None, reproducible=True, checkpoint_steps=2,
                   parallel__heartbeat_seconds=0.05)  # fmt: skip
    whole = trained(2, config, folder / "launched_whole")
    run = folder / "launched"
    command = [sys.executable, "-m", "hvd_imaging.cli.main", "launch", "-np", "2", "--", "train", str(config), "--run-dir", run]
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
    assert ending["weights_sha256"] == whole["weights_sha256"]
