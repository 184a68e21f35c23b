"""What stands where in a shard, and the hash that names a sample's content. Pure: no HDF5 here.

A shard is an HDF5 file::

    /                  attributes: format, schema
    /samples/<id>      attributes: sha256, label (-1: none), spacing (3,), affine (4, 4)
        image          (D, H, W, C) uint8, int16, float16 or float32, chunked (d, h, w, C); attributes: scale, offset
        mask           (D, H, W) uint8, chunked (d, h, w); only with a mask
        foreground     (N, 3) int32, voxels of the mask with a class above 0; only with a mask
        blocks/image   start, check, head: where the blocks of each chunk lie, see `frames.py`; attributes: block (3,), check
        blocks/mask    the same
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

FORMAT = "hvd_imaging shard"
SAMPLES = "samples"
IMAGE = "image"
MASK = "mask"
FOREGROUND = "foreground"
BLOCKS = "blocks"

FOREGROUND_PER_CLASS = 4096
_GOLDEN = 0.6180339887498949


def shard_name(index: int) -> str:
    """File name of a shard inside the dataset folder."""
    return f"shard-{index:05d}.h5"


def content_hash(
    image: np.ndarray, mask: np.ndarray | None, label: int | None, scale: float = 1.0, offset: float = 0.0
) -> str:
    """Hex SHA-256 over type, shape and bytes of what a sample holds.

    Args:
        image: ``(D, H, W, C)`` in the stored type.
        mask: uint8 ``(D, H, W)`` or None.
        label: class index or None.
        scale, offset: of the stored values.
    """
    digest = hashlib.sha256()
    for name, array in ((IMAGE, image), (MASK, mask)):
        if array is None:
            digest.update(f"{name} none\n".encode())
            continue
        # One byte order, so that the hash means the same on every machine.
        array = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    digest.update(f"label {label} scale {scale!r} offset {offset!r}\n".encode())
    return digest.hexdigest()


def foreground_voxels(mask: np.ndarray, per_class: int = FOREGROUND_PER_CLASS) -> np.ndarray:
    """int32 ``(N, 3)``: equally many voxels (d, h, w) of each class above 0, at most ``per_class``, classes in order.

    A small class repeats its voxels as often as the largest one needs, so that a uniform choice among the rows takes a
    small lesion as often as a whole organ.

    Where a class has more, golden-ratio steps through its voxels choose: even coverage without the alignment with rows
    that a constant step would have, and no random generator whose stream may change between NumPy versions.
    """
    flat = mask.reshape(-1)
    chosen = []
    for value in np.flatnonzero(np.bincount(flat, minlength=1)):
        if value == 0:
            continue
        voxels = np.flatnonzero(flat == value)
        if len(voxels) > per_class:
            places = np.floor((np.arange(1, per_class + 1) * _GOLDEN) % 1.0 * len(voxels)).astype(np.int64)
            voxels = voxels[np.unique(places)]
        chosen.append(voxels)
    if not chosen:
        return np.zeros((0, 3), np.int32)
    most = max(map(len, chosen))
    chosen = [np.resize(voxels, most) for voxels in chosen]
    return np.stack(np.unravel_index(np.concatenate(chosen), mask.shape), axis=1).astype(np.int32)


def class_voxels(mask: np.ndarray, classes: int) -> tuple[int, ...]:
    """Voxels of each class; ``mask`` holds values below ``classes`` only."""
    return tuple(int(count) for count in np.bincount(mask.reshape(-1), minlength=classes))


def plan_shards(sizes: Sequence[int], target: float) -> list[list[int]]:
    """Which samples go into which shard: a pure function of the samples' order and sizes.

    A shard is closed before it would grow beyond ``target`` bytes; a larger sample has a shard of its own. It knows
    nothing of ranks, so any number of them writes the same files.
    """
    shards: list[list[int]] = []
    filled = 0.0
    for index, size in enumerate(sizes):
        if not shards or filled + size > target:
            shards.append([])
            filled = 0.0
        shards[-1].append(index)
        filled += size
    return shards
