"""Boxes around what matters. Pure functions."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from ..errors import SourceError
from .intensity import foreground

Box = tuple[slice, slice, slice]

BODY_HU = -500.0


def body_box(array: np.ndarray) -> Box:
    """The box around the largest connected component above -500 HU (6 neighbours).

    Args:
        array: ``(D, H, W)`` in HU.

    Raises:
        SourceError: nothing is that dense.
    """
    labels, count = ndimage.label(array > BODY_HU)
    if count == 0:
        raise SourceError(
            f"crop=body: expected voxels above {BODY_HU:g} HU, found none (largest value {float(array.max()):g}); "
            "set preprocess.crop=none, or preprocess.units=hu if stored values were read"
        )
    sizes = np.bincount(labels.reshape(-1))
    sizes[0] = 0
    return _box(labels == int(sizes.argmax()))


def foreground_box(array: np.ndarray) -> Box:
    """The box around all voxels that are not 0 in ``(D, H, W)`` or in any channel of ``(D, H, W, C)``.

    Raises:
        SourceError: the image is 0 everywhere.
    """
    inside = foreground(array)
    if inside.ndim == 4:
        inside = inside.any(axis=3)
    if not inside.any():
        raise SourceError("crop=foreground: expected voxels that are not 0, found none; set preprocess.crop=none")
    return _box(inside)


def _box(inside: np.ndarray) -> Box:
    box = []
    for axis in range(3):
        hits = np.flatnonzero(inside.any(axis=tuple(other for other in range(3) if other != axis)))
        box.append(slice(int(hits[0]), int(hits[-1]) + 1))
    return box[0], box[1], box[2]


def widen(box: Box, margin_mm: float, spacing: tuple[float, float, float], shape: tuple[int, int, int]) -> Box:
    """The box with at least ``margin_mm`` on each side, as far as the volume reaches."""
    d, h, w = (
        # The small part of a voxel: 5 mm at 0.1 mm are 50 voxels, not 51 by rounding noise.
        slice(max(0, side.start - voxels), min(size, side.stop + voxels))
        for side, voxels, size in zip(
            box, (int(np.ceil(margin_mm / s - 1e-6)) for s in spacing), shape, strict=True
        )
    )
    return d, h, w


def cropped_affine(affine: np.ndarray, box: Box) -> np.ndarray:
    """The ``(4, 4)`` affine of the voxels inside the box."""
    moved = affine.astype(np.float64)
    moved[:3, 3] = affine[:3, 3] + affine[:3, :3] @ np.array([side.start for side in box], np.float64)
    return moved
