"""Whole data sets of mixed arrays through one reader: every voxel as h5py gives it."""

from concurrent.futures import ThreadPoolExecutor

import h5py
import hdf5plugin  # noqa: F401  registers the filter for h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hvd_imaging import filesystem
from hvd_imaging.config import ShardConfig
from hvd_imaging.shards import storage
from hvd_imaging.shards.reader import ShardReader
from hvd_imaging.shards.writer import Record, write_dataset

# What `auto` stores them as: uint8, int16, int16 with a scale, float32.
CONTENTS = {
    "bytes": lambda random, shape: random.integers(0, 256, shape),
    "units": lambda random, shape: random.integers(-1024, 3000, shape),
    "shares": lambda random, shape: random.random(shape),
    "powers": lambda random, shape: np.exp(8 * random.normal(size=shape)),
    "empty": lambda random, shape: np.zeros(shape),
}
DTYPES = [*["auto"] * 6, "uint8", "int16", "float16", "float32"]


class Chunks(dict):
    """A store of chunks in memory."""

    def get(self, keys, sizes=None):
        return [dict.get(self, key) for key in keys]

    def put(self, items):
        self.update(items)


def draw_dataset(random, compression):
    """(records, task, ShardConfig): five images of all stored types in any order, with odd sides for the most part."""
    channels, masked = random.choice([1, 1, 1, 2, 3]), random.random() < 0.5
    values = np.random.default_rng(random.randrange(1000))
    records = []
    for number, content in enumerate(random.sample(sorted(CONTENTS), len(CONTENTS))):
        shape = draw_sides(random)
        image = CONTENTS[content](values, (*shape, channels)).astype(np.float32)
        mask = values.integers(0, 3, shape).astype(np.uint8) if masked else None
        records.append(Record(f"{number:016x}", f"p{number}", image, mask, np.eye(4)))
    config = ShardConfig(
        dtype=random.choice(DTYPES),
        compression=compression,
        patch=random.choice([(20, 20, 20), draw_sides(random)]),
        chunk=random.choice([None, None, draw_sides(random)]),
        shard_mb=random.choice([100, 0.001]),  # one shard for all, or for each
    )
    return records, "segmentation" if masked else "unlabelled", config


def draw_sides(random):
    """Odd for the most part; all short, or some long."""
    return tuple(random.choice(random.choice([[1, 3, 5], [2, 7, 9, 11], [12, 15, 19, 21]])) for _ in range(3))


def draw_box(random, sample):
    """(first voxel, sides) of a box that touches the volume and may reach out of it."""
    shape = draw_sides(random)
    return tuple(random.randint(1 - n, side - 1) for n, side in zip(shape, sample.shape, strict=False)), shape


def stored_by_hdf5(folder, manifest):
    """(image, mask or None) of each sample, in the stored type."""
    found = {}
    for sample in manifest.samples:
        with h5py.File(folder / sample.shard, "r", locking=False) as file:
            group = file[f"samples/{sample.id}"]
            found[sample.id] = group["image"][...], group["mask"][...] if "mask" in group else None
    return found


def cut(array, start, shape):
    """A box of an array; 0 outside."""
    out = np.zeros((*shape, *array.shape[3:]), array.dtype)
    ranges = [(max(a, 0), min(a + n, side)) for a, n, side in zip(start, shape, array.shape, strict=False)]
    if all(low < high for low, high in ranges):
        inside = tuple(slice(low - a, high - a) for (low, high), a in zip(ranges, start, strict=True))
        out[inside] = array[tuple(slice(low, high) for low, high in ranges)]
    return out


def same(found, expected):
    return (found is None and expected is None) or (
        found.dtype == expected.dtype and found.shape == expected.shape and np.array_equal(found, expected)
    )


def look(reader, sample, stored, start, shape):
    """A box, the whole sample, and the whole in its stored type are what h5py gives."""
    image, mask = stored
    values = storage.decode(image, sample.scale, sample.offset)
    got, labels = reader.read(sample, start, shape)
    assert same(got, cut(values, start, shape)), (sample, start, shape)
    assert same(labels, None if mask is None else cut(mask, start, shape)), (sample, start, shape)
    whole = reader.read_whole(sample)
    assert same(whole[0], values) and same(whole[1], mask), sample
    whole = reader.read_stored(sample)
    assert same(whole[0], image) and same(whole[1], mask), sample


@pytest.mark.parametrize("way", ["mapped", "read", "chunk store"])
@pytest.mark.parametrize("compression", ["none", "lz4", "zstd", "gzip"])
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(random=st.randoms(use_true_random=True))
def test_any_mix_of_arrays_is_read_as_h5py_reads_it(tmp_path_factory, monkeypatch, compression, way, random):
    records, task, config = draw_dataset(random, compression)
    folder = tmp_path_factory.mktemp("mix") / "d"
    manifest = write_dataset(folder, records, task, ("background", "a", "b"), shards=config)
    stored = stored_by_hdf5(folder, manifest)
    kind = "local" if way == "mapped" else "nfs"
    monkeypatch.setattr(filesystem, "of", lambda path: filesystem.Filesystem("test", kind, kind != "local"))
    chunks = Chunks() if way == "chunk store" else None
    for _ in range(4):  # a reader's buffers grow with what it has read: several orders
        jobs = [(sample, stored[sample.id], *draw_box(random, sample)) for sample in manifest.samples]
        random.shuffle(jobs)
        with ShardReader(folder, manifest, chunks=chunks) as reader, ThreadPoolExecutor(random.randint(1, 2)) as pool:
            for one in [pool.submit(look, reader, *job) for job in jobs]:
                one.result()
            assert (compression == "gzip") == all(index is None for index in reader._indices.values())


@pytest.mark.parametrize("compression", ["none", "lz4", "zstd"])
@pytest.mark.parametrize("dtype", ["int16", "float16"])
def test_an_odd_number_of_bytes_before_items_of_two(tmp_path, monkeypatch, compression, dtype):
    """A decoded block of a mask leaves a buffer of an odd size, and the last chunk of a mask a file of an odd size."""
    monkeypatch.setattr(filesystem, "of", lambda path: filesystem.Filesystem("test", "local", False))
    values = np.random.default_rng(0)
    images = [values.integers(-99, 99, (*shape, 1)).astype(np.float32) for shape in [(3, 3, 3), (21, 21, 21)]]
    masks = [values.integers(0, 3, image.shape[:3]).astype(np.uint8) for image in images]
    records = [Record(f"{i:016x}", "p", image, mask, np.eye(4)) for i, (image, mask) in enumerate(zip(images, masks, strict=True))]
    config = ShardConfig(dtype=dtype, compression=compression, patch=(40, 40, 40))
    manifest = write_dataset(tmp_path / "d", records, "segmentation", ("background", "a", "b"), shards=config)
    file = tmp_path / "d" / manifest.shards[0].name
    if compression == "none" and file.stat().st_size % 2 == 0:
        with open(file, "ab") as longer:  # HDF5 reads a file with bytes after its end
            longer.write(b"\0")
    small, large = manifest.samples
    with ShardReader(tmp_path / "d", manifest) as reader:
        odd = np.empty(large.shape[:3], np.uint8)
        reader._fill(large, "mask", (0, 0, 0), large.shape[:3], odd, (0, 0, 0))
        assert np.array_equal(odd, masks[1])
        for number, sample in enumerate((small, large)):
            image, mask = reader.read_whole(sample)
            assert np.array_equal(image, images[number]) and np.array_equal(mask, masks[number])
