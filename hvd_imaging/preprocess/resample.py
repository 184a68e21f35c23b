"""Change of the voxel spacing. Pure functions.

A grid is resampled about its centre: old and new grid cover the same field of view (to half a voxel), their axes are
parallel, and the new affine is exact for the new voxel centres.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from .. import limits
from ..errors import SourceError

Triple = tuple[int, int, int]
Spacing = tuple[float, float, float]

LARGEST = 2**31  # voxels: a spacing typed in the wrong unit asks for more
MOST_GROWTH = 128
"""Voxels of a large new grid to those of the old one: 0.5 mm from slices of 5 mm is about 25. A wrong unit asks for far more."""


def new_shape(shape: Triple, ratio: np.ndarray) -> Triple:
    """(D, H, W) that covers the same field of view with voxels ``ratio`` times as large; at least one voxel an axis."""
    d, h, w = (max(1, round(n / r)) for n, r in zip(shape, ratio.tolist(), strict=True))
    return d, h, w


def grid(shape: Triple, affine: np.ndarray, spacing: Spacing) -> tuple[Triple, np.ndarray, list[np.ndarray]]:
    """The new grid.

    Args:
        shape: (D, H, W) of the old one.
        affine: ``(4, 4)`` of the old one.
        spacing: wanted mm along D, H, W.

    Returns:
        New (D, H, W), new affine, and for each axis float64 ``(n,)``: where the new voxels lie, in old indices.

    Raises:
        SourceError: the new grid would be too large for any memory.
    """
    old = np.linalg.norm(affine[:3, :3], axis=0)
    ratio = np.asarray(spacing, np.float64) / old
    shape_ = new_shape(shape, ratio)
    if np.prod(shape_, dtype=np.float64) > LARGEST or limits.grows_too_much(shape, shape_, MOST_GROWTH):
        raise SourceError(
            f"preprocess.spacing {tuple(spacing)} mm makes {shape_} voxels of {tuple(shape)} at "
            f"{tuple(round(float(s), 3) for s in old)} mm: too large; choose a larger spacing"
        )
    # Rounding noise in a header is no reason to interpolate.
    ratio = np.where((np.abs(ratio - 1) < 1e-6) & (np.array(shape_) == shape), 1.0, ratio)
    first = (np.array(shape) - 1) / 2 - (np.array(shape_) - 1) / 2 * ratio
    new = affine.astype(np.float64)
    new[:3, :3] = affine[:3, :3] * ratio
    new[:3, 3] = affine[:3, 3] + affine[:3, :3] @ first
    return shape_, new, [first[axis] + np.arange(shape_[axis]) * ratio[axis] for axis in range(3)]


def linear(array: np.ndarray, positions: list[np.ndarray]) -> np.ndarray:
    """Linear interpolation at a grid parallel to the voxels; smooths first along axes that lose resolution.

    Axis by axis, as trilinear interpolation is separable: less memory than a general transform, and voxels that
    coincide are copied. Outside, the border voxel holds.

    Args:
        array: float32 ``(D, H, W)``.
        positions: per axis, float64 ``(n,)`` in old indices, evenly spaced.

    Returns:
        float32 ``(n_d, n_h, n_w)``.
    """
    array = np.asarray(array, np.float32)
    # The axes that shrink most come first: less to do for the others.
    for axis in sorted(range(3), key=lambda axis: len(positions[axis]) / array.shape[axis]):
        x, size = positions[axis], array.shape[axis]
        if len(x) == size and np.array_equal(x, np.arange(size)):
            continue
        step = x[1] - x[0] if len(x) > 1 else float(size)
        sigma = (step - 1) / 2
        if sigma > 0.25 and size > 1:
            array = ndimage.gaussian_filter1d(array, sigma, axis=axis, mode="nearest", output=np.float32)
        x = np.clip(x, 0, size - 1)
        low = np.minimum(x.astype(np.int64), max(size - 2, 0))
        high = np.minimum(low + 1, size - 1)
        weight = (x - low).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(3)])
        left = np.take(array, low, axis=axis)
        array = left + weight * (np.take(array, high, axis=axis) - left)
    return array


def nearest(labels: np.ndarray, positions: list[np.ndarray]) -> np.ndarray:
    """Nearest neighbour at a grid parallel to the voxels: no label that was not there. Any type ``(D, H, W)``."""
    index = [
        np.clip(np.floor(x + 0.5), 0, size - 1).astype(np.int64)
        for x, size in zip(positions, labels.shape, strict=True)
    ]
    return np.ascontiguousarray(labels[np.ix_(*index)])
