"""Voxels of a file as float32, read in pieces: beside the result little is in memory, whatever the type in the file is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..errors import SourceError

PIECE = 4 << 20
"""Bytes of the file's type that are read at once."""


def fill(
    out: np.ndarray,
    read: Callable[[int], bytes],
    dtype: np.dtype,
    convert: Callable[[bytes, np.dtype], np.ndarray] | None = None,
) -> None:
    """Fill ``out``, float32 ``(R, N)`` or a strided view of such, row by row with the next R x N values of a stream.

    Args:
        read: gives as many bytes as it is asked for, fewer at the end.
        dtype: of the stream.
        convert: bytes of the stream to numbers; default: as they are.

    Raises:
        SourceError: the stream ends first.
    """
    rows, size = out.shape
    step = max(PIECE // dtype.itemsize, 1)
    several, part = max(step // max(size, 1), 1), min(step, size)
    done = 0
    for row in range(0, rows, several):
        for start in range(0, size, part):
            piece = out[row : row + several, start : start + part]
            wanted = piece.size * dtype.itemsize
            data = read(wanted)
            done += len(data)
            if len(data) != wanted:
                raise SourceError(f"expected {rows * size * dtype.itemsize} bytes of voxels, found {done} (truncated or damaged file?)")
            values = np.frombuffer(data, dtype) if convert is None else convert(data, dtype)
            with np.errstate(over="ignore", invalid="ignore"):  # what is too large for float32 becomes infinite
                piece[...] = values.reshape(piece.shape)


def skip(read: Callable[[int], bytes], count: int) -> None:
    """Read ``count`` bytes and drop them, or as many as there are."""
    while count > 0:
        data = read(min(count, PIECE))
        if not data:
            return
        count -= len(data)
