"""Masks as volumes: whole numbers on the grid of their image (NIfTI, NRRD)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ...errors import SourceError
from ...volume import Volume
from ..dicom import relative
from ..nifti import read_nifti

TOLERANCE = 0.1
"""How far voxels of a mask and its image may lie apart, as a share of the smallest spacing."""


def read_mask(
    path: Path, image: Volume, classes: Sequence[str], root: Path = Path(), notes: list[str] | None = None
) -> np.ndarray:
    """A mask as uint8 ``(D, H, W)`` on the grid of ``image``; what it does not cover is 0.

    Args:
        notes: gets what is to be said of it.

    Raises:
        SourceError: another geometry, or values that are no class.
    """
    mask = on_grid(path, image, root, notes)
    name = relative(path, root)
    largest = len(classes) - 1
    values = np.unique(mask.array)
    if values[0] < 0 or values[-1] > largest or (values != np.round(values)).any():
        raise SourceError(
            f"{name}: mask with values from {values[0]:g} to {values[-1]:g}, expected whole numbers from 0 to {largest} "
            f"({', '.join(classes)})"
        )
    return mask.array.astype(np.uint8)


def on_grid(path: Path, image: Volume, root: Path = Path(), notes: list[str] | None = None, layers: bool = False) -> Volume:
    """A file's volume ``(D, H, W)``, with ``layers`` also ``(D, H, W, C)``, on the grid of ``image``.

    Raises:
        SourceError: another geometry.
    """
    found = read_nifti(path, root)
    mask = padded(found, image)
    fits = mask.shape == image.shape and _near(image.affine, mask.affine, image.shape, TOLERANCE * min(image.spacing))
    if mask.array.ndim > 3 + layers or not fits:
        raise SourceError(
            f"{relative(path, root)}: mask of another geometry: expected shape {image.shape} and spacing {mm(image.spacing)} mm as its "
            f"image, found {mask.array.shape} and {mm(mask.spacing)} mm, or another position or orientation"
        )
    if notes is not None and sorted(found.shape) != sorted(image.shape):
        notes.append(f"the mask covers {' x '.join(map(str, found.shape))} of {' x '.join(map(str, image.shape))} voxels; the rest is background")
    return mask


def padded(mask: Volume, image: Volume) -> Volume:
    """A mask whose voxels are a box of those of ``image``, on the whole grid of ``image``, 0 outside of the box. Pure.

    3D Slicer and others store the box around what is marked. The box may have its axes in another order and sense. Its voxels outside of
    ``image`` must be 0.

    Returns:
        ``mask`` itself if its voxels are not those of ``image``, or need no change.
    """
    turn = np.round(np.linalg.solve(image.affine, mask.affine)[:3, :3])
    if not (np.abs(turn) <= 1).all() or (np.abs(turn).sum(axis=0) != 1).any() or (np.abs(turn).sum(axis=1) != 1).any():
        return mask
    order = np.abs(turn).argmax(axis=1)
    back = np.flatnonzero(turn.sum(axis=1) < 0)
    array = np.flip(mask.array.transpose(*order, *range(3, mask.array.ndim)), tuple(back))
    own = mask.affine[:, [*order, 3]].copy()
    for axis in back:
        own[:, 3] += own[:, axis] * (array.shape[axis] - 1)
        own[:, axis] *= -1
    start = np.linalg.solve(image.affine, own)[:3, 3]
    if not (np.abs(start) < 1e6).all():
        return mask
    first = np.round(start).astype(int)
    box = image.affine.copy()
    box[:3, 3] += image.affine[:3, :3] @ first
    if not _near(box, own, array.shape[:3], TOLERANCE * min(image.spacing)):
        return mask
    size = array.shape[:3]
    low = [max(0, begin) for begin in first]
    high = [min(whole, begin + length) for begin, length, whole in zip(first, size, image.shape, strict=True)]
    if any(begin >= end for begin, end in zip(low, high, strict=True)):
        return mask
    there = tuple(slice(begin, end) for begin, end in zip(low, high, strict=True))
    here = tuple(slice(begin - at, end - at) for begin, end, at in zip(low, high, first, strict=True))
    if np.count_nonzero(array[here]) < np.count_nonzero(array):
        return mask
    if size == image.shape and not first.any():
        return mask if array.strides == mask.array.strides else mask.with_array(np.ascontiguousarray(array), image.affine)
    whole = np.zeros(image.shape + array.shape[3:], array.dtype)
    whole[there] = array[here]
    return mask.with_array(whole, image.affine)


def _near(a: np.ndarray, b: np.ndarray, shape: tuple[int, ...], tolerance: float) -> bool:
    """True if both affines put the corner voxels of a grid within ``tolerance`` mm of each other."""
    corners = np.array([[d, h, w, 1.0] for d in (0, shape[0] - 1) for h in (0, shape[1] - 1) for w in (0, shape[2] - 1)])
    return bool(np.abs(corners @ (a - b).T).max() <= tolerance)


def mm(values: Sequence[float] | np.ndarray) -> str:
    """"5.000 x 0.700 x 0.700"."""
    return " x ".join(f"{value:.3f}" for value in values)
