"""Masks as volumes: whole numbers on the grid of their image (NIfTI, NRRD)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ...errors import SourceError
from ...orientation import placed
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

    Its voxels may be a box of those of ``image``, in any order and sense of the axes.

    Args:
        notes: gets what is to be said of it.

    Raises:
        SourceError: another geometry.
    """
    found = read_nifti(path, root)
    mask = whole(found, image) if found.array.ndim <= 3 + layers else None
    if mask is None:
        raise SourceError(
            f"{relative(path, root)}: mask of another geometry: expected shape {image.shape} and spacing {mm(image.spacing)} mm as its "
            f"image, found {found.array.shape} and {mm(found.spacing)} mm, or another position or orientation"
        )
    if notes is not None and sorted(found.shape) != sorted(image.shape):
        notes.append(f"the mask covers {' x '.join(map(str, found.shape))} of {' x '.join(map(str, image.shape))} voxels; the rest is background")
    return mask


def whole(mask: Volume, image: Volume) -> Volume | None:
    """A mask whose voxels are a box of those of ``image``, on the whole grid of ``image``, 0 outside of the box. Pure.

    3D Slicer and others store the box around what is marked. Its voxels outside of ``image`` must be 0.

    Returns:
        None if its voxels are not those of ``image``.
    """
    place = placed(mask.affine, mask.shape, image.affine, TOLERANCE * min(image.spacing))
    if place is None:
        return None
    turn, first = place
    array = turn.array(mask.array)
    if array.shape[:3] == image.shape and not any(first):
        return mask.with_array(np.ascontiguousarray(array), image.affine)
    low = [max(0, begin) for begin in first]
    high = [min(side, begin + length) for begin, length, side in zip(first, array.shape, image.shape, strict=False)]
    if any(begin >= end for begin, end in zip(low, high, strict=True)):
        return None
    there = tuple(slice(begin, end) for begin, end in zip(low, high, strict=True))
    here = tuple(slice(begin - at, end - at) for begin, end, at in zip(low, high, first, strict=True))
    if np.count_nonzero(array[here]) < np.count_nonzero(array):
        return None
    result = np.zeros(image.shape + array.shape[3:], array.dtype)
    result[there] = array[here]
    return mask.with_array(result, image.affine)


def mm(values: Sequence[float] | np.ndarray) -> str:
    """"5.000 x 0.700 x 0.700"."""
    return " x ".join(f"{value:.3f}" for value in values)
