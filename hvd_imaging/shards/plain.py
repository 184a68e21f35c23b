"""HDF5 files of others that are read by other programs' code (Keras' weights): arrays of numbers, and nothing that leads elsewhere."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

MOST = 100_000
"""Objects of a file."""


def check_arrays(path: Path) -> None:
    """Whether a file holds groups and arrays of numbers alone, which all lie in it.

    Raises:
        ValueError: damaged; a link to another place or file; an array whose numbers lie in another file, are none, or take more bytes than
            the file has.
    """
    try:
        with h5py.File(path, "r") as file:
            _groups(file, path.stat().st_size)
    except ValueError:
        raise
    except (OSError, RuntimeError, KeyError, TypeError, AttributeError, MemoryError) as error:
        raise ValueError("damaged HDF5") from error


def _groups(file: h5py.File, room: int) -> None:
    waiting, seen, count, size = [file["/"]], set(), 0, 0
    while waiting:
        group = waiting.pop()
        for name in group:
            count += 1
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                raise ValueError(f"{name!r} is a link to another place, which is never followed")
            member = group[name]
            where = h5py.h5o.get_info(member.id).addr
            if count > MOST or where in seen:
                raise ValueError(f"{name!r} stands in it twice, or it holds more than {MOST} objects")
            seen.add(where)
            if isinstance(member, h5py.Group):
                waiting.append(member)
            elif isinstance(member, h5py.Dataset):
                size += _bytes(member, name)
                if size > room:
                    raise ValueError(f"its arrays take {size} bytes, and the file has {room}")
            else:
                raise ValueError(f"{name!r} is neither a group nor an array")


def _bytes(array: h5py.Dataset, name: str) -> int:
    if array.external or array.is_virtual:
        raise ValueError(f"{name!r} keeps its numbers in another file, which is never followed")
    if array.dtype.kind not in "fiub" or array.dtype.hasobject:
        raise ValueError(f"{name!r} holds {array.dtype}, expected numbers")
    return int(np.prod([int(n) for n in array.shape], dtype=object)) * array.dtype.itemsize
