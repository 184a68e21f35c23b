"""What is taken out of a shard: what hard links lead to, and arrays of numbers that stand in the file itself, all of them.

A dataset can come from outside. A link in an HDF5 file can lead to any other file, an array can keep its numbers in one, and
an array of which nothing was written claims any size.
"""

from __future__ import annotations

import math
from typing import Any

import h5py

from .. import limits


class ShardFault(Exception):
    """What is wrong with a shard; the cause of the reader's DatasetError, which adds the place and the next step."""


def inside(file: h5py.Group, path: str) -> Any:
    """The object at ``path``, by hard links only.

    Raises:
        KeyError: there is none.
        ShardFault: a soft or external link on the way.
    """
    place: Any = file
    for name in path.split("/"):
        link = place.get(name, getlink=True)
        if link is None:
            raise KeyError(path)
        if not isinstance(link, h5py.HardLink):
            raise ShardFault(f"'{name}' is a link to another place, which is never followed")
        place = place[name]
    return place


def array(file: h5py.Group, path: str) -> h5py.Dataset:
    """The array of numbers at ``path``, which `check` has passed.

    Raises:
        KeyError: there is none.
        ShardFault: not an array, on another place, or not whole.
    """
    found = inside(file, path)
    if not isinstance(found, h5py.Dataset):
        raise ShardFault(f"'{path.rpartition('/')[2]}' is no array")
    check(found)
    return found


def check(found: h5py.Dataset) -> None:
    """Whether an array holds its numbers itself, as many as it claims.

    Raises:
        ShardFault: it does not.
    """
    name = found.name.rpartition("/")[2]
    if found.external or found.is_virtual:
        raise ShardFault(f"{name} keeps its data in another file, which is never followed")
    if found.dtype.kind not in "fiu" or found.dtype.hasobject:
        raise ShardFault(f"{name} holds {found.dtype}, expected numbers")
    check_room(found)


def check_room(found: h5py.Dataset) -> None:
    """Whether as many items are in the file as an array claims, of whatever type.

    Raises:
        ShardFault: they are not.
    """
    name = found.name.rpartition("/")[2]
    if found.shape is None:
        raise ShardFault(f"{name} has no shape")
    if found.chunks is None:
        claimed, held = math.prod(found.shape) * found.dtype.itemsize, found.id.get_storage_size()
        if claimed > held:
            raise ShardFault(f"{name} asks for {limits.brief(claimed)} bytes, and {held} are there")
    else:
        claimed, held = math.prod(-(-side // step) for side, step in zip(found.shape, found.chunks, strict=True)), found.id.get_num_chunks()
        if claimed > held:
            raise ShardFault(f"{name} has {held} of its {limits.brief(claimed)} chunks")
