"""The type in which an image is stored, chosen by its content, with the loss stated. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

_INTEGERS = ("uint8", "int16")
_PIECE = 1 << 15
_TRIAL = 1 << 9


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
    Whole numbers are kept exactly wherever they fit. Where the values are multiples of one step (Hounsfield units through a
    window) this step is the scale: nearly no error, and bits that compress. A wanted type is taken whatever its error.

    Args:
        image: real numbers of any shape.
        dtype: auto, uint8, int16, float16 or float32.
        max_error: share of (largest - smallest value).
    """
    exact = np.ascontiguousarray(image, np.float32)
    flat = exact.reshape(-1)
    low, high, whole = _range(flat)
    if dtype in ("auto", *_INTEGERS) and np.isfinite([low, high]).all():
        step = 0.0 if whole else _common_step(flat)
        for name in _INTEGERS if dtype == "auto" else (dtype,):
            kind = np.iinfo(name)
            if whole and kind.min <= low and high <= kind.max:
                return Stored(exact.astype(name), 1.0, 0.0, 0.0)
            even = (high - low) / (kind.max - kind.min)
            limit = max_error * (high - low)
            stored = _integers(flat, name, low, high, step, limit) if step >= even else None
            if stored is None:
                stored = _integers(flat, name, low, high, even, limit if dtype == "auto" else np.inf)
            if stored is not None:
                return replace(stored, array=stored.array.reshape(exact.shape))
    if dtype == "float16":
        most = float(np.finfo(np.float16).max)
        half = np.clip(exact, -most, most).astype(np.float16)
        return Stored(half, 1.0, 0.0, float(np.abs(half.astype(np.float32) - exact).max(initial=0)))
    return Stored(exact, 1.0, 0.0, 0.0)


def _pieces(flat: np.ndarray, first: int = 0) -> Iterator[slice]:
    """Parts of a flat array that stay in the processor's cache from one step to the next; the ``first`` items before all others."""
    if first:
        yield slice(0, first)
    for start in range(first, flat.size, _PIECE):
        yield slice(start, start + _PIECE)


def _range(flat: np.ndarray) -> tuple[float, float, bool]:
    """Smallest and largest value of a float32 array (0 of an empty one), and whether all are whole numbers."""
    low, high, whole = np.inf, -np.inf, True
    for piece in _pieces(flat):
        part = flat[piece]
        # np.minimum and np.maximum hand a NaN on.
        low, high = float(np.minimum(low, part.min())), float(np.maximum(high, part.max()))
        whole = whole and bool((np.rint(part) == part).all())
    return (low, high, whole) if flat.size else (0.0, 0.0, True)


def _common_step(flat: np.ndarray) -> float:
    """The step of which the differences of values seem to be multiples, by a part of them; 0: none. `_integers` judges it."""
    if not flat.size:
        return 0.0
    start = max(flat.size - _PIECE, 0) // 2
    values = np.unique(flat[start : start + _PIECE]).astype(np.float64)
    if not 2 <= len(values) <= _PIECE // 2:
        return 0.0
    rough = float(np.diff(values).min())
    return float((values[-1] - values[0]) / np.rint((values[-1] - values[0]) / rough))


def _integers(flat: np.ndarray, name: str, low: float, high: float, step: float, limit: float) -> Stored | None:
    """Whole steps above ``low``; None as soon as the error of a voxel is above ``limit``."""
    kind = np.iinfo(name)
    scale = float(np.float32(step))
    if scale == 0:  # one value, or nearly
        error = max((float(np.abs(flat[piece] - np.float32(low)).max()) for piece in _pieces(flat)), default=0.0)
        return Stored(np.zeros(flat.shape, name), 1.0, low, error) if error <= limit else None
    # A small offset rounds less: count from 0 where that is enough.
    lowest = kind.min if high - low > kind.max * scale else 0
    offset = float(np.float32(low - lowest * scale))
    array = np.empty(flat.shape, name)
    numbers = np.empty(min(_PIECE, flat.size), np.float64)
    found = np.empty(numbers.shape, np.float32)
    error = 0.0
    for piece in _pieces(flat, min(_TRIAL, flat.size)):  # a type that does not do mostly shows it at once
        exact = flat[piece]
        number, value = numbers[: exact.size], found[: exact.size]
        np.subtract(exact, offset, out=number)
        number /= scale
        np.rint(number, out=number)
        np.clip(number, kind.min, kind.max, out=number)
        array[piece] = number
        # As `decode` does it.
        np.multiply(array[piece], np.float32(scale), out=value, dtype=np.float32)
        value += np.float32(offset)
        value -= exact
        error = max(error, float(value.max()), -float(value.min()))
        if error > limit:
            return None
    return Stored(array, scale, offset, error)
