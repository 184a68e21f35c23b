"""Augmentation of one sample: random draws belong to the sample, so every world size sees the same images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.ndimage

from ..config import AugmentConfig


@dataclass(frozen=True)
class Draws:
    """What chance has decided of one sample; the same draws are made whatever is switched on.

    Attributes:
        flips: mirror along D, H, W.
        spatial: rotate, zoom and shift at all.
        angle, zoom, gamma: in [-1, 1].
        shift: (2,) in [-1, 1].
        noise_seed: of the noise.
    """

    flips: tuple[bool, bool, bool]
    spatial: bool
    angle: float
    zoom: float
    gamma: float
    shift: np.ndarray
    noise_seed: int


def draw(config: AugmentConfig, random: np.random.Generator) -> Draws:
    """Draw from the sample's own generator."""
    flips = random.random(3) < 0.5
    spatial = random.random() < config.probability
    angle, zoom, gamma = random.uniform(-1, 1, 3)
    shift = random.uniform(-1, 1, 2)
    mirrored = tuple(bool(wanted and drawn) for wanted, drawn in zip(config.flip, flips, strict=True))
    return Draws(mirrored, bool(spatial), angle, zoom, gamma, shift, int(random.integers(2**63)))  # type: ignore[arg-type]


def augment(
    image: np.ndarray, mask: np.ndarray | None, config: AugmentConfig, draws: Draws, first: int = 0
) -> tuple[np.ndarray, np.ndarray | None]:
    """Flip, rotate, zoom, shift (classification), gamma and noise; image and mask move together.

    No change moves anything from slice to slice but the flip along D: so a slab can be augmented by itself, see `source_slices`.

    Args:
        image: float32 ``(D, H, W, C)`` in [0, 1]: a patch, or the slab of it that `source_slices` names.
        mask: uint8 ``(D, H, W)`` or None.
        config: amounts; 0 switches a change off.
        draws: of the sample.
        first: slice of the augmented patch at which the slab begins.

    Returns:
        Arrays of the same shapes and dtypes. The mask holds no label that it did not hold before, besides 0.
    """
    angle, zoom, gamma, shift = draws.angle, draws.zoom, draws.gamma, draws.shift
    for axis in range(3):
        if draws.flips[axis]:
            image = np.flip(image, axis)
            mask = None if mask is None else np.flip(mask, axis)
    moves = mask is None and config.shift > 0
    if draws.spatial and (config.rotate_deg or config.scale or moves):
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
        image = image + np.float32(config.noise) * _noise(draws.noise_seed, image.shape, first)
    return np.ascontiguousarray(image, np.float32), None if mask is None else np.ascontiguousarray(mask)


def source_slices(draws: Draws | None, depth: int, slab: tuple[int, int]) -> tuple[int, int]:
    """The slices of a patch of ``depth`` that become slices ``slab`` of the augmented patch."""
    first, last = slab
    return (depth - last, depth - first) if draws is not None and draws.flips[0] else (first, last)


def _noise(seed: int, shape: tuple[int, ...], first: int) -> np.ndarray:
    # A stream for each slice: whoever has some of them draws what the whole patch would.
    key = np.random.SeedSequence(seed).generate_state(2, np.uint64)
    slices = np.empty(shape, np.float32)
    for at, plane in enumerate(slices, start=first):
        np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, at])).standard_normal(out=plane, dtype=np.float32)
    return slices


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
