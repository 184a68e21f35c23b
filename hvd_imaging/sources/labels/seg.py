"""DICOM SEG (PS3.3 A.51, C.8.20; label maps: A.51.4) as masks on the grid of a series."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.encaps import generate_frames
from pydicom.pixels import iter_pixels
from pydicom.uid import RLELossless

from ...decoders import DECODER, SYNTAXES, Expected
from ...errors import SetupError, SourceError
from ...privacy import vocabulary
from ...volume import Volume
from ..elements import UNCOMPRESSED, quiet, read_dataset, relative
from .layers import Annotation, crop, from_planes, is_background, paint
from .volumes import mm

KINDS = ("BINARY", "FRACTIONAL", "LABELMAP")


def read_seg_mask(path: Path, image: Volume, classes: Sequence[str], root: Path = Path()) -> np.ndarray:
    """One DICOM SEG as uint8 ``(D, H, W)`` class indices on the grid of ``image``.

    Args:
        classes: segment label -> index by position.

    Raises:
        SourceError: see `read_seg`; or an unknown segment.
    """
    annotation = read_seg(path, image, root)
    unknown = {layer.label for layer in annotation.layers} - set(classes)
    if unknown:
        raise SourceError(
            f"{relative(path, root)}: {len(unknown)} segments that are no class of this dataset ({', '.join(classes)})"
        )
    return paint(annotation.layers, {label: value for value, label in enumerate(classes)}, image.shape)[0]


@quiet()
def read_seg(path: Path, image: Volume, root: Path = Path(), shown: Mapping[str, str] | None = None) -> Annotation:
    """The segments of a DICOM SEG on the grid of ``image``.

    Frames are placed by PlanePositionSequence, else by the source image that they name. Fractional segments (probability
    and occupancy) count from one half of MaximumFractionalValue. Segments of one label are united.

    Args:
        shown: SegmentLabel -> name of the layer and in messages; what is not in it stays as it is.

    Raises:
        SourceError: another geometry, frames of unknown place or segment, or unreadable.
    """
    name = relative(path, root)
    try:
        seg = read_dataset(path, pixels=True)
        kind = str(seg.SegmentationType)
        size = int(seg.Rows), int(seg.Columns)
        count = int(seg.get("NumberOfFrames") or 1)
        shared = (seg.get("SharedFunctionalGroupsSequence") or [pydicom.Dataset()])[0]
        per_frame = list(seg.PerFrameFunctionalGroupsSequence)
        labels = {int(item.SegmentNumber): str(item.SegmentLabel).strip() for item in seg.SegmentSequence}
        labels = {number: (shown or {}).get(label, label) for number, label in labels.items()}
        highest = float(seg.get("MaximumFractionalValue") or 255)
    except Exception as error:
        raise SourceError(f"{name}: DICOM SEG is damaged or truncated ({type(error).__name__})") from error
    if "PixelData" not in seg:
        raise SourceError(f"{name}: DICOM SEG without pixels (truncated file?)")
    if kind not in KINDS:
        raise SourceError(f"{name}: DICOM SEG of {f'type {kind}' if vocabulary.is_term(kind) else 'an unknown type'} is not supported, expected one of {', '.join(KINDS)}")
    if size != image.shape[1:]:
        raise SourceError(
            f"{name}: mask of another geometry: {size[0]} x {size[1]} pixels, its series has "
            f"{image.shape[1]} x {image.shape[2]}"
        )
    if count != len(per_frame):
        raise SourceError(f"{name}: {count} frames of pixels, but {len(per_frame)} described")
    places = _Places(image)
    planes: dict[int, list[tuple[int, int, int, np.ndarray]]] = {number: [] for number in labels}
    pixels = _frames(seg, count)
    for index, group in enumerate(per_frame):
        where = f"{name}: frame {index + 1}"
        try:
            if kind != "LABELMAP":
                number = int(_item(group, shared, "SegmentIdentificationSequence").ReferencedSegmentNumber)
                if number not in labels:
                    raise SourceError(f"segment {number} is not in SegmentSequence")
            slice_ = places.of(group, shared)
        except SourceError as error:
            raise SourceError(f"{where}: {error}") from None
        except Exception as error:
            raise SourceError(f"{where}: its place or segment is not described") from error
        try:
            frame = next(pixels).reshape(size)
        except SourceError as error:
            raise SourceError(f"{where}: {error}") from None
        except SetupError:
            raise
        except Exception as error:
            raise SourceError(f"{name}: DICOM SEG is damaged or truncated ({type(error).__name__})") from error
        if kind == "LABELMAP":
            found = {int(value) for value in np.unique(frame)} - {0}
            if not found <= labels.keys():
                raise SourceError(f"{where}: pixels of {len(found - labels.keys())} segments that are not in SegmentSequence")
            parts = [(number, frame == number) for number in found]
        else:
            parts = [(number, frame >= (1 if kind == "BINARY" else 0.5 * highest))]
        for number, inside in parts:
            planes[number].append((slice_, *crop(inside)))
    by_label: dict[str, list[tuple[int, int, int, np.ndarray]]] = {}
    nameless = 0
    for number, label in labels.items():
        nameless += not label
        if label and not is_background(label):
            by_label.setdefault(label, []).extend(planes[number])
    layers = tuple(from_planes(label, parts) for label, parts in by_label.items())
    notes = (f"{nameless} segments without a label were left out",) if nameless else ()
    return Annotation(layers, notes)


def _frames(seg: pydicom.Dataset, count: int) -> Iterator[np.ndarray]:
    """The frames' stored values, one after another: all at once they can be larger than the image.

    Raises:
        SourceError: a compressed frame that cannot be decoded.
    """
    syntax = str(seg.file_meta.TransferSyntaxUID)
    if syntax in SYNTAXES:
        expected = Expected(syntax, int(seg.Rows), int(seg.Columns), 1, "MONOCHROME2")
        for data in generate_frames(seg.PixelData, number_of_frames=count):
            yield DECODER.frame(bytes(data), expected)
    elif syntax in UNCOMPRESSED or syntax == RLELossless:
        for frame in iter_pixels(seg, raw=True):
            yield np.asarray(frame)
    else:
        raise SourceError("pixel data in a transfer syntax that is not supported")


class _Places:
    """The slice of each frame on the grid of an image."""

    def __init__(self, image: Volume) -> None:
        self._image = image
        self._inverse = np.linalg.inv(image.affine)
        self._by_uid: dict[str, int] | None = None

    def of(self, group: pydicom.Dataset, shared: pydicom.Dataset) -> int:
        """The slice that a frame lies in.

        Raises:
            SourceError: none, or it is not told.
        """
        _check_plane(group, shared, self._image)
        plane = _item(group, shared, "PlanePositionSequence", missing_ok=True)
        if plane is not None:
            return _slice_at(np.array(plane.ImagePositionPatient, dtype=np.float64), self._inverse, self._image)
        if self._by_uid is None:
            self._by_uid = _slices_by_uid(self._image)
        source = group.DerivationImageSequence[0].SourceImageSequence[0]
        uid = str(source.ReferencedSOPInstanceUID)
        if uid not in self._by_uid:
            raise SourceError("it refers to an image that is not in its series")
        return self._by_uid[uid]


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
                f"mask of another geometry: pixel spacing {mm(pixels)} mm, its series has {mm(spacing[1:])} mm"
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
    files = image.source or ()
    if len(files) != image.shape[0]:
        raise SourceError("its place is told by source images only, and the series is not one file a slice")
    return {str(read_dataset(path, ["SOPInstanceUID"]).SOPInstanceUID): index for index, path in enumerate(files)}
