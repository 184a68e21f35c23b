"""What a mask leaves to be doubted. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_STRIPES = 4
"""So many slices with equal gaps between them are no chance."""


def doubts(mask: np.ndarray, classes: Sequence[str]) -> tuple[str, ...]:
    """Notes on a label map uint8 ``(D, H, W)``: nothing marked, stripes, or structures cut by the first or last slice or the edges."""
    marked = np.flatnonzero(mask.any(axis=(1, 2)))
    if not marked.size:
        return ("the mask is empty",)
    notes = []
    gaps = set(np.diff(marked).tolist())
    if len(marked) >= _STRIPES and len(gaps) == 1 and gaps != {1}:
        notes.append(f"only every {gaps.pop()}. slice is marked: was the mask drawn on slices of another distance?")
    for faces, where in (
        ((mask[0], mask[-1]) if len(mask) > 1 else (), "the first or last slice"),
        ((mask[:, 0], mask[:, -1], mask[:, :, 0], mask[:, :, -1]), "the edge of the slices"),
    ):
        counts = np.zeros(len(classes), np.int64)
        for face in faces:
            counts += np.bincount(face.ravel(), minlength=len(classes))[: len(classes)]
        names = [classes[value] for value in np.flatnonzero(counts[1:]) + 1]
        if names:
            notes.append(f"{', '.join(names)}: reaches {where}; it may go on outside of the image")
    return tuple(notes)
