"""The fast reader against HDF5 and against the source: every type, codec, cut, place and kind of damage."""

import itertools
import math
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import h5py
import hdf5plugin  # noqa: F401  registers the filter for h5py
import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_imaging import filesystem
from hvd_imaging.communicator import Alone
from hvd_imaging.config import ShardConfig
from hvd_imaging.errors import DatasetError
from hvd_imaging.shards import chunks, codec, frames, kernel, packing, storage
from hvd_imaging.shards import manifest as manifests
from hvd_imaging.shards import reader as readers
from hvd_imaging.shards.chunks import Layout, expected_amplification, plan_layout
from hvd_imaging.shards.reader import ShardReader
from hvd_imaging.shards.verify import verify
from hvd_imaging.shards.writer import Record, write_dataset

SHAPE = (21, 30, 17)


def source(kind="noise", channels=1, shape=SHAPE, seed=0):
    random = np.random.default_rng(seed)
    shape = (*shape, channels)
    if kind == "noise":
        return random.random(shape, dtype=np.float32)
    if kind == "constant":
        return np.full(shape, 7, np.float32)
    if kind == "smooth":
        return np.add.outer(np.arange(shape[0]), np.add.outer(np.arange(shape[1]), np.arange(shape[2])))[..., None].repeat(channels, 3)
    image = random.integers(-1000, 1000, shape)
    image[: shape[0] // 2] = 0  # whole chunks of zeros, and others of noise
    return image.astype(np.float32)


def make(folder, image, mask=None, **options):
    record = Record("00000000000000aa", "p", image, mask, np.eye(4), label=None)
    task = "unlabelled" if mask is None else "segmentation"
    return write_dataset(folder, [record], task, ("background", "a", "b", "c"), shards=ShardConfig(**options))


def shard(folder, manifest):
    return folder / manifest.samples[0].shard


def by_hdf5(folder, manifest, name="image"):
    with h5py.File(shard(folder, manifest), "r", locking=False) as file:
        return file[f"samples/{manifest.samples[0].id}/{name}"][...]


COMPRESSIONS = ["none", "lz4", "zstd", "gzip"]
TYPES = ["uint8", "int16", "float16", "float32"]


@pytest.fixture(params=[True, False], ids=["own disk", "shared disk"])
def own_disk(request, monkeypatch):
    """Files of a node's own disk are mapped, others are read: both ways."""
    found = filesystem.Filesystem("test", "local" if request.param else "nfs", not request.param)
    monkeypatch.setattr(filesystem, "of", lambda path: found)
    return request.param


@pytest.mark.parametrize("kind", ["noise", "constant", "smooth", "zeros"])
@pytest.mark.parametrize(("compression", "dtype"), itertools.product(COMPRESSIONS, TYPES))
def test_hdf5_and_the_fast_reader_agree_with_the_source(tmp_path, compression, dtype, kind, own_disk):
    image = source(kind, channels=2)
    mask = np.random.default_rng(1).integers(0, 4, SHAPE).astype(np.uint8)
    manifest = make(tmp_path / "d", image, mask, compression=compression, dtype=dtype, patch=(8, 8, 8))
    sample = manifest.samples[0]
    stored = by_hdf5(tmp_path / "d", manifest)
    assert stored.dtype == dtype and np.array_equal(by_hdf5(tmp_path / "d", manifest, "mask"), mask)
    with ShardReader(tmp_path / "d", manifest) as reader:
        found, labels = reader.read_stored(sample)
        assert found.dtype == dtype and np.array_equal(found, stored) and np.array_equal(labels, mask)
        values, _ = reader.read_whole(sample)
        assert np.array_equal(values, storage.decode(stored, sample.scale, sample.offset))
        assert (reader._index(sample, "image") is None) == (compression == "gzip")
    assert np.abs(values - image).max() <= sample.error * (1 + 1e-6) and sample.error <= (8 if dtype == "uint8" else 1)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_box_of_any_cut(data, tmp_path_factory):
    compression, channels = data.draw(st.sampled_from(["none", "lz4"])), data.draw(st.integers(1, 2))
    kind = data.draw(st.sampled_from(["local", "nfs"]))
    cut = data.draw(st.sampled_from([(21, 30, 17), (8, 8, 8), (5, 7, 3), (16, 4, 16)]))
    dtype = data.draw(st.sampled_from(["uint8", "int16", "float32"]))
    folder = tmp_path_factory.getbasetemp() / f"boxes-{compression}-{channels}-{cut}-{dtype}"
    image = source("zeros", channels)
    if not folder.exists():
        make(folder, image, compression=compression, dtype=dtype, chunk=cut)
    manifest = manifests.load(folder)
    start = [data.draw(st.integers(0, n - 1)) for n in SHAPE]
    size = [data.draw(st.integers(1, n - a)) for n, a in zip(SHAPE, start, strict=True)]
    where = tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))
    with pytest.MonkeyPatch.context() as patch, ShardReader(folder, manifest) as reader:
        patch.setattr(filesystem, "of", lambda path: filesystem.Filesystem("test", kind, kind != "local"))
        found = reader.stored_box(manifest.samples[0], start, size)
    assert np.array_equal(found, by_hdf5(folder, manifest)[where])


def test_a_patch_goes_straight_into_its_row_of_a_batch(tmp_path):
    manifest = make(tmp_path / "d", source("zeros"), np.ones(SHAPE, np.uint8), compression="lz4")
    images, masks = np.full((2, 9, 9, 9, 1), np.nan, np.float32), np.full((2, 9, 9, 9), 9, np.uint8)
    with ShardReader(tmp_path / "d", manifest) as reader:
        image, _ = reader.read(manifest.samples[0], (15, 25, -2), (9, 9, 9), (images[1], masks[1]))
        expected, labels = reader.read(manifest.samples[0], (15, 25, -2), (9, 9, 9))
    assert np.shares_memory(image, images) and np.isnan(images[0]).all() and (masks[0] == 9).all()
    assert np.array_equal(images[1], expected) and np.array_equal(masks[1], labels) and labels[:6, :5, 2:].all() and labels.sum() == 6 * 5 * 7


def test_a_slab_reads_its_slices_only(tmp_path, monkeypatch):
    manifest = make(tmp_path / "d", source("noise"), compression="none", chunk=(8, 30, 17), dtype="int16")
    whole = by_hdf5(tmp_path / "d", manifest)
    sample = manifest.samples[0]
    with ShardReader(tmp_path / "d", manifest) as reader:
        image, mask = reader.slab(sample, 9, 15)
        assert mask is None and np.array_equal(image, storage.decode(whole[9:15], sample.scale, sample.offset))
        seen = reader._index(sample, "image").seen
        assert [int(row.any()) for row in seen] == [0, 1, 0]  # chunk sums are compared where bytes were read


def test_threads_share_a_reader(tmp_path):
    manifest = make(tmp_path / "d", source("noise"), compression="lz4", dtype="int16", chunk=(5, 7, 3))
    whole = by_hdf5(tmp_path / "d", manifest)
    with ShardReader(tmp_path / "d", manifest) as reader:

        def one(seed):
            random = np.random.default_rng(seed)
            start = [int(random.integers(0, n - 4)) for n in SHAPE]
            where = tuple(slice(a, a + 5) for a in start)
            size = [min(5, n - a) for n, a in zip(SHAPE, start, strict=True)]
            return np.array_equal(reader.stored_box(manifest.samples[0], start, size), whole[where])

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(one, range(400)))


def test_big_endian_and_unknown_filters_are_read_by_hdf5_and_said(tmp_path, caplog):
    manifest = make(tmp_path / "d", source("zeros"), compression="none", dtype="int16")
    sample, whole = manifest.samples[0], by_hdf5(tmp_path / "d", manifest)
    for options in ({"dtype": ">i2"}, {"compression": "lzf"}, {"fletcher32": True}, {"chunks": None}):
        with h5py.File(shard(tmp_path / "d", manifest), "r+", locking=False) as file:
            path = f"samples/{sample.id}/image"
            del file[path]
            options = {"dtype": "<i2", "chunks": (4, 4, 4, 1)} | options
            file.create_dataset(path, data=whole, **options)
        caplog.clear()
        with ShardReader(tmp_path / "d", manifest) as reader:
            for _ in range(2):
                assert np.array_equal(reader.stored_box(sample, (1, 2, 3), (5, 5, 5)), whole[1:6, 2:7, 3:8])
        assert len(caplog.records) == 1 and "through HDF5" in caplog.text


def test_chunks_that_were_never_written_are_refused(tmp_path):
    manifest = make(tmp_path / "d", source("zeros"), compression="none", dtype="int16", chunk=(8, 8, 8))
    sample = manifest.samples[0]
    with h5py.File(shard(tmp_path / "d", manifest), "r+", locking=False) as file:
        path = f"samples/{sample.id}/image"
        del file[path]
        file.create_dataset(path, (*SHAPE, 1), "<i2", chunks=(8, 8, 8, 1), fillvalue=-5)[:8] = 3
    with ShardReader(tmp_path / "d", manifest) as reader, pytest.raises(DatasetError, match=r"image has \d+ of its \d+ chunks"):
        reader.stored_box(sample, (0, 0, 0), SHAPE)


def test_without_the_compiled_loop_the_result_is_the_same(tmp_path, monkeypatch, caplog):
    manifest = make(tmp_path / "d", source("noise"), np.ones(SHAPE, np.uint8), compression="lz4")
    with ShardReader(tmp_path / "d", manifest) as reader:
        fast = reader.read(manifest.samples[0], (-1, 3, 4), (9, 9, 9))

    def unavailable():
        raise kernel.Unavailable("the package numba is not installed")

    monkeypatch.setattr(kernel, "inner_loop", unavailable)
    with ShardReader(tmp_path / "d", manifest) as reader:
        slow = reader.read(manifest.samples[0], (-1, 3, 4), (9, 9, 9))
    assert all(np.array_equal(a, b) for a, b in zip(fast, slow, strict=True)) and "numba is not installed" in caplog.text


# Damage


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize("compression", ["none", "lz4", "zstd"])
def test_a_flipped_byte_of_any_chunk_is_named_on_first_touch(tmp_path, compression, own_disk):
    manifest = make(tmp_path / "d", source("noise"), compression=compression, dtype="int16", chunk=(8, 8, 8))
    sample, path = manifest.samples[0], shard(tmp_path / "d", manifest)
    with h5py.File(path, "r", locking=False) as file:
        array = file[f"samples/{sample.id}/image"]
        stored = [array.id.get_chunk_info(i) for i in range(array.id.get_num_chunks())]
    clean = path.read_bytes()
    for info in stored[::7]:
        path.write_bytes(clean)
        flip(path, info.byte_offset + info.size * 2 // 3)
        with ShardReader(tmp_path / "d", manifest) as reader, pytest.raises(DatasetError) as caught:
            reader.read_whole(sample)
        text = str(caught.value)
        assert sample.id in text and path.name in text and f"image, chunk {tuple(info.chunk_offset[:3])}, block" in text
        (problem,) = verify(tmp_path / "d", Alone())
        assert (problem.sample, problem.shard) == (sample.id, path.name) and str(tuple(info.chunk_offset[:3])) in problem.reason
        with ShardReader(tmp_path / "d", manifest) as reader:  # a patch elsewhere is not held up
            far = tuple(0 if a else n - 1 for a, n in zip(info.chunk_offset[:3], SHAPE, strict=True))
            if not all(a <= f < a + 8 for a, f in zip(info.chunk_offset[:3], far, strict=True)):
                reader.read(sample, far, (1, 1, 1))


@pytest.mark.parametrize("compression", ["none", "lz4"])
def test_a_flipped_byte_anywhere_is_found(tmp_path, compression):
    manifest = make(
        tmp_path / "d", source("zeros", shape=(8, 8, 8)), np.ones((8, 8, 8), np.uint8), compression=compression, chunk=(4, 8, 8)
    )
    path = shard(tmp_path / "d", manifest)
    clean = path.read_bytes()
    for place in range(0, len(clean), 37):
        path.write_bytes(clean)
        flip(path, place)
        problems = verify(tmp_path / "d", Alone())
        assert problems and {problem.shard for problem in problems} == {path.name}, place


@pytest.mark.parametrize("table", ["start", "check", "head"])
def test_a_damaged_table_sends_nobody_astray(tmp_path, table):
    manifest = make(tmp_path / "d", source("noise"), compression="lz4", dtype="int16")
    sample = manifest.samples[0]
    with h5py.File(shard(tmp_path / "d", manifest), "r+", locking=False) as file:
        values = file[f"samples/{sample.id}/blocks/image/{table}"]
        values[0, -1] = values[0, -1] + 1
    with ShardReader(tmp_path / "d", manifest) as reader, pytest.raises(DatasetError, match="table of its blocks"):
        reader.read_whole(sample)


@pytest.mark.parametrize(("compression", "row"), [("none", (0, 1)), ("none", (1, 1)), ("lz4", (1, -(10**6)))])
def test_a_wrong_table_with_a_right_check_sum_leads_nowhere(tmp_path, compression, row):
    manifest = make(tmp_path / "d", source("noise"), compression=compression, dtype="int16", patch=(3, 8, 8))
    sample = manifest.samples[0]
    with h5py.File(shard(tmp_path / "d", manifest), "r+", locking=False) as file:
        table = file[f"samples/{sample.id}/blocks/image"]
        start = table["start"][...].astype(np.int64)
        start[0, row[0]] += row[1]
        table["start"][...] = np.clip(start, 0, None).astype(np.uint32)
        table.attrs["check"] = frames.table_check(table["start"][...], table["check"][...], table["head"][...])
    with ShardReader(tmp_path / "d", manifest) as reader, pytest.raises(DatasetError, match="do not follow each other"):
        reader.read_whole(sample)


def test_every_half_becomes_the_float_that_numpy_makes_of_it(tmp_path):
    halves = np.arange(65536, dtype=np.uint16).view(np.float16).reshape(1, 256, 256, 1)
    finite = np.where(np.isfinite(halves), halves, 0).astype(np.float32)
    manifest = make(tmp_path / "d", finite, compression="none", dtype="float16")
    with ShardReader(tmp_path / "d", manifest) as reader:
        found = reader.read_whole(manifest.samples[0])[0]
    assert np.array_equal(found.view(np.uint32), finite.view(np.uint32))
    loop = kernel.inner_loop()
    out = np.zeros(65536, np.float32)
    loop._widen(
        np.arange(65536, dtype=np.uint16), *map(np.uint64, (0, 65536, 65536)), out, out.view(np.uint32),
        *map(np.uint64, (0, 65536, 65536)), 1, 1, np.uint64(65536),
    )  # fmt: skip
    assert np.array_equal(out.view(np.uint32), halves.ravel().astype(np.float32).view(np.uint32))


def test_a_read_that_fails_for_a_moment_is_tried_again(tmp_path, monkeypatch):
    manifest = make(tmp_path / "d", source("noise"), compression="lz4")
    empty = tmp_path / "empty"
    empty.touch()
    waits, opened, real = [], [], os.open

    def once(path, flags, *rest):
        opened.append(path)
        return real(empty if len(opened) == 1 else path, flags, *rest)

    with ShardReader(tmp_path / "d", manifest) as reader:
        reader._index(manifest.samples[0], "image")
        monkeypatch.setattr(os, "open", once)
        monkeypatch.setattr(readers.time, "sleep", waits.append)
        image, _ = reader.read_whole(manifest.samples[0])
        assert waits == [0.1] and len(opened) == 2
    monkeypatch.undo()
    with ShardReader(tmp_path / "d", manifest) as reader:
        assert np.array_equal(reader.read_whole(manifest.samples[0])[0], image)


@pytest.mark.parametrize("compression", ["none", "lz4"])
def test_a_read_that_fails_for_good_names_the_file(tmp_path, monkeypatch, compression, own_disk):
    manifest = make(tmp_path / "d", source("noise"), compression=compression)
    waits = []
    with ShardReader(tmp_path / "d", manifest) as reader:
        reader._index(manifest.samples[0], "image")
        monkeypatch.setattr(readers.time, "sleep", waits.append)
        shard(tmp_path / "d", manifest).write_bytes(b"")
        with pytest.raises(DatasetError, match=r"shard-00000\.h5: sample 00.*aa: image, chunk \(0, 0, 0\) cannot be read.*4 times"):
            reader.read_whole(manifest.samples[0])
    assert waits == [0.1, 0.5, 2.0]


@pytest.mark.parametrize("what", ["external", "soft", "outside data"])
def test_links_are_never_followed(tmp_path, what):
    manifest = make(tmp_path / "d", source("zeros"), compression="none", dtype="int16")
    sample, path = manifest.samples[0], shard(tmp_path / "d", manifest)
    shutil.copy(path, tmp_path / "elsewhere.h5")
    name = f"samples/{sample.id}/image"
    with h5py.File(path, "r+", locking=False) as file:
        del file[name]
        if what == "external":
            file[name] = h5py.ExternalLink(str(tmp_path / "elsewhere.h5"), name)
        elif what == "soft":
            file["other"] = np.zeros((*SHAPE, 1), np.int16)
            file[name] = h5py.SoftLink("/other")
        else:
            (tmp_path / "raw").write_bytes(bytes(2 * math.prod(SHAPE)))
            file.create_dataset(name, (*SHAPE, 1), "<i2", external=[(str(tmp_path / "raw"), 0, h5py.h5f.UNLIMITED)])
    with ShardReader(tmp_path / "d", manifest) as reader, pytest.raises(DatasetError, match=r"never followed.*restore the shard"):
        reader.read(sample, (0, 0, 0), (4, 4, 4))


def test_a_closed_reader_opens_again_and_leaves_no_descriptor(tmp_path):
    manifest = make(tmp_path / "d", source("noise"), compression="lz4")
    before = len(os.listdir("/proc/self/fd"))
    reader = ShardReader(tmp_path / "d", manifest)
    for _ in range(3):
        reader.read_whole(manifest.samples[0])
        reader.close()
        assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_is_not_closed_while_it_is_read(tmp_path):
    (tmp_path / "a").write_bytes(b"a")
    descriptors = readers._Descriptors(1)
    with descriptors.of(tmp_path / "a") as one:
        descriptors.forget(tmp_path / "a")
        with descriptors.of(tmp_path / "a") as two:
            assert one is not two and os.pread(one.descriptor, 1, 0) == os.pread(two.descriptor, 1, 0) == b"a"
            descriptors.close()
            assert os.pread(two.descriptor, 1, 0) == b"a"
    descriptors.close()
    for file in (one, two):
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(file.descriptor)
    assert threading.active_count() < 50


# Pure parts


@settings(max_examples=300, deadline=None)
@given(
    st.tuples(*[st.integers(1, 300)] * 3),
    st.tuples(*[st.sampled_from([1, 8, 16, 32, 48, 64, 96, 100, 128])] * 3),
    st.sampled_from([1, 2, 4, 8]),
    st.booleans(),
)
def test_every_cut_keeps_the_promises(shape, patch, voxel, compressed):
    layout = plan_layout(shape, patch, voxel, compressed)
    assert expected_amplification(layout.block, patch, shape) <= chunks.AMPLIFICATION
    assert layout.block[1:] == layout.chunk[1:] and layout.chunk[0] % layout.block[0] == 0
    for p, b, n in zip(patch, layout.block, shape, strict=True):
        assert p % b == 0 or p > n  # an aligned patch reads no more than itself
    assert math.prod(layout.chunk) * voxel <= max(chunks.CHUNK_BYTES, math.prod(layout.block) * voxel) and layout.blocks <= 32
    assert all(c - b < n for c, b, n in zip(layout.chunk, layout.block, shape, strict=True))


def test_the_expected_amplification_is_the_mean_over_all_places():
    def touched(start, p, b):
        return ((start + p - 1) // b - start // b + 1) * b

    for p, b in ((64, 16), (48, 12), (32, 4), (7, 3)):
        mean = np.mean([touched(start, p, b) for start in range(b)]) / p
        assert math.isclose(mean, expected_amplification((b, 1, 1), (p, 1, 1), (1000, 1, 1)))


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 7))
def test_the_check_sum_is_xxh64(data, before):
    loop = kernel.inner_loop()
    buffer = np.frombuffer(bytes(before) + data, np.uint8).copy()
    assert int(loop.check_sum(buffer, before, len(data))) == xxhash.xxh64_intdigest(data) & 0xFFFFFFFF


@pytest.mark.parametrize(
    ("values", "dtype", "scale", "error"),
    [
        (np.arange(-1000, 1000), "int16", 1.0, 0.0),
        (np.arange(256), "uint8", 1.0, 0.0),
        (np.full(9, 0.3), "uint8", 1.0, 0.0),
        (np.full(9, -1e30), "uint8", 1.0, 0.0),
        (np.linspace(0, 1, 256), "uint8", None, 1e-7),
        (np.random.default_rng(0).random(5000), "int16", None, 7.7e-6),
        (np.array([0, 1, np.nan]), "float32", 1.0, None),
        (np.array([0, 40000.0]), "uint8", None, 0.01),
    ],
)
def test_the_stored_type_follows_the_content(values, dtype, scale, error):
    stored = storage.encode(values.astype(np.float32), "auto", 1e-5)
    assert stored.array.dtype == dtype and (scale is None or stored.scale == scale)
    if error is not None:
        assert stored.error <= error
        difference = np.abs(storage.decode(stored.array, stored.scale, stored.offset) - values.astype(np.float32)).max()
        assert difference == stored.error


@pytest.mark.parametrize("codec_", ["lz4", "zstd"])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "float16", "float32"])
def test_frames_are_those_that_blosc2_writes(codec_, dtype):
    random = np.random.default_rng(1)
    volume = random.normal(100, 20, (50, 70, 40, 1)).astype(dtype)
    volume[:, :20] = 0
    volume[:, 20:40] = random.integers(0, 256, (50, 20, 40, 1)).astype(dtype)
    layout = chunks.plan_layout(volume.shape, (32, 48, 48), volume.itemsize, True)
    way = frames.way(layout, codec_, volume.dtype, (*layout.chunk, 1))
    assert way.parts is not None  # made by hand, not by falling back
    for place in frames.places(volume, layout):
        chunk = frames.chunk_at(volume, layout, place)
        assert way.frame(chunk) == way._whole(chunk)


@pytest.mark.parametrize("compression", ["none", "lz4", "zstd"])
@pytest.mark.parametrize(("dtype", "shape"), [("uint8", (33, 96, 48, 3)), ("int16", (70, 60, 75)), ("float32", (40, 33, 50, 1))])
def test_compiled_packing_gives_the_same_bytes(compression, dtype, shape, monkeypatch):
    random = np.random.default_rng(3)
    monkeypatch.setattr(packing, "_PATIENCE", math.inf)
    noise = random.integers(0, 200, shape).astype(dtype)
    noise[:, :30] = 7  # chunks of one value are stored otherwise
    steps = (np.arange(noise.size).reshape(shape) // 977 % 50).astype(dtype)
    for array in (noise, steps, (random.random(shape) > 0.9999).astype(dtype)):
        for layout in (Layout((30, 4, 24), (1, 4, 24)), Layout((16, 16, 16), (4, 16, 16))):
            found = []
            for enough in (1 << 40, 0):
                monkeypatch.setattr(kernel, "ENOUGH", enough)
                chunks: list = []
                tables = packing.pack_array(array, layout, compression, lambda place, data, to=chunks: to.append((place, bytes(data))))
                found.append((chunks, tables))
            assert found[0][0] == found[1][0]
            for one, other in zip(*(vars(tables).values() for _, tables in found), strict=True):
                assert one.dtype == other.dtype and np.array_equal(one, other)


def test_multiples_of_one_step_are_kept_as_such():
    units = np.random.default_rng(0).integers(-1000, 401, 200_000)
    stored = storage.encode(((units + 1000) / 1400).astype(np.float32), "auto", 1e-5)
    assert stored.array.dtype == np.int16 and np.array_equal(stored.array, units + 1000)
    assert stored.scale == pytest.approx(1 / 1400, rel=1e-6) and stored.error < 2e-7


def test_no_loss_allowed_means_none():
    values = np.random.default_rng(0).random(5000).astype(np.float32)
    stored = storage.encode(values, "auto", 0)
    assert stored.array.dtype == np.float32 and np.array_equal(stored.array, values)


@pytest.mark.parametrize(
    ("disk", "cores", "name"),
    [(50, 2, "zstd"), (2000, 2, "lz4"), (20000, 1, "none"), (100, 1, "zstd")],
)
def test_the_choice_of_a_codec_weighs_disk_and_cores(disk, cores, name):
    measured = [codec.Measured("lz4", 2.0, 1500), codec.Measured("zstd", 2.6, 700), codec.Measured("none", 1, math.inf)]
    found, reason = codec.choose(measured, disk, cores)
    assert found == name and f"disk {disk} MB/s" in reason and "lz4 2.0 x" in reason


def test_codecs_and_disk_are_measured(tmp_path):
    image = source("noise", shape=(32, 64, 64))
    found = codec.measure(image, Layout((32, 16, 16), (4, 16, 16)))
    assert [one.name for one in found] == ["lz4", "zstd", "none"] and all(one.decode_mb_s > 0 and one.ratio > 0.9 for one in found)
    assert codec.disk_speed(tmp_path) > 0 and not list(tmp_path.iterdir())


def test_a_chunk_and_its_table():
    chunk = np.random.default_rng(0).integers(0, 50, (8, 4, 4, 1)).astype(np.int16)
    layout = Layout((8, 4, 4), (2, 4, 4))
    for compression in ("none", "lz4", "zstd"):
        frame = frames.pack(chunk, layout, compression)
        assert frame.start.shape == (5,) and (np.diff(frame.start.astype(int)) > 0).all() and frame.start[-1] <= len(frame.data)
        assert np.array_equal(frame.check, frames.block_checks(frame.data, frame.start))
