"""One image in memory, with its geometry."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

Spacing = tuple[float, float, float]


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


def same_grid(a: Volume, b: Volume, tolerance: float = 1e-2) -> bool:
    """True if both have one shape and their corner voxels lie within ``tolerance`` mm of each other."""
    if a.shape != b.shape:
        return False
    corners = np.array([[d, h, w, 1.0] for d in (0, a.shape[0]) for h in (0, a.shape[1]) for w in (0, a.shape[2])])
    return bool(np.abs((corners @ a.affine.T) - (corners @ b.affine.T)).max() <= tolerance)


def flip_ras_lps(affine: np.ndarray) -> np.ndarray:
    """An affine in RAS+ (NIfTI) as LPS+ (DICOM), and the other way round."""
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
