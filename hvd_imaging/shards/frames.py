"""One chunk as bytes, and the table of its blocks.

A compressed chunk is what the HDF5 filter 32026 (Blosc2) stores, a Blosc2 frame, so any HDF5 program with the filter reads it.
The frame has no n-dimensional layer: releases of Blosc2 disagree on the order of voxels in one whose blocks are as wide as the
chunk along the last axis only. The table repeats where the blocks lie, so that a reader can take some of them:

    start  uint32 (blocks + 1,)   first byte of each block inside the HDF5 chunk, and the end of the last one
    check  uint32 (blocks,)       low half of the XXH64 of the block's bytes in the file
    head   uint8 (HEAD,)          first bytes of the Blosc2 chunk in the frame, without the list of its blocks
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from .chunks import Layout

HEAD = 48
_HEADER = 32  # of a Blosc2 chunk, bytes (README_CHUNK_FORMAT of C-Blosc2)
_MEMCPYED = 0x02
# Of the frame (README_CFRAME_FORMAT): where its length and the bytes of its chunks stand, and the shortest header.
FRAME_SIZE, FRAME_CHUNKS, _FRAME_HEADER = 16, 39, 87
_FIRST = 3  # frames: what it costs to learn the header is two of them
CODECS = ("lz4", "zstd")
LEVEL = {"lz4": 5, "zstd": 3}


@dataclass(frozen=True)
class Frame:
    """One chunk as it is written.

    Attributes:
        data: the bytes of the HDF5 chunk.
        start, check, head: as above; ``head`` is zeros without compression.
    """

    data: bytes
    start: np.ndarray
    check: np.ndarray
    head: np.ndarray


def places(array: np.ndarray, layout: Layout) -> list[tuple[int, ...]]:
    """First voxels of all chunks of a volume ``(D, H, W)`` or ``(D, H, W, C)``, in C order."""
    steps = (range(0, size, step) for size, step in zip(array.shape[:3], layout.chunk, strict=True))
    return [(*place, *([0] * (array.ndim - 3))) for place in itertools.product(*steps)]


def chunk_at(array: np.ndarray, layout: Layout, place: tuple[int, ...]) -> np.ndarray:
    """The chunk that begins at ``place``, in C order; past the volume's end come zeros."""
    (z, y, x), (d, h, w) = place[:3], layout.chunk
    part = array[z : z + d, y : y + h, x : x + w]
    if part.shape[:3] != layout.chunk:
        whole = np.zeros((*layout.chunk, *array.shape[3:]), array.dtype)
        whole[tuple(slice(0, n) for n in part.shape)] = part
        part = whole
    return np.ascontiguousarray(part)


def pack(chunk: np.ndarray, layout: Layout, compression: str) -> Frame:
    """A chunk ``(d, h, w)`` or ``(d, h, w, C)`` as bytes; compression is "none" or one of `CODECS`."""
    count = layout.blocks
    if compression == "none":
        data = chunk.tobytes()
        start = _even(count, len(data) // count)
        return Frame(data, start, block_checks(data, start), np.zeros(HEAD, np.uint8))
    data, inner, at = way(layout, compression, chunk.dtype, chunk.shape).frame(chunk)
    head = np.zeros(HEAD, np.uint8)
    head[: min(HEAD, len(inner))] = np.frombuffer(inner[:HEAD], np.uint8)
    if inner[31] >> 4 & 7:  # one value all over: nothing but the head
        start = np.zeros(count + 1, np.uint32)
    elif inner[2] & _MEMCPYED:
        start = (at + _HEADER + np.arange(count + 1) * (chunk.nbytes // count)).astype(np.uint32)
    else:
        starts = np.frombuffer(inner, "<i4", count, _HEADER)
        if (np.diff(starts) < 0).any():
            raise AssertionError("Blosc2 wrote the blocks in another order")
        start = (at + np.append(starts, len(inner))).astype(np.uint32)
    return Frame(data, start, block_checks(data, start), head)


@functools.lru_cache(maxsize=64)
def _even(count: int, size: int) -> np.ndarray:
    """First bytes of blocks of one size, and the end."""
    start = (np.arange(count + 1) * size).astype(np.uint32)
    start.flags.writeable = False
    return start


def block_checks(data: bytes, start: np.ndarray) -> np.ndarray:
    """uint32: check sum of each block of a chunk's bytes."""
    from xxhash import xxh64_intdigest as digest

    view = memoryview(data)
    places = start.tolist()
    return np.array([digest(view[a:b]) & 0xFFFFFFFF for a, b in itertools.pairwise(places)], np.uint32)


def table_check(start: np.ndarray, check: np.ndarray, head: np.ndarray) -> int:
    """Check sum of a whole table: a flipped byte in it must not send a reader astray."""
    import xxhash

    digest = xxhash.xxh64()
    for part in (start, check, head):
        digest.update(np.ascontiguousarray(part).tobytes())
    return digest.intdigest() & 0x7FFFFFFFFFFFFFFF


def filter_options(compression: str) -> dict[str, object]:
    """Arguments of h5py's ``create_dataset`` for a codec of `CODECS`."""
    import hdf5plugin

    return dict(hdf5plugin.Blosc2(cname=compression, clevel=LEVEL[compression], filters=hdf5plugin.Blosc2.BITSHUFFLE))


class _Way:
    """Makes the frames of equal chunks. Blosc2's own writer sets up a compressor for each, ten times the work of compressing.

    A frame of one chunk is a header with two sizes in it, the chunk, and an end that is always the same. Header and end are
    taken from a frame that Blosc2 made, and proven on a second one; where they do not fit, Blosc2 makes every frame. The first
    frames come from Blosc2 anyway: arrays of a size that is met once have one chunk or two.
    """

    def __init__(self, layout: Layout, codec: str, dtype: np.dtype, shape: tuple[int, ...]):
        import blosc2

        size = math.prod(shape) * dtype.itemsize
        self._chunk_bytes = size
        self._parameters: dict[str, Any] = {
            "codec": {"lz4": blosc2.Codec.LZ4, "zstd": blosc2.Codec.ZSTD}[codec],
            "clevel": LEVEL[codec],
            "filters": [blosc2.Filter.BITSHUFFLE],
            "filters_meta": [0],
            "nthreads": 1,  # more of them would write the blocks in any order
            "typesize": dtype.itemsize,
            "blocksize": size // layout.blocks,
        }
        self._dtype, self._shape = dtype, shape
        self._made = 0

    @functools.cached_property
    def parts(self) -> tuple[bytes, bytes] | None:
        """Header and end of a frame; None: Blosc2 makes other ones."""
        steps = np.arange(self._chunk_bytes, dtype=np.uint8)
        trial, proof = (np.ascontiguousarray(steps // n).view(self._dtype).reshape(self._shape) for n in (1, 7))
        frame, inner, at = self._whole(trial)
        if at < _FRAME_HEADER:
            return None
        parts = frame[:at], frame[at + len(inner) :]
        return parts if self._composed(proof, parts) == self._whole(proof) else None

    def frame(self, chunk: np.ndarray) -> tuple[bytes, bytes, int]:
        """(frame, the Blosc2 chunk inside it, where this one begins)."""
        self._made += 1
        if self._made <= _FIRST or self.parts is None:
            return self._whole(chunk)
        return self._composed(chunk, self.parts)

    def _composed(self, chunk: np.ndarray, parts: tuple[bytes, bytes]) -> tuple[bytes, bytes, int]:
        import blosc2

        inner = blosc2.compress2(chunk, **self._parameters)
        if inner[31] >> 4 & 7:  # one value all over is not a chunk in the frame
            return self._whole(chunk)
        head, end = parts
        sizes = (len(head) + len(inner) + len(end)).to_bytes(8, "big"), len(inner).to_bytes(8, "big")
        header = head[:FRAME_SIZE] + sizes[0] + head[FRAME_SIZE + 8 : FRAME_CHUNKS] + sizes[1] + head[FRAME_CHUNKS + 8 :]
        return header + inner + end, inner, len(header)

    def _whole(self, chunk: np.ndarray) -> tuple[bytes, bytes, int]:
        import blosc2

        packed = blosc2.SChunk(chunksize=self._chunk_bytes, data=chunk, contiguous=True, cparams=dict(self._parameters))
        frame, inner = packed.to_cframe(), packed.get_chunk(0)
        return frame, inner, max(frame.find(inner), 0)  # a chunk of zeros is not in the frame at all


@functools.lru_cache(maxsize=64)
def way(layout: Layout, codec: str, dtype: np.dtype, shape: tuple[int, ...]) -> _Way:
    """How equal chunks become frames."""
    return _Way(layout, codec, dtype, shape)
