"""Writing in the pixels: where it stands, what to do about it, and how to take it out.

Ultrasound machines and screen captures write names and dates into the image itself (PS3.15 E.3.1, Clean Pixel Data).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from scipy import ndimage
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

Box = tuple[int, int, int, int]
"""(top, left, bottom, right) in pixels; bottom and right are the first row and column outside."""

Mode = Literal["quarantine", "blank", "keep"]
Decision = Literal["keep", "blank", "quarantine"]

MEASURED = frozenset({"CT", "MR", "PT", "NM"})
"""Modalities whose pixels are measured: writing in them means a screen capture, or a false alarm in anatomy."""


def policy(modality: str, burned_in_annotation: str, boxes: Sequence[Box], mode: Mode) -> Decision:
    """What to do with an image. Pure.

    Args:
        burned_in_annotation: the attribute's value (0028,0301), "" if it is missing. "NO" is not believed where
            writing was found; "YES" is believed where none was found: then nobody knows what to blank.
        boxes: from `find_in_frames`.
        mode: `PrivacyConfig.burned_in`.
    """
    declared = burned_in_annotation.strip().upper() == "YES"
    if mode == "keep" or not (boxes or declared):
        return "keep"
    if mode == "quarantine" or not boxes:
        return "quarantine"
    # A hole in a measured volume invents air: only where the file itself says that there is writing.
    return "quarantine" if modality in MEASURED and not declared else "blank"


LARGEST = 1280
"""Larger images are looked at in reduced size: their characters are larger too."""
LEVELS = (0.35, 0.55, 0.75, 0.9)
"""Thresholds between the ground and the brightest value, as shares: ink is not always the brightest."""
LEAST_CONTRAST = 0.2
"""Of writing over its ground, as a share of the image's range."""
_SHORTEST, _TALLEST = 6, 80
_MOST_GLYPHS = 2000


def find_text(image: np.ndarray) -> list[Box]:
    """Boxes of lines of writing in one image, found by shape: glyphs of one ink, side by side on one line.

    Works for printed characters 8 to 80 pixels high, bright or dark, on plain ground or over an image. Writing by hand,
    at an angle, or of fewer than three characters is not found.

    Args:
        image: (H, W) of any real type, or (H, W, 3) colours.
    """
    planes = [image] if image.ndim == 2 else [image[..., :3].max(-1), image[..., :3].min(-1)]
    boxes: list[Box] = []
    for plane in planes:
        grey = plane.astype(np.float32)
        if grey.size == 0 or not np.isfinite(grey).all() or grey.max() == grey.min():
            continue
        step = max(1, math.ceil(max(grey.shape) / LARGEST))
        if step > 1:
            rows, columns = (side // step * step for side in grey.shape)
            grey = grey[:rows, :columns].reshape(rows // step, step, columns // step, step).mean((1, 3))
        for values in (grey, -grey):
            for top, left, bottom, right in _lines(values):
                boxes.append((top * step, left * step, bottom * step, right * step))
    return merge(boxes)


def _lines(values: np.ndarray) -> list[Box]:
    """Lines of bright writing in (H, W) float32."""
    low, high = float(np.percentile(values, 2)), float(values.max())
    height, width = values.shape
    found: list[Box] = []
    for share in LEVELS:
        level = low + share * (high - low)
        glyphs = _glyphs(values, level)
        for start in range(0, len(glyphs), _MOST_GLYPHS):
            for row in _rows(glyphs[start : start + _MOST_GLYPHS]):
                top, left, bottom, right = (int(n) for n in (*row[:, :2].min(0), *row[:, 2:4].max(0)))
                around = values[max(top - 2, 0) : bottom + 2, max(left - 2, 0) : right + 2]
                ground = float(np.median(around[around <= level], axis=None)) if (around <= level).any() else level
                # Grains of noise are no ink: they hardly stand out from their ground.
                if float(np.median(row[:, 5])) - ground < LEAST_CONTRAST * (high - low) or not _is_writing(row, high - low):
                    continue
                # Characters that were not counted (points, thin ones) stand beside and below.
                edge = max(3, (bottom - top) // 2)
                found.append(
                    (max(top - edge, 0), max(left - 2 * edge, 0), min(bottom + edge, height), min(right + 2 * edge, width))
                )
    return found


def _glyphs(values: np.ndarray, level: float) -> np.ndarray:
    """Patches of ink that may be characters: rows of (top, left, bottom, right, half stroke width, ink), sorted by bottom."""
    mask = values > level
    labels, _ = ndimage.label(mask, np.ones((3, 3)))
    boxes = [
        (index, rows.start, columns.start, rows.stop, columns.stop)
        for index, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1)
        if _SHORTEST <= rows.stop - rows.start <= _TALLEST and columns.stop - columns.start <= 6 * (rows.stop - rows.start)
    ]
    if len(boxes) < 3:
        return np.zeros((0, 6))
    table = np.array(boxes)
    depth = ndimage.distance_transform_cdt(np.pad(mask, 1), "chessboard")[1:-1, 1:-1]
    stroke = np.asarray(ndimage.maximum(depth, labels, table[:, 0]))
    ink = np.asarray(ndimage.maximum(values, labels, table[:, 0]))
    # Characters are lines; patches of anatomy are filled.
    thin = stroke <= np.maximum(1, 0.17 * (table[:, 3] - table[:, 1]))
    glyphs = np.column_stack([table[:, 1:], stroke, ink])[thin]
    return glyphs[np.argsort(glyphs[:, 2], kind="stable")]


def _rows(glyphs: np.ndarray) -> list[np.ndarray]:
    """Glyphs that stand side by side: near, of like height, on one line."""
    if len(glyphs) < 3:
        return []
    top, left, bottom, right = glyphs[:, :4].T
    height = bottom - top
    taller = np.maximum(height[:, None], height[None])
    gap = left[None] - right[:, None]
    near = (gap >= -0.3 * taller) & (gap <= 1.3 * taller) & (left[None] > left[:, None])
    alike = taller <= 2 * np.minimum(height[:, None], height[None])
    level = np.abs(bottom[:, None] - bottom[None]) <= np.maximum(1, 0.3 * taller)
    count, member = connected_components(coo_matrix(near & alike & level), directed=False)
    sizes = np.bincount(member, minlength=count)
    return [glyphs[member == index] for index in np.flatnonzero(sizes >= 3)]


def _is_writing(row: np.ndarray, span: float) -> bool:
    """True if the patches agree as printed characters do: on the line they stand on, in ink and in strokes."""
    top, left, bottom, right, stroke, ink = row.T
    height = np.median(bottom - top)
    tolerance = max(1.0, 0.08 * height)
    on_line = np.abs(bottom - np.median(bottom)) <= tolerance
    at_top = np.abs(top - np.median(top)) <= tolerance
    same_ink = np.abs(ink - np.median(ink)) <= (0.04 if height >= 12 else 0.1) * span
    same_stroke = np.abs(stroke - np.median(stroke)) <= max(1.0, 0.3 * np.median(stroke))
    count = len(row)
    needed = 0.95 if count < 5 else 0.7
    narrow = np.median(right - left) <= 1.3 * height
    return bool(
        on_line.mean() >= needed
        and same_ink.mean() >= needed
        and same_stroke.mean() >= needed
        and at_top.mean() >= (needed if count < 5 else 0.35)
        and (narrow or count >= 5)
    )


def find_in_frames(frames: np.ndarray) -> list[Box]:
    """Boxes of writing in any of the frames (F, H, W) or (F, H, W, 3); what overlaps is one box."""
    boxes: list[Box] = []
    for frame in frames:
        boxes += find_text(frame)
    return merge(boxes)


def merge(boxes: Sequence[Box]) -> list[Box]:
    """Boxes without overlap: those that touch become the box around them. Sorted."""
    merged: list[Box] = []
    waiting = list(dict.fromkeys(boxes))
    while waiting:
        top, left, bottom, right = waiting.pop()
        near = [b for b in merged if b[0] <= bottom and top <= b[2] and b[1] <= right and left <= b[3]]
        if not near:
            merged.append((top, left, bottom, right))
            continue
        merged = [b for b in merged if b not in near]
        near.append((top, left, bottom, right))
        waiting.append((min(b[0] for b in near), min(b[1] for b in near), max(b[2] for b in near), max(b[3] for b in near)))
    return sorted(merged)


def blank(array: np.ndarray, boxes: Sequence[Box], value: float | None = None) -> np.ndarray:
    """A copy with the boxes filled in every frame.

    Args:
        array: (H, W), (F, H, W) or (F, H, W, C).
        value: what to fill with; default the array's smallest value.
    """
    result = np.array(array)
    fill = (result.min() if result.size else 0) if value is None else value
    frames = result if result.ndim > 2 else result[None]
    for top, left, bottom, right in boxes:
        frames[:, top:bottom, left:right] = fill
    return result
