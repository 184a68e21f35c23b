"""Pixels around the image that a scanner fills up (PixelPaddingValue, PS3.3 C.7.5.1.1.2): they become air or background."""

from __future__ import annotations

import numpy as np

from .frames import Frame
from .headers import Header
from .pixels import Units, padding_in

AIR = -1000.0
"""HU."""
SIGNALS = ("MR", "PT", "NM", "RTDOSE")
"""Modalities in which 0 says that nothing was measured, whatever the smallest value is."""


class Padding:
    """Finds the padding of a volume slice by slice, and fills it when all slices stand.

    Filled is in CT with -1000 HU (for stored units: the value that means it), elsewhere with the background: 0, or the smallest
    other value if 0 lies outside of the volume's values and is not "no signal".
    """

    def __init__(self, modality: str, units: Units) -> None:
        self._modality, self._units = modality, units
        self._found: dict[int, tuple[np.ndarray, float | None]] = {}

    def look(self, index: int, stored: np.ndarray, header: Header, frame: Frame) -> None:
        """Remember which pixels of slice ``index`` are padding.

        Args:
            stored: ``(H, W)`` as `stored_values` gives them.
        """
        ends = padding_in(header, stored.dtype)
        if ends is None:
            return
        padded = stored == ends[0] if ends[0] == ends[1] else (stored >= ends[0]) & (stored <= ends[1])
        if padded.any():
            air: float | None = None
            if self._modality == "CT" and (self._units == "hu" or not header.lut):
                air = AIR if self._units == "hu" else (AIR - frame.intercept) / frame.slope
            self._found[index] = np.packbits(padded), air

    def fill(self, array: np.ndarray) -> tuple[str, ...]:
        """Fill the padding of ``array`` ``(D, H, W)`` in place.

        Returns:
            A note if padding lies in the middle of the slices too: then PixelPaddingValue may be a value of tissue.
        """
        if not self._found:
            return ()
        background = self._background(array) if any(air is None for _, air in self._found.values()) else 0.0
        height, width = array.shape[1:]
        middle = slice(height // 4, height - height // 4), slice(width // 4, width - width // 4)
        changed = 0
        for index, (packed, air) in self._found.items():
            padded, value = self._unpacked(packed, array), np.float32(background if air is None else air)
            changed += int(np.count_nonzero(padded[middle] & (array[index][middle] != value)))
            array[index][padded] = value
        if not changed:
            return ()
        filled = "-1000 HU" if self._modality == "CT" else "background"
        return (
            f"PixelPaddingValue stands for {changed} pixels in the middle of the slices too; they became {filled} as the standard says, "
            "but look whether they are tissue",
        )

    def _background(self, array: np.ndarray) -> float:
        low, high = np.inf, -np.inf
        for index, image in enumerate(array):
            values = image[~self._unpacked(self._found[index][0], array)] if index in self._found else image
            if values.size:
                low, high = min(low, float(values.min())), max(high, float(values.max()))
        none = 0.0 if self._modality in SIGNALS else low
        return 0.0 if low <= 0 <= high or low > high else none

    @staticmethod
    def _unpacked(packed: np.ndarray, array: np.ndarray) -> np.ndarray:
        shape = array.shape[1:]
        return np.unpackbits(packed, count=shape[0] * shape[1]).reshape(shape).view(bool)
