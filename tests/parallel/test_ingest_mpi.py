"""Ingest and verify under a real mpirun: one rank and several make the same bytes."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from mpi_tools import mpirun, mpirun_path

pytestmark = [pytest.mark.mpi, pytest.mark.skipif(mpirun_path() is None, reason="no mpirun")]

MAIN = [sys.executable, "-m", "hvd_imaging.cli.main"]
OPTIONS = ["--set", "preprocess.spacing=[3,2,2]", "--set", "shards.shard_mb=0.002", "--set", "split.val=0.3"]


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """Five NIfTI cases, one of them truncated."""
    import nibabel

    root = tmp_path_factory.mktemp("archive")
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).mkdir()
    random = np.random.default_rng(0)
    training = []
    for index in range(5):
        image = random.normal(100, 20, (12, 10, 6 + index)).astype(np.float32)
        for folder, array in (("imagesTr", image), ("labelsTr", (image > 110).astype(np.uint8))):
            nibabel.save(
                nibabel.Nifti1Image(array, np.diag([1.0, 1.5, 3.0, 1.0])), root / folder / f"case_{index}.nii.gz"
            )
        training.append({"image": f"./imagesTr/case_{index}.nii.gz", "label": f"./labelsTr/case_{index}.nii.gz"})
    victim = root / "imagesTr" / "case_3.nii.gz"
    victim.write_bytes(victim.read_bytes()[:200])
    description = {
        "name": "made", "modality": {"0": "MRI"}, "labels": {"0": "background", "1": "lesion"},
        "numTraining": 5, "training": training, "test": [],
    }  # fmt: skip
    (root / "dataset.json").write_text(json.dumps(description))
    return root


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_ranks_make_the_same_dataset(archive, tmp_path):
    for size in (1, 2, 3):
        command = [*MAIN, "ingest", archive, tmp_path / f"data{size}", "--key-file", tmp_path / "key", *OPTIONS]
        done = mpirun(size, command)
        assert done.returncode == 10, done.stdout + done.stderr  # one input is set aside
        assert done.stdout.count("4 samples") == 1, "only rank 0 speaks"
    assert hashes(tmp_path / "data1") == hashes(tmp_path / "data2") == hashes(tmp_path / "data3")
    assert len(hashes(tmp_path / "data1")) > 3
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".json") == ["data1", "data2", "data3", "key"]

    done = mpirun(2, [*MAIN, "dataset", "verify", tmp_path / "data2", "--json"])
    assert done.returncode == 0 and json.loads(done.stdout)["problems"] == []
    victim = sorted((tmp_path / "data2").glob("*.h5"))[-1]
    victim.write_bytes(victim.read_bytes()[:-300])
    done = mpirun(2, [*MAIN, "dataset", "verify", tmp_path / "data2"])
    assert done.returncode == 4 and f"{victim.name}: sample" in done.stdout


SHARING = """
import json, sys, time
from hvd_imaging.communicator import connect, together
communicator = connect()
told = []

def act(fails=False):
    mine = []
    with communicator.share(60, None if fails else told.append) as numbers:
        for number in numbers:
            mine.append(number)
            if fails and communicator.world.rank == int(sys.argv[1]):
                raise ValueError("broken")
            time.sleep(0.3 if communicator.world.rank == int(sys.argv[1]) else 0.02)
    return mine

parts = communicator.gather(together(communicator, act))
try:
    together(communicator, lambda: act(fails=True))
    error = ""
except Exception as found:
    error = str(found)
if communicator.world.is_root:
    print(json.dumps([parts, told, error]))
"""


@pytest.mark.parametrize("slow", [0, 2])
def test_work_goes_to_who_is_free(slow):
    """The slow rank may be the one that gives the work out; one that fails leaves nobody waiting."""
    done = mpirun(3, [sys.executable, "-c", SHARING, str(slow)], timeout=60)
    assert done.returncode == 0, done.stderr
    parts, told, error = json.loads(done.stdout)
    assert sorted(number for part in parts for number in part) == list(range(60)) and told == list(range(1, 61))
    others = [len(part) for rank, part in enumerate(parts) if rank != slow]
    assert len(parts[slow]) < min(others) / 2
    assert f"rank {slow}: " in error and "broken" in error


def test_an_error_ends_all_ranks(archive, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "other").write_text("x")
    done = mpirun(2, [*MAIN, "ingest", archive, tmp_path / "data"], timeout=60)
    assert done.returncode == 4, done.stdout + done.stderr
    assert "expected a new or empty folder" in done.stderr and "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def test_a_time_limit_leaves_no_process():
    marker = f"import time; time.sleep({600 + id(object()) % 1000})"
    with pytest.raises(AssertionError, match="did not end within 3 s"):
        mpirun(2, [sys.executable, "-c", marker], timeout=3)
    running = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            running.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    assert not any(marker in line for line in running)


def test_ranks_make_the_same_next_version_and_find_the_same_leaks(archive, tmp_path):
    import shutil

    from hvd_imaging.audit.run import audit
    from hvd_imaging.communicator import Alone
    from hvd_imaging.config import IngestConfig, load
    from hvd_imaging.ingest import ingest

    source = tmp_path / "archive"
    shutil.copytree(archive, source)
    ingest(source, tmp_path / "one", load(IngestConfig, None, OPTIONS[1::2]))
    # One case is gone, and one stands there a second time under another name.
    description = json.loads((source / "dataset.json").read_text())
    del description["training"][4]
    description["training"].append({key: value.replace("case_0", "case_9") for key, value in description["training"][0].items()})
    for folder in ("imagesTr", "labelsTr"):
        (source / folder / "case_4.nii.gz").unlink()
        shutil.copy(source / folder / "case_0.nii.gz", source / folder / "case_9.nii.gz")
    (source / "dataset.json").write_text(json.dumps(description))
    done = mpirun(2, [*MAIN, "ingest", source, tmp_path / "two", "--parent", tmp_path / "one"])
    assert done.returncode == 10 and done.stdout.count("1 added, 3 kept, 0 changed, 1 removed") == 1, done.stdout + done.stderr
    ingest(source, tmp_path / "alone", IngestConfig(), parent=tmp_path / "one")
    assert hashes(tmp_path / "two") == hashes(tmp_path / "alone")
    alone = audit(tmp_path / "two", Alone())
    done = mpirun(2, [*MAIN, "dataset", "audit", tmp_path / "two", "--json"])
    report = json.loads(done.stdout)
    assert done.returncode == (0 if alone.passed else 4)
    assert [leak["samples"] for leak in report["leaks"]] == [list(leak.samples) for leak in alone.leaks]
    assert report["repeated_in_a_split"] + len(report["leaks"]) == 1
