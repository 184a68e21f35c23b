"""Dense layers shared out over the ranks: the same training, whole files, and less on the wire."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from datasets import make_dataset
from mpi_tools import mpirun

from hvd_imaging.training import checkpoint
from hvd_imaging.training.events import epoch_records

pytestmark = pytest.mark.mpi

SEVERAL = Path(__file__).with_name("several.py")
COMMAND = [sys.executable, "-m", "hvd_imaging.cli.main", "train"]
SHARDED = ["--set", "parallel.dense=sharded"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("columns")
    make_dataset(folder / "data", "classification", 14, (1, 32, 32), split=(0.15, 0.15))
    for name, optimizer, rate in (("sgd", "sgd", 1e-3), ("adam", "adam", 1e-5)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({
            "data": {"dataset": str(folder / "data"), "patch": [1, 32, 32]},
            "model": {"name": "vgg16", "width": 0.25, "norm": "group", "head": "dense", "dropout": 0.2},
            "train": {"epochs": 5, "batch_size": 5, "max_steps": 10, "optimizer": optimizer, "learning_rate": rate, "clip_norm": 0.5},
            "output": {"tensorboard": False},
        }))  # fmt: skip
    return folder


def train(folder, ranks, *runs):
    """Several trainings in one world; each is (configuration, run folder, further words...)."""
    commands = [["train", os.fspath(folder / f"{of}.yaml"), "--json", "--run-dir", os.fspath(folder / name), *more] for of, name, *more in runs]
    done = mpirun(ranks, [sys.executable, SEVERAL, json.dumps(commands)], timeout=300)
    assert done.returncode == 0, (done.stdout[-2000:], done.stderr[-4000:])
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def trained(folder):
    part = ["--set", "train.max_steps=4"]
    train(folder, 1, ("sgd", "sgd-1"), ("adam", "adam-1"))
    told = train(folder, 2, ("sgd", "sgd-2", *SHARDED), ("adam", "adam-2", *SHARDED), ("adam", "moved", *part, *SHARDED),
                 ("sgd", "half", *SHARDED, "--set", "parallel.compression=fp16"), ("sgd", "parts", *SHARDED, "--set", "train.accumulate=2"))  # fmt: skip
    return folder, told


@pytest.fixture(scope="module")
def moved(trained):
    """Columns that three does not divide, and 11 images, of which one rank has fewer to validate."""
    folder, _ = trained
    train(folder, 3, ("sgd", "sgd-3", *SHARDED), ("adam", "moved", "--resume", "--set", "train.max_steps=7", *SHARDED))
    train(folder, 1, ("adam", "moved", "--resume"))


def state_of(run):
    state, problems = checkpoint.load_newest(run)
    assert state is not None and not problems
    return state


@pytest.mark.parametrize(
    ("name", "reference", "limit"),
    [("sgd-2", "sgd-1", 1e-4), ("adam-2", "adam-1", 1e-4), ("parts", "sgd-1", 1e-4), ("half", "sgd-1", 1e-3),
     *(pytest.param(*more, marks=pytest.mark.long) for more in (("sgd-3", "sgd-1", 1e-4), ("moved", "adam-1", 1e-4)))],
)  # fmt: skip
def test_shared_columns_learn_what_whole_layers_do(trained, name, reference, limit, request):
    folder, _ = trained
    if name in ("sgd-3", "moved"):
        request.getfixturevalue("moved")
    ours, theirs = state_of(folder / name), state_of(folder / reference)
    assert ours.meta["total"] == theirs.meta["total"] == 10
    for kind in ("weights", "optimizer"):
        found, told = getattr(ours, kind), getattr(theirs, kind)
        assert [a.shape for a in found] == [a.shape for a in told]
        if kind == "weights" or limit < 1e-3:
            a, b = (np.concatenate([array.ravel() for array in arrays]).astype(np.float64) for arrays in (found, told))
            assert np.linalg.norm(a - b) < (limit if kind == "weights" else 1e-2) * np.linalg.norm(b)
    records = [epoch_records(folder / run)[-1] for run in (name, reference)]
    assert records[0]["examples"] == records[1]["examples"]
    assert records[0]["val_loss"] == pytest.approx(records[1]["val_loss"], rel=1e-2 if name == "half" else 1e-3)


def test_the_best_model_is_whole_and_its_hash_is_told(trained):
    folder, told = trained
    best = checkpoint.load(folder / "sgd-2" / "best.npz")
    assert [w.shape for w in best.weights] == [w.shape for w in state_of(folder / "sgd-1").weights]
    assert told[0]["weights_sha256"] == checkpoint.digest(state_of(folder / "sgd-2").weights)


def test_a_network_without_dense_layers_is_named_once(folder):
    done = mpirun(2, [*COMMAND, folder / "sgd.yaml", "--run-dir", folder / "bad", *SHARDED, "--set", "model.head=average"], timeout=120)
    assert done.returncode == 2
    assert done.stderr.count("has no dense layer besides its last; take model.head=dense") == 1 and "Traceback" not in done.stderr
    assert not (folder / "bad").exists()
