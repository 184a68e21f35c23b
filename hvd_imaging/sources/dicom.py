"""DICOM series as volumes: found by content, ordered and spaced by where the slices lie in the patient.

Covers single-frame grey images in one regular stack. Multi-frame and colour images, tilted gantries and time series are
refused with the reason. Tags that describe the distance of slices in words (SpacingBetweenSlices, SliceThickness) are
not believed: real series contradict them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydicom
from pydicom.uid import (
    UID,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    MediaStorageDirectoryStorage,
    SegmentationStorage,
)

from ..errors import SourceError
from ..volume import Volume

Units = Literal["hu", "stored"]

SLICE_TOLERANCE = 0.05
"""Allowed distance of a slice from the regular grid, as a share of the spacing (but at least `LEAST_TOLERANCE_MM`)."""
LEAST_TOLERANCE_MM = 0.1
SAME_POSITION_MM = 0.01

_SCAN_TAGS = [
    "SOPClassUID",
    "SOPInstanceUID",
    "SeriesInstanceUID",
    "StudyInstanceUID",
    "PatientID",
    "Modality",
    "Rows",
    "ReferencedSeriesSequence",
    "SegmentSequence",
]
_GEOMETRY_TAGS = [
    "SOPInstanceUID",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "SliceThickness",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "RescaleSlope",
    "RescaleIntercept",
]
_PIXEL_TAGS = [
    "Rows",
    "Columns",
    "NumberOfFrames",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "PlanarConfiguration",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PixelData",
    "FloatPixelData",
    "DoubleFloatPixelData",
]


@dataclass(frozen=True)
class Rejected:
    """An input that can not be used: path relative to the scanned folder, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class SeriesFiles:
    """The files of one series. ``uid`` and ``patient_id`` are raw identifiers: for memory only, never written.

    Attributes:
        files: sorted by path; `read_series` brings them into the order of the slices.
        root: the scanned folder; messages name files relative to it.
    """

    uid: str = field(repr=False)
    patient_id: str = field(repr=False)
    modality: str
    files: tuple[Path, ...]
    root: Path = Path()


@dataclass(frozen=True)
class SegFile:
    """A DICOM SEG object: the series that it segments, and the labels of its segments."""

    path: Path
    series: tuple[str, ...] = field(repr=False)
    labels: tuple[str, ...]
    root: Path = Path()


@dataclass(frozen=True)
class DicomScan:
    """What a folder holds.

    Attributes:
        series: image series, sorted by UID.
        segmentations: DICOM SEG objects, sorted by path.
        rejected: DICOM that can not be read.
        skipped: files that are not DICOM.
        others: DICOM objects that are not images (reports, presentation states, DICOMDIR).
        notes: what the user should know.
    """

    series: tuple[SeriesFiles, ...]
    segmentations: tuple[SegFile, ...]
    rejected: tuple[Rejected, ...]
    skipped: int
    others: int
    notes: tuple[str, ...] = ()


def relative(path: Path, root: Path) -> str:
    """A path as messages show it."""
    return Path(os.path.relpath(path, root)).as_posix() if root != Path() else Path(path).as_posix()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence pydicom's warnings and log: they quote values, and values can be identifiers.

    Values are parsed when they are asked for, so this belongs around all use of a data set, not only around reading it.
    """
    log = logging.getLogger("pydicom")
    before = log.disabled
    log.disabled = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.disabled = before


def read_dataset(path: Path, tags: Sequence[str] | None = None, pixels: bool = False) -> pydicom.Dataset:
    """`pydicom.dcmread` of any file, with the asked tags only; use it inside `quiet`."""
    return pydicom.dcmread(
        path, force=True, stop_before_pixels=not pixels, specific_tags=None if tags is None else list(tags)
    )


def walk(root: Path) -> Iterator[Path]:
    """All regular files below ``root``, in a fixed order."""
    for folder, folders, names in os.walk(root):
        folders.sort()
        for name in sorted(names):
            path = Path(folder) / name
            if path.is_file():
                yield path


def looks_like_dicom(start: bytes) -> bool:
    """True for a file's first 132 bytes if it has the DICM prefix, or begins as a data set without preamble."""
    if start[128:132] == b"DICM":
        return True
    if len(start) < 16:
        return False
    group, element = int.from_bytes(start[:2], "little"), int.from_bytes(start[2:4], "little")
    return (group in (0x0002, 0x0008) and element <= 0x0070) or start[:3] == b"\x00\x08\x00"  # last: big endian


@quiet()
def scan_dicom(root: Path, on_file: Callable[[Path], None] | None = None) -> DicomScan:
    """Read the headers of all files below ``root``; what is DICOM is decided by content, never by name.

    Files that are not DICOM are counted only. A DICOM file without what identifies it (mostly: cut off in the header)
    is rejected.
    """
    series: dict[str, list[tuple[Path, str, str]]] = {}
    segmentations: list[SegFile] = []
    rejected: list[Rejected] = []
    skipped = others = nameless = 0
    for path in walk(root):
        if on_file is not None:
            on_file(path)
        try:
            with open(path, "rb") as file:
                start = file.read(132)
        except OSError as error:
            rejected.append(Rejected(relative(path, root), f"can not be opened ({error.strerror})"))
            continue
        if not looks_like_dicom(start):
            skipped += 1
            continue
        certain = start[128:132] == b"DICM"
        try:
            header = read_dataset(path, _SCAN_TAGS)
            kind = str(header.get("SOPClassUID", "") or header.file_meta.get("MediaStorageSOPClassUID", ""))
            uid = str(header.get("SeriesInstanceUID", ""))
            patient = str(header.get("PatientID", "") or "").strip()
            study = str(header.get("StudyInstanceUID", ""))
            modality = str(header.get("Modality", "") or "")
            is_image = header.get("Rows") is not None
            seg = _seg_file(path, root, header) if kind == SegmentationStorage else None
        except Exception as error:  # pydicom raises many kinds on damaged files; their text may quote values
            if certain:
                rejected.append(
                    Rejected(relative(path, root), f"damaged or truncated DICOM header ({type(error).__name__})")
                )
            else:
                skipped += 1
            continue
        if kind == MediaStorageDirectoryStorage:
            others += 1
        elif not kind or not uid:
            if certain:
                rejected.append(
                    Rejected(
                        relative(path, root),
                        "DICOM header without SOPClassUID or SeriesInstanceUID (truncated file?)",
                    )
                )
            else:
                skipped += 1
        elif seg is not None:
            if seg.series:
                segmentations.append(seg)
            else:
                rejected.append(Rejected(relative(path, root), "DICOM SEG without ReferencedSeriesSequence"))
        elif is_image:
            if not patient:
                nameless += 1
                patient = f"study {study or uid}"
            series.setdefault(uid, []).append((path, patient, modality))
        elif certain and header_is_cut(path, header):
            rejected.append(Rejected(relative(path, root), "DICOM file ends inside its header (truncated file?)"))
        else:
            others += 1

    found = []
    for uid, files in sorted(series.items()):
        patients, modalities = {f[1] for f in files}, {f[2] for f in files}
        if len(patients) > 1 or len(modalities) > 1:
            what = "PatientID" if len(patients) > 1 else "Modality"
            rejected.append(
                Rejected(
                    relative(files[0][0], root),
                    f"the {len(files)} files of this series have {max(len(patients), len(modalities))} values of {what}, "
                    "expected one",
                )
            )
            continue
        found.append(SeriesFiles(uid, files[0][1], files[0][2], tuple(f[0] for f in files), root))
    notes = []
    if nameless:
        notes.append(f"{nameless} files without PatientID: each study counts as a patient of its own")
    if others:
        notes.append(f"{others} DICOM objects that are not images were left out")
    return DicomScan(tuple(found), tuple(segmentations), tuple(rejected), skipped, others, tuple(notes))


def header_is_cut(path: Path, header: pydicom.Dataset) -> bool:
    """True if an object of an image class lacks the image: the file ends before Rows."""
    kind = UID(str(header.get("SOPClassUID", "")))
    return "Image Storage" in kind.name


def _seg_file(path: Path, root: Path, header: pydicom.Dataset) -> SegFile:
    series = tuple(str(item.SeriesInstanceUID) for item in header.get("ReferencedSeriesSequence", []))
    labels = tuple(str(item.SegmentLabel).strip() for item in header.get("SegmentSequence", []))
    return SegFile(path, series, labels, root)


@dataclass(frozen=True)
class _Slice:
    """Geometry and scale of one file."""

    path: Path
    name: str
    uid: str
    position: np.ndarray
    orientation: np.ndarray
    pixel_spacing: tuple[float, float]
    size: tuple[int, int]
    slope: float
    intercept: float
    scaled: bool
    thickness: float | None


@quiet()
def read_series(series: SeriesFiles, units: Units = "hu") -> Volume:
    """Read a series as float32 ``(D, H, W)``.

    D runs along the normal of the slices (row direction x column direction), H down the columns, W along the rows.
    Duplicates (one position, equal pixels) are dropped and noted.

    Args:
        units: "hu" applies RescaleSlope and RescaleIntercept of each slice, "stored" does not.

    Raises:
        SourceError: the files are not one regular stack of grey slices, or one can not be read.
    """
    if not series.files:
        raise SourceError("a series without files")
    slices = [_read_slice(path, relative(path, series.root)) for path in series.files]
    _check_alike(slices)
    notes: list[str] = []
    kept, pixels = _drop_duplicates(slices, notes)
    uids = Counter(item.uid for item in kept)
    shared = sum(count for count in uids.values() if count > 1)
    if shared:
        notes.append(f"{shared} slices share a SOPInstanceUID at different positions; all kept, ordered by position")
    order, affine, gaps = stack_geometry(
        np.stack([item.position for item in kept]),
        np.mean([item.orientation for item in kept], axis=0),
        kept[0].pixel_spacing,
        kept[0].thickness,
        [item.name for item in kept],
    )
    kept = [kept[index] for index in order]
    if len(gaps) and np.ptp(gaps) > 1e-3 * gaps.mean():
        notes.append(f"slice gaps vary from {gaps.min():.2f} to {gaps.max():.2f} mm; {gaps.mean():.2f} mm is used")
    if units == "hu" and series.modality == "CT" and not all(item.scaled for item in kept):
        notes.append("CT without RescaleSlope and RescaleIntercept: stored values are taken as HU")
    array = np.empty((len(kept), *kept[0].size), np.float32)
    for index, item in enumerate(kept):
        stored = pixels.pop(item.path) if item.path in pixels else _read_pixels(item)
        array[index] = stored * item.slope + item.intercept if units == "hu" else stored
    return Volume(
        array, affine, series.modality, source=tuple(item.path for item in kept), notes=tuple(notes)
    )


def stack_geometry(
    positions: np.ndarray,
    orientation: np.ndarray,
    pixel_spacing: tuple[float, float],
    thickness: float | None = None,
    names: Sequence[str] | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Order and affine of slices from where they lie. Pure.

    Args:
        positions: ``(N, 3)`` ImagePositionPatient, mm, all different.
        orientation: ``(6,)`` ImageOrientationPatient.
        pixel_spacing: (between rows, between columns), mm.
        thickness: mm; used for a single slice only, where nothing else tells its extent.
        names: what to call the slices in messages.

    Returns:
        order ``(N,)``, affine ``(4, 4)`` of (d, h, w, 1) to LPS mm, gaps ``(N - 1,)`` mm along the normal.

    Raises:
        SourceError: not a regular stack.
    """
    names = names or [f"slice {index}" for index in range(len(positions))]
    row, column = orientation[:3], orientation[3:]
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    if abs(lengths[0] - 1) > 1e-2 or abs(lengths[1] - 1) > 1e-2 or abs(float(row @ column)) > 1e-2:
        raise SourceError(f"{names[0]}: ImageOrientationPatient is not two perpendicular directions of length 1")
    row, column = row / lengths[0], column / lengths[1]
    normal = np.cross(row, column)
    normal /= np.linalg.norm(normal)
    along = positions @ normal
    order = np.argsort(along, kind="stable")
    count = len(order)
    first, last = positions[order[0]], positions[order[-1]]
    if count == 1:
        if not thickness or thickness <= 0:
            raise SourceError(f"{names[0]}: a single slice without SliceThickness; its extent is not known")
        step = normal * thickness
        gaps = np.zeros(0)
    else:
        step = (last - first) / (count - 1)
        gaps = np.diff(along[order])
        spacing = float(step @ normal)
        residual = np.abs(along[order] - along[order[0]] - spacing * np.arange(count))
        if residual.max() > max(SLICE_TOLERANCE * spacing, LEAST_TOLERANCE_MM):
            widest = int(gaps.argmax())
            usual = float(np.median(gaps))
            what = "slices are missing" if gaps[widest] > 1.5 * usual else "slices are not evenly spaced"
            raise SourceError(
                f"{what}: the gap between {names[order[widest]]} and {names[order[widest + 1]]} is "
                f"{gaps[widest]:.2f} mm, expected about {usual:.2f} mm as between most of the {count} slices"
            )
        sideways = (positions[order] - first) - np.outer(along[order] - along[order[0]], normal)
        shift = float(np.linalg.norm(sideways, axis=1).max())
        if shift > max(0.5 * min(pixel_spacing), LEAST_TOLERANCE_MM):
            angle = np.degrees(np.arctan2(np.linalg.norm(step - spacing * normal), spacing))
            raise SourceError(
                f"slices are shifted by up to {shift:.2f} mm sideways (gantry tilt of {angle:.1f} degrees?), expected a "
                "stack along the normal of the slices; not supported yet"
            )
    affine = np.eye(4)
    affine[:3, 0] = step
    affine[:3, 1] = column * pixel_spacing[0]
    affine[:3, 2] = row * pixel_spacing[1]
    affine[:3, 3] = first
    return order, affine, gaps


def _read_slice(path: Path, name: str) -> _Slice:
    try:
        header = read_dataset(path, _GEOMETRY_TAGS)
        frames = int(header.get("NumberOfFrames") or 1)
        samples = int(header.get("SamplesPerPixel") or 1)
        photometric = str(header.get("PhotometricInterpretation") or "MONOCHROME2")
        position = _numbers(header, "ImagePositionPatient", 3)
        orientation = _numbers(header, "ImageOrientationPatient", 6)
        spacing = _numbers(header, "PixelSpacing", 2)
        thickness = _numbers(header, "SliceThickness", 1)
        slope = _numbers(header, "RescaleSlope", 1)
        intercept = _numbers(header, "RescaleIntercept", 1)
        size = int(header.get("Rows") or 0), int(header.get("Columns") or 0)
        uid = str(header.get("SOPInstanceUID", ""))
    except SourceError as error:
        raise SourceError(f"{name}: {error}") from None
    except Exception as error:
        raise SourceError(f"{name}: damaged or truncated DICOM header ({type(error).__name__})") from error
    if frames > 1:
        raise SourceError(f"{name}: multi-frame image ({frames} frames) is not supported yet, expected one slice a file")
    if samples != 1 or not photometric.startswith("MONOCHROME"):
        raise SourceError(f"{name}: colour image ({photometric}) is not supported yet, expected MONOCHROME1 or 2")
    if position is None or orientation is None:
        raise SourceError(f"{name}: no ImagePositionPatient or ImageOrientationPatient; its place is not known")
    if spacing is None or spacing.min() <= 0:
        raise SourceError(f"{name}: no usable PixelSpacing; the size of its pixels is not known")
    if min(size) < 1:
        raise SourceError(f"{name}: image of {size[0]} rows and {size[1]} columns")
    return _Slice(
        path,
        name,
        uid,
        position,
        orientation,
        (float(spacing[0]), float(spacing[1])),
        size,
        1.0 if slope is None else float(slope[0]),
        0.0 if intercept is None else float(intercept[0]),
        slope is not None and intercept is not None,
        None if thickness is None else float(thickness[0]),
    )


def _numbers(header: pydicom.Dataset, keyword: str, count: int) -> np.ndarray | None:
    value: Any = header.get(keyword)
    if value is None or value == "":
        return None
    try:
        numbers = np.atleast_1d(np.array(value, dtype=np.float64))
    except (TypeError, ValueError):
        raise SourceError(f"{keyword} is not numeric") from None
    if numbers.shape != (count,) or not np.isfinite(numbers).all():
        raise SourceError(f"{keyword}: expected {count} finite numbers, found {numbers.size} values")
    return numbers


def _check_alike(slices: Sequence[_Slice]) -> None:
    first = slices[0]
    for item in slices[1:]:
        if item.size != first.size:
            raise SourceError(
                f"mixed image sizes: {first.name} is {first.size[0]} x {first.size[1]}, {item.name} is "
                f"{item.size[0]} x {item.size[1]}; expected one size in a series"
            )
        if np.abs(item.orientation - first.orientation).max() > 1e-3:
            raise SourceError(
                f"mixed orientations: {item.name} lies in another plane than {first.name} (a localizer?); expected one "
                "orientation in a series"
            )
        if not np.allclose(item.pixel_spacing, first.pixel_spacing, rtol=1e-3):
            raise SourceError(
                f"mixed PixelSpacing: {first.pixel_spacing} mm in {first.name}, {item.pixel_spacing} mm in {item.name}; "
                "expected one in a series"
            )


def _drop_duplicates(slices: Sequence[_Slice], notes: list[str]) -> tuple[list[_Slice], dict[Path, np.ndarray]]:
    """The slices at different positions, and the pixels that had to be read for it.

    The position decides, not the SOPInstanceUID: one that was given twice by mistake must not cost a slice.
    """
    kept: list[_Slice] = []
    pixels: dict[Path, np.ndarray] = {}
    places: dict[tuple[int, ...], list[_Slice]] = {}
    for item in slices:
        cell = np.floor(item.position / 1.0).astype(int)
        near = (
            other
            for offset in np.ndindex(3, 3, 3)
            for other in places.get(tuple(int(c) for c in cell + offset - 1), ())
            if np.linalg.norm(other.position - item.position) <= SAME_POSITION_MM
        )
        twin = next(near, None)
        if twin is None:
            kept.append(item)
            places.setdefault(tuple(int(c) for c in cell), []).append(item)
            continue
        for each in (twin, item):
            if each.path not in pixels:
                pixels[each.path] = _read_pixels(each)
        a, b = (pixels[each.path] * each.slope + each.intercept for each in (twin, item))
        if not np.array_equal(a, b):
            raise SourceError(
                f"{twin.name} and {item.name} lie at the same position with different pixels (time points, echoes or "
                "repeats in one series?); expected one image at each position"
            )
        del pixels[item.path]
        uid = "same SOPInstanceUID, " if twin.uid and twin.uid == item.uid else ""
        notes.append(f"duplicate dropped: {item.name} is {twin.name} again ({uid}same position, equal pixels)")
    return kept, pixels


def _read_pixels(item: _Slice) -> np.ndarray:
    """Stored values ``(H, W)`` as float64.

    Raises:
        SourceError: the pixel data is cut off, damaged, or in a coding without a decoder here.
    """
    syntax = ""
    try:
        dataset = read_dataset(item.path, _PIXEL_TAGS, pixels=True)
        if "TransferSyntaxUID" in dataset.file_meta:
            syntax = dataset.file_meta.TransferSyntaxUID.name
        else:  # a data set without preamble and file meta: not compressed, coded as the parser found
            implicit, little = dataset.original_encoding
            dataset.file_meta.TransferSyntaxUID = (
                ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian if little else ExplicitVRBigEndian
            )
        if not any(key in dataset for key in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
            raise SourceError(f"{item.name}: no pixel data (truncated file?); get this file again from its source")
        array = dataset.pixel_array
    except SourceError:
        raise
    except (RuntimeError, NotImplementedError, ImportError) as error:
        raise SourceError(
            f"{item.name}: pixel data in {syntax or 'an unknown coding'} can not be decoded ({type(error).__name__}): "
            "damaged, or its decoder is missing (the extra 'dicom' brings JPEG decoders)"
        ) from error
    except Exception as error:
        raise SourceError(
            f"{item.name}: pixel data is truncated or damaged ({type(error).__name__}), expected "
            f"{item.size[0]} x {item.size[1]} pixels; get this file again from its source"
        ) from error
    if array.shape != item.size:
        raise SourceError(f"{item.name}: pixel data of shape {array.shape}, expected {item.size}")
    return array.astype(np.float64)
