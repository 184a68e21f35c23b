"""Many images in one file: functional groups of enhanced objects, Siemens mosaics, dose grids, cine.

Places come from what each frame says of itself; where an object only tells a distance of frames, it is refused or has
no place. Sections of DICOM PS3.3 are named where they decide.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ..errors import SourceError
from .elements import CSA_IMAGE, numbers_of
from .frames import Frame, rescale

MOST_TILES = 1024


def functional_groups(dataset: Any, count: int) -> tuple[Frame, ...]:
    """Frames of an enhanced object (C.7.6.16); a group of the frame itself counts before the shared one.

    Raises:
        SourceError: another number of groups than frames, or a value that cannot be what it must be.
    """
    shared = dataset.get("SharedFunctionalGroupsSequence") or [None]
    groups = dataset.get("PerFrameFunctionalGroupsSequence") or []
    if len(groups) != count:
        raise SourceError(f"{count} frames of pixels, but {len(groups)} functional groups describe them")
    return tuple(_group(group, shared[0]) for group in groups)


def _group(group: Any, shared: Any) -> Frame:
    def item(keyword: str) -> Any:
        for place in (group, shared):
            if place is not None and place.get(keyword):
                return place[keyword][0]
        return {}

    measures, values = item("PixelMeasuresSequence"), item("PixelValueTransformationSequence")
    content, diffusion = item("FrameContentSequence"), item("MRDiffusionSequence")
    thickness = numbers_of(measures, "SliceThickness", 1)
    keys: list[tuple[str, float | str]] = []
    for place, keyword in (
        (content, "TemporalPositionIndex"),
        (diffusion, "DiffusionBValue"),
        (item("MREchoSequence"), "EffectiveEchoTime"),
        (item("MRModifierSequence"), "InversionTimes"),
        (item("CardiacSynchronizationSequence"), "NominalCardiacTriggerDelayTime"),
        (item("CTAcquisitionDetailsSequence"), "AcquisitionNumber"),
    ):
        found = numbers_of(place, keyword, 0)
        if found is not None:
            keys.append((keyword, found[0]))
    directions = diffusion.get("DiffusionGradientDirectionSequence")
    direction = numbers_of(directions[0], "DiffusionGradientOrientation", 3) if directions else None
    if direction is not None:
        keys.append(("DiffusionGradientOrientation", " ".join(f"{x:.4f}" for x in direction)))
    for keyword in ("MRImageFrameTypeSequence", "CTImageFrameTypeSequence", "PETFrameTypeSequence"):
        kind = item(keyword).get("FrameType")
        if kind is not None:
            keys.append(("ImageType", "\\".join(str(part) for part in list(kind)[2:])))
    return Frame(
        numbers_of(item("PlanePositionSequence"), "ImagePositionPatient", 3),
        numbers_of(item("PlaneOrientationSequence"), "ImageOrientationPatient", 6),
        numbers_of(measures, "PixelSpacing", 2),
        thickness[0] if thickness else None,
        stack=str(content.get("StackID") or ""),
        keys=tuple(keys),
        **rescale(numbers_of(values, "RescaleSlope", 1), numbers_of(values, "RescaleIntercept", 1)),
    )


def dose_grid(dataset: Any, frame: Frame, count: int) -> tuple[Frame, ...]:
    """Frames of an RT Dose (C.8.8.3): GridFrameOffsetVector in mm along the normal, or in z of the patient.

    Raises:
        SourceError: no offsets, another number of them, or no scaling.
    """
    if frame.position is None or frame.orientation is None:
        raise SourceError("no ImagePositionPatient or ImageOrientationPatient; its place is not known")
    scaling = numbers_of(dataset, "DoseGridScaling", 1)
    slope = scaling[0] if scaling else 1.0
    if slope == 0:
        raise SourceError("DoseGridScaling is 0: its doses are not known")
    position = np.array(frame.position)
    if count == 1:
        return (_moved(frame, position, slope, bool(scaling)),)
    offsets = numbers_of(dataset, "GridFrameOffsetVector", count)
    if offsets is None:
        raise SourceError(f"{count} dose planes without GridFrameOffsetVector; their places are not known")
    row, column = np.array(frame.orientation[:3]), np.array(frame.orientation[3:])
    normal = np.cross(row, column)
    if offsets[0] == 0:
        places = [position + offset * normal for offset in offsets]
    elif abs(offsets[0] - position[2]) < 1e-3 and abs(abs(normal[2]) - 1) < 1e-6:
        places = [np.array([position[0], position[1], offset]) for offset in offsets]
    else:
        raise SourceError("GridFrameOffsetVector begins neither with 0 nor with the z of ImagePositionPatient")
    return tuple(_moved(frame, place, slope, bool(scaling)) for place in places)


def _moved(frame: Frame, place: np.ndarray, slope: float, scaled: bool) -> Frame:
    position = tuple(map(float, place))
    return Frame(position, frame.orientation, frame.spacing, frame.thickness, slope, 0.0, scaled, "", frame.keys)


def mosaic(dataset: Any, frame: Frame, rows: int, columns: int) -> tuple[Frame, ...]:
    """Tiles of a Siemens mosaic: one time point of a stack in one large image.

    Number of tiles and direction of the stack come from the private CSA header, the distance from SpacingBetweenSlices,
    which for mosaics is the scanner's own (no tile has a position of its own). ImagePositionPatient is the corner that
    one image as large as the mosaic would have around the first tile's centre.

    Raises:
        SourceError: without these elements the places are not known.
    """
    from nibabel.nicom import csareader

    element = dataset.get(CSA_IMAGE)
    try:
        csa = csareader.read(bytes(element.value)) if element is not None else None
        tiles = int(csareader.get_n_mosaic(csa) or 0) if csa else 0
        normal = csareader.get_slice_normal(csa) if csa else None
    except Exception as error:  # of a damaged header, of many kinds
        raise SourceError(f"mosaic whose CSA header is damaged ({type(error).__name__})") from None
    distance = numbers_of(dataset, "SpacingBetweenSlices", 1)
    if not 1 < tiles <= MOST_TILES or normal is None or distance is None or distance[0] <= 0:
        raise SourceError("mosaic without its CSA header or SpacingBetweenSlices; the places of its tiles are not known")
    if frame.position is None or frame.orientation is None or frame.spacing is None:
        raise SourceError("no ImagePositionPatient, ImageOrientationPatient or PixelSpacing; its place is not known")
    across = tiles_across(tiles)
    if rows % across or columns % across:
        raise SourceError(f"mosaic of {rows} x {columns} pixels cannot hold {across} x {across} tiles")
    row, column = np.array(frame.orientation[:3]), np.array(frame.orientation[3:])
    along = np.cross(row, column)
    if abs(abs(float(along @ normal)) - 1) > 1e-2:
        raise SourceError("mosaic whose slice normal is not perpendicular to its image; the places of its tiles are not known")
    if float(along @ normal) < 0:
        along = -along
    first = (
        np.array(frame.position)
        + row * frame.spacing[1] * (columns - columns // across) / 2
        + column * frame.spacing[0] * (rows - rows // across) / 2
    )
    return tuple(
        replace(frame, position=tuple(map(float, first + along * distance[0] * index)), stack="")
        for index in range(tiles)
    )


def tiles_across(tiles: int) -> int:
    """A mosaic is square: so many tiles stand in a row and in a column. Pure."""
    return int(np.ceil(np.sqrt(tiles)))


def cut_tiles(image: np.ndarray, tiles: int) -> np.ndarray:
    """``(R, C)`` as ``(tiles, R / n, C / n)``, row by row. Pure."""
    across = tiles_across(tiles)
    rows, columns = image.shape[0] // across, image.shape[1] // across
    cut = image.reshape(across, rows, across, columns).swapaxes(1, 2)
    return cut.reshape(across * across, rows, columns)[:tiles]


def ultrasound_spacing(dataset: Any) -> tuple[float, float] | None:
    """(between rows, between columns) in mm if all spatial regions agree (C.8.5.5), else None.

    Raises:
        SourceError: a value that is no number.
    """
    found = set()
    for region in dataset.get("SequenceOfUltrasoundRegions") or []:
        if region.get("PhysicalUnitsXDirection") == 3 and region.get("PhysicalUnitsYDirection") == 3:  # cm
            x, y = numbers_of(region, "PhysicalDeltaX", 1), numbers_of(region, "PhysicalDeltaY", 1)
            if x and y:
                found.add((round(abs(y[0]) * 10, 6), round(abs(x[0]) * 10, 6)))
    if len(found) != 1:
        return None
    spacing = found.pop()
    return spacing if min(spacing) > 0 else None

