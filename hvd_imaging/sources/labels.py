"""What is known about an image: masks from DICOM SEG and NIfTI, one label a case from CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydicom

from ..errors import SourceError
from ..volume import Volume, same_grid
from .dicom import quiet, read_dataset, relative
from .nifti import read_nifti

_CODES = {"patientid": "patient", "seriesinstanceuid": "series"}
BACKGROUND = "background"


@dataclass(frozen=True)
class LabelTable:
    """A CSV of labels.

    Attributes:
        by: what the rows name: "patient" (PatientID or NIfTI case name) or "series" (SeriesInstanceUID).
        classes: sorted class names; a label is an index into them.
        labels: identifier -> class index.
        rows: identifier -> line number in the file, for messages.
        name: of the file.
    """

    by: Literal["patient", "series"]
    classes: tuple[str, ...]
    labels: dict[str, int] = field(repr=False)
    rows: dict[str, int] = field(repr=False)
    name: str = ""


def read_labels_csv(path: Path) -> LabelTable:
    """Read a table with the columns ``PatientID`` or ``SeriesInstanceUID``, and ``label`` (names or whole numbers).

    Raises:
        SourceError: missing file or column, an empty cell, or two labels for one case. Rows are named by number, never by
            the identifier in them.
    """
    name = path.name
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{name}: can not be read as UTF-8 text ({type(error).__name__})") from error
    lines = text.splitlines()
    first = lines[0] if lines else ""
    delimiter = max(",;\t", key=first.count)
    header = [cell.strip().strip('"').lower() for cell in first.split(delimiter)]
    columns = [column for column in ("seriesinstanceuid", "patientid") if column in header]
    if not columns or "label" not in header:
        raise SourceError(
            f"{name}: expected a header with PatientID or SeriesInstanceUID, and label; found {len(header)} columns without"
        )
    key, value = header.index(columns[0]), header.index("label")
    labels: dict[str, str] = {}
    rows: dict[str, int] = {}
    reader = csv.reader(io.StringIO(text), delimiter=delimiter)
    next(reader)
    for cells in reader:
        number = reader.line_num
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) <= max(key, value) or not cells[key].strip() or not cells[value].strip():
            raise SourceError(f"{name}: row {number}: expected an identifier and a label, found an empty or missing cell")
        identifier, label = cells[key].strip(), cells[value].strip()
        if labels.get(identifier, label) != label:
            raise SourceError(f"{name}: row {number}: another label than in row {rows[identifier]} for the same identifier")
        labels.setdefault(identifier, label)
        rows.setdefault(identifier, number)
    if not labels:
        raise SourceError(f"{name}: no rows under the header")
    classes = sort_classes(set(labels.values()))
    index = {label: number for number, label in enumerate(classes)}
    by: Any = _CODES[columns[0]]
    return LabelTable(by, classes, {key: index[label] for key, label in labels.items()}, rows, name)


def sort_classes(labels: set[str]) -> tuple[str, ...]:
    """Whole numbers by value, names by alphabet. Pure."""
    if all(label.isdecimal() for label in labels):
        return tuple(sorted(labels, key=lambda label: (int(label), label)))
    return tuple(sorted(labels))


def seg_classes(labels: Sequence[str]) -> tuple[str, ...]:
    """Classes of an archive from the segment labels of all its DICOM SEG objects; index 0 is the background. Pure."""
    return (BACKGROUND, *sorted({label for label in labels if label.lower() != BACKGROUND}))


def read_nifti_mask(path: Path, image: Volume, classes: Sequence[str], root: Path = Path()) -> np.ndarray:
    """A NIfTI mask as uint8 ``(D, H, W)`` on the grid of ``image``.

    Raises:
        SourceError: another geometry, or values that are no class.
    """
    mask = read_nifti(path, root)
    name = relative(path, root)
    if mask.array.ndim != 3 or not same_grid(image, mask, tolerance=0.1 * min(image.spacing)):
        raise SourceError(
            f"{name}: mask of another geometry: expected shape {image.shape} and spacing {_mm(image.spacing)} mm as its "
            f"image, found {mask.array.shape} and {_mm(mask.spacing)} mm, or another position or orientation"
        )
    largest = len(classes) - 1
    values = np.unique(mask.array)
    if values[0] < 0 or values[-1] > largest or (values != np.round(values)).any():
        raise SourceError(
            f"{name}: mask with values from {values[0]:g} to {values[-1]:g}, expected whole numbers from 0 to {largest} "
            f"({', '.join(classes)})"
        )
    return mask.array.astype(np.uint8)


@quiet()
def read_seg_mask(path: Path, image: Volume, classes: Sequence[str], root: Path = Path()) -> np.ndarray:
    """A DICOM SEG as uint8 ``(D, H, W)`` class indices on the grid of ``image``.

    Frames are placed by PlanePositionSequence, else by the source image that they name. Fractional segments count from
    one half. Where segments overlap, the one with the higher number wins.

    Args:
        classes: segment label -> index by position.

    Raises:
        SourceError: another geometry, an unknown segment, or unreadable.
    """
    name = relative(path, root)
    try:
        seg = read_dataset(path, pixels=True)
        frames = np.asarray(seg.pixel_array)
        kind = str(seg.SegmentationType)
        size = int(seg.Rows), int(seg.Columns)
        shared = seg.SharedFunctionalGroupsSequence[0]
        per_frame = list(seg.PerFrameFunctionalGroupsSequence)
        labels = {int(item.SegmentNumber): str(item.SegmentLabel).strip() for item in seg.SegmentSequence}
    except Exception as error:
        raise SourceError(f"{name}: DICOM SEG is damaged or truncated ({type(error).__name__})") from error
    if kind not in ("BINARY", "FRACTIONAL"):
        raise SourceError(f"{name}: DICOM SEG of type {kind} is not supported yet, expected BINARY or FRACTIONAL")
    if size != image.shape[1:]:
        raise SourceError(
            f"{name}: mask of another geometry: {size[0]} x {size[1]} pixels, its series has "
            f"{image.shape[1]} x {image.shape[2]}"
        )
    frames = frames.reshape(-1, *size)
    if len(frames) != len(per_frame):
        raise SourceError(f"{name}: {len(frames)} frames of pixels, but {len(per_frame)} described")
    threshold = 1.0 if kind == "BINARY" else 0.5 * float(seg.get("MaximumFractionalValue", 255))
    unknown = sorted(set(labels.values()) - set(classes) - {label for label in labels.values() if _is_background(label)})
    if unknown:
        raise SourceError(f"{name}: {len(unknown)} segments that are no class of this dataset ({', '.join(classes)})")

    inverse = np.linalg.inv(image.affine)
    by_uid: dict[str, int] | None = None
    placed: list[tuple[int, int, int]] = []
    for index, group in enumerate(per_frame):
        try:
            number = int(_item(group, shared, "SegmentIdentificationSequence").ReferencedSegmentNumber)
            _check_plane(group, shared, image)
            plane = _item(group, shared, "PlanePositionSequence", missing_ok=True)
            if plane is not None:
                slice_ = _slice_at(np.array(plane.ImagePositionPatient, dtype=np.float64), inverse, image)
            else:
                if by_uid is None:
                    by_uid = _slices_by_uid(image)
                source = group.DerivationImageSequence[0].SourceImageSequence[0]
                uid = str(source.ReferencedSOPInstanceUID)
                if uid not in by_uid:
                    raise SourceError("it refers to an image that is not in its series")
                slice_ = by_uid[uid]
        except SourceError as error:
            raise SourceError(f"{name}: frame {index + 1}: {error}") from None
        except Exception as error:
            raise SourceError(f"{name}: frame {index + 1}: its place or segment is not described") from error
        if number not in labels:
            raise SourceError(f"{name}: frame {index + 1}: segment {number} is not in SegmentSequence")
        placed.append((number, slice_, index))
    mask = np.zeros(image.shape, np.uint8)
    for number, slice_, index in sorted(placed):
        label = labels[number]
        value = 0 if _is_background(label) else list(classes).index(label)
        mask[slice_][frames[index] >= threshold] = value
    return mask


def _is_background(label: str) -> bool:
    return label.lower() == BACKGROUND


def _item(group: pydicom.Dataset, shared: pydicom.Dataset, keyword: str, missing_ok: bool = False) -> Any:
    for place in (group, shared):
        if place.get(keyword):
            return place[keyword][0]
    if missing_ok:
        return None
    raise SourceError(f"no {keyword}")


def _check_plane(group: pydicom.Dataset, shared: pydicom.Dataset, image: Volume) -> None:
    plane = _item(group, shared, "PlaneOrientationSequence", missing_ok=True)
    spacing = image.spacing
    if plane is not None:
        found = np.array(plane.ImageOrientationPatient, dtype=np.float64)
        expected = np.concatenate([image.affine[:3, 2] / spacing[2], image.affine[:3, 1] / spacing[1]])
        if np.abs(found - expected).max() > 2e-3:
            raise SourceError("mask of another geometry: its plane has another orientation than its series")
    measures = _item(group, shared, "PixelMeasuresSequence", missing_ok=True)
    if measures is not None and measures.get("PixelSpacing") is not None:
        pixels = np.array(measures.PixelSpacing, dtype=np.float64)
        if not np.allclose(pixels, spacing[1:], rtol=5e-3):
            raise SourceError(
                f"mask of another geometry: pixel spacing {_mm(pixels)} mm, its series has {_mm(spacing[1:])} mm"
            )


def _slice_at(position: np.ndarray, inverse: np.ndarray, image: Volume) -> int:
    d, h, w = (inverse @ [*position, 1.0])[:3]
    index = round(d)
    # The affine is the regular grid next to the true positions: allow what `read_series` allows.
    if abs(h) > 0.25 or abs(w) > 0.25 or abs(d - index) > max(0.1, 0.1 / image.spacing[0]):
        raise SourceError(
            f"mask of another geometry: its first pixel lies at (d, h, w) = ({d:.2f}, {h:.2f}, {w:.2f}) of its series, "
            "expected (slice, 0, 0)"
        )
    if not 0 <= index < image.shape[0]:
        raise SourceError(f"mask of another geometry: slice {index} of {image.shape[0]}")
    return index


def _slices_by_uid(image: Volume) -> dict[str, int]:
    return {
        str(read_dataset(path, ["SOPInstanceUID"]).SOPInstanceUID): index for index, path in enumerate(image.source or ())
    }


def _mm(values: Sequence[float] | np.ndarray) -> str:
    return " x ".join(f"{value:.3f}" for value in values)
