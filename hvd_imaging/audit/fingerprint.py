"""Short descriptions of images, to find the same one again though it was stored otherwise. Pure.

- The **digest** is of the voxels: equal ones have equal voxels.
- The **hash** is perceptual: signs of the lowest frequencies (DCT). Cheap to compare, so it chooses who is looked at closely.
- The **spectrum** holds low frequencies with their phases, fine ones weighted higher. Two of them are compared at the shift
  where they agree best: that tells a moved copy from another patient of the same build.

All three are of the image on a small grid, so resampling hardly changes the last two; the values are cut at quantiles, so other
windows change them little.
"""

from __future__ import annotations

import functools
import hashlib
import math
from dataclasses import dataclass

import numpy as np
from scipy import fft

GRID, FLAT_GRID = 32, 64
"""Cells along each axis that a volume, or an image of one slice, is reduced to."""
_QUANTILES = (0.02, 0.98)
_HASHED = 8
_CUT, _FLAT_CUT = 10, 20  # highest frequency of the spectrum
_WEIGHT = 1.5  # power of the frequency
_SHIFT = 1 / 21  # of an axis, at most: one slice of a thin volume


@dataclass(frozen=True)
class Fingerprint:
    """One image.

    Attributes:
        digest: hex SHA-256 of shape and values.
        hash: uint8, packed bits; empty for an image of one value, which is like any other.
        spectrum: complex64 ``(21, 21, 11)``, of a flat image ``(1, 41, 21)``; norm 1 together with its mirror half.
    """

    digest: str
    hash: np.ndarray
    spectrum: np.ndarray

    @property
    def flat(self) -> bool:
        """Of one slice."""
        return self.spectrum.shape[0] == 1


def fingerprint(image: np.ndarray, affine: np.ndarray | None = None) -> Fingerprint:
    """Describe an image.

    Args:
        image: float32 ``(D, H, W, C)``.
        affine: ``(4, 4)`` index to LPS where the image has a place in the patient: then the axes are put in one order
            first, so that a series as DICOM and as NIfTI are the same. One slice stays as it is.
    """
    if affine is not None and image.shape[0] > 1:
        image = upright(image, affine)
    digest = hashlib.sha256(str(image.shape).encode())
    for plane in image:  # one at a time: a turned volume is not copied
        digest.update(np.ascontiguousarray(plane, "<f4").reshape(-1).view(np.uint8).data)
    small = reduced(image.mean(axis=3, dtype=np.float32) if image.shape[3] > 1 else image[..., 0])
    low, high = np.quantile(small, _QUANTILES)
    if high <= low:
        low, high = small.min(), small.max()
    small = np.clip(small, low, high)
    flat = small.shape[0] == 1
    if high <= low:
        cut = _FLAT_CUT if flat else _CUT
        shape = (1 if flat else 2 * cut + 1, 2 * cut + 1, cut + 1)
        return Fingerprint(digest.hexdigest(), np.zeros(0, np.uint8), np.zeros(shape, np.complex64))
    small = small - small.mean()
    return Fingerprint(digest.hexdigest(), _hash(small, flat), _spectrum(small, flat))


def upright(image: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """The view ``(D, H, W, ...)`` of which the axes are nearest to z, y and x of the patient and point along them."""
    direction = np.asarray(affine, np.float64)[:3, :3]
    share = np.abs(direction / np.maximum(np.linalg.norm(direction, axis=0), 1e-12))
    order: list[int] = []
    for row in (2, 1, 0):
        order.append(max((axis for axis in range(3) if axis not in order), key=lambda axis: share[row, axis]))
    down = [direction[row, axis] < 0 for row, axis in zip((2, 1, 0), order, strict=True)]
    image = np.transpose(image, (*order, *range(3, image.ndim)))
    return image[tuple(slice(None, None, -1) if turned else slice(None) for turned in down)]


def reduced(image: np.ndarray) -> np.ndarray:
    """float64, as many cells along each axis as the grid has, a depth of 1 stays: means of equal parts of ``(D, H, W)``."""
    small, grid = image, FLAT_GRID if image.shape[0] == 1 else GRID
    for axis in sorted(range(3), key=lambda axis: -image.shape[axis]):  # the longest first: less to do for the others
        if axis or image.shape[0] > 1:
            small = _means(small, axis, grid)
    return np.asarray(small, np.float64)


def _means(array: np.ndarray, axis: int, parts: int) -> np.ndarray:
    """Means over equal parts of an axis; voxels on a border count in part."""
    size = array.shape[axis]
    places = np.linspace(0, size, parts + 1)
    # Overlap of part g with voxel v, as a matrix: a product is faster than anything with indices.
    voxels = np.arange(size)
    overlap = np.minimum(places[1:, None], voxels + 1) - np.maximum(places[:-1, None], voxels)
    weights = np.maximum(overlap, 0) * (parts / size)
    return np.moveaxis(np.tensordot(weights.astype(np.float32), array, (1, axis)), 0, axis)


def _hash(small: np.ndarray, flat: bool) -> np.ndarray:
    kept = (1, 2 * _HASHED, 2 * _HASHED) if flat else (_HASHED,) * 3
    low = fft.dctn(small, norm="ortho")[tuple(slice(n) for n in kept)]
    return np.packbits(low.reshape(-1)[1:] > 0)


def _spectrum(small: np.ndarray, flat: bool) -> np.ndarray:
    values = np.fft.rfftn(small)
    cut = _FLAT_CUT if flat else _CUT
    along = np.concatenate([np.arange(cut + 1), np.arange(-cut, 0)])
    first = np.zeros(1, int) if flat else along
    values = values[np.ix_(first, along, np.arange(cut + 1))]
    radius = np.sqrt(first[:, None, None] ** 2 + along[:, None] ** 2 + np.arange(cut + 1) ** 2)
    values = values * radius**_WEIGHT
    power = np.abs(values) ** 2
    return np.asarray(values / np.sqrt(2 * power.sum() - power[..., 0].sum()), np.complex64)


def distance(one: np.ndarray, two: np.ndarray) -> float:
    """0 for equal spectra to 1 for unlike ones (2 for negatives), at the best of small shifts. Both flat, or both not."""
    product = one * np.conj(two)
    product[..., 1:] *= 2  # the mirror half
    turn, cut = _turns(one.shape[2] - 1), one.shape[2] - 1
    product = product @ turn[:, : cut + 1].T
    product = np.einsum("sh,dhw->dsw", turn, product)
    if one.shape[0] > 1:
        product = np.tensordot(turn, product, (1, 0))
    return float(1 - product.real.max())


@functools.cache
def _turns(cut: int) -> np.ndarray:
    """complex64 ``(shifts, 2 * cut + 1)``: how a shift turns the phase of each frequency."""
    along = np.concatenate([np.arange(cut + 1), np.arange(-cut, 0)])
    steps = math.ceil(_SHIFT * 12.5 * cut)  # so many that the finest frequency turns by less than a twelfth of a circle
    shifts = np.linspace(-_SHIFT, _SHIFT, 2 * steps + 1)
    return np.exp(2j * np.pi * np.outer(shifts, along)).astype(np.complex64)


def differing_bits(one: np.ndarray, many: np.ndarray) -> np.ndarray:
    """Share of differing bits of hashes: uint8 ``(A, B)`` with ``(N, B)`` gives float ``(A, N)``."""
    return np.bitwise_count(one[:, None] ^ many[None]).sum(-1, dtype=np.int32) / (8 * one.shape[1])
