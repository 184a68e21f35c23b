"""Reads patches, slabs and whole samples from shards.

HDF5 is asked once for each array (`index`); then positional reads run outside its lock, decode and place (`inner_loop`). What the
fast way does not know is read through h5py, and said once.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import h5py
import hdf5plugin  # noqa: F401  registers its filters, outside h5py's lock: so not in a thread, later
import numpy as np

from .. import filesystem
from ..errors import DatasetError
from . import index as indices
from . import kernel, members, schema
from .index import ArrayIndex, Unusual
from .manifest import SCHEMA, Manifest, Sample
from .members import ShardFault
from .storage import decode

Triple = tuple[int, int, int]

_OPEN_FILES = 32  # a large dataset has more shards than a process may hold open
_INDEX_BYTES = 512 << 20
_FOREGROUND_SAMPLES = 256
_GAP = 4096  # bytes: below this, reading on is cheaper than another read
_ROW = 512 << 10  # bytes: of a row of chunks that is read at once
_RETRIES = (0.1, 0.5, 2.0)  # s

_log = logging.getLogger(__name__)


class Source(Protocol):
    """Where shards are read from."""

    def path(self, shard: str) -> Path:
        """The file to read now: the original, or a copy of it."""

    def forget(self, shard: str) -> None:
        """A copy turned out damaged: give the original from now on."""


class ChunkStore(Protocol):
    """A cache of chunks as they stand in the file."""

    def get(self, keys: Sequence[str], sizes: Sequence[int] | None = None) -> list[bytes | None]:
        """The values, None where there is none of that size."""

    def put(self, items: Mapping[str, bytes]) -> None:
        """Keep values."""


class Originals:
    """The source without copies."""

    def __init__(self, dataset: Path) -> None:
        self.dataset = dataset
        self._paths: dict[str, Path] = {}

    def path(self, shard: str) -> Path:
        """The shard in the dataset's folder: the same object each time, which is found and compared at once."""
        path = self._paths.get(shard)
        return path if path is not None else self._paths.setdefault(shard, self.dataset / shard)

    def forget(self, shard: str) -> None:
        """There is no copy."""


class ShardReader:
    """Reads samples of one dataset; any number of threads may use it at once.

    Files open at their first use, read-only, without locks (parallel filesystems). A read that fails is tried again, on a newly
    opened file, before it is an error.

    Args:
        dataset: the dataset's folder.
        manifest: its manifest.
        source: of the shards; default: the dataset's folder.
        chunks: asked for chunks before the source is, and given those that it had not.
    """

    def __init__(
        self, dataset: str | Path, manifest: Manifest, source: Source | None = None, chunks: ChunkStore | None = None
    ) -> None:
        self.dataset = Path(dataset)
        self.manifest = manifest
        self._originals = Originals(self.dataset)
        self._source: Source = source or self._originals
        self._chunks = chunks
        self._checked: dict[tuple[str, str], Path] = {}  # which file the check sums were compared in
        self._files: OrderedDict[str, h5py.File] = OrderedDict()
        self._descriptors = _Descriptors(_OPEN_FILES)
        self._indices: OrderedDict[tuple[str, str], ArrayIndex | None] = OrderedDict()
        self._index_bytes = 0
        self._foregrounds: OrderedDict[str, np.ndarray] = OrderedDict()
        self._said: set[str] = set()
        self._lock = threading.RLock()
        self._scratch: kernel.Scratch | None = None
        try:
            self._loop = kernel.inner_loop()
            self._scratch = kernel.Scratch()
        except kernel.Unavailable as reason:
            self._loop = None
            self._say(f"{reason}: shards are read through HDF5, many times slower")

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all files; the reader may be used again."""
        with self._lock:
            while self._files:
                self._files.popitem()[1].close()
            self._descriptors.close()

    def read(
        self, sample: Sample, start: Triple, shape: Triple, out: tuple[np.ndarray, np.ndarray | None] | None = None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """A patch; voxels outside the volume are 0.

        Args:
            sample: of this dataset's manifest.
            start: first voxel (d, h, w), may be negative.
            shape: (d, h, w) of the patch.
            out: image float32 ``(d, h, w, C)`` and mask uint8 ``(d, h, w)`` (or None) in C order, such as rows of a batch, that
                are filled; their former content is lost.

        Returns:
            image float32 ``(d, h, w, C)``, mask uint8 ``(d, h, w)`` or None.

        Raises:
            DatasetError: the shard is missing, damaged or foreign; names sample, shard and chunk.
        """
        ranges = [
            (max(first, 0), min(first + wanted, size))
            for first, wanted, size in zip(start, shape, sample.shape[:3], strict=True)
        ]
        inside = all(low == first and high - low == wanted for (low, high), first, wanted in zip(ranges, start, shape, strict=True))
        make = np.empty if inside else np.zeros
        if out is None:
            image = make((*shape, sample.shape[3]), np.float32)
            mask = None if sample.class_voxels is None else make(shape, np.uint8)
        else:
            image, mask = out
            if not inside:
                image.fill(0)
                if mask is not None:
                    mask.fill(0)
        if any(low >= high for low, high in ranges):
            return image, mask
        low = tuple(low for low, _ in ranges)
        high = tuple(high for _, high in ranges)
        self._fill(sample, schema.IMAGE, low, high, image, start)
        if mask is not None and sample.class_voxels is not None:
            self._fill(sample, schema.MASK, low, high, mask, start)
        return image, mask

    def slab(self, sample: Sample, first: int, stop: int) -> tuple[np.ndarray, np.ndarray | None]:
        """The slices ``first`` to ``stop`` of a sample, and nothing else of it: float32 ``(stop - first, H, W, C)`` and its mask.

        Slices outside the volume are 0. Raises as `read`.
        """
        return self.read(sample, (first, 0, 0), (stop - first, sample.shape[1], sample.shape[2]))

    def read_whole(self, sample: Sample) -> tuple[np.ndarray, np.ndarray | None]:
        """The whole sample: image float32 ``(D, H, W, C)``, mask uint8 ``(D, H, W)`` or None. Raises as `read`."""
        return self.read(sample, (0, 0, 0), sample.shape[:3])

    def read_stored(self, sample: Sample) -> tuple[np.ndarray, np.ndarray | None]:
        """As `read_whole`, with the image in its stored type: what the manifest's hash is made of."""
        image = self.stored_box(sample, (0, 0, 0), sample.shape[:3])
        if sample.class_voxels is None:
            return image, None
        mask = np.empty(sample.shape[:3], np.uint8)
        self._fill(sample, schema.MASK, (0, 0, 0), sample.shape[:3], mask, (0, 0, 0))
        return image, mask

    def stored_box(self, sample: Sample, start: Triple, shape: Triple, out: np.ndarray | None = None) -> np.ndarray:
        """A box inside the volume in the stored type ``(d, h, w, C)``, without scale and offset. Raises as `read`."""
        if out is None:
            out = np.empty((*shape, sample.shape[3]), sample.dtype)
        self._fill(sample, schema.IMAGE, start, tuple(a + n for a, n in zip(start, shape, strict=True)), out, start)
        return out

    def foreground(self, sample: Sample) -> np.ndarray:
        """int32 ``(N, 3)``: voxels (d, h, w) whose mask is above 0, equally many of each class; may be empty."""
        if sample.class_voxels is None:
            return np.zeros((0, 3), np.int32)
        with self._lock:
            found = self._foregrounds.get(sample.id)
            if found is None:
                found = self._told(sample, lambda: self._by_hdf5(sample, schema.FOREGROUND, ()))
                self._foregrounds[sample.id] = found
                while len(self._foregrounds) > _FOREGROUND_SAMPLES:
                    self._foregrounds.popitem(last=False)
            return found

    def _fill(
        self, sample: Sample, name: str, low: tuple[int, ...], high: tuple[int, ...], out: np.ndarray, origin: tuple[int, ...]
    ) -> None:
        """Voxels ``low`` to ``high`` into ``out``, whose first voxel stands for ``origin``."""
        self._told(sample, lambda: self._fill_or_fault(sample, name, low, high, out, origin))

    def _fill_or_fault(
        self, sample: Sample, name: str, low: tuple[int, ...], high: tuple[int, ...], out: np.ndarray, origin: tuple[int, ...]
    ) -> None:
        table = self._index(sample, name)
        if table is not None and out.flags.c_contiguous:
            self._by_loop(sample, name, table, low, high, out, origin)
            return
        stored = self._by_hdf5(sample, name, tuple(slice(a, b) for a, b in zip(low, high, strict=True)))
        place = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, origin, strict=True))
        if name == schema.IMAGE and out.dtype == np.float32 and stored.dtype != np.float32:
            stored = decode(stored, sample.scale, sample.offset)
        out[place] = stored

    def _by_loop(
        self,
        sample: Sample,
        name: str,
        table: ArrayIndex,
        low: tuple[int, ...],
        high: tuple[int, ...],
        out: np.ndarray,
        origin: tuple[int, ...],
    ) -> None:
        loop = self._loop
        if self._chunks is not None and self._by_chunks(sample, name, table, low, high, out, origin):
            return
        failed = np.zeros(2, np.int64)
        waits = list(_RETRIES)
        while True:
            path = self._source.path(sample.shard)
            key = (sample.id, name)
            known = self._checked.get(key)
            if known is not path and known != path:
                table.seen.fill(0)  # what was compared was another file
                self._checked[key] = path
            try:
                with self._descriptors.of(path) as file:
                    mapped = file.mapped(table.end) if table.mappable else None
                    result = self._call(file.descriptor, sample, table, table.seen, low, high, out, origin, failed, mapped)
                reason = "the file gives fewer bytes than it should"
            except OSError as error:
                result, reason = loop.SHORT_READ, error.strerror or type(error).__name__
            if result == loop.OK:
                return
            self._descriptors.forget(path)
            if path != self._originals.path(sample.shard):
                self._source.forget(sample.shard)
                self._say(f"{path}: a damaged copy; the original is read instead")
                continue
            place = _place(table, int(failed[0]))
            if result == loop.BAD_BLOCK:
                raise ShardFault(f"damaged: {name}, chunk {place}, block {failed[1]} cannot be decoded")
            if result == loop.BAD_CHECK and len(waits) < len(_RETRIES):
                raise ShardFault(f"damaged: {name}, chunk {place}, block {failed[1]}: the check sum differs")
            if not waits:
                raise ShardFault(f"{name}, chunk {place} cannot be read ({reason}; tried {len(_RETRIES) + 1} times)")
            # A parallel filesystem may fail for a moment, or hold a stale handle: another descriptor, then again.
            time.sleep(waits.pop(0))

    def _by_chunks(
        self,
        sample: Sample,
        name: str,
        table: ArrayIndex,
        low: tuple[int, ...],
        high: tuple[int, ...],
        out: np.ndarray,
        origin: tuple[int, ...],
    ) -> bool:
        """Read through the chunk store; False: it has to be done without."""
        assert self._chunks is not None
        numbers = table.touched(low, high)
        keys = [f"{sample.id}/{name}/{number}" for number in numbers]
        found = self._chunks.get(keys, [int(table.sizes[number]) for number in numbers])

        def original(number: int) -> bytes:
            with self._descriptors.of(self._originals.path(sample.shard)) as file:
                return os.pread(file.descriptor, int(table.sizes[number]), int(table.offsets[number]))

        fresh: dict[str, bytes] = {}
        try:
            with contextlib.ExitStack() as stack:
                # A file in memory with the chunks at their places: the loop reads it as it reads a shard.
                memory = os.memfd_create("hvd_imaging")
                stack.callback(os.close, memory)
                for number, key, value in zip(numbers, keys, found, strict=True):
                    if value is None:
                        value = fresh[key] = original(number)
                    os.pwrite(memory, value, int(table.offsets[number]))
                # What comes over a network is compared each time.
                unseen = np.zeros_like(table.seen)
                result = self._call(memory, sample, table, unseen, low, high, out, origin, np.zeros(2, np.int64))
            if result != self._loop.OK:
                fresh = {key: original(number) for key, number in zip(keys, numbers, strict=True)}
        except OSError:
            return False
        if fresh:
            self._chunks.put(fresh)
        if result != self._loop.OK:
            self._say("the chunk cache gave a damaged value; the shard is read instead")
        return bool(result == self._loop.OK)

    def _call(
        self,
        descriptor: int,
        sample: Sample,
        table: ArrayIndex,
        seen: np.ndarray,
        low: tuple[int, ...],
        high: tuple[int, ...],
        out: np.ndarray,
        origin: tuple[int, ...],
        failed: np.ndarray,
        mapped: np.ndarray | None = None,
    ) -> int:
        scratch, loop, channels = self._scratch, self._loop, table.channels
        assert scratch is not None
        room = max(table.longest, table.head.shape[1], _ROW)
        scratch.fit(2 * (room + 63 & ~63), table.block_bytes)
        return loop.read(
            descriptor if mapped is None else -1, table.packed, table.dtype.itemsize, _mode(loop, table.dtype, out.dtype),
            table.offsets, table.frames, table.start, table.check, table.head, table.lengths, seen, table.grid, table.chunk,
            table.layout.block[0], _wide(low, channels), _wide(high, channels), out.reshape(-1).view(np.uint8),
            _wide(out.shape, channels), _wide(origin, channels), np.float32(sample.scale), np.float32(sample.offset),
            scratch.context, scratch.source if mapped is None else mapped, scratch.block, _GAP, failed,
        )  # fmt: skip

    def _index(self, sample: Sample, name: str) -> ArrayIndex | None:
        """The array's index; None where HDF5 must read it."""
        if self._loop is None:
            return None
        key = (sample.id, name)
        with self._lock:
            if key in self._indices:
                self._indices.move_to_end(key)
                return self._indices[key]
            try:
                table = self._make_index(sample, name)
                self._index_bytes += table.nbytes
            except Unusual as reason:
                table = None
                self._say(f"{self.dataset.name}: {name}: {reason}: it is read through HDF5, many times slower")
            self._indices[key] = table
            while self._index_bytes > _INDEX_BYTES and len(self._indices) > 1:
                _, old = self._indices.popitem(last=False)
                self._index_bytes -= 0 if old is None else old.nbytes
            return table

    def _make_index(self, sample: Sample, name: str) -> ArrayIndex:
        with self._faults(name):
            array = self._array(sample, name)
            try:
                table = members.inside(self._files[sample.shard], indices.table_path(sample.id, name))
            except KeyError:
                table = None
            size = os.stat(self._originals.path(sample.shard)).st_size
            return indices.of_array(array, table, size)
        raise AssertionError

    def _by_hdf5(self, sample: Sample, name: str, where: tuple[slice, ...]) -> np.ndarray:
        with self._lock, self._faults(name):
            return np.asarray(self._array(sample, name)[where])
        raise AssertionError

    def _array(self, sample: Sample, name: str) -> h5py.Dataset:
        array = members.array(self._file(sample.shard), f"{schema.SAMPLES}/{sample.id}/{name}")
        expected: tuple[Any, Any] = {
            schema.IMAGE: (sample.shape, sample.dtype),
            schema.MASK: (sample.shape[:3], "uint8"),
            schema.FOREGROUND: ((array.shape[0], 3), "int32"),
        }[name]
        found = (tuple(array.shape), array.dtype.name)
        if found != expected:
            raise ShardFault(f"{name}: expected {expected[0]} {expected[1]} (manifest), found {found[0]} {found[1]}")
        return array

    @contextlib.contextmanager
    def _faults(self, name: str) -> Iterator[None]:
        try:
            yield
        except KeyError as error:
            raise ShardFault(f"does not hold the sample's {name}") from error
        # A damaged file makes HDF5 raise many kinds of errors.
        except (OSError, RuntimeError, ValueError, TypeError, AttributeError, IndexError, ArithmeticError, MemoryError) as error:
            raise ShardFault(f"damaged: {name} cannot be read") from error

    def _told(self, sample: Sample, act: Callable[[], Any]) -> Any:
        try:
            return act()
        except ShardFault as fault:
            raise DatasetError(
                f"{self.dataset / sample.shard}: sample {sample.id}: {fault}; `hvd-imaging dataset verify "
                f"{self.dataset}` lists all problems; restore the shard from a copy or ingest again"
            ) from fault

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            _log.warning("hvd-imaging: warning: %s", text)

    def _file(self, name: str) -> h5py.File:
        if name in self._files:
            self._files.move_to_end(name)
            return self._files[name]
        path = self._originals.path(name)
        if not path.is_file():
            raise ShardFault("the shard is missing")
        try:
            file = h5py.File(path, "r", locking=False)
        except PermissionError as error:
            raise ShardFault("no permission to read the shard") from error
        except (OSError, RuntimeError) as error:
            raise ShardFault("damaged, truncated, or not HDF5") from error
        try:
            kind, version = file.attrs.get("format"), file.attrs.get("schema")
            if kind != schema.FORMAT.encode():
                raise ShardFault("an HDF5 file that hvd_imaging did not write")
            if version != SCHEMA:
                raise ShardFault(f"shard of schema version {version}, expected {SCHEMA}")
        except BaseException:
            file.close()
            raise
        self._files[name] = file
        while len(self._files) > _OPEN_FILES:
            self._files.popitem(last=False)[1].close()
        return file


class _Open:
    """An open file: ``descriptor``, how many ``readers`` it has now, and its pages."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.readers = 0
        self._pages: np.ndarray | None = None
        self._may_map: bool | None = None

    def mapped(self, end: int) -> np.ndarray | None:
        """uint8 view of the whole file, where the disk is the node's own; None: read it.

        A mapped page that cannot be read ends the process, so a parallel filesystem, which may fail for a moment, is not mapped.

        Raises:
            OSError: the file is shorter than ``end``.
        """
        if self._may_map is None:
            self._may_map = filesystem.of(self.path).kind in ("local", "memory")
        if not self._may_map:
            return None
        size = os.fstat(self.descriptor).st_size
        if size < end:
            raise OSError(0, "the file gives fewer bytes than it should")
        if self._pages is None:
            # Private, so that NumPy has an ordinary array; nobody writes to it.
            self._pages = np.frombuffer(mmap.mmap(self.descriptor, size, access=mmap.ACCESS_COPY), np.uint8)
        return self._pages


class _Descriptors:
    """Open files, the last used ones; none is closed while a thread reads from it."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._open: OrderedDict[Path, _Open] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._open)

    @contextlib.contextmanager
    def of(self, path: Path) -> Iterator[_Open]:
        """The open file while the block runs. Raises OSError."""
        with self._lock:
            entry = self._open.get(path)
            if entry is None:
                entry = _Open(path)
                self._trim(self._limit - 1)
                self._open[path] = entry
            self._open.move_to_end(path)
            entry.readers += 1
        try:
            yield entry
        finally:
            with self._lock:
                entry.readers -= 1
                if self._open.get(path) is not entry and entry.readers == 0:
                    os.close(entry.descriptor)

    def forget(self, path: Path) -> None:
        """Open the file anew at its next use."""
        with self._lock:
            entry = self._open.pop(path, None)
            if entry is not None and entry.readers == 0:
                os.close(entry.descriptor)

    def close(self) -> None:
        """Close what nobody reads from."""
        with self._lock:
            self._trim(0)

    def _trim(self, limit: int) -> None:
        idle = [path for path, entry in self._open.items() if entry.readers == 0]
        for path in idle[: max(len(self._open) - limit, 0)]:
            os.close(self._open.pop(path).descriptor)


def _mode(loop: Any, stored: np.dtype, wanted: np.dtype) -> int:
    if stored == wanted:
        return {1: loop.COPY1, 2: loop.COPY2, 4: loop.COPY4}[stored.itemsize]
    return {"uint8": loop.FROM_UINT8, "int16": loop.FROM_INT16, "float16": loop.FROM_FLOAT16}[stored.name]


def _wide(place: tuple[int, ...], channels: int) -> Triple:
    """(D, H, W) to (D, H, W x C)."""
    return int(place[0]), int(place[1]), int(place[2]) * channels


def _place(table: ArrayIndex, number: int) -> Triple:
    """First voxel of a chunk."""
    d, h, w = np.unravel_index(number, table.grid)
    return int(d) * table.layout.chunk[0], int(h) * table.layout.chunk[1], int(w) * table.layout.chunk[2]
