"""RTSTRUCT objects for tests: contours traced around masks, or given by hand."""

from __future__ import annotations

from pathlib import Path

import contourpy
import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, RTStructureSetStorage, generate_uid


def trace(mask: np.ndarray, affine: np.ndarray) -> list[np.ndarray]:
    """Closed contours ``(N, 3)`` in mm around a bool mask ``(D, H, W)``, half-way between the voxels inside and outside."""
    contours = []
    for d in np.flatnonzero(mask.any(axis=(1, 2))):
        padded = np.pad(mask[d].astype(float), 1)
        for line in contourpy.contour_generator(z=padded).lines(0.5):
            w, h = line[:-1, 0] - 1, line[:-1, 1] - 1
            index = np.stack([np.full(len(w), float(d)), h, w, np.ones(len(w))])
            contours.append((affine @ index)[:3].T)
    return contours


def structure_set(
    regions: dict[str, list],
    series: str,
    patient: str = "SECRET-PATIENT",
    kind: str = "CLOSED_PLANAR",
    frame: str = "1.2.9",
    decimals: int = 4,
    **more,
) -> Dataset:
    """An RTSTRUCT; ``regions``: name -> contours ``(N, 3)`` mm, or (kind, contour)."""
    d = Dataset()
    d.file_meta = FileMetaDataset()
    d.file_meta.MediaStorageSOPClassUID = RTStructureSetStorage
    d.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    d.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    d.SOPClassUID = RTStructureSetStorage
    d.SOPInstanceUID = d.file_meta.MediaStorageSOPInstanceUID
    d.SpecificCharacterSet = "ISO_IR 192"
    d.StudyInstanceUID, d.SeriesInstanceUID = "1.2.3", generate_uid()
    d.PatientID, d.Modality, d.StructureSetLabel = patient, "RTSTRUCT", "test"
    place, study, item = Dataset(), Dataset(), Dataset()
    item.SeriesInstanceUID = series
    study.ReferencedSOPClassUID, study.ReferencedSOPInstanceUID = "1.2.840.10008.3.1.2.3.1", "1.2.3"
    study.RTReferencedSeriesSequence = [item]
    place.FrameOfReferenceUID, place.RTReferencedStudySequence = frame, [study]
    d.ReferencedFrameOfReferenceSequence = [place]
    d.StructureSetROISequence, d.ROIContourSequence = [], []
    for number, (name, contours) in enumerate(regions.items(), start=1):
        roi, region = Dataset(), Dataset()
        roi.ROINumber, roi.ReferencedFrameOfReferenceUID, roi.ROIName = number, frame, name
        region.ReferencedROINumber, region.ContourSequence = number, []
        for contour in contours:
            this, points = contour if isinstance(contour, tuple) else (kind, contour)
            points, each = np.asarray(points, float), Dataset()
            each.ContourGeometricType, each.NumberOfContourPoints = this, len(points)
            each.ContourData = [f"{value:.{decimals}f}" for value in points.ravel()]
            region.ContourSequence.append(each)
        d.StructureSetROISequence.append(roi)
        d.ROIContourSequence.append(region)
    for key, value in more.items():
        setattr(d, key, value)
    return d


def write_structure_set(path: Path, *args, implicit: bool = False, **more) -> Path:
    """`structure_set` into a file."""
    dataset = structure_set(*args, **more)
    if implicit:
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path
