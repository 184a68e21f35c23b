"""The whole way of the data by the command line alone: archive, ingest, two ranks, evaluation, export, prediction."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from mpi_tools import mpirun

from hvd_imaging.sources.catalog import load_case, scan
from hvd_imaging.training.events import epoch_records

COMMAND = [sys.executable, "-m", "hvd_imaging.cli.main"]
SEVERAL = Path(__file__).parents[1] / "parallel" / "several.py"


def run(*args):
    finished(subprocess.run([*COMMAND, *map(os.fspath, args)], capture_output=True, text=True, timeout=240))


def run_all(*commands):
    """Commands one after another in one process, which starts TensorFlow once."""
    finished(subprocess.run([sys.executable, *several(commands)], capture_output=True, text=True, timeout=240))


def on_two_ranks(*commands):
    finished(mpirun(2, [sys.executable, *several(commands)], timeout=240))


def several(commands):
    return SEVERAL, json.dumps([[os.fspath(word) for word in command] for command in commands])


def finished(done):
    assert done.returncode == 0, (done.args, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chain")
    run("phantom", folder / "archive", "--patients", "8", "--seed", "5")
    run("phantom", folder / "unseen", "--patients", "1", "--seed", "6")
    return folder


@pytest.mark.mpi
def test_segmentation_from_archive_to_dicom_seg(folder):
    on_two_ranks([
        "ingest", folder / "archive", folder / "data", "--set", "preprocess.spacing=[8,6,6]",
        "--set", "preprocess.crop=body",
    ])  # fmt: skip
    run("dataset", "verify", folder / "data")
    run("init", "segmentation", "--dataset", folder / "data", "-o", folder / "seg.yaml")
    on_two_ranks([
        "train", folder / "seg.yaml", "--run-dir", folder / "run", "--set", "data.patch=[16,32,32]",
        "--set", "model.filters=4", "--set", "model.depth=2", "--set", "train.epochs=24", "--set", "model.norm=group",
        "--set", "train.learning_rate=0.02",
    ], ["evaluate", folder / "run"])  # fmt: skip
    assert epoch_records(folder / "run")[-1]["val_dice_lung"] > 0.5
    report = json.loads((folder / "run/evaluation-test.json").read_text())
    assert report["mean"]["dice"]["per_class"]["lung"]["value"] > 0.5
    assert (folder / "run/plots/overlays-test.png").stat().st_size > 5000

    run_all(
        ["export", folder / "run", "--format", "tflite", folder / "lite"],
        ["export", folder / "run", "--format", "savedmodel", folder / "saved"],
    )
    series = next((folder / "unseen").glob("patient_*/series"))
    models = ("run", "lite", "saved")
    run_all(
        *(["predict", folder / model, series, folder / f"{model}.nii.gz"] for model in models),
        ["predict", folder / "lite", series, folder / "mask.dcm"],
    )
    masks = [np.asarray(nibabel.load(folder / f"{model}.nii.gz").dataobj) for model in models]
    assert (masks[0] == masks[1]).mean() > 0.999 and (masks[0] == masks[2]).mean() > 0.999
    assert (folder / "mask.dcm").stat().st_size > 0
    # What was predicted lies where the archive's own mask of that unseen patient lies.
    found = scan(folder / "unseen")
    _, truth = load_case(found.cases[0], found)
    predicted = masks[0].transpose(2, 1, 0)
    overlap = 2 * ((predicted > 0) & (truth > 0)).sum() / ((predicted > 0).sum() + (truth > 0).sum())
    assert overlap > 0.5


@pytest.mark.mpi
def test_classification_from_archive_to_csv(folder):
    run(
        "ingest", folder / "archive", folder / "images", "--task", "classification",
        "--set", "preprocess.projection=mip", "--set", "preprocess.projection_slab=[0.25,0.75]",
        "--set", "preprocess.spacing=[6,6,6]",
    )  # fmt: skip
    run("init", "classification", "--dataset", folder / "images", "-o", folder / "cls.yaml")
    on_two_ranks([
        "train", folder / "cls.yaml", "--run-dir", folder / "cls", "--set", "data.patch=[1,32,48]",
        "--set", "train.epochs=2", "--set", "model.width=0.125",
    ])  # fmt: skip
    series = next((folder / "unseen").glob("patient_*/series"))
    run_all(["evaluate", folder / "cls"], ["export", folder / "cls", "--format", "tflite", folder / "cls_lite"])
    run("predict", folder / "cls_lite", series, folder / "answer.csv")
    with open(folder / "answer.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["p_0"]) + float(row["p_1"]) == pytest.approx(1, abs=1e-4)


def test_nothing_that_identifies_is_left(folder):
    """Runs after the two above; looks into every file that is not an archive."""
    text = b"".join(
        path.read_bytes()
        for name in ("data", "images", "run", "cls", "lite", "saved")
        for path in (folder / name).rglob("*")
        if path.is_file()
    )
    assert text
    for case in scan(folder / "archive").cases:
        for secret in (case.source_id, case.patient_id):
            assert secret.encode() not in text
