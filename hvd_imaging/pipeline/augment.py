"""Augmentation of one sample: random draws belong to the sample, so every world size sees the same images."""

from __future__ import annotations

import numpy as np
import scipy.ndimage

from ..config import AugmentConfig


def augment(
    image: np.ndarray, mask: np.ndarray | None, config: AugmentConfig, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray | None]:
    """Flip, rotate, zoom, shift (classification), gamma and noise; image and mask move together.

    Args:
        image: float32 ``(D, H, W, C)`` in [0, 1].
        mask: uint8 ``(D, H, W)`` or None.
        config: amounts; 0 switches a change off.
        random: the sample's own generator. The same draws are made whatever is switched on.

    Returns:
        Arrays of the same shapes and dtypes. The mask holds no label that it did not hold before, besides 0.
    """
    flips = random.random(3) < 0.5
    spatial = random.random() < config.probability
    angle, zoom, gamma = random.uniform(-1, 1, 3)
    shift = random.uniform(-1, 1, 2)
    noise_seed = int(random.integers(2**63))
    for axis in range(3):
        if config.flip[axis] and flips[axis]:
            image = np.flip(image, axis)
            mask = None if mask is None else np.flip(mask, axis)
    moves = mask is None and config.shift > 0
    if spatial and (config.rotate_deg or config.scale or moves):
        matrix, offset = in_plane_matrix(
            image.shape[1:3],
            np.deg2rad(angle * config.rotate_deg),
            1 + zoom * config.scale,
            shift * config.shift if moves else np.zeros(2),
        )
        image = _warp(image, matrix, offset, order=1)
        mask = None if mask is None else _warp(mask, matrix, offset, order=0)
    if config.gamma:
        image = np.clip(image, 0, 1) ** np.float32(1 + gamma * config.gamma)
    if config.noise:
        noise = np.random.Generator(np.random.Philox(key=noise_seed)).standard_normal(image.shape, np.float32)
        image = image + np.float32(config.noise) * noise
    return np.ascontiguousarray(image, np.float32), None if mask is None else np.ascontiguousarray(mask)


def in_plane_matrix(
    plane: tuple[int, ...], angle: float, zoom: float, shift: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Output (h, w) -> input (h, w) for a rotation and zoom about the centre; ``shift`` is a share of the side."""
    cos, sin = np.cos(angle) / zoom, np.sin(angle) / zoom
    matrix = np.array([[cos, -sin], [sin, cos]])
    centre = (np.array(plane, float) - 1) / 2
    return matrix, centre - matrix @ centre + shift * np.array(plane, float)


def _warp(array: np.ndarray, matrix: np.ndarray, offset: np.ndarray, order: int) -> np.ndarray:
    """Apply one in-plane map to every slice and channel."""
    out = np.empty_like(array, order="C")
    slices = array[..., None] if array.ndim == 3 else array
    target = out[..., None] if array.ndim == 3 else out
    for d in range(slices.shape[0]):
        for c in range(slices.shape[3]):
            scipy.ndimage.affine_transform(
                slices[d, :, :, c], matrix, offset, output=target[d, :, :, c], order=order, mode="constant"
            )
    return out
