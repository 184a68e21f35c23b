"""Where the bytes of one stored array lie: taken once from HDF5, then reading needs HDF5 no more."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import h5py
import numpy as np

from . import frames, members, schema
from .chunks import Layout
from .members import ShardFault

BLOSC2 = 32026  # of the HDF Group's register of filters


class Unusual(Exception):
    """The array can be read by HDF5 only; the text says why. Not an error."""


@dataclass(frozen=True)
class ArrayIndex:
    """Tables of one array ``(D, H, W)`` or ``(D, H, W, C)``; see `inner_loop.read`, to which they go.

    Attributes:
        dtype: stored, little-endian.
        sizes: int64 (chunks,): bytes of each chunk in the file.
        layout: voxels of chunk and block.
        offsets, frames, start, check, head, lengths, seen: see there.
        longest: bytes of the longest chunk.
        mappable: plain items at whole multiples of their size, which can be used where they stand.
        end: first byte of the file after all chunks.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    packed: bool
    layout: Layout
    offsets: np.ndarray
    sizes: np.ndarray
    frames: np.ndarray
    start: np.ndarray
    check: np.ndarray
    head: np.ndarray
    lengths: np.ndarray
    seen: np.ndarray
    longest: int
    mappable: bool
    end: int

    @functools.cached_property
    def grid(self) -> tuple[int, int, int]:
        """Chunks along each axis."""
        return self.layout.grid(self.shape)

    @functools.cached_property
    def channels(self) -> int:
        """Items of a voxel."""
        return math.prod(self.shape[3:])

    @functools.cached_property
    def chunk(self) -> tuple[int, int, int]:
        """Items of a chunk along (D, H, W x C)."""
        d, h, w = self.layout.chunk
        return d, h, w * self.channels

    @functools.cached_property
    def block_bytes(self) -> int:
        """Bytes of a decoded block."""
        return math.prod(self.layout.block) * self.channels * self.dtype.itemsize

    def touched(self, low: Sequence[int], high: Sequence[int]) -> list[int]:
        """Numbers of the chunks that hold voxels from ``low`` up to ``high``."""
        ranges = [range(a // n, (b - 1) // n + 1) for a, b, n in zip(low, high, self.layout.chunk, strict=True)]
        _, rows, columns = self.grid
        return [(d * rows + h) * columns + w for d, h, w in itertools.product(*ranges)]

    @property
    def nbytes(self) -> int:
        """Memory of the tables."""
        return sum(a.nbytes for a in (self.offsets, self.sizes, self.frames, self.start, self.check, self.head, self.lengths, self.seen))


def table_path(sample: str, name: str) -> str:
    """The HDF5 group with the block tables of an array."""
    return f"{schema.SAMPLES}/{sample}/{schema.BLOCKS}/{name}"


def of_array(array: h5py.Dataset, table: h5py.Group | None, file_bytes: int) -> ArrayIndex:
    """The index of an array.

    Args:
        table: the group at `table_path`; None: there is none.
        file_bytes: length of the file: no chunk may lie beyond it.

    Raises:
        Unusual: written in a way that the fast reader does not know.
        ShardFault: the tables are damaged or belong to another array.
    """
    if table is None:
        raise Unusual("it has no table of blocks")
    if array.chunks is None:
        raise Unusual("it is not chunked")
    creation = array.id.get_create_plist()
    filters = [creation.get_filter(i)[0] for i in range(creation.get_nfilters())]
    if filters not in ([], [BLOSC2]):
        raise Unusual(f"it has the HDF5 filters {filters}")
    if array.dtype.byteorder == ">" or array.dtype.name not in ("uint8", "int16", "float16", "float32"):
        raise Unusual(f"its type is {array.dtype.str}")
    packed = bool(filters)
    d, h, w = (int(side) for side in array.chunks[:3])
    block = tuple(int(side) for side in np.asarray(table.attrs["block"]).reshape(-1))
    if len(block) != 3 or block[0] < 1 or d % block[0] or block[1:] != (h, w):
        raise ShardFault(f"{array.name}: blocks {block} are no runs of slices of the chunks {(d, h, w)}")
    layout = Layout((d, h, w), (block[0], block[1], block[2]))
    grid = layout.grid(array.shape)
    count = int(np.prod(grid))
    if array.chunks[3:] != array.shape[3:]:
        raise Unusual("its channels stand in chunks of their own")
    held = [members.array(table, name) for name in ("start", "check", "head")]
    expected = [(count, layout.blocks + 1), (count, layout.blocks), (count, frames.HEAD)]
    if [one.shape for one in held] != expected:
        raise ShardFault(f"{array.name}: the table of its blocks is one of another array")
    start, check, head = (one[...] for one in held)
    if frames.table_check(start, check, head) != int(table.attrs["check"]):
        raise ShardFault(f"{array.name}: damaged: the table of its blocks differs from its check sum")
    offsets, sizes = np.full(count, -1, np.int64), np.zeros(count, np.int64)
    unusual = []

    def note(info: h5py.h5d.StoreInfo) -> None:
        place = [a // n for a, n in zip(info.chunk_offset[:3], (d, h, w), strict=True)]
        number = (place[0] * grid[1] + place[1]) * grid[2] + place[2]
        offsets[number], sizes[number] = info.byte_offset, info.size
        if info.filter_mask:
            unusual.append(number)

    array.id.chunk_iter(note)
    if unusual:
        raise Unusual("some of its chunks were stored without the filter")
    if (offsets < 0).any() or (offsets + sizes > file_bytes).any() or (start[:, -1] > sizes).any():
        raise ShardFault(f"{array.name}: damaged or truncated: a chunk reaches over the file's end")
    # The loop trusts these: a table that is wrong though its check sum is right must not lead out of a chunk.
    steps = np.diff(start.astype(np.int64), axis=1)
    size = math.prod(layout.block) * math.prod(array.shape[3:]) * array.dtype.itemsize
    if (steps < 0).any() or (not packed and ((steps != size).any() or start[:, 0].any())):
        raise ShardFault(f"{array.name}: damaged: the blocks of a chunk do not follow each other")
    begins = lengths = np.zeros(count, np.int64)
    if packed:
        head, lengths, begins = _heads(start, head)
    return ArrayIndex(
        array.dtype, tuple(array.shape), packed, layout, offsets, sizes, begins, start, check, head, lengths,
        np.zeros(check.shape, np.uint8), int(start[:, -1].max(initial=0)),
        not packed and not (offsets % array.dtype.itemsize).any(), int((offsets + sizes).max(initial=0)),
    )  # fmt: skip


def _heads(start: np.ndarray, head: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(heads with the list of blocks as Blosc2 wants them, their lengths, first byte of the Blosc2 chunk in the HDF5 chunk)."""
    blocks = start.shape[1] - 1
    first = start[:, 0].astype(np.int64)
    alone = head[:, 31] >> 4 & 7 != 0
    copied = ~alone & (head[:, 2] & 0x02 != 0)  # incompressible: no list
    lengths = np.where(alone, frames.HEAD, np.where(copied, 32, 32 + 4 * blocks))
    begins = first - np.where(alone, 0, lengths)
    whole = np.zeros((len(head), max(frames.HEAD, 32 + 4 * blocks)), np.uint8)
    whole[:, : frames.HEAD] = head
    listed = ~alone & ~copied
    relative = (start[:, :-1].astype(np.int64) - begins[:, None]).astype("<i4")
    whole[listed, 32 : 32 + 4 * blocks] = relative[listed].view(np.uint8)
    return whole, lengths, begins
