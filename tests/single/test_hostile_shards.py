"""Datasets from outside: nothing leads out of their folder, nothing claims what is not there, nothing waits for ever."""

from __future__ import annotations

import json
import os
import shutil

import h5py
import hdf5plugin  # noqa: F401  registers the filter for h5py
import numpy as np
import pytest

from hvd_imaging.communicator import Alone
from hvd_imaging.config import ShardConfig, SplitConfig
from hvd_imaging.errors import DatasetError
from hvd_imaging.ingest.workspace import Workspace
from hvd_imaging.shards import content
from hvd_imaging.shards import manifest as manifests
from hvd_imaging.shards.reader import ShardReader
from hvd_imaging.shards.split import resplit
from hvd_imaging.shards.verify import verify
from hvd_imaging.shards.versions import derive
from hvd_imaging.shards.writer import Record, write_dataset

SHAPE = (9, 10, 11)


@pytest.fixture
def dataset(tmp_path):
    random = np.random.default_rng(0)
    records = [
        Record(f"{n:016x}", f"p{n}", random.random((*SHAPE, 1), np.float32), random.integers(0, 2, SHAPE).astype(np.uint8), np.eye(4), label=None)
        for n in range(3)
    ]
    write_dataset(tmp_path / "d", records, "segmentation", ("background", "a"), shards=ShardConfig(compression="lz4"))
    return tmp_path / "d"


def sample_of(dataset):
    manifest = manifests.load(dataset)
    return manifest, manifest.samples[0]


def link(file, group, path, dataset):
    """An external link in the place of ``path`` to the same object in another file, which a naive reader would find whole."""
    shutil.copy(file.filename, dataset.parent / "victim.h5")
    del group[path]
    group[path] = h5py.ExternalLink(str(dataset.parent / "victim.h5"), f"{group.name}/{path}")


def soft(file, group, path, dataset):
    file.copy(group[path], file, "elsewhere")
    del group[path]
    group[path] = h5py.SoftLink("/elsewhere")


def raw(file, group, path, dataset):
    """The same values, in a raw file outside of the dataset."""
    values = group[path][...]
    values.tofile(dataset.parent / "victim.raw")
    del group[path]
    group.create_dataset(path, values.shape, values.dtype, external=[(str(dataset.parent / "victim.raw"), 0, h5py.h5f.UNLIMITED)])


def virtual(file, group, path, dataset):
    shutil.copy(file.filename, dataset.parent / "victim.h5")
    shape, dtype = group[path].shape, group[path].dtype
    layout = h5py.VirtualLayout(shape, dtype)
    layout[...] = h5py.VirtualSource(str(dataset.parent / "victim.h5"), f"{group.name}/{path}", shape)
    del group[path]
    group.create_virtual_dataset(path, layout)


def sparse(file, group, path, dataset):
    """As many items as an array can have, of which none was written."""
    shape, dtype = group[path].shape, group[path].dtype
    del group[path]
    group.create_dataset(path, (1 << 40, *shape[1:]), dtype, chunks=(1, *shape[1:]))


def late(file, group, path, dataset):
    """The right shape, contiguous, and none of it was written."""
    shape, dtype = group[path].shape, group[path].dtype
    del group[path]
    group.create_dataset(path, shape, dtype)


MEMBERS = ["image", "mask", "foreground"] + [f"blocks/{array}/{name}" for array in ("image", "mask") for name in ("start", "check", "head")]


@pytest.mark.parametrize("attack", [link, soft, raw, virtual, sparse, late])
@pytest.mark.parametrize("member", MEMBERS)
def test_a_member_that_leads_elsewhere_or_is_not_there_is_named(dataset, member, attack):
    manifest, sample = sample_of(dataset)
    with h5py.File(dataset / sample.shard, "r+", locking=False) as file:
        attack(file, file[f"samples/{sample.id}"], member, dataset)
    with ShardReader(dataset, manifest) as reader, pytest.raises(DatasetError, match=f"{sample.id}"):
        reader.read_stored(sample)
        reader.foreground(sample)
    assert sample.id in {problem.sample for problem in verify(dataset, Alone())}


@pytest.mark.parametrize("attack", [link, soft])
@pytest.mark.parametrize("member", ["blocks", "blocks/image", "../" + "0" * 16])
def test_a_group_that_leads_elsewhere_is_named(dataset, member, attack):
    manifest, sample = sample_of(dataset)
    with h5py.File(dataset / sample.shard, "r+", locking=False) as file:
        place = file["samples"] if member.startswith("..") else file[f"samples/{sample.id}"]
        attack(file, place, sample.id if member.startswith("..") else member, dataset)
    with ShardReader(dataset, manifest) as reader, pytest.raises(DatasetError, match="link to another place"):
        reader.read_stored(sample)


@pytest.mark.parametrize("attack", [raw, virtual, sparse])
def test_the_search_by_bytes_does_not_follow(dataset, attack):
    _, sample = sample_of(dataset)
    with h5py.File(dataset / sample.shard, "r+", locking=False) as file:
        attack(file, file[f"samples/{sample.id}"], "mask", dataset)
    assert sum(map(len, content.values(dataset / sample.shard))) < 1 << 20
    list(content.texts(dataset / sample.shard))


def test_a_pipe_in_place_of_a_shard_does_not_hang(dataset):
    manifest, sample = sample_of(dataset)
    (dataset / sample.shard).unlink()
    os.mkfifo(dataset / sample.shard)
    problems = verify(dataset, Alone())
    assert {problem.sample for problem in problems} == {each.id for each in manifest.samples if each.shard == sample.shard}
    with pytest.raises(DatasetError, match="not a plain file"):
        derive(dataset, dataset.parent / "two", manifest)


def test_a_version_of_shards_that_are_links_stands_alone(dataset):
    manifest, sample = sample_of(dataset)
    (dataset / "store").mkdir()
    (dataset / sample.shard).rename(dataset / "store" / "held.h5")
    (dataset / sample.shard).symlink_to("store/held.h5")
    two = dataset.parent / "elsewhere" / "two"
    derive(dataset, two, resplit(manifest, SplitConfig(val=0.4, test=0.2)))
    shutil.rmtree(dataset)
    assert not (two / sample.shard).is_symlink() and verify(two, Alone()) == []


def test_a_shard_that_leads_out_of_the_dataset_is_not_shared(dataset):
    manifest, sample = sample_of(dataset)
    victim = dataset.parent / "private.h5"
    (dataset / sample.shard).rename(victim)
    for target in (victim, "../private.h5"):
        (dataset / sample.shard).symlink_to(target)
        with pytest.raises(DatasetError, match="a link that leads out of the dataset's folder"):
            derive(dataset, dataset.parent / "two", manifest)
        assert victim.stat().st_nlink == 1 and not (dataset.parent / "two").exists()
        (dataset / sample.shard).unlink()


@pytest.mark.parametrize("place", ["", "staging", "dataset", "source", "lock"])
def test_a_building_folder_that_is_somebody_elses_link_is_not_entered(tmp_path, place):
    (tmp_path / "trap").mkdir()
    folder = tmp_path / ".data.building"
    if place:
        folder.mkdir()
        (folder / place).symlink_to(tmp_path / "trap" / ("file" if place == "lock" else ""))
    else:
        folder.symlink_to(tmp_path / "trap")
    with pytest.raises(DatasetError, match=r"a link, where this dataset is to be built|cannot be made"), Workspace(tmp_path / "data").held():
        pass
    assert list((tmp_path / "trap").iterdir()) == []


def test_a_building_folder_of_another_user_is_not_entered(tmp_path):
    if os.geteuid():
        pytest.skip("only root can make a folder of another user")
    (tmp_path / ".data.building").mkdir()
    os.chown(tmp_path / ".data.building", 12345, 12345)
    with pytest.raises(DatasetError, match="of another user"), Workspace(tmp_path / "data").held():
        pass


# --- the manifest -----------------------------------------------------------------------------------------------------------------

WRONG = [
    ("shape", [-1, 10, 11, 1]), ("shape", [0, 10, 11, 1]), ("shape", [1 << 40, 10, 11, 1]), ("shape", [10**400, 1, 1, 1]), ("shape", [1 << 20, 1 << 20, 9, 1]),
    ("shape", [9, 10]), ("dtype", "object"), ("dtype", "float64"), ("chunk", [0, 1, 1]), ("block", [-8, 1, 1]), ("spacing", [1, 1, float("inf")]),
    ("affine", [[float("nan")] * 4] * 4), ("scale", float("inf")), ("label", -3), ("class_voxels", [-1, 5]), ("class_voxels", [10**30, 5]),
    ("shard", "../d2/shard-00000.h5"), ("shard", "/etc/passwd"), ("shape", "9"), ("shape", None),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), WRONG, ids=[f"{key} {n}" for n, (key, _) in enumerate(WRONG)])
def test_a_manifest_with_impossible_values_is_named(dataset, key, value):
    values = json.loads((dataset / "manifest.json").read_text())
    values["samples"][0][key] = value
    (dataset / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(DatasetError, match=r"manifest\.json: ") as caught:
        manifests.load(dataset)
    assert len(str(caught.value)) < 600
