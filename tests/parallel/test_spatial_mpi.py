"""Volumes shared by ranks: every layer, whole networks and trainings give what they give unsplit."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from datasets import make_dataset
from mpi_tools import mpirun

from hvd_imaging.training import checkpoint
from hvd_imaging.training.events import epoch_records, read_events

pytestmark = pytest.mark.mpi

TRAIN = [sys.executable, "-m", "hvd_imaging.cli.main", "train"]
PARITY = [sys.executable, Path(__file__).with_name("spatial_parity.py")]
# Sums over channels that a norm makes nearly cancel: rounding of the parts is all that is left of some of its gradients.
LIMITS = {"output": 1e-5, "gradient": 1e-4, "loss": 1e-5}


@pytest.mark.parametrize(
    ("ranks", "spatial", "cases"),
    [
        (2, 2, []),
        (4, 4, ["conv k3 s1 same d13", "conv k3 s2 same d16", "conv k3 s1 valid d12", "conv dilated", "transposed k3 s2 same", "max pool same",
                "average pool same", "group norm", "dropout by voxel", "global maximum", "unet3d", "unet3d uneven", "cnn3d odd"]),
        pytest.param(4, 2, ["conv k3 s2 same d15", "instance norm", "dropout by channel", "unet3d uneven", "cnn3d"], marks=pytest.mark.long),
    ],
)  # fmt: skip
def test_layers_and_networks_on_slabs(ranks, spatial, cases):
    done = mpirun(ranks, [*PARITY, str(spatial), *cases], timeout=400)
    assert done.returncode == 0, (done.stdout[-2000:], done.stderr[-4000:])
    found = json.loads(done.stdout)
    assert len(found) >= 5
    wrong = {case: one for case, one in found.items() if any(not one[key] <= limit for key, limit in LIMITS.items())}
    assert not wrong


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spatial")
    make_dataset(folder / "seg", samples=7, split=(0.15, 0.15))
    make_dataset(folder / "cls", "classification", 14, (36, 32, 32), split=(0.15, 0.15))
    return folder


def train(folder, name, ranks, *settings, task="seg", code=0, resume=False):
    values = {
        "data": {"dataset": str(folder / task), "patch": [12, 16, 16], "patches_per_volume": 2, "augment": {"flip": [True, True, True]}},
        "model": {"name": "unet3d", "filters": 4, "depth": 3, "dropout": 0.2} if task == "seg" else {"name": "cnn3d", "width": 0.25, "norm": "group"},
        "train": {
            "epochs": 30, "batch_size": 4, "max_steps": 50, "optimizer": "sgd", "momentum": 0.9, "learning_rate": 0.01, "validate_every": 10,
        },
        "output": {"tensorboard": False},
    }  # fmt: skip
    if task == "cls":
        # Uneven: 16 slices and 20. At a rate of fine-tuning: where a norm has few voxels, one that rounding puts on the other side of a
        # ReLU is a per cent of a step, and a thousandth of the weights after some large ones (docs/distributed.md).
        values["data"]["patch"] = [36, 32, 32]
        values["train"]["learning_rate"] = 1e-4
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    words = [*TRAIN, folder / f"{name}.yaml", "--run-dir", folder / name, *(["--resume"] if resume else [])]
    for setting in settings:
        words += ["--set", setting]
    done = mpirun(ranks, words, timeout=300)
    assert done.returncode == code, (done.stdout[-2000:], done.stderr[-4000:])
    return done


def weights(run):
    state, problems = checkpoint.load_newest(run)
    assert state is not None and not problems
    return np.concatenate([w.ravel() for w in state.weights])


def last_epoch(run):
    return [record for record in epoch_records(run) if "val_loss" in record][-1]


@pytest.fixture(scope="module")
def whole(folder):
    for task in ("seg", "cls"):
        train(folder, f"{task}-whole", 1, task=task)
    return folder


@pytest.mark.parametrize(("task", "ranks"), [("seg", 4), ("cls", 2)])
def test_fifty_steps_on_slabs_learn_what_whole_volumes_do(whole, task, ranks):
    train(whole, f"{task}-split", ranks, "parallel.spatial=2", task=task)
    assert np.abs(weights(whole / f"{task}-split") - weights(whole / f"{task}-whole")).max() < 1e-3
    found, told = last_epoch(whole / f"{task}-split"), last_epoch(whole / f"{task}-whole")
    assert found["examples"] == told["examples"]
    for key in ("loss", "val_loss"):
        assert found[key] == pytest.approx(told[key], rel=1e-3)


@pytest.mark.long
def test_a_run_goes_on_under_another_grid(whole):
    train(whole, "moved", 4, "parallel.spatial=2", "train.max_steps=20")
    train(whole, "moved", 2, "parallel.spatial=2", "train.max_steps=35", "train.recompute=true", resume=True)
    train(whole, "moved", 1, resume=True)
    assert np.abs(weights(whole / "moved") - weights(whole / "seg-whole")).max() < 1e-3


def test_the_grid_can_be_found_by_memory(folder):
    # One volume a step: a second rank has nothing to do unless it shares it.
    train(folder, "auto", 2, "parallel.spatial=auto", "train.batch_size=1", "train.max_steps=3")
    assert next(event for event in read_events(folder / "auto") if event["event"] == "start")["grid"] == {"data": 1, "spatial": 2}
    done = train(folder, "none", 2, "parallel.spatial=auto", "parallel.memory_gb=0.1", code=2)
    assert done.stderr.count("no grid of 2 ranks fits into 0.1 GB a rank") == 1 and not (folder / "none").exists()


@pytest.mark.parametrize(
    ("ranks", "settings", "message"),
    [
        (2, ["parallel.spatial=2", "data.patch=[4,16,16]"], "a depth of 4 (data.patch) cannot be split into 2 slabs of whole 4 slices"),
        (3, ["parallel.spatial=2"], "3 ranks cannot be cut into groups of 2"),
        (2, ["parallel.spatial=2", "parallel.data=2"], "parallel.data=2 x parallel.spatial=2 makes 4 ranks, found 2"),
        (2, ["parallel.spatial=2", "train.balance=auto"], "does not go together with train.balance=auto"),
        (2, ["parallel.spatial=2", "model.name=networks:subclassed"], "layer 'rolled' (Lambda) has no spatial version"),
    ],
)
def test_what_can_not_be_split_is_said_once_before_the_first_step(folder, ranks, settings, message, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(folder))
    (folder / "networks.py").write_text(
        "import tensorflow as tf\n"
        "def subclassed(spec):\n"
        "    inputs = tf.keras.Input((*spec.patch, spec.channels))\n"
        "    x = tf.keras.layers.Conv3D(len(spec.classes), 1)(inputs)\n"
        "    return tf.keras.Model(inputs, tf.keras.layers.Lambda(lambda x: tf.roll(x, 1, 1), name='rolled')(x))\n"
    )
    done = train(folder, "bad", ranks, *settings, code=2)
    assert done.stderr.count(message) == 1 and "Traceback" not in done.stderr
    assert not (folder / "bad").exists()


def test_ranks_that_disagree_about_the_grid_all_end(folder):
    program = (
        "import sys\n"
        "from hvd_imaging.cli.main import main\n"
        "from hvd_imaging.world import world_from_environment\n"
        "sys.argv[1:] = [*sys.argv[1:], '--set', f'parallel.spatial={2 if world_from_environment().rank < 2 else 1}']\n"
        "main()\n"
    )
    (folder / "odd.py").write_text(program)
    (folder / "odd.yaml").write_text(yaml.safe_dump({
        "data": {"dataset": str(folder / "seg"), "patch": [12, 16, 16]}, "model": {"name": "unet3d", "filters": 4, "depth": 3},
    }))  # fmt: skip
    done = mpirun(4, [sys.executable, folder / "odd.py", "train", folder / "odd.yaml", "--run-dir", folder / "odd"], timeout=60)
    assert done.returncode == 2 and "parallel.spatial: rank 0 has 2, rank 2 has 1" in done.stderr
    assert "Traceback" not in done.stderr and not (folder / "odd").exists()
