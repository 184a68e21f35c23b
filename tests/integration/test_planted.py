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
