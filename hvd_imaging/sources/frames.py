"""One frame of an image, as readers and writers of geometry pass it on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Frame:
    """One frame: where it lies, in mm of the patient's LPS+ system, and how its values are scaled.

    Attributes:
        position: ImagePositionPatient, or None.
        orientation: ImageOrientationPatient, or None.
        spacing: (between rows, between columns) mm, or None.
        thickness: SliceThickness mm, or None.
        slope, intercept: rescale to the modality's units.
        scaled: slope and intercept were given.
        unscalable: the slope that was given is 0, which would make all values one; slope and intercept stand for none.
        stack: StackID, "" if none.
        keys: (name, value) of what tells apart frames at one position: time, b-value, echo, type.
    """

    position: tuple[float, ...] | None = None
    orientation: tuple[float, ...] | None = None
    spacing: tuple[float, ...] | None = None
    thickness: float | None = None
    slope: float = 1.0
    intercept: float = 0.0
    scaled: bool = False
    stack: str = ""
    keys: tuple[tuple[str, float | str], ...] = field(default=(), repr=False)
    unscalable: bool = False


def rescale(slope: tuple[float, ...] | None, intercept: tuple[float, ...] | None) -> dict[str, Any]:
    """``slope``, ``intercept``, ``scaled`` and ``unscalable`` of a `Frame`, from the elements as they stand. Pure.

    A slope of 0 is what some exporters write for "none": stored values hold then.
    """
    if slope is not None and slope[0] == 0:
        return {"unscalable": True}
    return {
        "slope": 1.0 if slope is None else slope[0],
        "intercept": 0.0 if intercept is None else intercept[0],
        "scaled": slope is not None and intercept is not None,
    }
