"""Masks as volumes: whole numbers on the grid of their image (NIfTI, NRRD)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ...errors import SourceError
from ...volume import Volume, same_voxels
from ..dicom import relative
from ..nifti import read_nifti


def read_mask(path: Path, image: Volume, classes: Sequence[str], root: Path = Path()) -> np.ndarray:
    """A mask as uint8 ``(D, H, W)`` on the grid of ``image``; its own voxels may come in another order and sense of the axes.

    Raises:
        SourceError: another geometry, or values that are no class.
    """
    mask = read_nifti(path, root)
    name = relative(path, root)
    voxels = same_voxels(mask, image, tolerance=0.1 * min(image.spacing)) if mask.array.ndim == 3 else None
    if voxels is None:
        raise SourceError(
            f"{name}: mask of another geometry: expected shape {image.shape} and spacing {mm(image.spacing)} mm as its "
            f"image, found {mask.array.shape} and {mm(mask.spacing)} mm, or another position or orientation"
        )
    largest = len(classes) - 1
    values = np.unique(voxels)
    if values[0] < 0 or values[-1] > largest or (values != np.round(values)).any():
        raise SourceError(
            f"{name}: mask with values from {values[0]:g} to {values[-1]:g}, expected whole numbers from 0 to {largest} "
            f"({', '.join(classes)})"
        )
    return voxels.astype(np.uint8)


def mm(values: Sequence[float] | np.ndarray) -> str:
    """"5.000 x 0.700 x 0.700"."""
    return " x ".join(f"{value:.3f}" for value in values)
