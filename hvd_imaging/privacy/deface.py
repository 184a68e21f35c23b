"""Faces cut off the head series of a folder of de-identified DICOM files. The decision is `faces`', this is its shell."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset

from ..errors import SourceError
from . import pixels
from .deidentify import mark_face
from .faces import face_region, face_risk

_MODALITIES = frozenset({"CT", "MR"})
_LEAST_SLICES = 8
_SAME = 1e-3


@dataclass(frozen=True)
class _Slice:
    """Where a file's slice lies: orientation and spacing in the plane, size, and position in mm along the normal."""

    path: Path
    directions: tuple[float, ...]
    spacing: tuple[float, ...]
    size: tuple[int, int]
    position: tuple[float, ...]

    @property
    def along(self) -> float:
        """mm along the normal."""
        return float(np.cross(self.directions[:3], self.directions[3:]) @ np.array(self.position))


def deface_series(files: list[Path]) -> list[Path]:
    """Cut off the face that the files of one series show, in place.

    Volumes of fewer than 8 slices are not looked at, as no surface can be made of them.

    Args:
        files: of one series, from `folder.run`.

    Returns:
        Files of volumes that had a face, those above it too.

    Raises:
        SourceError: it is CT or MR, and cannot be looked at: the files are not to be used.
    """
    first = pydicom.dcmread(files[0], stop_before_pixels=True)
    if str(first.get("Modality", "")) not in _MODALITIES:
        return []
    if any("NumberOfFrames" in ds or "PixelSpacing" not in ds for ds in map(_header, files)):
        raise SourceError("--deface: many frames in a file, or images without geometry, cannot be searched for a face")
    groups: dict[tuple, list[_Slice]] = {}
    for path in files:
        one = _placed(path)
        groups.setdefault((tuple(round(value, 3) for value in one.directions), one.spacing, one.size), []).append(one)
    return [path for group in groups.values() for path in _deface(group)]


def _deface(group: list[_Slice]) -> list[Path]:
    # Several volumes of one head (times, echoes) stand at the same places: the first tells of all.
    places: list[float] = []
    index: dict[Path, int] = {}
    volume: list[_Slice] = []
    for one in sorted(group, key=lambda one: one.along):
        if not places or one.along - places[-1] > _SAME:
            places.append(one.along)
            volume.append(one)
        index[one.path] = len(places) - 1
    if len(volume) < _LEAST_SLICES:
        return []
    array = np.stack([_values(pydicom.dcmread(one.path)) for one in volume])
    affine = np.eye(4)
    row, column = np.array(group[0].directions[:3]), np.array(group[0].directions[3:])
    affine[:3, 0] = np.cross(row, column) * np.median(np.diff(places))
    affine[:3, 1], affine[:3, 2] = column * group[0].spacing[0], row * group[0].spacing[1]
    affine[:3, 3] = volume[0].position
    risk = face_risk(array, affine)
    if risk.level != "face":
        return []
    region, darkest = face_region(array.shape, affine, risk), float(array.min())
    del array
    for one in group:
        ds = pydicom.dcmread(one.path)
        stored = pixels.stored(ds)
        kind = np.iinfo(stored.dtype)
        dark = (darkest - float(ds.get("RescaleIntercept", 0) or 0)) / float(ds.get("RescaleSlope", 1) or 1)
        stored[region[index[one.path]]] = min(max(round(dark), kind.min), kind.max)
        pixels.store(ds, stored)
        mark_face(ds)
        ds.save_as(one.path, enforce_file_format=True)
    return [one.path for one in group]


def _header(path: Path) -> Dataset:
    return pydicom.dcmread(path, stop_before_pixels=True)


def _placed(path: Path) -> _Slice:
    ds = _header(path)
    try:
        directions = tuple(float(value) for value in ds.ImageOrientationPatient)
        position = tuple(float(value) for value in ds.ImagePositionPatient)
        spacing = tuple(float(value) for value in ds.PixelSpacing)
        size = (int(ds.Rows), int(ds.Columns))
    except (AttributeError, TypeError, ValueError):
        raise SourceError("--deface: an image without geometry cannot be searched for a face") from None
    if len(directions) != 6 or len(position) != 3 or len(spacing) != 2 or min(spacing) <= 0:
        raise SourceError("--deface: an image without geometry cannot be searched for a face")
    return _Slice(path, directions, spacing, size, position)


def _values(ds: Dataset) -> np.ndarray:
    """float32 (H, W): stored values with slope and intercept."""
    slope, intercept = float(ds.get("RescaleSlope", 1) or 1), float(ds.get("RescaleIntercept", 0) or 0)
    return pixels.stored(ds).astype(np.float32) * np.float32(slope) + np.float32(intercept)
