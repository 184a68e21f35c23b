"""Ingest with made cases: the same result on any number of ranks, and nothing half-made after a failure."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import json
import threading
from pathlib import Path

import numpy as np
import pytest

from hvd_imaging.config import IngestConfig, PreprocessConfig, ShardConfig
from hvd_imaging.errors import DatasetError, HvdImagingError, SetupError, SourceError
from hvd_imaging.ingest import ingest, prepare, run
from hvd_imaging.ingest.plan import resolve_all
from hvd_imaging.shards import manifest as manifests
from hvd_imaging.shards.reader import ShardReader
from hvd_imaging.shards.verify import verify
from hvd_imaging.sources.catalog import Case, Catalog
from hvd_imaging.sources.dicom import Rejected, SeriesFiles
from hvd_imaging.volume import Volume
from hvd_imaging.world import World

CONFIG = IngestConfig(
    preprocess=PreprocessConfig(spacing=(2.0, 1.0, 1.0)), shards=ShardConfig(shard_mb=0.02, chunk=(4, 8, 8))
)
SHAPE = (6, 16, 15)


class Ranks:
    """Ranks as threads; values are copied, as messages would be."""

    def __init__(self, size: int) -> None:
        self.size, self.values, self.meeting = size, [None] * size, threading.Barrier(size, timeout=30)
        self.lock, self.numbers = threading.Lock(), iter(())

    def run(self, act) -> list:
        """Results or errors of all ranks."""
        results = [None] * self.size

        def one(rank):
            try:
                results[rank] = act(Rank(self, rank))
            except Exception as error:
                results[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads), "a rank hangs"
        return results


class Rank:
    def __init__(self, ranks: Ranks, rank: int) -> None:
        self.ranks, self.world = ranks, World(rank, ranks.size, rank, ranks.size)

    def gather(self, value):
        self.ranks.values[self.world.rank] = value
        self.ranks.meeting.wait()
        values = copy.deepcopy(self.ranks.values)
        self.ranks.meeting.wait()
        return values

    def broadcast(self, value):
        return self.gather(value)[0]

    def barrier(self):
        self.gather(None)

    @contextlib.contextmanager
    def share(self, count, taken=None):
        ranks = self.ranks
        if self.world.is_root:
            ranks.numbers = iter(range(count))
        self.barrier()

        def take():
            with ranks.lock:
                return next(ranks.numbers, None)

        yield iter(take, None)

    def abort(self, code):
        raise AssertionError("abort")


class Archive:
    """Stands for hvd_imaging.sources: cases in memory, with faults where a test wants them."""

    def __init__(self, src: Path, task="segmentation", cases=7) -> None:
        self.src, self.task, self.rejected, self.faults, self.notes = src, task, [], {}, {}
        self.classes = {"segmentation": ("background", "a", "b"), "classification": ("no", "yes")}.get(task, ())
        self.channels: dict[int, int] = {}
        self.read: list[int] = []
        self.modality: dict[int, str] = {}
        self.source_ids = [f"1.2.840.99.{i}" for i in range(cases)]
        src.mkdir(exist_ok=True)

    def scan(self, root, labels_csv=None, task=None, dicom=None):
        cases = []
        for i, uid in enumerate(self.source_ids):
            files = (self.src / f"folder{i}" / "a.dcm", self.src / f"folder{i}" / "b.dcm")
            series = SeriesFiles(uid, f"Smith^{i // 2}", self.modality.get(i, "CT"), files)
            label = i % 2 if self.task == "classification" else None
            cases.append(Case(uid, f"Smith^{i // 2}", self.modality.get(i, "CT"), label, "dicom", series, ()))
        return Catalog(self.task, self.classes, tuple(cases), tuple(self.rejected))

    def load_case(self, case, catalog, units="hu"):
        index = catalog.cases.index(case)
        self.read.append(index)
        if index in self.faults:
            raise self.faults[index]
        random = np.random.default_rng(index)
        shape = (*SHAPE, self.channels[index]) if index in self.channels else SHAPE
        image = random.uniform(-1000, 400, shape).astype(np.float32)
        mask = random.integers(0, 3, SHAPE).astype(np.uint8) if self.task == "segmentation" else None
        affine = np.diag([2.5, 1.25, 1.0, 1.0])
        return Volume(image, affine, case.modality, notes=self.notes.get(index, ())), mask


@pytest.fixture
def archive(tmp_path, monkeypatch):
    def make(**options):
        made = Archive(tmp_path / "src", **options)
        monkeypatch.setattr(run.sources, "scan", made.scan)
        monkeypatch.setattr(run.sources, "load_case", made.load_case)
        return made

    return make


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != "src")


def files(folder):
    """What the references of a dataset's reports stand for."""
    return json.loads((folder.parent / f"{folder.name}.files.json").read_text())


def test_dataset_is_whole_and_has_no_identifier(tmp_path, archive):
    made = archive()
    result = ingest(made.src, tmp_path / "data", CONFIG)
    manifest = manifests.load(tmp_path / "data")
    assert manifest == result.manifest and result.quarantined == [] and result.notes == []
    assert names(tmp_path) == ["data", "data.files.json", "data.key"]
    assert names(tmp_path / "data") == [
        "manifest.json", "quarantine.json", *sorted({sample.shard for sample in manifest.samples}),
    ]  # fmt: skip
    assert manifest.preprocess.intensity == "window" and manifest.channels == 1
    assert [s.id for s in manifest.samples] == sorted(s.id for s in manifest.samples)
    assert len({s.shard for s in manifest.samples}) > 1
    assert len({s.patient for s in manifest.samples}) == 4
    with ShardReader(tmp_path / "data", manifest) as reader:
        for sample in manifest.samples:
            image, mask = reader.read_whole(sample)
            assert image.shape == (8, 20, 15, 1) and mask.shape == (8, 20, 15)
            assert image.min() >= 0 and image.max() <= 1 and sample.spacing == (2.0, 1.0, 1.0)
    assert verify(tmp_path / "data", run.Alone()) == []
    for path in (tmp_path / "data").iterdir():
        data = path.read_bytes()
        for secret in (b"Smith", b"1.2.840", str(tmp_path).encode()):
            assert secret not in data, path.name


@pytest.mark.parametrize("size", [2, 3, 9])
def test_any_number_of_ranks_makes_the_same_files(tmp_path, archive, size):
    made = archive()
    made.faults[3] = SourceError("odd")
    made.notes[1] = ("one slice dropped",)
    key = tmp_path / "key"
    one = ingest(made.src, tmp_path / "one", CONFIG, key_file=key)
    results = Ranks(size).run(lambda rank: ingest(made.src, tmp_path / "many", CONFIG, key_file=key, communicator=rank))
    assert hashes(tmp_path / "one") == hashes(tmp_path / "many")
    assert all(dataclasses.replace(result, files=one.files) == one for result in results)
    assert names(tmp_path) == ["key", "many", "many.files.json", "one", "one.files.json"]


def test_order_of_the_archive_does_not_matter(tmp_path, archive):
    made = archive(task="unlabelled")
    first = ingest(made.src, tmp_path / "a", CONFIG, key_file=tmp_path / "key").manifest
    assert [s.label for s in first.samples] == [None] * 7 and first.samples[0].class_voxels is None
    assert ingest(made.src, tmp_path / "b", CONFIG, key_file=tmp_path / "key").manifest.hash() == first.hash()
    other = ingest(made.src, tmp_path / "c", CONFIG).manifest  # another key
    assert {s.id for s in other.samples}.isdisjoint(s.id for s in first.samples)
    assert {s.sha256 for s in other.samples} == {s.sha256 for s in first.samples}


def test_classification_labels(tmp_path, archive):
    made = archive(task="classification", cases=6)
    manifest = ingest(made.src, tmp_path / "data", CONFIG).manifest
    assert sorted(sample.label for sample in manifest.samples) == [0, 0, 0, 1, 1, 1]
    assert manifest.classes == ("no", "yes")


def test_quarantine(tmp_path, archive, capfd):
    made = archive()
    made.rejected = [Rejected("notes/readme.dcm", "not DICOM")]
    made.faults = {0: SourceError(f"{made.src}/folder0/a.dcm: truncated"), 2: KeyError("Smith^1")}
    made.channels = {4: 2}
    made.notes = {1: ("1 duplicate slice dropped: b.dcm",)}
    result = ingest(made.src, tmp_path / "data", CONFIG)
    assert len(result.manifest.samples) == 4
    text = (tmp_path / "data" / "quarantine.json").read_text()
    found, known = json.loads(text), files(tmp_path / "data")
    assert [(known[item["path"]], item["reason"]) for item in found["quarantined"]] == [
        ("notes/readme.dcm", "not DICOM"),
        ("folder0/a.dcm", "truncated"),
        ("folder2/a.dcm", "cannot be read (KeyError)"),
        ("folder4/a.dcm", "expected 1 channel(s) as most inputs have, found 2"),
    ]
    (note,) = found["notes"]
    before, _, reference = note["note"].rpartition(" ")
    assert known[note["path"]] == "folder1" and before == "1 duplicate slice dropped:"
    assert known[reference] == "folder1/b.dcm"
    for secret in ("Smith", "folder", "a.dcm", "b.dcm", "readme"):
        assert secret not in text.replace("folder-", "") + "".join(capfd.readouterr()), secret
    assert (tmp_path / "data.files.json").stat().st_mode & 0o777 == 0o600


def test_a_series_that_stands_twice_counts_once(tmp_path, archive):
    made = archive(cases=3)
    made.source_ids[2] = made.source_ids[0]
    made.source_ids.sort()
    result = ingest(made.src, tmp_path / "data", CONFIG)
    assert len(result.manifest.samples) == 2
    assert [item.reason for item in result.quarantined] == ["another input has the same series or case name"]
    assert verify(tmp_path / "data", run.Alone()) == []


@pytest.mark.parametrize(
    ("task", "fault", "reason"),
    [
        ("segmentation", lambda v, m: (v, None), "no mask"),
        ("segmentation", lambda v, m: (v, m + 1), "expected values below 3"),
        ("segmentation", lambda v, m: (v, m[1:]), "expected the image's shape"),
        ("unlabelled", lambda v, m: (v.with_array(v.array * np.nan), m), "finite"),
    ],
)
def test_cases_that_do_not_fit_are_set_aside(tmp_path, archive, monkeypatch, task, fault, reason):
    made = archive(task=task)

    def load_case(case, catalog, units="hu"):
        found = made.load_case(case, catalog, units)
        return fault(*found) if case is catalog.cases[1] else found

    monkeypatch.setattr(run.sources, "load_case", load_case)
    result = ingest(made.src, tmp_path / "data", CONFIG)
    assert len(result.manifest.samples) == 6
    (item,) = result.quarantined
    assert files(tmp_path / "data")[item.path] == "folder1/a.dcm" and reason in item.reason


def test_nothing_usable_makes_no_dataset(tmp_path, archive):
    made = archive(cases=2)
    made.faults = dict.fromkeys(range(2), SourceError("truncated"))
    with pytest.raises(SourceError, match=r"none of 2 inputs.*file-[0-9a-f]{10}: truncated"):
        ingest(made.src, tmp_path / "data", CONFIG)
    assert names(tmp_path) == ["data.files.json", "data.key"]


def test_mixed_modalities_need_a_rule(tmp_path, archive):
    made = archive()
    made.modality[3] = "MR"
    with pytest.raises(SourceError, match=r"preprocess\.intensity.*CT.*MR"):
        ingest(made.src, tmp_path / "data", CONFIG)
    assert names(tmp_path) == ["data.key"]
    config = CONFIG.model_copy(update={"preprocess": PreprocessConfig(intensity="percentile")})
    assert len(ingest(made.src, tmp_path / "data", config).manifest.samples) == 7


def test_resolve_all():
    auto = PreprocessConfig()
    assert resolve_all(auto, ["CT", "CT"]).intensity == "window"
    assert resolve_all(auto, ["MR", "PT"]).intensity == resolve_all(auto, [""]).intensity == "percentile"
    with pytest.raises(SourceError, match="unknown"):
        resolve_all(auto, ["CT", ""])


def test_body_crop_needs_hu(tmp_path, archive):
    made = archive()
    config = IngestConfig(preprocess=PreprocessConfig(crop="body", units="stored"))
    with pytest.raises(SourceError, match=r"preprocess\.crop=body.*units"):
        ingest(made.src, tmp_path / "data", config)


def test_existing_dataset_is_kept(tmp_path, archive):
    made = archive()
    ingest(made.src, tmp_path / "data", CONFIG)
    before = hashes(tmp_path / "data")
    with pytest.raises(DatasetError, match="found a dataset"):
        ingest(made.src, tmp_path / "data", CONFIG)
    assert hashes(tmp_path / "data") == before and names(tmp_path) == ["data", "data.files.json", "data.key"]


@pytest.mark.parametrize("place", ["write_shard", "stage", "publish", "load"])
@pytest.mark.parametrize("size", [1, 2])
def test_after_a_failure_the_next_one_goes_on(tmp_path, archive, monkeypatch, place, size):
    """On one rank of several: all ranks stop with its message; what was prepared is not read again."""
    made = archive()
    calls, owner = [], prepare if place == "load" else run
    original = getattr(owner, place)

    def fails(*args, **kwargs):
        calls.append(1)
        if len(calls) == (1 if place == "publish" else 2):
            raise OSError(28, "No space left on device")
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, place, fails)
        results = Ranks(size).run(lambda rank: ingest(made.src, tmp_path / "data", CONFIG, communicator=rank))
    expected = HvdImagingError if size > 1 else (OSError, HvdImagingError)
    assert all(isinstance(result, expected) and "No space left" in str(result) for result in results)
    if size == 2:
        assert len({str(result) for result in results}) == 1 and str(results[0]).startswith("rank ")
    assert {"data.key", ".data.building"} <= set(names(tmp_path)) <= {"data.key", ".data.building", "data.files.json"}
    before = sorted(made.read)
    ingest(made.src, tmp_path / "data", CONFIG)
    assert (sorted(made.read) == list(range(7)) and len(before) < 7) or before == list(range(7))
    assert names(tmp_path) == ["data", "data.files.json", "data.key"]
    ingest(made.src, tmp_path / "straight", CONFIG, key_file=tmp_path / "data.key")
    assert hashes(tmp_path / "data") == hashes(tmp_path / "straight")


def test_what_is_not_whole_is_read_again(tmp_path, archive, monkeypatch):
    made = archive()

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run, "write_shard", interrupted)
        ingest(made.src, tmp_path / "data", CONFIG)
    whole = sorted((tmp_path / ".data.building" / "staging").glob("*.case"))
    assert len(whole) == 7
    one, two, three, four, *_ = whole
    one.write_bytes(bytes(8) + b"{")
    two.write_bytes(two.read_bytes()[:-1])
    three.write_bytes(b"\xff" * 9)
    flipped = bytearray(four.read_bytes())
    flipped[-1] ^= 1
    four.write_bytes(flipped)
    made.read.clear()
    ingest(made.src, tmp_path / "data", CONFIG)
    assert len(made.read) == 4 and verify(tmp_path / "data", run.Alone()) == []


def test_other_settings_prepare_anew(tmp_path, archive, monkeypatch):
    made = archive()
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(run, "write_shard", lambda *_: (_ for _ in ()).throw(OSError(5, "x")))
        ingest(made.src, tmp_path / "data", CONFIG)
    made.read.clear()
    ingest(made.src, tmp_path / "data", CONFIG.model_copy(update={"preprocess": PreprocessConfig()}))
    assert sorted(made.read) == list(range(7))


def test_two_at_once_do_not_disturb_each_other(tmp_path, archive, monkeypatch):
    made = archive()
    original = run.write_shard

    def second(*args, **kwargs):
        with pytest.raises(DatasetError, match="another ingest is making this dataset"):
            ingest(made.src, tmp_path / "data", CONFIG)
        return original(*args, **kwargs)

    monkeypatch.setattr(run, "write_shard", second)
    ingest(made.src, tmp_path / "data", CONFIG)
    assert verify(tmp_path / "data", run.Alone()) == []


def test_bad_key_file(tmp_path, archive):
    made = archive()
    (tmp_path / "key").write_text("hello")
    (tmp_path / "key").chmod(0o600)
    results = Ranks(2).run(
        lambda rank: ingest(made.src, tmp_path / "data", CONFIG, key_file=tmp_path / "key", communicator=rank)
    )
    assert all(isinstance(result, SetupError) for result in results)
    assert names(tmp_path) == ["key"]


def test_dataset_without_a_name(tmp_path, archive, monkeypatch):
    made = archive()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DatasetError, match="name of a new folder"):
        ingest(made.src, Path(), CONFIG)


def test_progress_sees_the_work(tmp_path, archive):
    made = archive()
    seen = {}

    @contextlib.contextmanager
    def progress(text, unit):
        seen[text] = [unit]
        yield lambda done, total: seen[text].append((done, total))

    shards = {s.shard for s in ingest(made.src, tmp_path / "data", CONFIG, progress=progress).manifest.samples}
    assert list(seen) == ["reading headers", "reading and preparing", "writing shards"]
    assert len(seen["reading and preparing"]) == 8 and seen["writing shards"][-1] == (len(shards) - 1, len(shards))
