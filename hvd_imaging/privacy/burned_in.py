"""Writing in the pixels: where it stands, what to do about it, and how to take it out.

Ultrasound machines and screen captures write names and dates into the image itself (PS3.15 E.3.1, Clean Pixel Data).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

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


def find_text(image: np.ndarray) -> list[Box]:
    """Boxes of lines of writing in one image.

    Args:
        image: (H, W) of any real type, or (H, W, 3) colours.
    """
    return []


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
    fill = result.min(initial=np.inf) if value is None else value
    frames = result if result.ndim > 2 else result[None]
    for top, left, bottom, right in boxes:
        frames[:, top:bottom, left:right] = fill
    return result
