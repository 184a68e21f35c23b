"""Training under real launchers: the same result for any number of ranks, and one failing rank stops all."""

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

from hvd_imaging.training import checkpoint
from hvd_imaging.training.events import epoch_records

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


# Max pooling is not smooth: where two voxels are equal up to rounding, another order of additions sends the gradient to
# the other one. Each such jump is worth some per cent of a step, so VGG is asked at the rates of fine-tuning. What it
# learns at higher rates is equal to the bit in exact mode (test_guarantees_mpi.py).
RATES = {("seg", "sgd"): 0.01, ("seg", "adam"): 0.001, ("cls", "sgd"): 3e-5, ("cls", "adam"): 3e-6}
LIMITS = {"sgd": 1e-4, "adam": 1e-3}


@pytest.mark.parametrize(
    "task, optimizer, ways",
    [
        ("seg", "sgd", [1, 2, 3, 4, "accumulate", "horovodrun"]),
        ("seg", "adam", [1, 3]),
        ("cls", "sgd", [1, 2, 3, 4]),
        ("cls", "adam", [1, 3]),
    ],
)
def test_any_number_of_ranks_learns_the_same(folder, task, optimizer, ways):
    # Global batches of 4 of 10 patches, or of 5 of 10 to 12 images: uneven parts, a last batch that leaves ranks without.
    batch = 4 if task == "seg" else 5
    config = write(
        folder, f"same_{task}_{optimizer}", task, batch_size=batch, max_steps=50, epochs=30, optimizer=optimizer,
        learning_rate=RATES[task, optimizer], validate_every=100,
    )  # fmt: skip
    runs = {way: folder / f"{task}_{optimizer}_{way}" for way in ways}
    for way, run in runs.items():
        command = [*COMMAND, config, "--run-dir", run]
        if way == "horovodrun":
            done = horovodrun(2, command)
        elif way == "accumulate":
            done = mpirun(1, [*command, "--set", "train.accumulate=2"], timeout=240)
        else:
            done = mpirun(way, command, timeout=240)
        assert done.returncode == 0, done.stderr
    reference, metrics = final_weights(runs[1]), epoch_records(runs[1])
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


def test_resume_on_two_ranks_is_exact_to_the_bit(folder):
    config = write(folder, "resume", "seg", epochs=3, max_steps=None)
    shas = []
    for run, steps in (("whole", [None]), ("parts", [5, None])):
        for stop in steps:
            extra = ["--set", f"train.max_steps={stop}"] if stop else []
            done = mpirun(2, [*COMMAND, config, "--resume", "--json", "--run-dir", folder / run, *extra], timeout=240)
            assert done.returncode == 0, done.stderr
        shas.append(json.loads(done.stdout.splitlines()[-1])["weights_sha256"])
    assert shas[0] == shas[1]


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
