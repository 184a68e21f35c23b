"""Archives as folders: what is taken, what is refused, and that nothing leaves the folder."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import lzma
import os
import shutil
import stat
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.fileset import FileSet
from test_ingest import Ranks

from hvd_imaging.cli.main import cli
from hvd_imaging.config import IngestConfig
from hvd_imaging.errors import DatasetError, SourceError
from hvd_imaging.ingest import ingest
from hvd_imaging.sources import archives
from hvd_imaging.sources.elements import quiet
from hvd_imaging.sources.phantom import make_large_series


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """Two small series in folders whose names must not be told."""
    root = tmp_path_factory.mktemp("archives") / "archive"
    for index in range(2):
        make_large_series(root, index, (6, 24, 24))
    for number, folder in enumerate(sorted(root.iterdir())):
        folder.rename(root / f"Doe_Jane_{number}")
    return root


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def packed(kind: str, archive: Path, out: Path) -> Path:
    """The archive as a file of this kind."""
    return Path(shutil.make_archive(str(out / "packed"), kind, archive))


@pytest.mark.parametrize("kind", ["zip", "tar", "gztar", "xztar", "bztar"])
def test_an_archive_is_the_folder_it_was_made_of(kind, archive, tmp_path):
    path = packed(kind, archive, tmp_path)
    told = []
    found = archives.opened(path, tmp_path / "scratch", lambda done, total: told.append((done, total)))
    assert content(found.folder) == content(archive) and not found.refused
    assert told and all(done <= total for done, total in told)
    assert stat.S_IMODE((tmp_path / "scratch").stat().st_mode) == 0o700


def test_a_folder_is_taken_as_it_is(archive, tmp_path):
    assert archives.opened(archive, tmp_path / "scratch").folder == archive
    assert not (tmp_path / "scratch").exists()


def test_one_folder_that_holds_all_is_the_archive(archive, tmp_path):
    path = Path(shutil.make_archive(str(tmp_path / "packed"), "zip", archive.parent, "archive"))
    assert content(archives.opened(path, tmp_path / "scratch").folder) == content(archive)


@pytest.mark.parametrize("kind", ["zip", "tar", "gztar"])
def test_a_second_start_unpacks_only_what_is_missing(kind, archive, tmp_path):
    path, scratch = packed(kind, archive, tmp_path), tmp_path / "scratch"
    folder = archives.opened(path, scratch).folder
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    before = {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in files}
    # As if it had been killed: not marked as whole, one file missing and one cut off.
    state = json.loads((scratch / "state.json").read_text())
    (scratch / "state.json").write_text(json.dumps({key: state[key] for key in ("kind", "archive")}))
    files[0].unlink()
    files[1].write_bytes(b"cut")
    again = archives.opened(path, scratch).folder
    assert content(again) == content(archive)
    after = {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in files}
    assert [after[file] for file in files[2:]] == [before[file] for file in files[2:]]
    assert [after[file][1] for file in files] == [before[file][1] for file in files]  # the members' times
    # Whole: not even looked at. Another archive: anew.
    files[0].unlink()
    assert len(content(archives.opened(path, scratch).folder)) == len(files) - 1
    os.utime(path, ns=(1, 1))
    assert content(archives.opened(path, scratch).folder) == content(archive)


NAMES = ["../up", "/absolute", "C:\\drive", "a/../../up", "good/one", "good/one", "good/one/below", "a\\..\\..\\b", "good", "x" * 300]


def test_zip_members_that_lead_out_or_are_no_files_are_set_aside(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        for name in NAMES:
            with pytest.warns(UserWarning) if name in file.namelist() else contextlib.nullcontext():
                file.writestr(name, name)
        link = zipfile.ZipInfo("link")
        link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        file.writestr(link, "/etc/passwd")
        file.writestr("good/two", "two")
    found = archives.opened(tmp_path / "a.zip", tmp_path / "deep" / "scratch")
    assert content(tmp_path / "deep/scratch/files") == {"good/one": b"good/one", "good/two": b"two"}
    assert len(found.refused) == len(NAMES) - 1 + 1
    assert {path.name for path in (tmp_path / "deep").iterdir()} == {"scratch"}
    assert archives.opened(tmp_path / "a.zip", tmp_path / "deep" / "scratch") == found


def test_tar_members_that_lead_out_or_are_no_files_are_set_aside(tmp_path):
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as file:
        for name in NAMES:
            member = tarfile.TarInfo(name)
            member.size = len(name)
            file.addfile(member, io.BytesIO(name.encode()))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            member = tarfile.TarInfo("special")
            member.type, member.linkname = kind, "/etc/passwd"
            file.addfile(member)
        member = tarfile.TarInfo("good/two")
        member.size = 3
        file.addfile(member, io.BytesIO(b"two"))
    found = archives.opened(tmp_path / "a.tgz", tmp_path / "deep" / "scratch")
    assert content(tmp_path / "deep/scratch/files") == {"good/one": b"good/one", "good/two": b"two"}
    assert len(found.refused) == len(NAMES) - 1 + 4
    assert {path.name for path in (tmp_path / "deep").iterdir()} == {"scratch"}


def bomb(kind: str, path: Path) -> Path:
    """Hundreds of MiB of zeros, in a MB or less."""
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
            file.writestr("a", bytes(1 << 20))
        data = bytearray(path.read_bytes())
        # The directory claims 2 GiB.
        at = data.rindex(b"PK\x01\x02")
        data[at + 24 : at + 28] = (2**31).to_bytes(4, "little")
        path.write_bytes(data)
        return path
    # One member of 512 MiB, or one header of 256 MiB.
    header = tarfile.TarInfo("a")
    header.size = 512 << 20
    if kind == "header":
        header.type, header.size = tarfile.XHDTYPE, 256 << 20
    piece = gzip.compress(bytes(1 << 24), 1)
    with open(path, "wb") as file:
        file.write(gzip.compress(header.tobuf()))
        for _ in range(32 if kind == "tar" else 16):
            file.write(piece)
    return path


@pytest.mark.parametrize("kind", ["zip", "tar", "header"])
def test_bombs_are_refused(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "FREELY", 64 << 20)
    monkeypatch.setattr(archives, "_HEADER", 8 << 20)
    with pytest.raises(SourceError, match="more than 200 times its packed size|header of a member is larger"):
        archives.opened(bomb(kind, tmp_path / "bomb"), tmp_path / "scratch")
    assert sum(len(data) for data in content(tmp_path / "scratch").values()) < 65 << 20


def test_too_many_members_and_too_small_a_disk(archive, tmp_path, monkeypatch):
    for kind in ("zip", "tar"):
        path = packed(kind, archive, tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(archives, "MOST_MEMBERS", 3)
            with pytest.raises(SourceError, match="more than 3 members"):
                archives.opened(path, tmp_path / kind)
        with monkeypatch.context() as patch:
            patch.setattr(archives, "SPARE", 1 << 60)
            with pytest.raises(DatasetError, match="make space"):
                archives.opened(path, tmp_path / kind)


@pytest.mark.parametrize("kind", ["zip", "tar", "gztar"])
@pytest.mark.parametrize(("size", "taken"), [(0, False), (3, False), (600, True)])
def test_many_members_of_nothing_are_no_archive_of_images(tmp_path, monkeypatch, kind, size, taken):
    monkeypatch.setattr(archives, "FEW_MEMBERS", 50)
    for number in range(60):
        path = tmp_path / "in" / f"{number}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(os.urandom(size))
    made = Path(shutil.make_archive(str(tmp_path / "made"), kind, tmp_path / "in"))
    if taken:
        assert len(content(archives.opened(made, tmp_path / "scratch").folder)) == 60
        return
    with pytest.raises(SourceError, match=r"\d+ members of \d+ bytes on average: this is no archive of images"):
        archives.opened(made, tmp_path / "scratch")
    assert len(content(tmp_path / "scratch")) <= 52


def test_damaged_archives(archive, tmp_path):
    path = packed("tar", archive, tmp_path)
    data = path.read_bytes()
    with tarfile.open(path) as file:
        members = [member.offset for member in file if member.isfile()]
    cases = {"cut.tar": data[: len(data) // 2], "cut_at_a_header.tar": data[: members[3]]}
    cases["header.tar"] = data[: members[3]] + b"x" * 512 + data[members[3] + 512 :]
    cases["cut.tar.gz"] = gzip.compress(data)[:-200]
    cases["cut.tar.xz"] = lzma.compress(data)[:-200]
    for name, wrong in cases.items():
        (tmp_path / name).write_bytes(wrong)
        with pytest.raises(SourceError, match="damaged or cut off") as caught:
            archives.opened(tmp_path / name, tmp_path / "scratch")
        assert "Doe" not in str(caught.value)
    # A ZIP has a check sum for each member: only that one is set aside.
    path = packed("zip", archive, tmp_path)
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        info = next(item for item in file.infolist() if not item.is_dir())
    at = info.header_offset + 30 + len(info.filename) + 200
    data[at : at + 8] = bytes(byte ^ 0xFF for byte in data[at : at + 8])
    path.write_bytes(data)
    found = archives.opened(path, tmp_path / "scratch")
    assert [item.path for item in found.refused] == [info.filename] and "damaged" in found.refused[0].reason
    assert len(content(tmp_path / "scratch/files")) == len(content(archive)) - 1
    path.write_bytes(data[:-30])
    with pytest.raises(SourceError, match="found a file that is none of them|not a whole ZIP"):
        archives.opened(path, tmp_path / "scratch")


def test_encrypted_zip(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a", b"a")
    data = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(mark) + offset] |= 1
    path.write_bytes(data)
    with pytest.raises(SourceError, match="encrypted"):
        archives.opened(path, tmp_path / "scratch")


def test_what_is_no_archive(archive, tmp_path):
    (tmp_path / "text").write_text("text")
    (tmp_path / "case.nii.gz").write_bytes(gzip.compress((348).to_bytes(4, "little") + bytes(1000)))
    (tmp_path / "empty").touch()
    one = next(archive.rglob("*.dcm"))
    for path, text in (("text", "none of them"), ("case.nii.gz", "none of them"), ("empty", "none of them"), ("no", "nothing here"), (one, "single DICOM")):
        with pytest.raises(SourceError, match=text) as caught:
            archives.kind_of(tmp_path / path)
        assert "a ZIP" in str(caught.value)


@pytest.fixture
def medium(archive, tmp_path) -> Path:
    """A medium with a DICOMDIR, and a file that it does not name."""
    files = FileSet()
    for path in sorted(archive.rglob("*.dcm")):
        files.add(path)
    files.write(tmp_path / "medium")
    files._stage["t"].cleanup()
    shutil.copy(next(archive.rglob("*.dcm")), tmp_path / "medium" / "other.dcm")
    return tmp_path / "medium"


def test_a_dicomdir_gives_what_it_names(archive, medium, tmp_path):
    assert archives.kind_of(medium / "DICOMDIR") == "dicomdir"
    found = archives.opened(medium / "DICOMDIR", tmp_path / "scratch")
    assert sorted(content(found.folder).values()) == sorted(content(archive).values()) and not found.refused
    # Mounted with small letters and version numbers; files missing, and references that lead out.
    for path in sorted(medium.rglob("*"), reverse=True):
        if path.name != "DICOMDIR":
            path.rename(path.with_name(path.name.lower() + (";1" if path.is_file() else "")))
    (tmp_path / "outside.dcm").write_bytes(b"x")
    directory = pydicom.dcmread(medium / "DICOMDIR")
    named = [record for record in directory.DirectoryRecordSequence if record.get("ReferencedFileID")]
    (medium / "link").symlink_to(tmp_path / "outside.dcm")
    with quiet():
        named[0].ReferencedFileID = ["..", "outside.dcm"]
        named[1].ReferencedFileID = ["NO", "SUCH"]
        named[2].RecordInUseFlag = 0
        named[3].ReferencedFileID = ["LINK"]
        directory.save_as(medium / "DICOMDIR")
    found = archives.opened(medium / "DICOMDIR", tmp_path / "scratch")
    assert len(content(found.folder)) == len(content(archive)) - 4
    reasons = {item.path: item.reason for item in found.refused}
    assert set(reasons) == {"../outside.dcm", "NO/SUCH", "LINK"}
    assert "outside" in reasons["../outside.dcm"] and "missing" in reasons["NO/SUCH"] and "leads out" in reasons["LINK"]


@pytest.fixture
def run(capsys):
    """`hvd-imaging ingest`, which must not name anybody."""

    def act(*args, code=0) -> str:
        found = cli.main(["ingest", *map(os.fspath, args)], standalone_mode=False) or 0
        out, err = capsys.readouterr()
        assert found == code and "Doe" not in out + err
        return out

    return act


def test_ingest_of_an_archive_is_the_ingest_of_its_folder(archive, tmp_path, run):
    key = ("--key-file", tmp_path / "key", "--json")
    from_folder = json.loads(run(archive, tmp_path / "a", *key))
    path = packed("zip", archive, tmp_path)
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("../Doe_Jane_up", "x")
        file.writestr("Doe_Jane_0/broken.dcm", bytes(128) + b"DICM" + b"x" * 50)
    from_zip = json.loads(run(path, tmp_path / "b", *key, code=10))
    assert from_zip["samples"] == from_folder["samples"] and len(from_zip["quarantined"]) == 2
    assert {item["path"][:5] for item in from_zip["quarantined"]} == {"file-"}
    known = json.loads((tmp_path / "b.files.json").read_text())
    assert {known[item["path"]] for item in from_zip["quarantined"]} == {"../Doe_Jane_up", "Doe_Jane_0/broken.dcm"}
    assert not (tmp_path / ".b.building").exists()
    assert b"Doe" not in b"".join(content(tmp_path / "b").values())


def test_ingest_of_an_archive_without_images_says_so_of_the_archive(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("Doe_Jane/readme.txt", "x")
    with pytest.raises(SourceError) as caught:
        ingest(tmp_path / "a.zip", tmp_path / "data", IngestConfig())
    assert str(tmp_path / "a.zip") in str(caught.value) and "building" not in str(caught.value) and "Doe" not in str(caught.value)
    assert not (tmp_path / ".data.building").exists()


def test_one_rank_unpacks_for_all(archive, tmp_path, monkeypatch):
    path, opened, calls = packed("zip", archive, tmp_path), archives.opened, []
    monkeypatch.setattr(archives, "opened", lambda *args: calls.append(args) or opened(*args))
    alone = ingest(path, tmp_path / "alone", IngestConfig(), key_file=tmp_path / "key")
    found = Ranks(3).run(lambda rank: ingest(path, tmp_path / "data", IngestConfig(), key_file=tmp_path / "key", communicator=rank))
    assert {result.manifest.hash() for result in found} == {alone.manifest.hash()} and len(calls) == 2
    # What is wrong with it is said alike on all ranks.
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("more", bytes(100))
    monkeypatch.setattr(archives, "MOST_MEMBERS", 3)
    errors = Ranks(3).run(lambda rank: ingest(path, tmp_path / "other", IngestConfig(), communicator=rank))
    assert {type(error) for error in errors} == {SourceError} and len({str(error) for error in errors}) == 1
    assert "rank 0: " in str(errors[0]) and not (tmp_path / ".other.building").exists()


def test_mutated_archives_are_read_or_refused(archive, medium, tmp_path):
    """Fixed seed; whatever a byte may be, no other error than ours, and nothing outside of the scratch folder."""
    random = np.random.default_rng(0)
    kinds = [(tmp_path / "mutated", packed(kind, archive, tmp_path).read_bytes()) for kind in ("zip", "tar", "gztar", "xztar")]
    kinds.append((medium / "DICOMDIR", (medium / "DICOMDIR").read_bytes()))
    before = set(tmp_path.iterdir())
    for number in range(250):
        path, data = kinds[number % len(kinds)][0], bytearray(kinds[number % len(kinds)][1])
        for _ in range(random.integers(1, 5)):
            at = int(random.integers(min(len(data), int(random.choice([600, len(data)])))))
            at = len(data) - 1 - at if random.random() < 0.3 else at
            if random.random() < 0.8:
                data[at] = int(random.integers(256))
            else:
                del data[at : at + int(random.integers(1, 600))]
        path.write_bytes(data)
        with contextlib.suppress(SourceError, DatasetError):
            archives.opened(path, tmp_path / "scratch")
    assert set(tmp_path.iterdir()) - before <= {tmp_path / "scratch", tmp_path / "mutated"}
