"""The formats that `bench io` compares: how each writes the same volumes and reads boxes of them, at its best.

Optional packages are imported where they are used, so that a missing one costs only its own row. TensorFlow is imported in
the process of `io_worker` that measures it and nowhere else.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

Triple = tuple[int, int, int]
Request = tuple[int, Triple, Triple]
"""(volume, first voxel, shape), voxels along (D, H, W)."""

MIB = 1 << 20


class Reader(Protocol):
    """An open store. `ready` is not timed, what it returns is."""

    def ready(self, requests: Sequence[Request], threads: int) -> Callable[[int], None]:
        """A function that reads all requests so many times, spread over the threads."""
        ...

    def boxes(self, requests: Sequence[Request]) -> Iterator[np.ndarray]:
        """The stored voxels of each request ``(d, h, w[, C])``; an array is good until the next one is taken."""
        ...

    def close(self) -> None:
        """Free the files."""
        ...


class Format(Protocol):
    """A way to store volumes.

    Attributes:
        store: name of its folder; formats that read the same files share it, the first of them writes.
        needs: modules without which it cannot be measured.
    """

    @property
    def store(self) -> str: ...

    @property
    def needs(self) -> tuple[str, ...]: ...

    def write(self, folder: Path, volumes: Sequence[np.ndarray], patch: Triple) -> None:
        """Store int16 volumes ``(D, H, W)`` for reading patches of this shape."""
        ...

    def open(self, folder: Path, threads: int) -> Reader:
        """Open for reading with so many threads."""
        ...

    def truth(self, volume: np.ndarray, start: Triple, shape: Triple) -> np.ndarray:
        """What a right reader gives for a request."""
        ...


def missing(form: Format) -> str:
    """Why the format cannot be measured here; empty if it can."""
    absent = [name for name in form.needs if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else ""


def box(start: Sequence[int], shape: Sequence[int]) -> tuple[slice, slice, slice]:
    """The slices of a request."""
    d, h, w = (slice(low, low + size) for low, size in zip(start, shape, strict=True))
    return d, h, w


class BoxReader:
    """Reads box by box; threads take every n-th request each, so nothing is handed over between them.

    Args:
        read: (volume, start, shape, out ``(d, h, w)``) to the box; may fill and return ``out``.
        close: frees the files.
        callers: threads that call ``read`` whatever `ready` is asked for; None: as many as asked for.
        dtype: of ``out``.
    """

    def __init__(
        self,
        read: Callable[[int, Triple, Triple, np.ndarray], np.ndarray],
        close: Callable[[], object] = lambda: None,
        callers: int | None = None,
        dtype: Any = np.int16,
    ) -> None:
        self._read, self._close = read, close
        self._callers, self._dtype = callers, dtype

    def ready(self, requests: Sequence[Request], threads: int) -> Callable[[int], None]:
        """As `Reader`."""
        count = min(self._callers or threads, len(requests))
        parts = [requests[first::count] for first in range(count)]
        outs = [{shape: np.zeros(shape, self._dtype) for _, _, shape in part} for part in parts]
        errors: list[BaseException] = []

        def work(part: Sequence[Request], out: dict[Triple, np.ndarray], passes: int) -> None:
            try:
                for _ in range(passes):
                    for volume, start, shape in part:
                        self._read(volume, start, shape, out[shape])
            except BaseException as error:
                errors.append(error)

        def go(passes: int) -> None:
            # One thread is the caller itself: a library may treat the main thread better.
            pairs = list(zip(parts, outs, strict=True))
            others = [threading.Thread(target=work, args=(*pair, passes)) for pair in pairs] if count > 1 else []
            for thread in others:
                thread.start()
            if not others:
                work(*pairs[0], passes)
            for thread in others:
                thread.join()
            if errors:
                raise errors[0]

        return go

    def boxes(self, requests: Sequence[Request]) -> Iterator[np.ndarray]:
        """As `Reader`."""
        for volume, start, shape in requests:
            yield self._read(volume, start, shape, np.zeros(shape, self._dtype))

    def close(self) -> None:
        """As `Reader`."""
        self._close()


class _Boxes:
    """Formats that give the voxels of the box."""

    def truth(self, volume: np.ndarray, start: Triple, shape: Triple) -> np.ndarray:
        return volume[box(start, shape)]


@dataclass(frozen=True)
class Ours(_Boxes):
    """Shards of hvd_imaging, through `ShardReader`.

    Attributes:
        compression: as in `ShardConfig`.
        plain_h5py: read the same files with h5py instead, without locks and without a copy.
    """

    compression: str
    plain_h5py: bool = False

    @property
    def store(self) -> str:
        """As `Format`."""
        return f"ours-{self.compression}"

    @property
    def needs(self) -> tuple[str, ...]:
        """As `Format`: plain h5py knows Blosc through hdf5plugin only."""
        return ("hdf5plugin",) if self.plain_h5py and self.compression != "none" else ()

    def write(self, folder: Path, volumes: Sequence[np.ndarray], patch: Triple) -> None:
        """As `Format`."""
        from ..config import ShardConfig, SplitConfig
        from ..shards.writer import Record, write_dataset

        records = [
            Record(id=f"volume{i:03d}", patient=f"patient{i:03d}", image=v[..., None], mask=None, affine=np.eye(4))
            for i, v in enumerate(volumes)
        ]
        shards = ShardConfig.model_validate({"compression": self.compression, "dtype": "int16", "patch": patch})
        write_dataset(
            folder / "data", records, task="unlabelled", classes=(), split=SplitConfig(val=0, test=0), shards=shards
        )

    def open(self, folder: Path, threads: int) -> Reader:
        """As `Format`."""
        if self.plain_h5py:
            return self._h5py(folder / "data")
        return dataset_reader(folder / "data")

    def _h5py(self, dataset: Path) -> Reader:
        import h5py

        from ..shards import schema
        from ..shards.manifest import load

        if self.needs:
            import hdf5plugin  # noqa: F401  # registers its filters with HDF5

        samples = load(dataset).of_split("train")
        files = {name: h5py.File(dataset / name, "r", locking=False) for name in {s.shard for s in samples}}
        arrays = [files[s.shard][f"{schema.SAMPLES}/{s.id}/{schema.IMAGE}"] for s in samples]

        def read(volume: int, start: Triple, shape: Triple, out: np.ndarray) -> np.ndarray:
            arrays[volume].read_direct(out[..., None], (*box(start, shape), slice(None)))
            return out

        return BoxReader(read, lambda: [file.close() for file in files.values()])


def dataset_reader(dataset: Path) -> Reader:
    """The train samples of any dataset of hvd_imaging, in the stored type; request ``volume`` is the sample's index."""
    from ..shards.manifest import load
    from ..shards.reader import ShardReader

    manifest = load(dataset)
    samples = manifest.of_split("train")
    reader = ShardReader(dataset, manifest)
    # Only one channel and type fit a buffer that is made beforehand.
    kinds = {(sample.shape[3], sample.dtype) for sample in samples}
    same = len(kinds) == 1 and next(iter(kinds))[0] == 1

    def read(volume: int, start: Triple, shape: Triple, out: np.ndarray) -> np.ndarray:
        return reader.stored_box(samples[volume], start, shape, out=out[..., None] if same else None)

    return BoxReader(read, reader.close, dtype=samples[0].dtype if same else np.uint8)


@dataclass(frozen=True)
class Raw:
    """No format: one `os.preadv` of as many bytes as the request needs. The roof that the system's calls set.

    An aligned patch is one run in a file in patch order, a volume one in a file in voxel order. A box at a random place is no
    run in any file: as many bytes from its first voxel on are read instead.
    """

    store: str = "raw"
    needs: tuple[str, ...] = ()

    def write(self, folder: Path, volumes: Sequence[np.ndarray], patch: Triple) -> None:
        """As `Format`."""
        shapes = []
        for i, volume in enumerate(volumes):
            volume.tofile(folder / f"{i}.voxels")
            with open(folder / f"{i}.patches", "wb") as file:
                for start in itertools.product(*(range(0, n - p + 1, p) for n, p in zip(volume.shape, patch, strict=True))):
                    file.write(np.ascontiguousarray(volume[box(start, patch)]).tobytes())
            shapes.append(volume.shape)
        (folder / "shapes.json").write_text(json.dumps({"shapes": shapes, "patch": patch}), encoding="utf-8")

    def open(self, folder: Path, threads: int) -> Reader:
        """As `Format`."""
        known = json.loads((folder / "shapes.json").read_text(encoding="utf-8"))
        shapes, patch = [tuple(shape) for shape in known["shapes"]], tuple(known["patch"])
        voxels, patches = (
            [os.open(folder / f"{i}.{kind}", os.O_RDONLY) for i in range(len(shapes))] for kind in ("voxels", "patches")
        )

        def read(volume: int, start: Triple, shape: Triple, out: np.ndarray) -> np.ndarray:
            aligned = shape == patch and not any(s % p for s, p in zip(start, patch, strict=True))
            if aligned:
                grid = [n // p for n, p in zip(shapes[volume], patch, strict=True)]
                at = [s // p for s, p in zip(start, patch, strict=True)]
                file, offset = patches[volume], ((at[0] * grid[1] + at[1]) * grid[2] + at[2]) * out.nbytes
            else:
                file, offset = voxels[volume], _run(shapes[volume], start, shape) * out.itemsize
            if os.preadv(file, [out.data], offset) != out.nbytes:
                raise OSError(f"{folder}: a short read")
            return out

        def close() -> None:
            for file in voxels + patches:
                os.close(file)

        return BoxReader(read, close)

    def truth(self, volume: np.ndarray, start: Triple, shape: Triple) -> np.ndarray:
        """As `Format`: see the class for places that are not aligned."""
        if not any(s % p for s, p in zip(start, shape, strict=True)):
            return volume[box(start, shape)]
        first = _run(volume.shape, start, shape)
        return volume.reshape(-1)[first : first + math.prod(shape)].reshape(shape)


def _run(volume: Sequence[int], start: Triple, shape: Triple) -> int:
    """First voxel of a run of as many voxels as the box has, inside the volume."""
    first = (start[0] * volume[1] + start[1]) * volume[2] + start[2]
    return min(first, math.prod(volume) - math.prod(shape))


@dataclass(frozen=True)
class H5py(_Boxes):
    """One HDF5 array (N, D, H, W) of all volumes, through h5py without locks and without a copy.

    Attributes:
        compression: blosc (LZ4 and bitshuffle), gzip (level 4) or none.
        chunk: side of the cubic chunks; 0: one slice a chunk.
        cache: bytes of HDF5's chunk cache. One array for all, so that the cache is small beside the data, as in training.
    """

    compression: str
    chunk: int
    cache: int = MIB

    @property
    def store(self) -> str:
        """As `Format`."""
        return f"h5py-{self.compression}-{self.chunk}"

    @property
    def needs(self) -> tuple[str, ...]:
        """As `Format`."""
        return ("hdf5plugin",) if self.compression == "blosc" else ()

    def write(self, folder: Path, volumes: Sequence[np.ndarray], patch: Triple) -> None:
        """As `Format`."""
        import h5py

        shape = volumes[0].shape
        chunk = (self.chunk,) * 3 if self.chunk else (1, *shape[1:])
        options: dict[str, Any] = {}
        if self.compression == "gzip":
            options = {"compression": "gzip", "compression_opts": 4}
        elif self.compression == "blosc":
            import hdf5plugin

            options = dict(hdf5plugin.Blosc(cname="lz4", clevel=5, shuffle=hdf5plugin.Blosc.BITSHUFFLE))
        with h5py.File(folder / "data.h5", "w", libver="latest", locking=False) as file:
            chunks = (1, *(min(c, n) for c, n in zip(chunk, shape, strict=True)))
            array = file.create_dataset("v", (len(volumes), *shape), "i2", chunks=chunks, **options)
            for i, volume in enumerate(volumes):
                array[i] = volume

    def open(self, folder: Path, threads: int) -> Reader:
        """As `Format`."""
        import h5py

        if self.needs:
            import hdf5plugin  # noqa: F401  # registers its filters with HDF5
        # Slots: a prime, a hundred for each chunk that the cache can hold. rdcc_w0 stays at its default: with 1.0, HDF5 1.14
        # keeps chunks far beyond rdcc_nbytes, and a second pass would measure copies out of memory.
        file = h5py.File(folder / "data.h5", "r", locking=False, rdcc_nbytes=self.cache, rdcc_nslots=100_003)
        array = file["v"]

        def read(volume: int, start: Triple, shape: Triple, out: np.ndarray) -> np.ndarray:
            array.read_direct(out, (volume, *box(start, shape)))
            return out

        return BoxReader(read, file.close)


@dataclass(frozen=True)
class Npy(_Boxes):
    """A .npy file a volume, mapped into memory."""

    store: str = "npy"
    needs: tuple[str, ...] = ()

    def write(self, folder: Path, volumes: Sequence[np.ndarray], patch: Triple) -> None:
        """As `Format`."""
        for i, volume in enumerate(volumes):
            np.save(folder / f"{i}.npy", volume)

    def open(self, folder: Path, threads: int) -> Reader:
        """As `Format`."""
        arrays = [np.load(path, mmap_mode="r") for path in _numbered(folder, ".npy")]

        def read(volume: int, start: Triple, shape: Triple, out: np.ndarray) -> np.ndarray:
            np.copyto(out, arrays[volume][box(start, shape)])
            return out

        return BoxReader(read, arrays.clear)


@dataclass(frozen=True)
class Zarr(_Boxes):
    """A Zarr array a volume.

    Attributes:
        compression: blosc (LZ4 and bitshuffle) or none.
        chunk: side of the cubic chunks, a file each.
    """

    compression: str
    chunk: int = 64
    needs: tuple[str, ...] = ("zarr", "numcodecs")

    @property
    def store(self) -> str:
        """As `Format`."""
        return f"zarr-{self.compression}-{self.chunk}"

    def write(self, folder: Path, volumes: Sequence[np.ndarray], patch: Triple) -> None:
        """As `Format`."""
        import zarr

        blosc = self.compression == "blosc"
        for i, volume in enumerate(volumes):
            path, chunks = str(folder / f"{i}.zarr"), tuple(min(self.chunk, n) for n in volume.shape)
            if int(zarr.__version__.split(".")[0]) >= 3:
                codec = zarr.codecs.BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle") if blosc else None
                array = zarr.create_array(path, shape=volume.shape, chunks=chunks, dtype="i2", compressors=codec)
            else:
                import numcodecs

                codec = numcodecs.Blosc("lz4", 5, numcodecs.Blosc.BITSHUFFLE) if blosc else None
                array = zarr.open_array(
                    path, mode="w", shape=volume.shape, chunks=chunks, dtype="i2", compressor=codec
                )
            array[:] = volume

    def open(self, folder: Path, threads: int) -> Reader:
        """As `Format`."""
        import numcodecs.blosc
        import zarr

        # Blosc's own threads work for calls from the main thread only; so `threads` is the number in both cases.
        numcodecs.blosc.set_nthreads(threads)
        arrays = [zarr.open_array(str(path), mode="r") for path in _numbered(folder, ".zarr")]
        return BoxReader(lambda volume, start, shape, out: arrays[volume][box(start, shape)], arrays.clear)


@dataclass(frozen=True)
class Blosc2(_Boxes):
    """A Blosc2 file a volume in the layout of nnU-Net's data sets, mapped into memory.

    Attributes:
        codec: zstd (level 8, as nnU-Net writes) or lz4 (level 5 and bitshuffle, as the other formats here).
        inside: the library's threads decode the blocks of one box; else each thread reads boxes of its own.
    """

    codec: str
    inside: bool
    needs: tuple[str, ...] = ("blosc2",)

    @property
    def store(self) -> str:
        """As `Format`."""
        return f"blosc2-{self.codec}"

    def write(self, folder: Path, volumes: Sequence[np.ndarray], patch: Triple) -> None:
        """As `Format`."""
        import blosc2

        options: dict[str, Any] = {"codec": blosc2.Codec.ZSTD, "clevel": 8}
        if self.codec == "lz4":
            options = {"codec": blosc2.Codec.LZ4, "clevel": 5, "filters": [blosc2.Filter.BITSHUFFLE]}
        for i, volume in enumerate(volumes):
            chunks, blocks = blosc2_layout(volume.shape, patch, volume.itemsize)
            path = str(folder / f"{i}.b2nd")
            blosc2.asarray(
                np.ascontiguousarray(volume), urlpath=path, mode="w", chunks=chunks, blocks=blocks, cparams=options
            )

    def open(self, folder: Path, threads: int) -> Reader:
        """As `Format`."""
        import blosc2

        paths = _numbered(folder, ".b2nd")
        inside = {"nthreads": threads if self.inside else 1}
        local = threading.local()

        def read(volume: int, start: Triple, shape: Triple, out: np.ndarray) -> np.ndarray:
            # An open array decodes with one context, which threads may not share.
            arrays = local.__dict__.setdefault("arrays", {})
            if volume not in arrays:
                arrays[volume] = blosc2.open(urlpath=str(paths[volume]), mode="r", mmap_mode="r", dparams=inside)
            return arrays[volume][box(start, shape)]

        return BoxReader(read, callers=1 if self.inside else None)


def blosc2_layout(
    shape: Sequence[int],
    patch: Sequence[int],
    itemsize: int,
    l1: int = 32 * 1024,
    l3: int = 1408 * 1024,
    fill: float = 0.8,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Chunks and blocks of a volume by nnU-Net's idea: shaped like the patch, a block fits the L1 cache, a chunk a core's L3.

    Args:
        l1: bytes of a core's L1 cache; this and ``l3`` as nnU-Net assumes them on any machine.
        fill: share of the caches that is used.

    Returns:
        chunks, blocks; voxels along (D, H, W).
    """
    blocks = [1 << max(0, int(math.log2(p / 2))) for p in patch]
    while math.prod(blocks) * itemsize > fill * l1:
        axis = max(range(len(blocks)), key=lambda i: (blocks[i] / patch[i], -i))
        blocks[axis] //= 2
    blocks = [min(b, n) for b, n in zip(blocks, shape, strict=True)]
    chunks = list(blocks)
    while growing := [i for i in range(len(chunks)) if chunks[i] < shape[i]]:
        axis = min(growing, key=lambda i: chunks[i] / patch[i])
        larger = [min(c + blocks[i], shape[i]) if i == axis else c for i, c in enumerate(chunks)]
        mean = sum(c / p for c, p in zip(larger, patch, strict=True)) / len(chunks)
        if math.prod(larger) * itemsize > fill * l3 or mean > 1.5:
            break
        chunks = larger
    return tuple(chunks), tuple(blocks)


@dataclass(frozen=True)
class TfRecord(_Boxes):
    """A TFRecord file a volume, one record of raw bytes; tf.data reads, decodes and crops with parallel calls."""

    store: str = "tfrecord"
    needs: tuple[str, ...] = ("tensorflow",)

    def write(self, folder: Path, volumes: Sequence[np.ndarray], patch: Triple) -> None:
        """As `Format`."""
        import tensorflow as tf

        for i, volume in enumerate(volumes):
            with tf.io.TFRecordWriter(str(folder / f"{i}.tfrecord")) as file:
                file.write(volume.tobytes())
        shapes = [volume.shape for volume in volumes]
        (folder / "shapes.json").write_text(json.dumps(shapes), encoding="utf-8")

    def open(self, folder: Path, threads: int) -> Reader:
        """As `Format`."""
        shapes = json.loads((folder / "shapes.json").read_text(encoding="utf-8"))
        return _TfData([str(path) for path in _numbered(folder, ".tfrecord")], shapes)


class _TfData:
    def __init__(self, paths: Sequence[str], shapes: Sequence[Sequence[int]]) -> None:
        import tensorflow as tf

        tf.config.set_visible_devices([], "GPU")
        self._paths, self._shapes, self._tf = paths, shapes, tf

    def _reading(self, requests: Sequence[Request], threads: int) -> Any:
        tf = self._tf

        def read(path: Any, volume: Any, start: Any, shape: Any) -> Any:
            def crop(record: Any) -> Any:
                return tf.slice(tf.reshape(tf.io.decode_raw(record, tf.int16), volume), start, shape)

            return tf.data.TFRecordDataset(path).map(crop)

        columns = (
            [self._paths[volume] for volume, _, _ in requests],
            [self._shapes[volume] for volume, _, _ in requests],
            [start for _, start, _ in requests],
            [shape for _, _, shape in requests],
        )
        options = tf.data.Options()
        options.threading.private_threadpool_size = threads
        data = tf.data.Dataset.from_tensor_slices(columns)
        data = data.interleave(read, cycle_length=threads, block_length=1, num_parallel_calls=threads)
        return data.prefetch(threads).with_options(options)

    def ready(self, requests: Sequence[Request], threads: int) -> Callable[[int], None]:
        """As `Reader`; building the pipeline is not timed."""
        data = self._reading(requests, threads)

        def go(passes: int) -> None:
            for _ in range(passes):
                for _patch in data:
                    pass

        return go

    def boxes(self, requests: Sequence[Request]) -> Iterator[np.ndarray]:
        """As `Reader`."""
        yield from self._reading(requests, 1).as_numpy_iterator()

    def close(self) -> None:
        """tf.data closes its files itself."""


def _numbered(folder: Path, suffix: str) -> list[Path]:
    return sorted(folder.glob(f"*{suffix}"), key=lambda path: int(path.stem))


def forget(folder: Path) -> None:
    """Ask the system to drop the files under ``folder`` from its page cache.

    POSIX_FADV_DONTNEED is advice: pages that are mapped stay, and some filesystems do not heed it.
    """
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            try:
                with contextlib.suppress(OSError):  # some filesystems cannot sync a file that is open for reading
                    os.fsync(handle)
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(handle)


FORMATS: dict[str, Format] = {
    "ours-lz4": Ours("lz4"),
    "ours-none": Ours("none"),
    "raw": Raw(),
    "h5py-ours": Ours("lz4", plain_h5py=True),
    **{
        f"h5py-{compression}-{chunk}-{cache}": H5py(compression, chunk, cache * MIB)
        for compression in ("blosc", "none")
        for chunk in (16, 32, 64)
        for cache in (1, 8)
    },
    "h5py-gzip": H5py("gzip", 0),
    "npy": Npy(),
    "tfrecord": TfRecord(),
    **{f"zarr-{compression}-{chunk}": Zarr(compression, chunk) for compression in ("blosc", "none") for chunk in (32, 64)},
    "blosc2-zstd": Blosc2("zstd", inside=False),
    "blosc2-lz4": Blosc2("lz4", inside=False),
    "blosc2-lz4-inside": Blosc2("lz4", inside=True),
}
