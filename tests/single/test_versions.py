"""Versions of a dataset: what is read again, which shards are shared, what is recorded, how they are compared."""

from __future__ import annotations

import json
import os
import shutil

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli_dataset import run
from test_ingest import Ranks

from hvd_imaging import errors
from hvd_imaging.cli.dataset import command as dataset_command
from hvd_imaging.cli.ingest import command as ingest_command
from hvd_imaging.communicator import Alone
from hvd_imaging.config import IngestConfig, PreprocessConfig, ShardConfig, SplitConfig
from hvd_imaging.ingest import ingest, prepare
from hvd_imaging.ingest.plan import inherit
from hvd_imaging.shards import manifest as manifests
from hvd_imaging.shards import versions
from hvd_imaging.shards.manifest import Manifest, Sample, ShardFile
from hvd_imaging.shards.verify import verify

CONFIG = IngestConfig(
    preprocess=PreprocessConfig(intensity="percentile"),
    shards=ShardConfig(shard_mb=0.003, patch=(4, 4, 4)),
    split=SplitConfig(val=0.3, test=0.3, seed=1),
)


def write_case(archive, index, seed=None):
    array = np.random.default_rng(index if seed is None else seed).integers(0, 1000, (6, 8, 9)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(array, np.diag([1.0, 1.0, 2.0, 1.0])), archive / f"case_{index:02}.nii.gz")


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "archive"
    path.mkdir()
    for index in range(8):
        write_case(path, index)
    return path


@pytest.fixture
def reads(monkeypatch):
    """How many cases were read."""
    calls = []
    real = prepare.prepare
    monkeypatch.setattr(prepare, "prepare", lambda case, job: calls.append(case) or real(case, job))
    return calls


def whole(dataset):
    manifest = manifests.load(dataset)
    assert verify(dataset, Alone()) == []
    assert {path.name for path in dataset.glob("*.h5")} == {shard.name for shard in manifest.shards}
    return manifest


def test_a_next_version_reads_only_what_is_new_and_shares_the_rest(archive, tmp_path, reads):
    one = ingest(archive, tmp_path / "one", CONFIG).manifest
    assert len(reads) == 8 and len(one.shards) == 3
    write_case(archive, 8)
    write_case(archive, 9)
    reads.clear()
    # The settings are the parent's, its key too.
    two = ingest(archive, tmp_path / "two", IngestConfig(), parent=tmp_path / "one").manifest
    assert len(reads) == 2 and whole(tmp_path / "two") == two and not (tmp_path / "two.key").exists()
    assert two.version.parents == (versions.parent_of(one),) and two.preprocess == one.preprocess
    assert two.version.counts == {"added": 2, "kept": 8, "changed": 0, "removed": 0}
    for shard in one.shards:
        assert (tmp_path / "two" / shard.name).samefile(tmp_path / "one" / shard.name)
    assert manifests.load(tmp_path / "one") == one
    # Version by version is the same content as at once, but for the splits, which stay where they were.
    at_once = ingest(archive, tmp_path / "whole", CONFIG, key_file=tmp_path / "one.key").manifest
    assert {s.id: s.sha256 for s in at_once.samples} == {s.id: s.sha256 for s in two.samples}
    splits = {s.patient: s.split for s in one.samples}
    for sample in two.samples:
        assert sample.split == splits.get(sample.patient, sample.split)
        assert sample.patient in splits or sample.split != "test"
    shutil.rmtree(tmp_path / "one")
    whole(tmp_path / "two")


@pytest.mark.parametrize("size", [1, 2, 3])
def test_any_number_of_ranks_makes_the_same_version(archive, tmp_path, size):
    ingest(archive, tmp_path / "one", CONFIG)
    write_case(archive, 2, seed=99)
    write_case(archive, 8)
    alone = ingest(archive, tmp_path / "alone", IngestConfig(), parent=tmp_path / "one").manifest
    results = Ranks(size).run(
        lambda rank: ingest(archive, tmp_path / "two", IngestConfig(), parent=tmp_path / "one", communicator=rank)
    )
    assert [result.manifest for result in results] == [alone] * size
    for path in (tmp_path / "two").iterdir():
        assert path.read_bytes() == (tmp_path / "alone" / path.name).read_bytes()


def test_changed_and_removed_samples(archive, tmp_path, reads):
    one = ingest(archive, tmp_path / "one", CONFIG).manifest
    write_case(archive, 2, seed=99)
    (archive / "case_05.nii.gz").unlink()
    reads.clear()
    two = ingest(archive, tmp_path / "two", IngestConfig(), parent=tmp_path / "one").manifest
    assert len(reads) == 1 and whole(tmp_path / "two") == two
    assert two.version.counts == {"added": 0, "kept": 6, "changed": 1, "removed": 1}
    old, new = {s.id: s for s in one.samples}, {s.id: s for s in two.samples}
    (gone,) = old.keys() - new.keys()
    touched = {old[gone].shard} | {s.shard for s in one.samples if s.id in new and new[s.id].sha256 != s.sha256}
    assert {s.name for s in two.shards} & {s.name for s in one.shards} == {s.name for s in one.shards} - touched
    three = ingest(archive, tmp_path / "three", IngestConfig(), parent=tmp_path / "two").manifest
    assert three.version.counts == {"added": 0, "kept": 7, "changed": 0, "removed": 0} and three.shards == two.shards
    assert three.hash() == two.hash() and three.files_hash() == two.files_hash()


def test_read_again_is_not_changed(archive, tmp_path, reads):
    one = ingest(archive, tmp_path / "one", CONFIG).manifest
    os.utime(archive / "case_03.nii.gz")
    reads.clear()
    two = ingest(archive, tmp_path / "two", IngestConfig(), parent=tmp_path / "one").manifest
    assert len(reads) == 1 and two.version.counts["kept"] == 8 and two.shards == one.shards
    reads.clear()
    three = ingest(archive, tmp_path / "three", IngestConfig(), parent=tmp_path / "two").manifest
    assert not reads and three.hash() == one.hash()


def test_other_settings_change_everything(archive, tmp_path):
    one = ingest(archive, tmp_path / "one", CONFIG).manifest
    config = IngestConfig(preprocess=PreprocessConfig(spacing=(2.0, 2.0, 2.0)))
    two = ingest(archive, tmp_path / "two", config, parent=tmp_path / "one").manifest
    assert two.version.counts == {"added": 0, "kept": 0, "changed": 8, "removed": 0}
    assert not {s.name for s in one.shards} & {s.name for s in two.shards}
    assert two.preprocess.intensity == "percentile" and two.preprocess.spacing == (2.0, 2.0, 2.0)
    found = versions.diff(one, two)
    assert found["settings"]["preprocess.spacing"] == {"from": None, "to": [2.0, 2.0, 2.0]} and len(found["changed"]) == 8


def test_a_parent_wants_its_key(archive, tmp_path):
    ingest(archive, tmp_path / "one", CONFIG)
    (tmp_path / "one.key").rename(tmp_path / "kept.key")
    with pytest.raises(errors.SetupError, match=r"one\.key.*--key-file"):
        ingest(archive, tmp_path / "two", IngestConfig(), parent=tmp_path / "one")
    assert not (tmp_path / "one.key").exists(), "no key is made for a parent"
    ingest(archive, tmp_path / "other", CONFIG)
    with pytest.raises(errors.DatasetError, match="another pseudonym key"):
        ingest(archive, tmp_path / "two", IngestConfig(), parent=tmp_path / "one", key_file=tmp_path / "other.key")
    ingest(archive, tmp_path / "two", IngestConfig(), parent=tmp_path / "one", key_file=tmp_path / "kept.key")
    assert not (tmp_path / ".two.building").exists()


@pytest.mark.parametrize("harm", ["missing", "cut", "no parent", "task"])
def test_a_parent_that_can_not_be_used(archive, tmp_path, harm):
    one = ingest(archive, tmp_path / "one", CONFIG).manifest
    shard = tmp_path / "one" / one.shards[0].name
    parent, options = tmp_path / "one", {}
    if harm == "missing":
        shard.unlink()
    elif harm == "cut":
        shard.write_bytes(shard.read_bytes()[:100])
    elif harm == "no parent":
        parent = tmp_path / "nowhere"
    else:
        labels = tmp_path / "labels.csv"
        labels.write_text("PatientID,label\n" + "".join(f"case_{i:02},{i % 2}\n" for i in range(8)))
        options = {"task": "classification", "labels_csv": labels}
    with pytest.raises(errors.HvdImagingError):
        ingest(archive, tmp_path / "two", IngestConfig(), parent=parent, **options)
    assert not (tmp_path / "two").exists()


def test_a_damaged_sample_is_not_carried_on(archive, tmp_path):
    one = ingest(archive, tmp_path / "one", CONFIG.model_copy(update={"shards": ShardConfig(patch=(4, 4, 4), compression="none")})).manifest
    (archive / "case_05.nii.gz").unlink()  # the one shard has to be written anew
    shard = tmp_path / "one" / one.shards[0].name
    data = bytearray(shard.read_bytes())
    place = len(data) // 2
    data[place : place + 64] = bytes(b ^ 255 for b in data[place : place + 64])
    shard.write_bytes(data)
    with pytest.raises(errors.DatasetError):
        ingest(archive, tmp_path / "two", IngestConfig(), parent=tmp_path / "one")


def test_an_older_manifest_is_a_parent_too(archive, tmp_path, reads):
    one = ingest(archive, tmp_path / "one", CONFIG).manifest
    path = tmp_path / "one" / "manifest.json"
    values = json.loads(path.read_text())
    del values["version"]
    values["split"] = {"val": 0.3, "test": 0.3, "seed": 1}
    path.write_text(json.dumps(values))
    assert manifests.load(tmp_path / "one").hash() == one.hash()
    reads.clear()
    two = ingest(archive, tmp_path / "two", IngestConfig(), parent=tmp_path / "one").manifest
    assert two.hash() == one.hash()
    assert two.version.counts["kept"] + two.version.counts["changed"] == 8


def test_links_or_copies(archive, tmp_path, monkeypatch):
    one = ingest(archive, tmp_path / "one", CONFIG).manifest

    def refuse(*_, **__):
        raise OSError(18, "another filesystem")

    monkeypatch.setattr(os, "link", refuse)
    two = ingest(archive, tmp_path / "two", IngestConfig(), parent=tmp_path / "one", key_file=tmp_path / "one.key").manifest
    assert whole(tmp_path / "two").hash() == one.hash()
    assert not (tmp_path / "two" / two.shards[0].name).samefile(tmp_path / "one" / two.shards[0].name)


# --- commands -----------------------------------------------------------------------------------------------------------
@pytest.fixture
def family(archive, tmp_path):
    """one, its child two, and two's child three with another split."""
    options = [f"shards.shard_mb={CONFIG.shards.shard_mb}", "split.val=0.3", "split.test=0.3"]
    assert run(ingest_command, archive, tmp_path / "one", *[a for o in options for a in ("--set", o)]).exit_code == 0
    write_case(archive, 8)
    (archive / "case_01.nii.gz").unlink()
    result = run(ingest_command, archive, tmp_path / "two", "--parent", tmp_path / "one")
    assert result.exit_code == 0 and "1 added, 7 kept, 0 changed, 1 removed" in result.output
    assert run(dataset_command, "split", tmp_path / "two", "--out", tmp_path / "three", "--seed", 9).exit_code == 0
    return tmp_path


def test_log(family):
    rows = json.loads(run(dataset_command, "log", family / "three", "--json").stdout)
    assert [row["action"] for row in rows] == ["split", "ingest", "ingest"]
    assert [row["folder"] and row["folder"].rsplit("/")[-1] for row in rows] == ["three", "two", "one"]
    text = run(dataset_command, "log", family / "three").output
    assert text.count("version ") >= 3 and "1 added, 7 kept" in text
    shutil.rmtree(family / "one")
    rows = json.loads(run(dataset_command, "log", family / "three", "--json").stdout)
    assert len(rows) == 3 and rows[2]["folder"] is None and len(rows[2]["hash"]) == 64
    assert "not beside" in run(dataset_command, "log", family / "three").output


def test_diff(family):
    found = json.loads(run(dataset_command, "diff", family / "one", family / "two", "--json").stdout)
    assert (len(found["added"]), len(found["removed"]), found["kept"], found["changed"]) == (1, 1, 7, [])
    assert found["splits"] == [] and found["settings"] == {}
    text = run(dataset_command, "diff", family / "one", family / "two").output
    assert "1 added, 7 kept, 0 changed, 1 removed" in text and "\n+ " in text and "\n- " in text
    found = json.loads(run(dataset_command, "diff", family / "two", family / "three", "--json").stdout)
    assert found["settings"] == {"split.seed": {"from": 0, "to": 9}} and found["kept"] == 8
    same = json.loads(run(dataset_command, "diff", family / "two", family / "two", "--json").stdout)
    assert not same["added"] + same["removed"] + same["changed"] + same["splits"] and same["settings"] == {}


def test_the_next_ingest_after_a_split_keeps_the_split(family):
    three = manifests.load(family / "three")
    assert run(ingest_command, family / "archive", family / "four", "--parent", family / "three").exit_code == 0
    four = whole(family / "four")
    assert four.hash() == three.hash() and four.split == three.split
    assert {s.patient for s in four.of_split("test")} == {s.patient for s in manifests.load(family / "two").of_split("test")}


def test_checkout(family):
    one = manifests.load(family / "one")
    assert run(dataset_command, "checkout", family / "two", "parent", family / "a").exit_code == 0
    assert run(dataset_command, "checkout", family / "three", one.hash()[:10], family / "b").exit_code == 0
    (family / "runs").mkdir()
    shutil.copy(family / "two" / "manifest.json", family / "runs")  # as a run keeps it
    two = manifests.load(family / "two")
    shutil.rmtree(family / "two")
    assert run(dataset_command, "checkout", family / "three", family / "runs", family / "c").exit_code == 0
    assert whole(family / "a") == whole(family / "b") == one and whole(family / "c") == two
    for version, words in (("ffffffff", "no dataset"), ("ab", "at least 6"), ("xyzxyz", "at least 6")):
        result = run(dataset_command, "checkout", family / "three", version, family / "d")
        assert isinstance(result.exception, errors.DatasetError) and words in str(result.exception)
    for name in ("one", "a", "b"):
        shutil.rmtree(family / name)
    (family / "runs" / "manifest.json").write_text(one.model_dump_json(by_alias=True))
    result = run(dataset_command, "checkout", family / "three", family / "runs", family / "d")
    assert isinstance(result.exception, errors.DatasetError) and "cannot be put together" in str(result.exception)
    assert not (family / "d").exists()


# --- pure ---------------------------------------------------------------------------------------------------------------
def sample(id, content, shard, split="train", patient=""):
    return Sample(
        id=id, patient=patient or f"p{id}", shape=(1, 1, 1, 1), dtype="uint8", spacing=(1, 1, 1), modality="CT", label=None,
        affine=((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)), class_voxels=None, split=split, shard=shard,
        sha256=content,
    )  # fmt: skip


def manifest_of(samples):
    shards = tuple(ShardFile(name=name, bytes=1, sha256=name) for name in sorted({s.shard for s in samples}))
    return Manifest(
        schema=2, task="unlabelled", classes=(), channels=1, preprocess=PreprocessConfig(intensity="none"), split=SplitConfig(),
        samples=tuple(samples), shards=shards,
    )  # fmt: skip


CONTENTS = st.dictionaries(st.sampled_from("abcdefgh"), st.sampled_from("xyz"), max_size=8)


@settings(max_examples=150, deadline=None)
@given(CONTENTS, CONTENTS, st.lists(st.integers(0, 3), min_size=8, max_size=8))
def test_a_plan_accounts_for_every_sample(old, new, places):
    shard_of = dict(zip("abcdefgh", (f"shard-{place:05}.h5" for place in places), strict=True))
    parent = manifest_of([sample(id, old[id], shard_of[id]) for id in sorted(old)])
    plan = versions.plan(parent, [sample(id, new[id], "") for id in new])
    assert set(plan.kept) == {id for id in old if new.get(id) == old[id]}
    assert set(plan.changed) == {id for id in old.keys() & new.keys() if new[id] != old[id]}
    assert set(plan.added) == new.keys() - old.keys() and set(plan.removed) == old.keys() - new.keys()
    for shard in {s.shard for s in parent.samples}:
        members = [s.id for s in parent.samples if s.shard == shard]
        assert (shard in plan.shared) == all(id in plan.kept for id in members)
    fresh = [name for name, _ in zip(versions.free_names(parent), range(3), strict=False)]
    assert len(set(fresh)) == 3 and not set(fresh) & {s.shard for s in parent.samples}


def test_what_is_content_and_what_is_not():
    base = manifest_of([sample("a", "x", "shard-00000.h5"), sample("b", "y", "shard-00001.h5")])
    moved = manifest_of([sample("a", "x", "shard-00007.h5"), sample("b", "y", "shard-00007.h5")])
    told = base.model_copy(update={"version": versions.record("ingest", moved, {"a": 1}, {})})
    assert base.hash() == moved.hash() == told.hash() and base.files_hash() == told.files_hash() != moved.files_hash()
    for other in ([sample("a", "z", "shard-00000.h5"), base.samples[1]], [sample("a", "x", "s", "val"), base.samples[1]], base.samples[:1]):
        assert base.model_copy(update={"samples": tuple(other)}).hash() != base.hash()


def test_metadata_alone_leaves_the_shard():
    parent = manifest_of([sample("a", "x", "shard-00000.h5")])
    plan = versions.plan(parent, [sample("a", "x", "").model_copy(update={"site": "1234"})])
    assert plan.changed == ("a",) and plan.shared == ("shard-00000.h5",)


@pytest.mark.parametrize("recorded", [None, [], "x", {"split": 3}, {"unknown": 1}])
def test_a_strange_record_is_no_crash(recorded):
    manifest = manifest_of([]).model_copy(update={"version": versions.record("ingest", None, {"config": recorded}, {})})
    if isinstance(recorded, dict):
        with pytest.raises(errors.ConfigError, match="the parent's settings"):
            inherit(IngestConfig(), manifest)
    else:
        assert inherit(IngestConfig(), manifest).preprocess == manifest.preprocess


@pytest.mark.parametrize(
    ("config", "spacing", "seed", "chosen"),
    [
        (IngestConfig(), (2.0, 1.0, 1.0), 5, "percentile"),
        (IngestConfig(split=SplitConfig(seed=7)), (2.0, 1.0, 1.0), 7, "percentile"),
        (IngestConfig(preprocess=PreprocessConfig(spacing=None)), None, 5, "percentile"),
    ],
)
def test_settings_are_inherited(config, spacing, seed, chosen):
    base = IngestConfig(preprocess=PreprocessConfig(spacing=(2.0, 1.0, 1.0), intensity="percentile"), split=SplitConfig(seed=5))
    record = versions.record("ingest", None, {"config": base.model_dump(mode="json")}, {})
    found = inherit(config, manifest_of([]).model_copy(update={"version": record}))
    assert (found.preprocess.spacing, found.split.seed, found.preprocess.intensity) == (spacing, seed, chosen)
