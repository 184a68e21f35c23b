"""What a DICOM SEG or RTSTRUCT tells of the images that it was drawn on, beside the series that it names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pydicom

from .elements import CONTOURS, read_dataset

Point = tuple[float, float, float]


@dataclass(frozen=True)
class Drawn:
    """Identifiers are raw: for memory only, never written.

    Attributes:
        sources: SOPInstanceUIDs that single frames or contours name.
        listed: SOPInstanceUIDs that the object as a whole names.
        frames: FrameOfReferenceUIDs.
        planes: (FrameOfReferenceUID or "", a point in mm) of frames (the centre of their first pixel) and of closed contours.
        size: rows and columns of the frames; (0, 0) for contours.
        patient, study: PatientID, StudyInstanceUID.
    """

    sources: frozenset[str] = field(default=frozenset(), repr=False)
    listed: frozenset[str] = field(default=frozenset(), repr=False)
    frames: frozenset[str] = field(default=frozenset(), repr=False)
    planes: tuple[tuple[str, Point], ...] = field(default=(), repr=False)
    size: tuple[int, int] = (0, 0)
    patient: str = field(default="", repr=False)
    study: str = field(default="", repr=False)


def by_segmentation(dataset: pydicom.Dataset, deep: bool) -> Drawn:
    """Of a SEG; ``deep``: single frames too, of which there can be ten thousands.

    Raises:
        Exception: of pydicom, of many kinds, where the object is damaged.
    """
    listed = set(_instances(dataset.get("SourceImageSequence")))
    for series in dataset.get("ReferencedSeriesSequence") or []:
        listed |= set(_instances(series.get("ReferencedInstanceSequence")))
    sources: set[str] = set()
    planes: dict[tuple[str, Point], None] = {}
    groups = [*(dataset.get("SharedFunctionalGroupsSequence") or []), *(dataset.get("PerFrameFunctionalGroupsSequence") or [])]
    for group in groups if deep else ():
        for item in group.get("DerivationImageSequence") or []:
            sources |= set(_instances(item.get("SourceImageSequence")))
        for item in group.get("PlanePositionSequence") or []:
            planes["", _point(item.ImagePositionPatient)] = None
    frame = str(dataset.get("FrameOfReferenceUID") or "")
    size = int(dataset.get("Rows") or 0), int(dataset.get("Columns") or 0)
    return Drawn(frozenset(sources), frozenset(listed), frozenset({frame} - {""}), tuple(planes), size)


def by_structure_set(dataset: pydicom.Dataset, path: Path, deep: bool) -> Drawn:
    """Of an RTSTRUCT; ``deep``: single contours too, which are most of the file.

    Raises:
        Exception: of pydicom, of many kinds, where the object is damaged.
    """
    listed: set[str] = set()
    frames: set[str] = set()
    for place in dataset.get("ReferencedFrameOfReferenceSequence") or []:
        frames.add(str(place.get("FrameOfReferenceUID") or ""))
        for study in place.get("RTReferencedStudySequence") or []:
            for series in study.get("RTReferencedSeriesSequence") or []:
                listed |= set(_instances(series.get("ContourImageSequence")))
    regions: dict[int, str] = {}
    for item in dataset.get("StructureSetROISequence") or []:
        regions[int(item.ROINumber)] = str(item.get("ReferencedFrameOfReferenceUID") or "")
    frames |= set(regions.values())
    sources: set[str] = set()
    planes: list[tuple[str, Point]] = []
    if deep:
        for region in read_dataset(path, [CONTOURS]).get("ROIContourSequence") or []:
            frame = regions.get(int(region.ReferencedROINumber), "")
            for contour in region.get("ContourSequence") or []:
                sources |= set(_instances(contour.get("ContourImageSequence")))
                if str(contour.get("ContourGeometricType") or "").strip().upper().startswith("CLOSED"):
                    planes.append((frame, _point(_first(contour))))
    return Drawn(frozenset(sources), frozenset(listed), frozenset(frames - {""}), tuple(planes))


def _instances(items: Any) -> Iterator[str]:
    for item in items or []:
        uid = str(item.get("ReferencedSOPInstanceUID") or "")
        if uid:
            yield uid


def _first(contour: pydicom.Dataset) -> Any:
    """The first point of a contour, without an object for each of its numbers."""
    element: Any = contour.get_item("ContourData")
    raw = element.value
    return raw.strip(b" \0").split(b"\\", 3)[:3] if isinstance(raw, bytes) else list(raw)[:3]


def _point(values: Any) -> Point:
    x, y, z = (float(value) for value in values)
    return x, y, z
