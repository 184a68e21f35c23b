"""The round trip with a real PACS: store, query, ingest from it, predict, store the answer back."""

from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path

import pydicom
import pytest
from orthanc_server import PASSWORD, USER, Server

from hvd_imaging.cli.main import cli
from hvd_imaging.config import IngestConfig, PreprocessConfig
from hvd_imaging.errors import SourceError
from hvd_imaging.ingest import ingest
from hvd_imaging.sources import dicomweb
from hvd_imaging.sources.phantom import make_archive

SMALL = PreprocessConfig(spacing=(8.0, 6.0, 6.0))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("orthanc"))
    yield server
    server.kill()


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("phantom") / "archive"
    make_archive(root, 2, 3)
    (root / "labels.csv").unlink()  # a server has none
    return root


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Pauses between attempts are the same, but shorter."""
    monkeypatch.setattr(dicomweb, "WAIT_S", 0.01)


@pytest.fixture
def environment(server, monkeypatch):
    monkeypatch.setenv("HVD_DICOMWEB_USER", USER)
    monkeypatch.setenv("HVD_DICOMWEB_PASSWORD_FILE", str(server.password_file))


@pytest.fixture
def run(capsys, archive):
    """A command in this process (TensorFlow starts once): exit code and output; nothing may identify anybody."""
    names = identifiers(archive)

    def act(*args: object) -> tuple[int, str]:
        code = 0
        try:
            code = cli.main([os.fspath(arg) if isinstance(arg, os.PathLike) else str(arg) for arg in args], standalone_mode=False) or 0
        except Exception as error:
            code = getattr(error, "exit_code", 70)
            print(error)
        out, err = capsys.readouterr()
        for name in (*names, PASSWORD):
            assert name not in out + err
        return code, out

    return act


def identifiers(archive: Path) -> set[str]:
    found = set()
    for path in dicomweb.storable(archive)[0]:
        dataset = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["PatientID", "SeriesInstanceUID", "SOPInstanceUID"])
        found |= {str(element.value) for element in dataset}
    return found


def access_of(server: Server) -> tuple[str, ...]:
    return ("--user", USER, "--password-file", str(server.password_file))


def connection(server: Server) -> dicomweb.Server:
    return dicomweb.Server(dicomweb.parse(server.url), dicomweb.Access(USER, PASSWORD))


def instances(folder: Path) -> set[bytes]:
    return {path.read_bytes() for path in dicomweb.storable(folder)[0]}


def test_round_trip(server, archive, tmp_path, run, environment):
    (archive / "notes.txt").write_text("no DICOM")
    code, out = run("store", server.url, archive, *access_of(server), "--json")
    (archive / "notes.txt").unlink()
    count = len(instances(archive))
    assert code == 0 and json.loads(out) == {"url": server.url, "stored": count, "not_dicom": 1, "set_aside": []}

    # Queried and fetched: byte for byte what was stored, and only what fits.
    code, out = run("fetch", server.url, tmp_path / "all", "--json")
    assert code == 0 and json.loads(out)["fetched"] == count and json.loads(out)["series"] == 4
    assert instances(tmp_path / "all") == instances(archive)
    code, out = run("fetch", server.url, tmp_path / "ct", "--query", "Modality=CT", "--series-limit", 1, "--json")
    one = json.loads(out)["fetched"]
    assert code == 0 and 0 < one < count and len(instances(tmp_path / "ct")) == one
    code, out = run("fetch", server.url, tmp_path / "ct", "--query", "Modality=CT", "--json")
    assert json.loads(out)["already_there"] == one and json.loads(out)["fetched"] == count - 2 - one
    code, out = run("fetch", server.url, tmp_path / "none", "--query", "Modality=MR")
    assert code == SourceError.exit_code and "no series fits" in out

    # Ingested from the server: the dataset of the folder.
    settings = ("--key-file", tmp_path / "key", "--set", "preprocess.spacing=[8,6,6]", "--json")
    code, out = run("ingest", archive, tmp_path / "local", *settings)
    local = json.loads(out)
    code, out = run("ingest", server.url, tmp_path / "remote", *settings)
    assert code == 0 and json.loads(out)["manifest_hash"] == local["manifest_hash"] and local["task"] == "segmentation"
    assert not (tmp_path / ".remote.building").exists()

    # Predicted, and the answer stored beside its series.
    from runs import make_run

    make_run(tmp_path / "run", tmp_path / "remote")
    series = next(archive.glob("patient_*/series"))
    code, out = run("predict", tmp_path / "run", series, tmp_path / "mask.dcm")
    assert code == 0
    code, out = run("store", server.url, tmp_path / "mask.dcm")
    assert code == 0 and "1 of 1 instances stored" in out
    source, seg = pydicom.dcmread(next(series.iterdir())), pydicom.dcmread(tmp_path / "mask.dcm")
    query = (("Modality", "SEG"), ("StudyInstanceUID", str(source.StudyInstanceUID)))
    found = connection(server).series(query)
    assert (seg.StudyInstanceUID, seg.SeriesInstanceUID) in found and len(found) == 2
    run("fetch", server.url, tmp_path / "back", "--query", f"SeriesInstanceUID={seg.SeriesInstanceUID}")
    (path,) = (tmp_path / "back").rglob("*.dcm")
    assert path.read_bytes() == (tmp_path / "mask.dcm").read_bytes()
    assert pydicom.dcmread(path).ReferencedSeriesSequence[0].SeriesInstanceUID == source.SeriesInstanceUID


def test_who_may_not_is_told_so(server, archive, tmp_path, run):
    (tmp_path / "wrong").write_text("wrong secret\n")
    for access in ((), ("--user", USER, "--password-file", tmp_path / "wrong")):
        for command, place in (("fetch", tmp_path / "out"), ("store", archive)):
            code, out = run(command, server.url, place, *access)
            assert code == SourceError.exit_code and "access refused (401)" in out and "wrong secret" not in out
    code, out = run("ingest", server.url, tmp_path / "data")
    assert code == SourceError.exit_code and "access refused (401)" in out
    assert not (tmp_path / ".data.building").exists()


def test_what_the_server_does_not_take_is_set_aside(server, archive, tmp_path, run, environment):
    (tmp_path / "mixed").mkdir()
    good = dicomweb.storable(archive)[0][0]
    (tmp_path / "mixed" / "Doe_Jane_good.dcm").write_bytes(good.read_bytes())
    (tmp_path / "mixed" / "Doe_Jane_bad.dcm").write_bytes(bytes(128) + b"DICM" + b"x" * 300)
    code, out = run("store", server.url, tmp_path / "mixed", "--json")
    result = json.loads(out)
    assert code == 10 and result["stored"] == 1 and "Doe" not in out
    (row,) = result["set_aside"]
    assert json.loads((tmp_path / "mixed.files.json").read_text())[row["file"]] == "Doe_Jane_bad.dcm"


def test_a_server_that_dies_is_waited_for_and_then_told(server, archive, tmp_path, environment):
    assert not dicomweb.store(connection(server), dicomweb.storable(archive)[0])

    def dies_at(number: int):
        def report(done: int, total: int) -> None:
            if done == number and server.process.poll() is None:
                server.kill()

        return report

    # It comes back while the command waits.
    def pause(seconds: float) -> None:
        if server.process.poll() is not None:
            server.start()

    patient = dicomweb.Server(dicomweb.parse(server.url), dicomweb.Access(USER, PASSWORD), pause=pause)
    dicomweb.fetch(server.url, tmp_path / "waited", (("Modality", "CT"),), report=dies_at(7), server=patient)
    assert instances(tmp_path / "waited") == set().union(*(instances(series) for series in archive.glob("patient_*/series")))

    # It does not, in the middle of an ingest: what came is kept, and a second start goes on.
    known = set(tmp_path.iterdir())

    def told(start: int):
        @contextlib.contextmanager
        def progress(text: str, unit: str):
            yield dies_at(start) if text == "fetching" else lambda done, total: None

        return progress

    config = IngestConfig(preprocess=SMALL)
    with pytest.raises(SourceError, match="after 5 attempts.*start the same command again") as caught:
        ingest(server.url + "?Modality=CT", tmp_path / "data", config, progress=told(9))
    assert not re.search(r"\d\.\d+\.\d+\.\d{5}", str(caught.value)) and "Modality" not in str(caught.value)
    assert set(tmp_path.iterdir()) - known == {tmp_path / "data.key", tmp_path / ".data.building"}
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / ".data.building").rglob("*.dcm")}
    assert len(kept) == 9
    server.start()
    fetched = []

    @contextlib.contextmanager
    def count(text: str, unit: str):
        yield lambda done, total: fetched.extend(
            path for path in kept if text == "fetching" and path.stat().st_mtime_ns != kept[path]
        )

    result = ingest(server.url + "?Modality=CT", tmp_path / "data", config, progress=count)
    assert result.manifest.counts() and not result.quarantined and not fetched
    assert not (tmp_path / ".data.building").exists()
