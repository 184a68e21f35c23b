"""RTSTRUCT (PS3.3 C.8.8.5, C.8.8.6): contours in the patient, as masks on the grid of a series."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom

from ...errors import SourceError
from ...volume import Volume
from ..elements import quiet, read_dataset, relative
from .layers import Annotation, Layer, crop, from_planes, is_background

PLANE_TOLERANCE = 0.1
"""How far the points of one contour, and the contours of one slice, may lie apart, as a share of the slice distance."""
LEAST_TOLERANCE_MM = 0.1
MIDWAY = 0.45
"""A contour further from the nearest slice, as a share of the slice distance, belongs to no slice."""
CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR", "CLOSED_PLANAR_XOR")


@quiet()
def read_rtstruct(
    path: Path, image: Volume, series: str = "", root: Path = Path(), shown: Mapping[str, str] | None = None, frame: str = ""
) -> Annotation:
    """The regions of an RTSTRUCT on the grid of ``image``.

    A voxel belongs to a region if its centre lies inside an odd number of the region's contours of its slice: contours in
    contours are holes, and a keyhole's two edges cancel. Slices between contours stay empty.

    Args:
        series: SeriesInstanceUID of ``image``; regions of another frame of reference than its own are left out.
        frame: FrameOfReferenceUID of ``image``, for structure sets that do not name the series.
        shown: ROIName -> name of the layer and in messages; what is not in it stays as it is.

    Raises:
        SourceError: contours that do not lie in the planes of the series' slices, or a damaged file.
    """
    name = relative(path, root)
    try:
        dataset = read_dataset(path)
        names = {int(item.ROINumber): str(item.get("ROIName") or "").strip() for item in dataset.StructureSetROISequence}
        names = {number: (shown or {}).get(name, name) for number, name in names.items()}
        places = {int(item.ROINumber): str(item.get("ReferencedFrameOfReferenceUID") or "") for item in dataset.StructureSetROISequence}
        regions = [(int(item.ReferencedROINumber), item) for item in dataset.get("ROIContourSequence") or []]
        frame = _frame_of(dataset, series) or (frame if frame in places.values() else "")
    except Exception as error:
        raise SourceError(f"{name}: RTSTRUCT is damaged or truncated ({type(error).__name__})") from error
    notes: list[str] = []
    unknown = [number for number, _ in regions if number not in names]
    if unknown:
        raise SourceError(f"{name}: {len(unknown)} regions with contours that StructureSetROISequence does not name")
    found: dict[str, list[tuple[int, int, int, np.ndarray]]] = {}
    nameless = elsewhere = 0
    contoured = dict.fromkeys(names)
    for number, region in regions:
        label = names[number]
        contoured.pop(number, None)
        if not label or is_background(label):
            nameless += not label
            continue
        if frame and places[number] and places[number] != frame:
            elsewhere += 1
            continue
        try:
            planes = _region(region, image, label, notes)
        except SourceError as error:
            raise SourceError(f"{name}: region '{label}': {error}") from None
        except Exception as error:
            raise SourceError(f"{name}: region '{label}': its contours are damaged ({type(error).__name__})") from error
        found.setdefault(label, []).extend(planes)
    for number in contoured:  # named, but without contours: looked for and absent
        if names[number] and not is_background(names[number]):
            found.setdefault(names[number], [])
    if nameless:
        notes.append(f"{nameless} regions without a name were left out")
    if elsewhere:
        notes.append(f"{elsewhere} regions of another frame of reference were left out")
    layers = tuple(from_planes(label, planes) for label, planes in found.items())
    notes += [note for layer in layers for note in _gaps(layer)]
    return Annotation(layers, tuple(notes))


def rasterize(contours: Sequence[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """Pixels whose centre lies inside an odd number of closed polygons. Pure.

    Args:
        contours: each ``(N, 2)`` float: (row, column), pixel centres are whole numbers; the last point joins the first.
        shape: (H, W) of the result.

    Returns:
        bool ``(H, W)``. A centre on an edge counts as inside on the side of growing rows and columns only, so that polygons
        that share an edge share no pixel.
    """
    height, width = shape
    ends = np.concatenate([np.concatenate([points, np.roll(points, -1, axis=0)], axis=1) for points in contours])
    # Each edge downwards: an edge and its reverse, as of a keyhole, then give the same bits and cancel.
    up = ends[:, 0] > ends[:, 2]
    ends[up] = ends[up][:, [2, 3, 0, 1]]
    first = np.clip(np.ceil(ends[:, 0]), 0, height).astype(np.int64)
    last = np.clip(np.ceil(ends[:, 2]), 0, height).astype(np.int64)  # the row of the lower end is the next edge's
    counts = np.maximum(last - first, 0)
    edges = np.repeat(ends, counts, axis=0)
    rows = np.repeat(first, counts) + np.arange(len(edges)) - np.repeat(np.cumsum(counts) - counts, counts)
    share = (rows - edges[:, 0]) / (edges[:, 2] - edges[:, 0])
    columns = np.clip(np.ceil(edges[:, 1] + share * (edges[:, 3] - edges[:, 1])), 0, width).astype(np.int64)
    crossed = np.bincount(rows * (width + 1) + columns, minlength=height * (width + 1)).reshape(height, width + 1)
    return (np.cumsum(crossed[:, :width], axis=1) & 1).astype(bool)


def _frame_of(dataset: pydicom.Dataset, series: str) -> str:
    """FrameOfReferenceUID under which the structure set names the series; "" if it does not tell."""
    for place in dataset.get("ReferencedFrameOfReferenceSequence") or []:
        for study in place.get("RTReferencedStudySequence") or []:
            for item in study.get("RTReferencedSeriesSequence") or []:
                if series and str(item.get("SeriesInstanceUID") or "") == series:
                    return str(place.get("FrameOfReferenceUID") or "")
    return ""


def _region(region: pydicom.Dataset, image: Volume, label: str, notes: list[str]) -> list[tuple[int, int, int, np.ndarray]]:
    """The filled contours of one region, slice by slice."""
    inverse = np.linalg.inv(image.affine)
    spacing = image.spacing[0]
    tolerance = max(PLANE_TOLERANCE, LEAST_TOLERANCE_MM / spacing)
    slices: dict[int, list[tuple[float, np.ndarray]]] = {}
    seen: set[bytes] = set()
    open_, outside, repeated, small = 0, 0, 0, 0
    farthest = 0.0
    for item in region.get("ContourSequence") or []:
        kind = str(item.get("ContourGeometricType") or "").strip().upper()
        if kind not in CLOSED:
            open_ += 1
            continue
        points = _points(item)
        if len(points) < 3:
            small += 1
            continue
        key = points.tobytes()
        if key in seen:
            repeated += 1
            continue
        seen.add(key)
        index = points @ inverse[:3, :3].T + inverse[:3, 3]
        d = index[:, 0]
        if np.ptp(d) > 2 * tolerance:
            raise SourceError(
                f"a contour runs through {np.ptp(d):.1f} slices (oblique, or drawn on other slices), expected contours in the "
                "planes of the series' slices"
            )
        place = float(d.mean())
        nearest = round(place)
        off = abs(place - nearest)
        if place < -MIDWAY or place > image.shape[0] - 1 + MIDWAY:
            outside += 1
            continue
        if off > MIDWAY:
            raise SourceError(
                f"a contour lies between slices {int(place)} and {int(place) + 1}, {off * spacing:.2f} mm "
                f"from the nearest one, expected contours in the slices (distance {spacing:.2f} mm)"
            )
        farthest = max(farthest, off)
        slices.setdefault(nearest, []).append((place, index[:, 1:]))
    planes = []
    for number, contours in sorted(slices.items()):
        places = [place for place, _ in contours]
        if max(places) - min(places) > 2 * tolerance:
            raise SourceError(
                f"slice {number} has contours of several planes, {(max(places) - min(places)) * spacing:.2f} mm apart: they were "
                "drawn on slices of another distance"
            )
        planes.append(_fill(number, [points for _, points in contours], image))
    if open_:
        notes.append(f"'{label}': {open_} points or open contours were left out, only closed planar contours have an inside")
    if small:
        notes.append(f"'{label}': {small} contours of fewer than 3 points were left out")
    if repeated:
        notes.append(f"'{label}': {repeated} contours that stand there twice count once")
    if outside:
        notes.append(f"'{label}': {outside} contours lie outside of the image and were left out")
    if farthest > tolerance:
        notes.append(f"'{label}': contours lie up to {farthest * spacing:.2f} mm from the slices that they were given to")
    beyond = sum(
        bool((p < -0.5).any() or (p > np.array(image.shape[1:]) - 0.5).any()) for c in slices.values() for _, p in c
    )
    if beyond:
        notes.append(f"'{label}': {beyond} contours reach beyond the edge of the image and were cut")
    return planes


def _fill(number: int, contours: list[np.ndarray], image: Volume) -> tuple[int, int, int, np.ndarray]:
    """The contours of one slice, filled within the box around them."""
    points = np.concatenate(contours)
    low = np.clip(np.floor(points.min(axis=0)), 0, image.shape[1:]).astype(int)
    high = np.clip(np.ceil(points.max(axis=0)) + 1, low, image.shape[1:]).astype(int)
    size = int(high[0] - low[0]), int(high[1] - low[1])
    if 0 in size:
        return number, 0, 0, np.zeros((0, 0), bool)
    h, w, part = crop(rasterize([contour - low for contour in contours], size))
    return number, int(low[0]) + h, int(low[1]) + w, part


def _points(item: pydicom.Dataset) -> np.ndarray:
    """ContourData as ``(N, 3)`` mm.

    Raises:
        SourceError: not triples of finite numbers.
    """
    element: Any = item.get_item("ContourData")
    raw = None if element is None else element.value
    # Parsing text at once is many times faster than an object for each number.
    values = raw.strip(b" \0").split(b"\\") if isinstance(raw, bytes) else raw
    try:
        numbers = np.array([] if values is None or values == [b""] else values, dtype=np.float64).ravel()
    except (TypeError, ValueError):
        raise SourceError("a contour with coordinates that are no numbers") from None
    if numbers.size % 3 or not (np.abs(numbers) < 1e7).all():
        raise SourceError(f"a contour of {numbers.size} coordinates, expected finite (x, y, z) in mm")
    return numbers.reshape(-1, 3)


def _gaps(layer: Layer) -> list[str]:
    filled = layer.inside.any(axis=(1, 2)) if layer.inside.size else np.ones(1, bool)
    empty = int(np.count_nonzero(~filled))
    if not empty:
        return []
    return [f"'{layer.label}': {empty} slices between its first and its last have no contour; they stay empty"]
