"""`hvd-imaging ingest` and `hvd-imaging dataset`, called as click commands."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner

from hvd_imaging import errors
from hvd_imaging.cli.dataset import command as dataset_command
from hvd_imaging.cli.ingest import command as ingest_command
from hvd_imaging.config import PreprocessConfig, ShardConfig, SplitConfig
from hvd_imaging.shards import manifest as manifests
from hvd_imaging.shards.writer import Record, write_dataset


def run(command, *args):
    # click 8.1 mixes stderr into stdout unless told otherwise; later versions keep them apart and know no such option.
    apart = {"mix_stderr": False} if "mix_stderr" in inspect.signature(CliRunner).parameters else {}
    result = CliRunner(**apart).invoke(command, [str(arg) for arg in args], prog_name="hvd-imaging")
    if result.exception is not None and not isinstance(result.exception, SystemExit | errors.HvdImagingError):
        raise result.exception
    return result


@pytest.fixture
def dataset(tmp_path):
    random = np.random.default_rng(0)
    records = [
        Record(
            id=f"{i:016x}",
            patient=f"{i // 2:016x}",
            image=random.random((4, 6, 8 + i, 1), dtype=np.float32),
            mask=random.integers(0, 2, (4, 6, 8 + i)).astype(np.uint8),
            affine=np.diag([2.0, 1.0, 0.5 + i, 1.0]),
            modality="MR",
        )
        for i in range(12)
    ]
    write_dataset(
        tmp_path / "data",
        records,
        "segmentation",
        ("background", "lesion"),
        PreprocessConfig(intensity="percentile", crop="foreground"),
        SplitConfig(val=0.2, test=0.2),
        ShardConfig(shard_mb=0.004),
    )
    return tmp_path / "data"


def test_info_shows_what_there_is(dataset):
    manifest = manifests.load(dataset)
    text = run(dataset_command, "info", dataset).output
    for expected in ("segmentation", "lesion (", manifest.hash(), "MR", "8-19", "2 x 1 x 0.5-11.5 mm", "crop=foreground"):
        assert expected in text, expected
    assert "window" not in text  # of preprocessing, only what was used
    found = json.loads(run(dataset_command, "info", dataset, "--json").output)
    assert found["manifest_hash"] == manifest.hash() and found["samples"] == 12 and found["patients"] == 6
    assert sum(found["class_counts"].values()) == sum(np.prod(s.shape) for s in manifest.samples)
    assert {name: split["samples"] for name, split in found["splits"].items()} == manifest.counts()
    assert found["missing_shards"] == [] and found["bytes"] > 0


def test_verify_is_quiet_about_a_good_dataset(dataset):
    result = run(dataset_command, "verify", dataset)
    assert result.exit_code == 0 and "12 samples read" in result.output
    assert json.loads(run(dataset_command, "verify", dataset, "--json").output)["problems"] == []


def test_verify_lists_sample_and_shard(dataset):
    sample = manifests.load(dataset).samples[5]
    path = dataset / sample.shard
    path.write_bytes(path.read_bytes()[:-200])
    result = run(dataset_command, "verify", dataset)
    assert result.exit_code == 4 == errors.DatasetError.exit_code
    assert f"{sample.shard}: sample {sample.id}" in result.output and "hvd-imaging: error:" in result.stderr
    result = run(dataset_command, "verify", dataset, "--json")
    assert result.exit_code == 4
    found = json.loads(result.stdout)["problems"]
    assert {"sample", "shard", "reason"} == set(found[0]) and sample.id in {problem["sample"] for problem in found}


@pytest.mark.parametrize("verb", ["info", "verify", "split", "log", "audit", "diff", "checkout", "sign"])
def test_no_dataset(tmp_path, verb):
    more = {
        "split": ["--out", tmp_path / "new"], "diff": [tmp_path / "nowhere"], "checkout": ["parent", tmp_path / "new"],
        "sign": ["--key-file", tmp_path / "key", "--new-key"],
    }  # fmt: skip
    result = run(dataset_command, verb, tmp_path / "nowhere", *more.get(verb, []))
    assert not (tmp_path / "new").exists() and not (tmp_path / "key").exists()
    assert isinstance(result.exception, errors.DatasetError)
    assert re.search(r"no manifest\.json.*hvd-imaging ingest", str(result.exception))


def test_split_moves_patients_and_leaves_the_shards(dataset):
    before = manifests.load(dataset)
    shards = {path.name: hashlib.sha256(path.read_bytes()).digest() for path in dataset.glob("*.h5")}
    out = dataset.with_name("out")
    result = run(dataset_command, "split", dataset, "--out", out, "--val", "0.5", "--test", 0, "--seed", 3)
    after = manifests.load(out)
    assert result.exit_code == 0
    assert "train  6 samples of 3 patients" in result.output and "test   0 samples" in result.output
    assert "'test' is empty" in result.stderr and after.hash() in result.output
    assert after.counts() == {"train": 6, "val": 6, "test": 0} and after.hash() != before.hash()
    assert after.split == SplitConfig(val=0.5, test=0, seed=3)
    assert {s.id: s.sha256 for s in after.samples} == {s.id: s.sha256 for s in before.samples}
    assert shards == {path.name: hashlib.sha256(path.read_bytes()).digest() for path in out.glob("*.h5")}
    assert manifests.load(dataset) == before, "a dataset never changes"
    assert all((out / name).samefile(dataset / name) for name in shards), "no room is taken twice"
    splits = {}
    for sample in after.samples:
        assert splits.setdefault(sample.patient, sample.split) == sample.split
    found = json.loads(run(dataset_command, "split", out, "--out", dataset.with_name("again"), "--seed", 4, "--json").stdout)
    assert found["split"] == SplitConfig(val=0.5, test=0, seed=4).model_dump()
    assert found["splits"]["test"]["samples"] == 0 and found["manifest_hash"] != after.hash()


def test_impossible_split_changes_nothing(dataset):
    before = (dataset / "manifest.json").read_bytes()
    out = dataset.with_name("out")
    result = run(dataset_command, "split", dataset, "--out", out, "--val", 0.9, "--test", 0.9)
    assert isinstance(result.exception, errors.ConfigError) and "more than 1" in str(result.exception)
    assert (dataset / "manifest.json").read_bytes() == before and not out.exists()


@pytest.mark.parametrize("args", [[], *([v] for v in ("info", "verify", "split", "log", "diff", "checkout", "sign", "audit"))])
def test_help_has_an_example(args):
    result = run(dataset_command, *args, "--help")
    assert result.exit_code == 0 and "Example" in result.output and "hvd-imaging dataset" in result.output


def test_ingest_help_has_examples():
    result = run(ingest_command, "--help")
    assert result.exit_code == 0 and "mpirun -np 8 hvd-imaging ingest" in result.output and "--labels" in result.output


def test_command_modules_are_light():
    """`--help` must not wait for NumPy, HDF5 or TensorFlow."""
    code = (
        "import sys, hvd_imaging.cli.ingest, hvd_imaging.cli.dataset; "
        "print([m for m in ('numpy', 'h5py', 'scipy', 'pydantic', 'pydicom', 'tensorflow') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "[]"


# Ingest of a small NIfTI folder through the real readers


@pytest.fixture
def nifti(tmp_path):
    return make_nifti(tmp_path / "src")


def make_nifti(root, cases=3):
    """Medical Segmentation Decathlon layout with random volumes."""
    import nibabel

    (root / "imagesTr").mkdir(parents=True)
    (root / "labelsTr").mkdir()
    random = np.random.default_rng(0)
    training = []
    for index in range(cases):
        affine = np.diag([1.0, 1.5, 3.0, 1.0])
        image = random.normal(100, 20, (12, 10, 6)).astype(np.float32)
        mask = (image > 110).astype(np.uint8)
        nibabel.save(nibabel.Nifti1Image(image, affine), root / "imagesTr" / f"case_{index}.nii.gz")
        nibabel.save(nibabel.Nifti1Image(mask, affine), root / "labelsTr" / f"case_{index}.nii.gz")
        training.append({"image": f"./imagesTr/case_{index}.nii.gz", "label": f"./labelsTr/case_{index}.nii.gz"})
    description = {
        "name": "made", "modality": {"0": "MRI"}, "labels": {"0": "background", "1": "lesion"},
        "numTraining": cases, "training": training, "test": [],
    }  # fmt: skip
    (root / "dataset.json").write_text(json.dumps(description))
    return root


def test_ingest_nifti(nifti, tmp_path):
    result = run(ingest_command, nifti, tmp_path / "data", "--set", "preprocess.spacing=[3,2,2]")
    assert result.exit_code == 0, (result.output, result.exception)
    manifest = manifests.load(tmp_path / "data")
    assert "3 samples" in result.stdout and manifest.hash() in result.stdout
    assert manifest.task == "segmentation" and manifest.classes == ("background", "lesion")
    assert manifest.preprocess.intensity == "percentile"
    # File axes are (W, H, D)
    assert {sample.spacing for sample in manifest.samples} == {(3.0, 2.0, 2.0)}
    assert {sample.shape for sample in manifest.samples} == {(6, 8, 6, 1)}


def test_ingest_json_and_partial(nifti, tmp_path):
    victim = nifti / "imagesTr" / "case_1.nii.gz"
    victim.write_bytes(victim.read_bytes()[:100])
    result = run(ingest_command, nifti, tmp_path / "data", "--json")
    assert result.exit_code == errors.PARTIAL == 10, (result.output, result.exception)
    found = json.loads(result.stdout)
    assert sum(found["samples"].values()) == 2 and found["manifest_hash"] == manifests.load(tmp_path / "data").hash()
    (item,) = found["quarantined"]
    assert json.loads((tmp_path / "data.files.json").read_text())[item["path"]] == "imagesTr/case_1.nii.gz"
    assert item["path"] in result.stderr and "exit code 10" in result.stderr and "case_1" not in result.stdout + result.stderr
    assert json.loads((tmp_path / "data" / "quarantine.json").read_text())["quarantined"] == found["quarantined"]


def test_ingest_bad_input(nifti, tmp_path):
    data = tmp_path / "data"
    cases = [
        ((tmp_path / "nowhere", data), errors.SourceError, "nowhere"),
        ((nifti, data, "--set", "preprocess.spcing=1"), errors.ConfigError, "preprocess.spacing"),
        ((nifti, data, "--set", "preprocess.spacing=big"), errors.ConfigError, "preprocess.spacing"),
        ((nifti, nifti), errors.DatasetError, "not empty"),
    ]
    for args, kind, text in cases:
        result = run(ingest_command, *args)
        assert isinstance(result.exception, kind) and text in str(result.exception), (args, result.exception)
        assert "\n" not in str(result.exception)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]
