"""Where frames lie: order, spacing, affine, gantry tilt. Pure; positions decide, words about distances are not believed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .. import limits
from ..errors import SourceError

SLICE_TOLERANCE = 0.05
"""Allowed distance of a slice from the regular grid, as a share of the spacing (but at least `LEAST_TOLERANCE_MM`)."""
LEAST_TOLERANCE_MM = 0.1
SAME_POSITION_MM = 0.01
LARGEST_TILT = 45.0
"""Degrees. Gantries tilt by up to 30; slices that are shifted further are no stack."""
MOST_GROWTH = 8
"""Voxels of an upright grid to those of a tilted stack, if it is large: a tilt of 30 degrees about doubles a head."""
LARGEST_PLACE_MM = 1e6
"""No patient is a kilometre from a scanner's origin."""


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
        order ``(N,)``, affine ``(4, 4)`` of (d, h, w, 1) to LPS mm, gaps ``(N - 1,)`` mm along the normal. The first
        column of the affine is not along the normal where the gantry was tilted, see `tilt`.

    Raises:
        SourceError: not a regular stack.
    """
    names = names or [f"slice {index}" for index in range(len(positions))]
    if not (np.abs(positions) <= LARGEST_PLACE_MM).all():
        far = int((~(np.abs(positions) <= LARGEST_PLACE_MM)).any(axis=1).argmax())
        raise SourceError(f"{names[far]}: ImagePositionPatient lies more than {LARGEST_PLACE_MM / 1e6:g} km from the origin")
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
        if spacing < SAME_POSITION_MM:
            raise SourceError(f"{names[0]}: the {count} slices lie side by side in one plane, expected a stack")
        residual = np.abs(along[order] - along[order[0]] - spacing * np.arange(count))
        if residual.max() > max(SLICE_TOLERANCE * spacing, LEAST_TOLERANCE_MM):
            widest = int(gaps.argmax())
            usual = float(np.median(gaps))
            what = "slices are missing" if gaps[widest] > 1.5 * usual else "slices are not evenly spaced"
            raise SourceError(
                f"{what}: the gap between {names[order[widest]]} and {names[order[widest + 1]]} is "
                f"{gaps[widest]:.2f} mm, expected about {usual:.2f} mm as between most of the {count} slices"
            )
        drift = positions[order] - first - np.outer(np.arange(count), step)
        aside = np.linalg.norm(drift - np.outer(drift @ normal, normal), axis=1)
        # Slices may drift sideways evenly (a tilted gantry), not one by one.
        if aside.max() > max(0.5 * min(pixel_spacing), LEAST_TOLERANCE_MM):
            worst = int(aside.argmax())
            raise SourceError(
                f"{names[order[worst]]} is shifted by {aside[worst]:.2f} mm sideways in its stack of {count} slices, expected "
                "a straight stack"
            )
    affine = np.eye(4)
    affine[:3, 0] = step
    affine[:3, 1] = column * pixel_spacing[0]
    affine[:3, 2] = row * pixel_spacing[1]
    affine[:3, 3] = first
    return order, affine, gaps


def tilt(affine: np.ndarray, count: int) -> tuple[np.ndarray, float]:
    """How far each next slice is shifted within its plane. Pure.

    Args:
        affine: of `stack_geometry`.
        count: of slices.

    Returns:
        Shift ``(2,)`` along H and W in pixels a slice, zero if the last slice is shifted by less than half a pixel (what
        scanners write of an upright stack); and the angle in degrees.

    Raises:
        SourceError: more than `LARGEST_TILT`.
    """
    spacing = np.linalg.norm(affine[:3, 1:3], axis=0)
    axes = affine[:3, 1:3] / spacing
    aside = affine[:3, 0] @ axes
    if np.linalg.norm(aside) * max(count - 1, 0) <= max(0.5 * float(spacing.min()), LEAST_TOLERANCE_MM):
        return np.zeros(2), 0.0
    normal = np.linalg.norm(affine[:3, 0] - axes @ aside)
    angle = float(np.degrees(np.arctan2(np.linalg.norm(aside), normal)))
    if angle > LARGEST_TILT:
        raise SourceError(
            f"each slice is shifted by {np.linalg.norm(aside):.4g} mm sideways, which would be a gantry tilt of {angle:.1f} degrees; "
            f"expected at most {LARGEST_TILT:g}: its positions or orientation are wrong"
        )
    return aside / spacing, angle


def upright(array: np.ndarray, affine: np.ndarray, shift: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A sheared stack on a grid along the normal of its slices. Pure.

    Each slice stays in its plane and moves in it, by linear interpolation between its pixels; the grid is so large that
    no slice loses a pixel, and what no slice covers has the smallest value of the stack.

    Args:
        array: ``(D, H, W)`` float32.
        affine: of the sheared stack.
        shift: of `tilt`, pixels a slice along H and W.

    Returns:
        ``(D, H', W')`` float32, and its affine.

    Raises:
        SourceError: the grid would be far larger than the stack.
    """
    count, height, width = array.shape
    moved = np.outer(np.arange(count), shift)  # where a slice's first pixel lies on the upright grid of the first slice
    low = np.floor(moved.min(axis=0)).astype(int)
    high = np.ceil(moved.max(axis=0)).astype(int)
    size = (count, height + int(high[0] - low[0]), width + int(high[1] - low[1]))
    if limits.grows_too_much(array.shape, size, MOST_GROWTH):
        raise SourceError(
            f"slices shifted sideways by up to {np.abs(moved).max():.0f} pixels would need a grid of {size[0]} x {size[1]} x {size[2]} "
            f"voxels, more than {MOST_GROWTH} times the {count} x {height} x {width} that they have"
        )
    empty = array.min()
    result = np.full(size, empty, np.float32)
    for index in range(count):
        place = moved[index] - low
        whole = np.floor(place + 1e-6).astype(int)
        rest = np.clip(place - whole, 0.0, None)
        plane = array[index]
        for axis in (0, 1):
            if rest[axis] > 1e-6:
                share = np.float32(rest[axis])
                pad = [(0, 0), (0, 0)]
                pad[axis] = (1, 0)
                before = np.pad(plane, pad, constant_values=empty)
                pad[axis] = (0, 1)
                after = np.pad(plane, pad, constant_values=empty)
                plane = before * share + after * (1 - share)
        h, w = whole
        result[index, h : h + plane.shape[0], w : w + plane.shape[1]] = plane
    upright_affine = affine.copy()
    spacing = np.linalg.norm(affine[:3, 1:3], axis=0)
    axes = affine[:3, 1:3] / spacing
    upright_affine[:3, 0] = affine[:3, 0] - axes @ (affine[:3, 0] @ axes)
    upright_affine[:3, 3] = affine[:3, 3] + affine[:3, 1:3] @ low
    return result, upright_affine


def same_places(positions: np.ndarray) -> list[tuple[int, int]]:
    """(earlier, later) index of positions ``(N, 3)`` within `SAME_POSITION_MM` of each other; later appears once. Pure."""
    if len(positions) < 2:
        return []
    # Along a direction that no scanner has, equal numbers mean equal places, mostly; the distance decides.
    along = positions @ np.array([0.5377, 0.6181, 0.5736])
    order = np.argsort(along, kind="stable")
    if np.diff(along[order]).min() > SAME_POSITION_MM:
        return []
    twins: dict[int, int] = {}
    for place, index in enumerate(order):
        for other in order[place + 1 :]:
            if along[other] - along[index] > SAME_POSITION_MM:
                break
            early, late = sorted((int(index), int(other)))
            if np.linalg.norm(positions[late] - positions[early]) <= SAME_POSITION_MM:
                twins[late] = min(twins.get(late, early), early)
    return sorted((early, late) for late, early in twins.items())
