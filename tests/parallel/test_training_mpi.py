"""Training under real launchers: the same result for any number of ranks, and one failing rank stops all."""

import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from datasets import make_dataset
from mpi_tools import mpirun

from hvd_imaging.monitoring import record
from hvd_imaging.training import checkpoint
from hvd_imaging.training.events import epoch_records, read_events
from hvd_imaging.world import host_name

pytestmark = pytest.mark.mpi

COMMAND = [sys.executable, "-m", "hvd_imaging.cli.main", "train"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mpi")
    # 5 training samples x 2 patches, 12 images: uneven parts, and a short last batch.
    make_dataset(folder / "seg", samples=7, split=(0.15, 0.15))
    make_dataset(folder / "cls", "classification", 14, (1, 96, 96), split=(0.15, 0.15))
    return folder


def write(folder, name, task, **changes):
    values = {
        "data": {"dataset": str(folder / task), "patch": [8, 16, 16], "patches_per_volume": 2},
        "model": {"name": "unet3d", "filters": 4, "depth": 2},
        "train": {
            "epochs": 10, "batch_size": 3, "max_steps": 20, "optimizer": "sgd", "momentum": 0.9, "learning_rate": 0.01,
        },
        "parallel": {},
        "output": {"tensorboard": False},
    }  # fmt: skip
    if task == "cls":
        values["data"]["patch"] = [1, 96, 96]
        values["model"] = {"name": "vgg16", "width": 0.25, "norm": "group"}
    for key, value in changes.items():
        section, _, rest = key.partition("__") if "__" in key else ("train", "", key)
        values[section][rest] = value
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def final_weights(run: Path) -> np.ndarray:
    state, problems = checkpoint.load_newest(run)
    assert state is not None and not problems
    return np.concatenate([w.ravel() for w in state.weights])


SEVERAL = Path(__file__).with_name("several.py")


def trainings(*runs, program=SEVERAL):
    """Arguments for `mpirun`: several trainings in one world; each is (configuration, run folder, further words...)."""
    commands = [["train", os.fspath(config), "--json", "--run-dir", os.fspath(run), *more] for config, run, *more in runs]
    return [sys.executable, program, json.dumps(commands)]


# Max pooling is not smooth: where two voxels are equal up to rounding, another order of additions sends the gradient to
# the other one. Each such jump is worth some per cent of a step, so VGG is asked at the rates of fine-tuning. What it
# learns at higher rates is equal to the bit in exact mode (test_guarantees_mpi.py).
RATES = {("seg", "sgd"): 0.01, ("seg", "adam"): 0.001, ("cls", "sgd"): 3e-5, ("cls", "adam"): 3e-6}
LIMITS = {"sgd": 1e-4, "adam": 1e-3}
WAYS = {
    ("seg", "sgd"): [1, 2, 3, "accumulate"],
    ("seg", "adam"): [1, 3],
    ("cls", "sgd"): [1, 2, 3],
    ("cls", "adam"): [1, 3],
}
MORE = {("seg", "sgd"): [1, 4, "horovodrun"], ("cls", "sgd"): [1, 4]}


@pytest.fixture(scope="module")
def world(folder):
    """Call with a number of ranks: makes all runs of so many ranks in one world, at the first call; how it ended."""
    configs = {
        # Batches of 4 of 10 patches, or of 5 of 10 to 12 images: uneven parts, a last batch that leaves ranks without.
        (task, optimizer): write(
            folder, f"{task}_{optimizer}", task, batch_size=4 if task == "seg" else 5, max_steps=50, epochs=30,
            optimizer=optimizer, learning_rate=rate, validate_every=100,
        )
        for (task, optimizer), rate in RATES.items()
    }  # fmt: skip
    resumed = write(folder, "resume", "seg", epochs=3, max_steps=None)

    @functools.cache
    def run(count):
        if count == "horovodrun":
            return horovodrun(2, trainings((configs["seg", "sgd"], folder / "seg_sgd_horovodrun")))
        runs = [(config, folder / f"{'_'.join(of)}_{count}") for of, config in configs.items() if count in [*WAYS[of], *MORE.get(of, ())]]
        if count == 1:
            runs.append((configs["seg", "sgd"], folder / "seg_sgd_accumulate", "--set", "train.accumulate=2"))
        if count == 2:
            runs += [(resumed, folder / "whole"), (resumed, folder / "parts", "--set", "train.max_steps=5")]
        return mpirun(count, trainings(*runs), timeout=400)

    return run


@pytest.mark.parametrize(
    ("task", "optimizer", "ways"),
    [(*of, ways) for of, ways in WAYS.items()] + [pytest.param(*of, ways, marks=pytest.mark.long) for of, ways in MORE.items()],
)
def test_any_number_of_ranks_learns_the_same(folder, world, task, optimizer, ways):
    for way in ways:
        done = world(1 if way == "accumulate" else way)
        assert done.returncode == 0, done.stderr
    runs = {way: folder / f"{task}_{optimizer}_{way}" for way in ways}
    reference, metrics = final_weights(runs[1]), epoch_records(runs[1])
    assert metrics[-1]["step"] == 50
    for way, run in runs.items():
        weights = final_weights(run)
        difference = np.linalg.norm(weights - reference) / np.linalg.norm(reference)
        print(f"{task} {optimizer} {way}: relative difference of the parameters {difference:.1e}")
        assert difference < LIMITS[optimizer], way
        for ours, theirs in zip(epoch_records(run), metrics, strict=True):
            assert ours["examples"] == theirs["examples"]
            for key in ("loss", "val_loss"):
                assert ours.get(key) == pytest.approx(theirs.get(key), rel=1e-3), (way, key)


def horovodrun(count, command):
    environ = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    launch = ["horovodrun", "-np", str(count), *map(str, command)]
    return subprocess.run(launch, env=environ, capture_output=True, text=True, timeout=240)


def test_resume_on_two_ranks_is_exact_to_the_bit(folder, world):
    done = world(2)
    assert done.returncode == 0, done.stderr
    whole = json.loads(done.stdout.splitlines()[-2])
    done = mpirun(2, trainings((folder / "resume.yaml", folder / "parts", "--resume")), timeout=240)
    assert done.returncode == 0, done.stderr
    parts = json.loads(done.stdout.splitlines()[-1])
    assert whole["steps"] == parts["steps"] > 5
    assert whole["weights_sha256"] == parts["weights_sha256"]
    left_by_each_rank(folder / "whole", starts=1)
    left_by_each_rank(folder / "parts", starts=2)


def left_by_each_rank(run, starts):
    """Samples, logs and times of two ranks on this host."""
    host = host_name()
    begun = [event for event in read_events(run) if event["event"] in ("start", "resume")]
    assert len(begun) == starts and all(event["hosts"] == [host, host] and event["job_id"] is None for event in begun)
    of_ranks = [event for event in read_events(run) if event["event"] == "ranks"]
    assert {event["epoch"] for event in of_ranks} == {0, 1, 2}
    for event in of_ranks:
        assert event["hosts"] == [host, host] and all(len(event[f"{name}_seconds"]) == 2 for name in ("input", "compute", "exchange"))
        assert min(event["compute_seconds"]) > 0
    # 10 patches in batches of 3, 3, 3, 1: the last rank takes what is left over.
    assert of_ranks[-1]["samples"] == [3, 7]
    samples = record.read(run)
    assert {sample["rank"] for sample in samples} == {0, 1} and len({sample["pid"] for sample in samples if sample["rank"] == 1}) == starts
    # One of the two speaks for the host.
    assert [host.host for host in record.summary(samples).hosts] == [host]
    assert all((sample["watts"] is None) == (sample["rank"] == 1) for sample in samples)
    for rank in (0, 1):
        said = [line["event"] for line in read_events(run, f"ranks/log-{rank:05d}.jsonl")]
        assert said.count("start") == said.count("end") == starts and said.count("epoch") >= 3


def test_more_ranks_than_samples_is_one_message(folder):
    config = write(folder, "many", "seg", batch_size=64)
    done = mpirun(4, [*COMMAND, config, "--run-dir", folder / "many", "--set", "data.patches_per_volume=1",
                      "--set", "data.train_split=val"], timeout=180)  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("4 ranks, but only 1 samples in the train split") == 1
    assert "Traceback" not in done.stderr and not (folder / "many").exists()


def test_an_unknown_key_is_said_once(folder):
    config = write(folder, "typo", "seg", epoch=3)
    done = mpirun(2, [*COMMAND, config], timeout=120)
    assert done.returncode == 2
    assert done.stderr.count("train.epoch: unknown key") == 1 and "Traceback" not in done.stderr


# Rank 1 alone sees a damaged file in the middle of training, as on a node whose filesystem fails.
FAILING = """
import sys
from hvd_imaging import bootstrap
from hvd_imaging.world import world_from_environment
bootstrap.prepare()
if world_from_environment().rank == 1:
    from hvd_imaging.errors import DatasetError
    from hvd_imaging.pipeline import dataset
    whole = dataset.TrainingData.example
    def example(self, epoch, item):
        if epoch == 1:
            raise DatasetError("shard-00000.h5: sample 0: damaged")
        return whole(self, epoch, item)
    dataset.TrainingData.example = example
    # And it computes slowly.
    from dataclasses import replace
    from hvd_imaging.training.step import Step
    run = Step.run
    Step.run = lambda self, *args: (lambda done: replace(done, compute_s=10 * done.compute_s))(run(self, *args))
from hvd_imaging.monitoring import stragglers
stragglers.LEAST_S = 0
from hvd_imaging.cli.main import main
main()
"""


def test_one_failing_rank_stops_all_with_its_message(folder):
    config = write(folder, "failing", "seg", max_steps=None)
    script = folder / "failing.py"
    script.write_text(FAILING)
    began = time.monotonic()
    done = mpirun(2, [sys.executable, script, "train", config, "--run-dir", folder / "failing"], timeout=120)
    took = time.monotonic() - began
    assert done.returncode == 4, (done.returncode, done.stderr)
    assert "hvd-imaging: error: rank 1: shard-00000.h5: sample 0: damaged" in done.stderr
    assert "Traceback" not in done.stderr
    print(f"all ranks ended {took:.0f} s after the start")
    # What was learned before is still there.
    assert epoch_records(folder / "failing")[0]["examples"] == 10
    (error,) = [line for line in read_events(folder / "failing", "ranks/log-00001.jsonl") if line["event"] == "error"]
    assert error["kind"] == "DatasetError" and error["message"] == "shard-00000.h5: sample 0: damaged"
    (slow,) = [event for event in read_events(folder / "failing") if event["event"] == "straggler"]
    assert (slow["rank"], slow["host"], slow["epoch"]) == (1, host_name(), 0) and slow["ratio"] > 1.25
    assert f"rank 1 on {host_name()} is slow" in done.stderr
