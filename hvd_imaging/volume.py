"""One image in memory, with its geometry."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from .orientation import placed

Spacing = tuple[float, float, float]
AIR_HU = -1000.0


@dataclass(frozen=True)
class SourceFrames:
    """The DICOM frames that a volume was read from, in the order of its slices.

    Attributes:
        files: the file of each slice; a file of many frames stands there for each of its slices.
        numbers: which frame of its file each slice is, from 0.
        shape, affine: the grid that the frames lie on; sheared, and another one than the volume's, where a gantry was tilted.
    """

    files: tuple[Path, ...] = field(repr=False)
    numbers: tuple[int, ...]
    shape: tuple[int, int, int]
    affine: np.ndarray


@dataclass(frozen=True)
class Volume:
    """An image and where it lies in the patient.

    Attributes:
        array: ``(D, H, W)`` or ``(D, H, W, C)``; float32 in HU or stored units, integer for label maps.
        affine: ``(4, 4)`` float64, voxel index ``(d, h, w, 1)`` to mm in the patient's LPS+ system
            (DICOM PS3.3 C.7.6.2.1.1).
        modality: DICOM Modality ("CT", "MR", ...), "" if unknown.
        patient: pseudonym of the patient, never an identifier.
        id: pseudonym of the series or case.
        source: what writers need to refer to the origin (for DICOM: the sorted file paths; empty if the voxels are not
            those of the files). Never stored in a dataset.
        frames: the frames of DICOM slices, for writers that answer frame by frame; None for other sources.
        notes: what the reader corrected or dropped, in words without identifiers.
        geometry: "patient": the affine maps to the patient. "image": spacing in mm is known, no place in the patient
            (projection images; frames of a cine lie along D, which is no length then). "none": pixels of no known size;
            spacing 1 is an index.
    """

    array: np.ndarray
    affine: np.ndarray
    modality: str = ""
    patient: str = ""
    id: str = ""
    source: Any = field(default=None, repr=False)
    frames: SourceFrames | None = field(default=None, repr=False)
    notes: tuple[str, ...] = ()
    geometry: str = "patient"

    def __post_init__(self) -> None:
        if self.array.ndim not in (3, 4):
            raise ValueError(f"a volume is (D, H, W) or (D, H, W, C), not {self.array.shape}")
        if self.affine.shape != (4, 4):
            raise ValueError(f"an affine is (4, 4), not {self.affine.shape}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(D, H, W)."""
        return self.array.shape[:3]  # type: ignore[return-value]

    @property
    def spacing(self) -> Spacing:
        """Distance of neighbouring voxels in mm along D, H, W."""
        d, h, w = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(d), float(h), float(w)

    def with_array(self, array: np.ndarray, affine: np.ndarray | None = None) -> Volume:
        """The same case with other voxels and, if given, another grid."""
        return replace(self, array=array, affine=self.affine if affine is None else affine)


def same_voxels(a: Volume, b: Volume, tolerance: float = 1e-2) -> np.ndarray | None:
    """``a``'s array in the order of ``b``'s voxels, if both have the same voxels in whatever order and sense of the axes.

    Args:
        tolerance: mm that corner voxels may lie apart.

    Returns:
        ``a.array`` turned, contiguous; None if the grids differ.
    """
    place = placed(a.affine, a.shape, b.affine, tolerance)
    if place is None or any(place[1]):
        return None
    array = np.ascontiguousarray(place[0].array(a.array))
    return array if array.shape[:3] == b.shape else None


def filled(array: np.ndarray, modality: str = "", reuse: bool = False) -> tuple[np.ndarray, str]:
    """Voxels that are NaN or infinite as background: 0, or the smallest value if that is lower; in CT not above -1000 HU, air.

    Args:
        reuse: the array may be overwritten; saves one of its size.

    Returns:
        the array (the same one if nothing was to be done, or if no voxel is finite), and a note, "" if nothing was done.
    """
    if array.dtype.kind != "f" or all(np.isfinite(part).all() for part in array):
        return array, ""
    good = np.isfinite(array)
    if not good.any():
        return array, ""
    background = min(float(array.min(where=good, initial=np.inf)), AIR_HU if modality == "CT" else 0.0)
    count = array.size - int(np.count_nonzero(good))
    result = array if reuse else array.copy()
    result[~good] = np.float32(background)
    return result, f"{count} voxels that are not finite were set to {background:g}"


def flip_ras_lps(affine: np.ndarray) -> np.ndarray:
    """An affine in RAS+ (NIfTI) as LPS+ (DICOM), and the other way round."""
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
