"""Shards: what is written comes back; what is damaged says so."""

import hashlib
import itertools
import shutil

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_imaging.communicator import Alone
from hvd_imaging.config import PreprocessConfig, ShardConfig, SplitConfig
from hvd_imaging.errors import DatasetError
from hvd_imaging.shards import manifest as manifests
from hvd_imaging.shards import schema
from hvd_imaging.shards.reader import ShardReader
from hvd_imaging.shards.split import resplit
from hvd_imaging.shards.verify import verify
from hvd_imaging.shards.writer import Record, _attribute, _table, write_dataset, write_shard

SHAPE = (9, 14, 11)


def record(index, shape=SHAPE, channels=1, mask=True, label=None, patient=None):
    random = np.random.default_rng(index)
    return Record(
        id=f"{index:016x}",
        patient=patient or f"{index:016x}",
        image=random.random((*shape, channels), dtype=np.float32),
        mask=random.choice(np.array([0, 0, 0, 1, 2], np.uint8), shape) if mask else None,
        affine=np.diag([2.5, 1.0, 0.5, 1.0]),
        modality="CT",
        label=label,
    )


def make(folder, count=4, shards=None, **options):
    return write_dataset(
        folder,
        [record(i, **options) for i in range(count)],
        "segmentation",
        ("background", "a", "b"),
        PreprocessConfig(intensity="none"),
        shards=shards or ShardConfig(chunk=(4, 8, 8), dtype="float32"),
    )


@pytest.fixture
def dataset(tmp_path):
    folder = tmp_path / "data"
    return folder, make(folder, shards=ShardConfig(shard_mb=0.012, chunk=(4, 8, 8), dtype="float32", compression="none"))


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_patch_is_what_a_padded_volume_holds(data, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "patches"
    if not folder.exists():
        make(folder, count=1, channels=2)
    start = data.draw(st.tuples(*[st.integers(-20, 20)] * 3))
    shape = data.draw(st.tuples(*[st.integers(1, 18)] * 3))
    sample = manifests.load(folder).samples[0]
    with ShardReader(folder, manifests.load(folder)) as reader:
        image, mask = reader.read(sample, start, shape)
    source = record(0, channels=2)
    padded = np.pad(source.image, [(40, 40)] * 3 + [(0, 0)])
    labels = np.pad(source.mask, 40)
    where = tuple(slice(40 + a, 40 + a + n) for a, n in zip(start, shape, strict=True))
    assert image.dtype == np.float32 and np.array_equal(image, padded[where])
    assert mask.dtype == np.uint8 and np.array_equal(mask, labels[where])


@pytest.mark.parametrize("compression", ["none", "lz4", "zstd", "gzip"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_write_and_read_back(tmp_path, dtype, compression):
    manifest = make(tmp_path / "d", shards=ShardConfig(dtype=dtype, compression=compression))
    assert manifests.load(tmp_path / "d") == manifest
    with ShardReader(tmp_path / "d", manifest) as reader:
        for index, sample in enumerate(manifest.samples):
            source = record(index)
            image, mask = reader.read_whole(sample)
            assert image.dtype == np.float32 and sample.dtype == dtype
            assert np.array_equal(image, source.image.astype(dtype).astype(np.float32))
            assert np.array_equal(mask, source.mask)
            assert sample.class_voxels == tuple(np.bincount(source.mask.ravel(), minlength=3))
            assert sample.spacing == (2.5, 1.0, 0.5) and sample.shape == (*SHAPE, 1)
            voxels = reader.foreground(sample)
            assert voxels.dtype == np.int32 and (mask[tuple(voxels.T)] > 0).all()
            assert {tuple(v) for v in voxels} == set(zip(*(int_axis.tolist() for int_axis in np.nonzero(mask)), strict=True))
    assert verify(tmp_path / "d", Alone()) == []


def test_float16_holds_values_beyond_its_range(tmp_path):
    big = record(0)
    big.image[0, 0, 0, 0] = 1e6
    manifest = write_dataset(tmp_path / "d", [big], "unlabelled", (), shards=ShardConfig(dtype="float16"))
    with ShardReader(tmp_path / "d", manifest) as reader:
        assert reader.read_whole(manifest.samples[0])[0].max() == 65504


def test_no_mask(tmp_path):
    manifest = write_dataset(tmp_path / "d", [record(0, mask=False, label=1)], "classification", ("no", "yes"))
    with ShardReader(tmp_path / "d", manifest) as reader:
        image, mask = reader.read(manifest.samples[0], (-1, 0, 0), (3, 3, 3))
        assert image.shape == (3, 3, 3, 1) and mask is None
        assert reader.foreground(manifest.samples[0]).shape == (0, 3)
    assert manifest.samples[0].label == 1 and verify(tmp_path / "d", Alone()) == []


@pytest.mark.parametrize("compression", ["none", "lz4", "gzip"])
def test_same_samples_same_bytes(tmp_path, compression):
    for name in "ab":
        make(tmp_path / name, shards=ShardConfig(shard_mb=0.012, compression=compression))
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    assert len(hashes(tmp_path / "a")) > 2


def test_nothing_is_left_beside_the_dataset(dataset):
    folder, manifest = dataset
    assert [path.name for path in folder.parent.iterdir()] == ["data"]
    assert sorted(path.name for path in folder.iterdir()) == [
        "manifest.json",
        *sorted({sample.shard for sample in manifest.samples}),
    ]


def test_a_failure_in_the_middle_leaves_nothing(tmp_path):
    def records():
        yield record(0)
        raise OSError(28, "No space left on device")

    with pytest.raises(DatasetError, match=r"shard-00000\.h5.*No space left"):
        write_shard(tmp_path / "shard-00000.h5", records(), ShardConfig(compression="lz4"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["dataset", "folder", "file"])
def test_existing_dataset_is_refused_and_kept(tmp_path, what):
    folder = tmp_path / "d"
    if what == "dataset":
        make(folder, 1)
    elif what == "folder":
        folder.mkdir()
        (folder / "thesis.txt").write_text("x")
    else:
        folder.write_text("x")
    before = hashes(folder) if folder.is_dir() else folder.read_text()
    with pytest.raises(DatasetError, match="expected a new or empty folder"):
        make(folder)
    assert before == (hashes(folder) if folder.is_dir() else folder.read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_empty_folder_is_taken(tmp_path):
    (tmp_path / "d").mkdir()
    make(tmp_path / "d", 1)
    assert (tmp_path / "d" / "manifest.json").exists()


# Damage


def read_all(folder, manifest):
    with ShardReader(folder, manifest) as reader:
        for sample in manifest.samples:
            reader.read_whole(sample)


def test_missing_shard(dataset):
    folder, manifest = dataset
    victim = manifest.samples[1]
    (folder / victim.shard).unlink()
    with pytest.raises(DatasetError, match=f"{victim.shard}.*{victim.id}.*missing.*dataset verify"):
        read_all(folder, manifest)
    found = verify(folder, Alone())
    assert {problem.sample for problem in found} == {s.id for s in manifest.samples if s.shard == victim.shard}


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.99])
def test_truncated_shard(dataset, keep):
    folder, manifest = dataset
    path = folder / manifest.samples[0].shard
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if keep < 1 else keep])
    with pytest.raises(DatasetError, match="damaged"):
        read_all(folder, manifest)
    assert {problem.shard for problem in verify(folder, Alone())} == {path.name}


def test_flipped_byte_is_found_by_verify(dataset):
    folder, manifest = dataset
    sample = manifest.samples[2]
    path = folder / sample.shard
    data = bytearray(path.read_bytes())
    piece = record(2).image[0, 0, :3].tobytes()
    place = data.index(piece)
    data[place + 1] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(DatasetError, match=rf"{sample.shard}: sample {sample.id}: .*chunk \(0, 0, 0\), block 0: the check sum"):
        read_all(folder, manifest)
    problems = verify(folder, Alone())
    assert (problems[0].sample, problems[0].shard) == (sample.id, sample.shard) and "chunk (0, 0, 0)" in problems[0].reason


def test_every_flipped_byte_is_an_error_or_a_hash_difference_or_harmless(tmp_path):
    """Damage anywhere in the file ends in a message, never in a crash of another kind."""
    manifest = make(tmp_path / "d", 1, shape=(4, 8, 8))
    path = tmp_path / "d" / manifest.samples[0].shard
    whole = path.read_bytes()
    for place in range(0, len(whole), 61):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        verify(tmp_path / "d", Alone())


def test_foreign_and_text_files(dataset):
    folder, manifest = dataset
    path = folder / manifest.samples[0].shard
    with h5py.File(path, "w") as file:
        file["samples"] = [1, 2, 3]
    with pytest.raises(DatasetError, match="hvd_imaging did not write"):
        read_all(folder, manifest)
    path.write_text("hello")
    with pytest.raises(DatasetError, match="not HDF5"):
        read_all(folder, manifest)


def test_shard_of_another_schema(dataset):
    folder, manifest = dataset
    path = folder / manifest.samples[0].shard
    with h5py.File(path, "r+") as file:
        file.attrs["schema"] = 99
    with pytest.raises(DatasetError, match="version 99, expected 2"):
        read_all(folder, manifest)


def test_manifest_of_another_schema(dataset):
    folder, _ = dataset
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"schema": 2', '"schema": 3', 1))
    with pytest.raises(DatasetError, match="schema version 3, expected 2"):
        manifests.load(folder)


def test_shard_of_another_dataset(tmp_path):
    a, b = make(tmp_path / "a"), make(tmp_path / "b", shape=(5, 5, 5))
    shutil.copy(tmp_path / "b" / b.samples[0].shard, tmp_path / "a" / a.samples[0].shard)
    with pytest.raises(DatasetError, match=r"expected \(9, 14, 11, 1\) float32.*found \(5, 5, 5, 1\)"):
        read_all(tmp_path / "a", a)


def test_a_lost_sample(dataset):
    folder, manifest = dataset
    sample = manifest.samples[0]
    with h5py.File(folder / sample.shard, "r+") as file:
        del file[f"samples/{sample.id}"]
    with pytest.raises(DatasetError, match="does not hold the sample's image"):
        read_all(folder, manifest)


def test_wrong_foreground_is_found(dataset):
    folder, manifest = dataset
    sample = manifest.samples[0]
    with h5py.File(folder / sample.shard, "r+") as file:
        file[f"samples/{sample.id}/foreground"][0] = (0, 0, 0)
        file[f"samples/{sample.id}/foreground"][1] = (0, 0, 0)
    assert [problem.sample for problem in verify(folder, Alone())] == [sample.id]


def test_many_shards_are_not_all_open(tmp_path):
    manifest = make(tmp_path / "d", 40, shards=ShardConfig(shard_mb=1e-6), shape=(2, 2, 2))
    assert len({sample.shard for sample in manifest.samples}) == 40
    with ShardReader(tmp_path / "d", manifest) as reader:
        for _ in range(2):
            for sample in manifest.samples:
                reader.read(sample, (0, 0, 0), (1, 1, 1))
        assert len(reader._files) <= 32 and len(reader._descriptors) <= 32


# Pure parts


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 100), max_size=30), st.integers(1, 150))
def test_plan_shards(sizes, target):
    plan = schema.plan_shards(sizes, target)
    assert [index for members in plan for index in members] == list(range(len(sizes)))
    for members in plan:
        assert members and (len(members) == 1 or sum(sizes[i] for i in members) <= target)
    for one, two in itertools.pairwise(plan):
        assert sum(sizes[i] for i in one) + sizes[two[0]] > target


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=40),
    st.floats(0, 0.5),
    st.floats(0, 0.5),
    st.integers(0, 1000),
)
def test_a_patient_is_in_one_split_only(patients, val, test, seed):
    samples = [
        manifests.Sample(
            id=f"{index:016x}", patient=f"p{patient}", shape=(1, 1, 1, 1), dtype="float32", spacing=(1, 1, 1),
            affine=((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)), modality="", label=None,
            class_voxels=None, split="train", shard="shard-00000.h5", sha256="",
        )
        for index, patient in enumerate(patients)
    ]  # fmt: skip
    manifest = manifests.Manifest(
        schema=2, task="unlabelled", classes=(), channels=1, preprocess=PreprocessConfig(intensity="none"),
        split=SplitConfig(), samples=tuple(samples),
    )  # fmt: skip
    new = resplit(manifest, SplitConfig(val=val, test=test, seed=seed))
    splits = {}
    for sample in new.samples:
        splits.setdefault(sample.patient, set()).add(sample.split)
    assert all(len(found) == 1 for found in splits.values())
    assert new.split == SplitConfig(val=val, test=test, seed=seed)
    assert sum(new.counts().values()) == len(patients)
    assert resplit(new, new.split) == new


def test_content_hash_knows_everything():
    image, mask = np.zeros((2, 3, 4, 1), np.float32), np.zeros((2, 3, 4), np.uint8)
    values = {
        schema.content_hash(image, mask, None),
        schema.content_hash(image, None, None),
        schema.content_hash(image, mask, 0),
        schema.content_hash(image, mask, 1),
        schema.content_hash(image.astype(np.float16), mask, None),
        schema.content_hash(image.reshape(3, 2, 4, 1), mask, None),
        schema.content_hash(image, mask + 1, None),
    }
    assert len(values) == 7
    fortran = np.asfortranarray(np.random.default_rng(0).random((2, 3, 4, 1), dtype=np.float32))
    assert schema.content_hash(fortran, None, None) == schema.content_hash(np.ascontiguousarray(fortran), None, None)
    assert schema.content_hash(fortran.astype(">f4"), None, None) == schema.content_hash(fortran, None, None)


def test_foreground_covers_a_large_class_evenly():
    mask = np.zeros((64, 64, 64), np.uint8)
    mask[:, :, 32:] = 1
    mask[0, 0, 0] = 2
    voxels = schema.foreground_voxels(mask)
    values = mask[tuple(voxels.T)]
    assert 4000 <= (values == 1).sum() <= 4096 and (values == 2).sum() == (values == 1).sum()
    assert len(np.unique(voxels[values == 1], axis=0)) == (values == 1).sum()
    for axis in range(3):  # no column is preferred
        counts = np.bincount(voxels[values == 1][:, axis], minlength=64)
        assert counts[counts > 0].max() < 3 * counts[counts > 0].mean()
        assert (counts > 0).sum() == (32 if axis == 2 else 64)


def test_a_small_lesion_is_drawn_as_often_as_an_organ():
    mask = np.zeros((8, 16, 16), np.uint8)
    mask[2:6] = 1
    mask[3, 4, 5:8] = 2
    voxels = schema.foreground_voxels(mask)
    counts = np.bincount(mask[tuple(voxels.T)])
    assert counts[0] == 0 and counts[1] == counts[2] == (mask == 1).sum()


def test_attributes_and_tables_are_those_that_h5py_writes(tmp_path):
    values = {"text": np.bytes_("a" * 64), "number": np.int64(-1), "row": np.arange(3.0), "square": np.eye(4), "scale": np.float64(0.5)}
    tables = [np.arange(6, dtype=np.uint32).reshape(3, 2), np.zeros((3, 48), np.uint8)]
    for way in ("ours", "h5py"):
        with h5py.File(tmp_path / way, "w", locking=False) as file:
            group = file.create_group("a")
            for name, value in values.items():
                if way == "ours":
                    _attribute(group, name, value)
                else:
                    group.attrs[name] = value
            for number, table in enumerate(tables):
                if way == "ours":
                    _table(group, str(number), table)
                else:
                    group.create_dataset(str(number), data=table, track_times=False)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "h5py").read_bytes()
