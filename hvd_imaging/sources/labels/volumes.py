"""Masks as volumes: whole numbers on the grid of their image (NIfTI, NRRD)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ...errors import SourceError
from ...volume import Volume, same_grid
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
    if mask.array.ndim > 3 + layers or not same_grid(image, mask, tolerance=TOLERANCE * min(image.spacing)):
        raise SourceError(
            f"{relative(path, root)}: mask of another geometry: expected shape {image.shape} and spacing {mm(image.spacing)} mm as its "
            f"image, found {mask.array.shape} and {mm(mask.spacing)} mm, or another position or orientation"
        )
    if mask is not found and notes is not None:
        notes.append(f"the mask covers {' x '.join(map(str, found.shape))} of {' x '.join(map(str, image.shape))} voxels; the rest is background")
    return mask


def padded(mask: Volume, image: Volume) -> Volume:
    """A mask whose voxels are a box of those of ``image``, on the whole grid of ``image``, 0 outside of the box. Pure.

    3D Slicer and others store the box around what is marked. Voxels of the box outside of ``image`` must be 0.

    Returns:
        ``mask`` itself if its voxels are not those of ``image``, or the box is the whole image.
    """
    start = np.linalg.solve(image.affine, mask.affine)[:3, 3]
    if not (np.abs(start) < 1e6).all():
        return mask
    first = np.round(start).astype(int)
    shift = image.affine.copy()
    shift[:3, 3] += image.affine[:3, :3] @ first
    size = tuple(map(int, first)), mask.shape
    if (not first.any() and mask.shape == image.shape) or not same_grid(
        Volume(np.broadcast_to(np.uint8(0), mask.shape), shift), mask, TOLERANCE * min(image.spacing)
    ):
        return mask
    low = [max(0, begin) for begin in size[0]]
    high = [min(whole, begin + length) for begin, length, whole in zip(*size, image.shape, strict=True)]
    if any(begin >= end for begin, end in zip(low, high, strict=True)):
        return mask
    there = tuple(slice(begin, end) for begin, end in zip(low, high, strict=True))
    here = tuple(slice(begin - at, end - at) for begin, end, at in zip(low, high, size[0], strict=True))
    if np.count_nonzero(mask.array[here]) < np.count_nonzero(mask.array):
        return mask
    array = np.zeros(image.shape + mask.array.shape[3:], mask.array.dtype)
    array[there] = mask.array[here]
    return mask.with_array(array, image.affine)


def mm(values: Sequence[float] | np.ndarray) -> str:
    """"5.000 x 0.700 x 0.700"."""
    return " x ".join(f"{value:.3f}" for value in values)
