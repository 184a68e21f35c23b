"""All that an HDF5 file holds, unpacked, for a search by bytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from . import members

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_PIECE = 1 << 22


def texts(path: Path) -> Iterator[bytes]:
    """Names, attributes and strings of an HDF5 file, each followed by a line's end; nothing for other files.

    Raises:
        OSError: it cannot be read.
    """
    for one in _objects(path):
        yield one.name.encode(errors="surrogateescape") + b"\n"
        for name in one.attrs:
            yield name.encode(errors="surrogateescape") + b"\n"
            yield from _bytes(one.attrs[name])
        if isinstance(one, h5py.Dataset) and _own(one) and one.dtype.kind in "OSUV":
            yield from _bytes(one[()])


def values(path: Path) -> Iterator[bytes]:
    """The unpacked numbers of all data sets of an HDF5 file, in pieces of some MB; nothing for other files.

    Raises:
        OSError: it cannot be read.
    """
    for one in _objects(path):
        if not isinstance(one, h5py.Dataset) or not _own(one) or one.dtype.kind in "OSUV" or not one.size or not one.shape:
            continue
        rows = max(1, _PIECE // max(one.nbytes // one.shape[0], 1))
        for start in range(0, one.shape[0], rows):
            yield np.ascontiguousarray(one[start : start + rows]).tobytes()


def _own(one: h5py.Dataset) -> bool:
    """True if its values stand in this file, all of them: what is not there says nothing, and can be of any size."""
    if one.external or one.is_virtual or not one.shape:
        return not (one.external or one.is_virtual)
    try:
        members.check_room(one)
    except members.ShardFault:
        return False
    return True


def _objects(path: Path) -> Iterator[Any]:
    with open(path, "rb") as file:
        if file.read(len(_SIGNATURE)) != _SIGNATURE:
            return
    with h5py.File(path, "r") as file:
        yield file
        names: list[str] = []
        file.visit(names.append)
        for name in names:
            yield file[name]


def _bytes(value: Any) -> Iterator[bytes]:
    for one in np.asarray(value, object).reshape(-1) if isinstance(value, np.ndarray) and value.dtype.kind == "O" else [value]:
        yield (one.encode(errors="surrogateescape") if isinstance(one, str) else bytes(one) if isinstance(one, bytes) else np.asarray(one).tobytes()) + b"\n"
