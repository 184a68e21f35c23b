"""A whole array as the bytes of its chunks and the table of its blocks: compiled for large ones and for very many, plain Python otherwise."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import frames, kernel
from .chunks import Layout

_ROOM = 1 << 22  # bytes of packed chunks that wait to be written
_PATIENCE = 10.0  # s: more than compiling takes the first time in an installation

Emit = Callable[[tuple[int, ...], Any], None]
"""Takes the place (first voxel) of a chunk and its bytes, which hold until the next call."""


@dataclass(frozen=True)
class Tables:
    """Of all chunks of an array, in C order; see `frames`."""

    start: np.ndarray
    check: np.ndarray
    head: np.ndarray


def pack_array(array: np.ndarray, layout: Layout, compression: str, emit: Emit) -> Tables:
    """Give every chunk of ``(D, H, W)`` or ``(D, H, W, C)`` to ``emit``, in C order.

    Args:
        compression: "none" or one of `frames.CODECS`.
    """
    if array.nbytes >= kernel.ENOUGH or _spent.seconds > _PATIENCE:
        try:
            return _compiled(array, layout, compression, emit)
        except kernel.Unavailable:
            pass
    begun = time.thread_time()
    places = frames.places(array, layout)
    tables = _empty(len(places), layout)
    for number, place in enumerate(places):
        frame = frames.pack(frames.chunk_at(array, layout, place), layout, compression)
        emit(place, frame.data)
        tables.start[number], tables.check[number], tables.head[number] = frame.start, frame.check, frame.head
    _spent.seconds += time.thread_time() - begun
    return tables


def _empty(count: int, layout: Layout) -> Tables:
    return Tables(
        np.zeros((count, layout.blocks + 1), np.uint32),
        np.zeros((count, layout.blocks), np.uint32),
        np.zeros((count, frames.HEAD), np.uint8),
    )


class _Spent:
    """Seconds of processor that this process has packed small arrays in plain Python for: with enough of them, Numba pays."""

    seconds = 0.0


_spent = _Spent()


def _compiled(array: np.ndarray, layout: Layout, compression: str, emit: Emit) -> Tables:
    loop = kernel.inner_pack()
    tail = array.shape[3:]
    shape = (*layout.chunk, *tail)
    prefix = suffix = b""
    if compression != "none":
        parts = frames.way(layout, compression, array.dtype, shape).parts
        if parts is None:
            raise kernel.Unavailable("Blosc2 makes frames of another kind")
        prefix, suffix = parts
    array = np.ascontiguousarray(array)
    source = array.reshape(-1).view(np.uint8)
    source.flags.writeable = False  # as a map's is: one type, compiled once
    item = array.dtype.itemsize * math.prod(tail)
    size = item * math.prod(layout.chunk)
    grid = tuple(-(-n // c) for n, c in zip(array.shape, layout.chunk, strict=False))
    count = math.prod(grid)
    tables = _empty(count, layout)
    out = np.empty(max(_ROOM, 2 * size + 1024), np.uint8)
    ends, scratch = np.zeros(count, np.int64), np.empty(size, np.uint8)
    places = frames.places(array, layout)
    uniform: dict[bytes, frames.Frame] = {}
    done, why = 0, loop.FULL
    with kernel.compressor(compression, array.dtype.itemsize, size // layout.blocks) as context:
        while why != loop.DONE:
            why, until = loop.pack(
                context, source, item, array.shape[:3], layout.chunk, grid, done, layout.blocks,
                np.frombuffer(prefix, np.uint8), np.frombuffer(suffix, np.uint8), frames.FRAME_SIZE, frames.FRAME_CHUNKS,
                scratch, out, ends, tables.start, tables.check, tables.head,
            )  # fmt: skip
            begin = 0
            for number in range(done, until):
                emit(places[number], out[begin : ends[number]])
                begin = ends[number]
            done = until
            if why == loop.UNIFORM:
                value = scratch[: array.dtype.itemsize].tobytes()
                frame = uniform.get(value)
                if frame is None:
                    frame = uniform[value] = frames.pack(scratch.view(array.dtype).reshape(shape), layout, compression)
                emit(places[done], frame.data)
                tables.start[done], tables.check[done], tables.head[done] = frame.start, frame.check, frame.head
                done += 1
                why = loop.DONE if done == count else why
            elif why == loop.FAILED:
                raise AssertionError("Blosc2 could not compress a chunk, or wrote its blocks in another order")
    return tables

