"""Three hundred identifiers go in with an archive; none of them is in the dataset, in a report, or in what is printed."""

import json
import os
import stat
import subprocess
import sys

import planted
import pytest
from mpi_tools import mpirun, mpirun_path

from hvd_imaging.errors import PARTIAL, SourceError
from hvd_imaging.privacy.audit import find_identifiers
from hvd_imaging.shards import manifest as manifests
from hvd_imaging.shards.reader import ShardReader

MAIN = [sys.executable, "-m", "hvd_imaging.cli.main"]
KEY = "0123456789abcdef" * 4


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    root = tmp_path_factory.mktemp("planted")
    identifiers = planted.plant(root / "archive", 23)
    assert len(identifiers) >= 300
    return root / "archive", identifiers


@pytest.fixture
def ingest(archive, tmp_path):
    """Runs an ingest; what it prints is kept beside what it makes, where the search finds it."""
    source, _ = archive
    (tmp_path / "out").mkdir()
    key = tmp_path / "key"
    key.write_text(KEY + "\n")
    key.chmod(0o600)

    def run(*options, code, ranks=1):
        command = [*MAIN, "ingest", os.fspath(source), os.fspath(tmp_path / "out/data"), "--key-file", os.fspath(key), *options]
        if ranks == 1:
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        else:
            done = mpirun(ranks, command, timeout=120)
        assert done.returncode == code, (done.stdout, done.stderr)
        # The way to the archive is the user's own word; its folder has a name that identifies nobody.
        (tmp_path / "out/printed.txt").write_text(done.stdout + done.stderr)
        return done

    return run


def nothing_left(tmp_path, identifiers):
    """Search all that was made, without the two files that are for keeping identifiers apart."""
    private = [tmp_path / "out/data.files.json", tmp_path / "key"]
    for path in private:
        if path.exists():
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path.name
            path.rename(tmp_path / f"private-{path.name}")
    return [
        (found.kind, sorted((tmp_path / "out").rglob("*"))[found.file].name, found.offset)
        for found in find_identifiers(tmp_path / "out", identifiers)
    ]


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=[pytest.mark.mpi, pytest.mark.skipif(mpirun_path() is None, reason="no mpirun")])])
def test_nothing_planted_is_in_a_dataset(archive, ingest, tmp_path, ranks):
    _, identifiers = archive
    options = ["--task", "unlabelled", "--set", "preprocess.intensity=percentile", "--set", "shards.compression=none", "--json"]
    done = ingest(*options, code=PARTIAL, ranks=ranks)
    manifest = manifests.load(tmp_path / "out/data")
    assert len({sample.patient for sample in manifest.samples if sample.modality == "CT"}) == 4
    # Writing in pixels: what holds it is not there.
    reasons = [item["reason"] for item in json.loads(done.stdout)["quarantined"]]
    assert sum("writing in the pixels" in reason for reason in reasons) == 2 and not any(s.modality == "US" for s in manifest.samples)
    assert nothing_left(tmp_path, identifiers) == []
    if ranks == 1:  # the search would have found them
        assert len({found.identifier for found in find_identifiers(archive[0], identifiers)}) > 280


def test_writing_is_blanked_where_that_is_asked(archive, ingest, tmp_path):
    _, identifiers = archive
    options = ["--task", "unlabelled", "--set", "preprocess.intensity=none", "--set", "privacy.burned_in=blank"]
    ingest(*options, code=PARTIAL)
    manifest = manifests.load(tmp_path / "out/data")
    cines = [sample for sample in manifest.samples if sample.modality == "US"]
    assert cines
    with ShardReader(tmp_path / "out/data", manifest) as reader:
        for sample in cines:
            image, _ = reader.read_whole(sample)
            assert image.max() > 60 and image[:, :56, :316].max() == 0  # speckle is there, the banner is not
    assert nothing_left(tmp_path, identifiers) == []


@pytest.mark.parametrize("what", ["labels", "masks", "stranger"])
def test_errors_name_nobody(archive, ingest, tmp_path, what):
    source, identifiers = archive
    table = tmp_path / "labels.csv"
    patients = [value for value in identifiers if value.startswith("Q")][:5]
    table.write_text("PatientID,label\n" + "".join(f"{patient},{number % 2}\n" for number, patient in enumerate(patients)))
    options = {
        "labels": ["--task", "classification", "--labels", os.fspath(table)],
        "masks": ["--task", "segmentation"],
        "stranger": ["--task", "unlabelled", "--set", "preprocess.crop=body", "--set", "preprocess.intensity=percentile"],
    }[what]
    ingest(*options, code=PARTIAL if what == "stranger" else SourceError.exit_code)
    assert nothing_left(tmp_path, identifiers) == []


# Annotated archives


def identified(out, identifiers):
    """(kind, name of the file) of what is found below a folder."""
    files = sorted(out.rglob("*"))
    return sorted({(found.kind, files[found.file].name) for found in find_identifiers(out, identifiers)})


@pytest.fixture(scope="module")
def annotated(tmp_path_factory):
    """(folder, identifiers) of an archive of SEGs and its dataset, with all that the commands on the way there made and printed below ``out``."""
    root = tmp_path_factory.mktemp("annotated")
    identifiers = planted.plant_annotated(root / "archive", 5)
    assert len(identifiers) >= 100
    (root / "out").mkdir()
    (root / "key").write_text(KEY + "\n")
    (root / "key").chmod(0o600)

    def run(*words, codes=(0, PARTIAL)):
        done = subprocess.run([*MAIN, *words], capture_output=True, text=True, timeout=300, cwd=root)
        assert done.returncode in codes, (words, done.stdout, done.stderr)
        with open(root / "out/printed.txt", "a", encoding="utf-8") as file:
            file.write(done.stdout + done.stderr)
        return done

    run("labels", "archive", "--out", "out/annotations", "--key-file", "key")
    run("labels", "archive", "--key-file", "key", "--json")
    run("ingest", "archive", "out/data", "--key-file", "key", "--set", "preprocess.intensity=window", "--set", "split.val=0.2", "--set", "split.test=0.2")
    for private in root.glob("out/*.files.json"):
        private.rename(root / private.name)
    run("dataset", "info", "out/data", "--json")
    run("dataset", "verify", "out/data")
    run("dataset", "audit", "out/data", "--json", codes=range(12))  # its images are alike
    return root, identifiers, run


def test_no_name_becomes_a_class_or_stands_in_a_report(annotated):
    root, identifiers, _ = annotated
    manifest = manifests.load(root / "out/data")
    assert "Lung" in manifest.classes and all(name in ("background", "Lung") or name.startswith("label-") for name in manifest.classes)
    assert {sample.modality for sample in manifest.samples} <= {"CT", "OT"} and len(manifest.samples) == 5
    assert identified(root / "out", identifiers) == []
    assert len({found.identifier for found in find_identifiers(root / "archive", identifiers)}) > 100


def test_nor_in_what_a_chain_of_jobs_is_made_of(annotated):
    root, identifiers, run = annotated
    (root / "run.yaml").write_text(RUN)
    run("submit", "run.yaml", "--dry-run", "--chain", "train,evaluate", "--json")
    assert identified(root / "out", identifiers) == []


RUN = """
data: {dataset: out/data, patch: [4, 16, 16], augment: null}
model: {name: unet3d, filters: 4, depth: 1}
train: {epochs: 1, batch_size: 1}
output: {run_dir: out/run}
"""


@pytest.mark.long
def test_nor_in_a_run_its_report_its_predictions_and_its_export(annotated):
    root, identifiers, run = annotated
    (root / "run.yaml").write_text(RUN)
    run("train", "run.yaml")
    run("evaluate", "out/run")
    run("report", "out/run")
    run("status", "out/run", "--json")
    series = sorted(path for path in (root / "archive").iterdir())[0]
    for path in series.glob("*.seg"):
        path.rename(root / path.name)
    run("predict", "out/run", str(series), "out/mask.nii.gz")
    run("predict", "out/run", str(series), "out/volumes.csv", "--json")
    run("predict", "out/run", "out/data", "out/masks")
    run("export", "out/run", "out/export", "--format", "onnx")
    run("init", "compress-segmentation", "-o", "recipe.yaml")
    run("compress", "out/run", "--recipe", "recipe.yaml", "--out", "out/compressed", codes=range(12))
    # The series' own place is the user's word; what was printed of it is no output of the product.
    printed = (root / "out/printed.txt").read_text()
    (root / "out/printed.txt").write_text(printed.replace(str(series), "SERIES"))
    assert identified(root / "out", identifiers) == []
