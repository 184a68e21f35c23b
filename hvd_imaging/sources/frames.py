"""One frame of an image, as readers and writers of geometry pass it on."""

from __future__ import annotations

from dataclasses import dataclass, field


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
