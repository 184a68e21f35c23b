"""Intensities to [0, 1] float32. Pure functions; any shape, one channel at a time."""

from __future__ import annotations

import numpy as np

from ..config import PreprocessConfig


def foreground(array: np.ndarray) -> np.ndarray:
    """True where a voxel is not 0: what brain extraction, masking and padding leave out is 0."""
    return array != 0


def scale(array: np.ndarray, low: float, high: float, out: np.ndarray | None = None) -> np.ndarray:
    """``low`` to 0, ``high`` to 1, clipped between; 0 everywhere if there is no range.

    Args:
        out: float32, where to put it; may be ``array``.
    """
    array = np.asarray(array, np.float32)
    scaled = np.empty(array.shape, np.float32) if out is None else out
    if not high > low:
        scaled[...] = 0
        return scaled
    # Slice by slice: each stays in the processor's cache. The limits stay Python floats: float32 in, float32 out.
    for source, target in zip(array, scaled, strict=True) if array.ndim > 1 else ((array, scaled),):
        np.subtract(source, float(low), out=target)
        target *= 1.0 / (float(high) - float(low))
        np.clip(target, 0.0, 1.0, out=target)
    return scaled


def window(array: np.ndarray, limits: tuple[float, float], out: np.ndarray | None = None) -> np.ndarray:
    """A fixed range (HU for CT)."""
    return scale(array, *limits, out=out)


def percentile(array: np.ndarray, quantiles: tuple[float, float], out: np.ndarray | None = None) -> np.ndarray:
    """The range between two quantiles (0..1) of the foreground, held at 0 and 1 beyond."""
    voxels = array[foreground(array)]
    if voxels.size == 0:
        return scale(array, 0.0, 0.0, out)
    low, high = np.quantile(voxels.astype(np.float64), quantiles)
    return scale(array, float(low), float(high), out)


def zscore(array: np.ndarray, deviations: float, out: np.ndarray | None = None) -> np.ndarray:
    """Mean of the foreground to 0.5, mean -+ ``deviations`` standard deviations to 0 and 1."""
    voxels = array[foreground(array)].astype(np.float64)
    if voxels.size == 0:
        return scale(array, 0.0, 0.0, out)
    mean, deviation = float(voxels.mean()), float(voxels.std())
    return scale(array, mean - deviations * deviation, mean + deviations * deviation, out)


def normalize(array: np.ndarray, config: PreprocessConfig, out: np.ndarray | None = None) -> np.ndarray:
    """One channel as the configuration says; ``intensity: none`` changes the type only.

    Args:
        array: any shape, float32.
        config: with ``intensity`` resolved (not "auto").
        out: float32, where the result may go; may be ``array``.
    """
    if config.intensity == "window":
        return window(array, config.window, out)
    if config.intensity == "percentile":
        return percentile(array, config.percentiles, out)
    if config.intensity == "zscore":
        return zscore(array, config.zscore_range, out)
    if config.intensity == "none":
        return np.asarray(array, np.float32)
    raise ValueError("preprocess.intensity is still 'auto': call pipeline.resolve first")
