"""Faces in head series: a surface drawn from CT or MR can be recognized. Pure functions on volumes.

A head is told by its outline in coarse slices, its face by what lies in front below the brow. The face is cut off by a plane
in front of the brain, as quickshear does (Schimke and Hale 2011), but placed by the size of the head: there is no model of
anatomy here. It is made for heads as scanners have them, upright or lying, within some 20 degrees of straight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import ndimage

Level = Literal["none", "head", "face"]

_STEP_MM = 3.0
_COARSEST_MM = 8.0
"""Between slices: sagittal ones of 7 mm still show a profile."""
_BRIGHT = 0.2
"""Of the way from the darkest to the brightest: between air or noise and skin, in CT (-800 to -600 HU) and MR."""
_PART = 0.05
"""Smaller things, in shares of the largest, are not of the head."""
_WIDTH_MM, _LENGTH_MM, _SHAPE = (100.0, 190.0), (125.0, 240.0), (1.02, 1.7)
"""Of a head's largest slice, ears and nose included; and length / width. A trunk is wider than it is deep."""
_CROWN_MM = 80.0
"""Below the vertex: above the nose, which would make the head longer."""
_BROW = 0.55
"""Depth of the brow below the vertex, in lengths of the head: nasion to vertex is 100 to 110 mm of 190 to 200 in adults."""
_FOREHEAD_MM = (10.0, 30.0)
"""Above the brow."""
_FACE_MM = (10.0, 70.0)
"""Below the brow: eyes to mouth."""
_NEAR_MM = 18.0
"""A face is not farther behind the forehead than this; what is left of a stripped skull or a cut face is."""
_CUT_MM = 22.0
"""The plane lies so far behind the forehead's skin: behind eyes, nose and lips, in front of the temporal lobes."""


@dataclass(frozen=True)
class Risk:
    """What a volume shows.

    Attributes:
        level: "none"; "head": a head without a face in the picture; "face".
        reason: in words, without identifiers.
        brow, plane: of a face: first slice below the brow, and first row that stays, in voxels of the volume turned to
            (from the vertex down, from front to back, from right to left).
    """

    level: Level
    reason: str
    brow: int = 0
    plane: int = 0


def face_risk(array: np.ndarray, affine: np.ndarray) -> Risk:
    """Whether a volume shows a face.

    Args:
        array: ``(D, H, W)``, any scale in which air is darker than skin.
        affine: ``(4, 4)`` index to LPS mm.
    """
    order, flips, spacing = _turn(affine)
    turned = _turned(array, order, flips)
    if max(spacing) > _COARSEST_MM:
        return Risk("none", f"voxels of {max(spacing):.1f} mm are too coarse for a face")
    # A trunk is told by a look at some voxels.
    shape = _shape(turned, spacing, 3 * _STEP_MM)
    if shape is not None and (shape.width > _WIDTH_MM[1] + 6 * _STEP_MM or shape.length > _LENGTH_MM[1] + 6 * _STEP_MM):
        return _no_head(shape.width, shape.length)
    shape = _shape(turned, spacing, _STEP_MM)
    if shape is None:
        return Risk("none", "nothing stands out from the background")
    head, mm, top, largest = shape.mask, shape.mm, shape.top, shape.largest
    width, length, areas = shape.width, shape.length, shape.areas
    if not (_WIDTH_MM[0] <= width <= _WIDTH_MM[1] and _LENGTH_MM[0] <= length <= _LENGTH_MM[1]):
        return _no_head(width, length)
    if not _SHAPE[0] <= length / width <= _SHAPE[1]:
        return Risk("none", "the largest slice has not the shape of a head")
    # Where the picture begins below the vertex: as much as an ellipsoid with that first slice would go on.
    missing = 0.5 * length * (1 - float(np.sqrt(1 - areas[0] / areas.max()))) if top == 0 else 0.0
    brow = top + max(round((_BROW * length - missing) / mm[0]), 0)
    face = slice(brow + round(_FACE_MM[0] / mm[0]), brow + 1 + round(_FACE_MM[1] / mm[0]))
    rows = head[face]
    if len(rows) * mm[0] < 30:
        return Risk("head", "the picture ends above the face")
    middle = round(float(np.flatnonzero(head[largest].any(axis=0)).mean()))
    band = slice(max(middle - round(20 / mm[2]), 0), middle + 1 + round(20 / mm[2]))
    above = slice(max(brow - round(_FOREHEAD_MM[1] / mm[0]), top), max(brow - round(_FOREHEAD_MM[0] / mm[0]), top + 1))
    forehead = np.median(_front(head[above, :, band]).min(axis=1))
    front = _front(rows[:, :, band]).min(axis=1)
    if not np.isfinite(forehead) or ((front - forehead) * mm[1] < _NEAR_MM).sum() * mm[0] < 30:
        return Risk("head", "nothing is in front below the brow: the face was taken out, or is not in the picture")
    return Risk(
        "face",
        f"a head of {width:.0f} x {length:.0f} mm with skin in front below the brow",
        brow=min(round(brow * mm[0] / spacing[0]), turned.shape[0]),
        plane=min(round((float(forehead) * mm[1] + _CUT_MM) / spacing[1]), turned.shape[1]),
    )


def _no_head(width: float, length: float) -> Risk:
    return Risk("none", f"the largest slice is {width:.0f} mm wide and {length:.0f} mm deep, which no head is")


@dataclass(frozen=True)
class _Shape:
    """Outline ``mask`` of some voxels, ``mm`` apart; its first slice, the largest one below it, and the size of this one."""

    mask: np.ndarray
    mm: np.ndarray
    top: int
    largest: int
    areas: np.ndarray
    width: float
    length: float


def _shape(turned: np.ndarray, spacing: tuple[float, ...], step_mm: float) -> _Shape | None:
    steps = [max(1, round(step_mm / mm)) for mm in spacing]
    some = turned[tuple(slice(min(step, size) // 2, None, step) for step, size in zip(steps, turned.shape, strict=True))]
    mm = np.array(spacing) * steps
    mask = _outline(some.astype(np.float32))
    if mask is None:
        return None
    top = int(np.flatnonzero(mask.any(axis=(1, 2)))[0])
    areas = mask[top : top + 1 + round(_CROWN_MM / mm[0])].sum(axis=(1, 2))
    largest = top + int(np.argmax(areas))
    return _Shape(mask, mm, top, largest, areas, float(_extent(mask, 2, mm[2])[largest]), float(_extent(mask, 1, mm[1])[largest]))


def face_region(shape: tuple[int, ...], affine: np.ndarray, risk: Risk) -> np.ndarray:
    """bool (D, H, W): the voxels that `deface` takes."""
    region = np.zeros(shape, bool)
    order, flips, _ = _turn(affine)
    _turned(region, order, flips)[risk.brow :, : risk.plane] = True
    return region


def deface(array: np.ndarray, affine: np.ndarray, risk: Risk) -> np.ndarray:
    """A copy of ``array`` whose voxels in front of the plane below the brow are the darkest ones.

    Args:
        risk: of `face_risk` for this volume, with the level "face".
    """
    return np.where(face_region(array.shape, affine, risk), array.min(), array)


def _turn(affine: np.ndarray) -> tuple[tuple[int, ...], tuple[bool, ...], tuple[float, ...]]:
    """Axes of the array from the vertex down, front to back, right to left; which to flip; their mm."""
    columns = np.asarray(affine, np.float64)[:3, :3]
    lengths = np.linalg.norm(columns, axis=0)
    share = np.abs(columns / lengths)  # (x, y, z) of each array axis
    order: list[int] = []
    for patient in (2, 1, 0):
        order.append(max((axis for axis in range(3) if axis not in order), key=lambda axis: share[patient, axis]))
    flips = tuple(bool((columns[patient, axis] < 0) != (patient == 2)) for patient, axis in zip((2, 1, 0), order, strict=True))
    return tuple(order), flips, tuple(float(lengths[axis]) for axis in order)


def _turned(array: np.ndarray, order: tuple[int, ...], flips: tuple[bool, ...]) -> np.ndarray:
    """A view."""
    view = array.transpose(order)
    return view[tuple(slice(None, None, -1 if flip else 1) for flip in flips)]


def _outline(coarse: np.ndarray) -> np.ndarray | None:
    """The large things that are brighter than the background, their hollows filled slice by slice."""
    low, high = np.quantile(coarse, (0.02, 0.98))
    if not high > low:
        return None
    bright = coarse > low + _BRIGHT * (high - low)
    labels, count = ndimage.label(bright)
    if not count:
        return None
    sizes = np.bincount(labels.reshape(-1))
    sizes[0] = 0
    # In MR the skull is dark: skin and brain are two.
    large = (sizes > _PART * sizes.max())[labels]
    return np.stack([ndimage.binary_fill_holes(one) for one in large])


def _extent(mask: np.ndarray, axis: int, mm: float) -> np.ndarray:
    """mm from the first to the last voxel along an axis, of each slice."""
    found = mask.any(axis=3 - axis)
    first, last = found.argmax(axis=1), found.shape[1] - 1 - found[:, ::-1].argmax(axis=1)
    return np.where(found.any(axis=1), (last - first + 0.5) * mm, 0.0)


def _front(mask: np.ndarray) -> np.ndarray:
    """First row of each column of each slice, infinite where there is none."""
    return np.where(mask.any(axis=1), mask.argmax(axis=1), np.inf)
