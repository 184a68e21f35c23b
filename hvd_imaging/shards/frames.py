"""One chunk as bytes, and the table of its blocks.

A compressed chunk is what the HDF5 filter 32026 (Blosc2) stores, a Blosc2 frame, so any HDF5 program with the filter reads it.
The frame has no n-dimensional layer: releases of Blosc2 disagree on the order of voxels in one whose blocks are as wide as the
chunk along the last axis only. The table repeats where the blocks lie, so that a reader can take some of them:

    start  uint32 (blocks + 1,)   first byte of each block inside the HDF5 chunk, and the end of the last one
    check  uint32 (blocks,)       low half of the XXH64 of the block's bytes in the file
    head   uint8 (HEAD,)          first bytes of the Blosc2 chunk in the frame, without the list of its blocks
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .chunks import Layout

HEAD = 48
_HEADER = 32  # of a Blosc2 chunk, bytes (README_CHUNK_FORMAT of C-Blosc2)
_MEMCPYED = 0x02
CODECS = ("lz4", "zstd")
_LEVEL = {"lz4": 5, "zstd": 3}


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


def cut(array: np.ndarray, layout: Layout) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """(first voxel, chunk) of a volume ``(D, H, W)`` or ``(D, H, W, C)`` in C order; past the volume's end come zeros."""
    tail = array.shape[3:]
    for d in range(0, array.shape[0], layout.chunk[0]):
        for h in range(0, array.shape[1], layout.chunk[1]):
            for w in range(0, array.shape[2], layout.chunk[2]):
                place = (d, h, w)
                where = tuple(slice(a, a + n) for a, n in zip(place, layout.chunk, strict=True))
                part = array[where]
                if part.shape[:3] != layout.chunk:
                    whole = np.zeros((*layout.chunk, *tail), array.dtype)
                    whole[tuple(slice(0, n) for n in part.shape)] = part
                    part = whole
                yield (*place, *([0] * len(tail))), np.ascontiguousarray(part)


def pack(chunk: np.ndarray, layout: Layout, compression: str) -> Frame:
    """A chunk ``(d, h, w)`` or ``(d, h, w, C)`` as bytes; compression is "none" or one of `CODECS`."""
    count = layout.blocks
    if compression == "none":
        data = chunk.tobytes()
        start = (np.arange(count + 1) * (len(data) // count)).astype(np.uint32)
        return Frame(data, start, checks(data, start), np.zeros(HEAD, np.uint8))
    data, inner = _compress(chunk, layout, compression)
    head = np.zeros(HEAD, np.uint8)
    head[: min(HEAD, len(inner))] = np.frombuffer(inner[:HEAD], np.uint8)
    at = max(data.find(inner), 0)  # a chunk of zeros is not in the frame at all
    if inner[31] >> 4 & 7:  # one value all over: nothing but the head
        start = np.zeros(count + 1, np.uint32)
    elif inner[2] & _MEMCPYED:
        start = (at + _HEADER + np.arange(count + 1) * (chunk.nbytes // count)).astype(np.uint32)
    else:
        starts = np.frombuffer(inner, "<i4", count, _HEADER)
        if (np.diff(starts) < 0).any():
            raise AssertionError("Blosc2 wrote the blocks in another order")
        start = (at + np.append(starts, len(inner))).astype(np.uint32)
    return Frame(data, start, checks(data, start), head)


def checks(data: bytes, start: Sequence[int] | np.ndarray) -> np.ndarray:
    """uint32: check sum of each block of a chunk's bytes."""
    import xxhash

    view = memoryview(data)
    places = itertools.pairwise(int(place) for place in start)
    return np.array([xxhash.xxh64_intdigest(view[a:b]) & 0xFFFFFFFF for a, b in places], np.uint32)


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

    return dict(hdf5plugin.Blosc2(cname=compression, clevel=_LEVEL[compression], filters=hdf5plugin.Blosc2.BITSHUFFLE))


def _compress(chunk: np.ndarray, layout: Layout, codec: str) -> tuple[bytes, bytes]:
    """(frame, the Blosc2 chunk inside it)."""
    import blosc2

    packed = blosc2.SChunk(
        chunksize=chunk.nbytes,
        data=chunk,
        contiguous=True,
        cparams={
            "codec": {"lz4": blosc2.Codec.LZ4, "zstd": blosc2.Codec.ZSTD}[codec],
            "clevel": _LEVEL[codec],
            "filters": [blosc2.Filter.BITSHUFFLE],
            "filters_meta": [0],
            "nthreads": 1,  # more of them would write the blocks in any order
            "typesize": chunk.dtype.itemsize,
            "blocksize": chunk.nbytes // layout.blocks,
        },
    )
    return packed.to_cframe(), packed.get_chunk(0)
