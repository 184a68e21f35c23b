"""The type in which an image is stored, chosen by its content, with the loss stated. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Stored integers and the lowest of them.
_INTEGERS = {"uint8": 0, "int16": -32768}


@dataclass(frozen=True)
class Stored:
    """An image as it is stored: ``value = array * scale + offset``, computed in float32.

    Attributes:
        array: uint8, int16, float16 or float32, C order.
        scale: 1 for floats.
        offset: 0 for floats.
        error: largest difference between a decoded voxel and the image.
    """

    array: np.ndarray
    scale: float
    offset: float
    error: float


def decode(array: np.ndarray, scale: float, offset: float) -> np.ndarray:
    """float32 values of stored ones; always a new array."""
    values = array.astype(np.float32)
    if scale != 1:
        values *= np.float32(scale)
    if offset != 0:
        values += np.float32(offset)
    return values


def encode(image: np.ndarray, dtype: str, max_error: float) -> Stored:
    """An image in its stored type.

    "auto" takes the smallest type whose largest error is within ``max_error`` times the image's range: uint8, int16, else float32.
    Whole numbers are kept exactly wherever they fit. A wanted type is taken whatever its error.

    Args:
        image: real numbers of any shape.
        dtype: auto, uint8, int16, float16 or float32.
        max_error: share of (largest - smallest value).
    """
    image = np.ascontiguousarray(image)
    exact = np.asarray(image, np.float32)
    low, high = (float(exact.min()), float(exact.max())) if exact.size else (0.0, 0.0)
    finite = bool(np.isfinite([low, high]).all())
    if dtype in ("auto", *_INTEGERS) and finite:
        for name in _INTEGERS if dtype == "auto" else (dtype,):
            stored = _integers(exact, name, low, high)
            if dtype != "auto" or stored.error <= max_error * (high - low):
                return stored
    if dtype == "float16":
        limit = float(np.finfo(np.float16).max)
        half = np.clip(exact, -limit, limit).astype(np.float16)
        return Stored(half, 1.0, 0.0, _error(half.astype(np.float32), exact))
    return Stored(exact, 1.0, 0.0, 0.0)


def _integers(exact: np.ndarray, name: str, low: float, high: float) -> Stored:
    kind = np.iinfo(name)
    if kind.min <= low and high <= kind.max and np.array_equal(exact, np.rint(exact)):
        return Stored(exact.astype(name), 1.0, 0.0, 0.0)
    scale = float(np.float32((high - low) / (kind.max - kind.min)))
    if scale == 0:  # one value, or nearly
        return Stored(np.zeros(exact.shape, name), 1.0, low, _error(np.full_like(exact, low), exact))
    offset = float(np.float32(low - kind.min * scale))
    steps = np.rint((exact.astype(np.float64) - offset) / scale)
    array = np.clip(steps, kind.min, kind.max).astype(name)
    return Stored(array, scale, offset, _error(decode(array, scale, offset), exact))


def _error(found: np.ndarray, exact: np.ndarray) -> float:
    return float(np.abs(found - exact).max(initial=0))
