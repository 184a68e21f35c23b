"""Whole volumes through a network that sees patches: overlapping windows, Gaussian weights, bounded memory.

Only NumPy: the network is any callable. The windows form a grid, and a window's weight is a product of one factor per
axis, so the sum of weights at a voxel is a product of three one-dimensional sums. Each window is therefore weighted
with its *normalised* share at once: the accumulator holds finished probabilities, and no second volume of weights exists.

Windows go along D in rising order. When the next row of windows starts at plane ``d``, the planes before ``d`` are
final and leave the accumulator, so it is never deeper than one patch. Where even that does not fit into the budget,
the volume is worked through in strips along H; windows on a strip's border are then predicted once per strip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Literal

import numpy as np

from ..errors import RunError

Shape3 = tuple[int, int, int]
Predict = Callable[[np.ndarray], np.ndarray]
"""Batch ``(N, D, H, W, C)`` float32 to probabilities ``(N, D, H, W, K)`` of the same patch."""

MEMORY_BYTES = 1 << 30
WEIGHT_FLOOR = 1e-3


def importance(length: int) -> np.ndarray:
    """Weights ``(length,)`` float64 of one axis: a Gaussian of sigma length / 8 around the middle, never below the floor.

    Predictions near a window's border lack context, so they count less than those of a window that has them inside.
    """
    offset = np.arange(length) - (length - 1) / 2
    return np.maximum(np.exp(-0.5 * (offset / (length / 8)) ** 2), WEIGHT_FLOOR)


def window_starts(length: int, patch: int, overlap: float) -> list[int]:
    """Starts of the windows along one axis: even steps, the last one flush with the border.

    A length below the patch gives one window with a start <= 0 that holds the volume in its middle.
    """
    if length <= patch:
        return [-((patch - length) // 2)]
    step = max(1, int(patch * (1 - overlap)))
    return [*range(0, length - patch, step), length - patch]


def extract(image: np.ndarray, start: Shape3, shape: Shape3) -> np.ndarray:
    """The box ``shape`` at ``start`` of ``image`` (D, H, W, C), float32 ``(*shape, C)``; 0 outside of the image."""
    out = np.zeros((*shape, image.shape[3]), np.float32)
    inside, outside = [], []
    for begin, size, limit in zip(start, shape, image.shape[:3], strict=True):
        low, high = max(begin, 0), min(begin + size, limit)
        if low >= high:
            return out
        inside.append(slice(low, high))
        outside.append(slice(low - begin, high - begin))
    out[tuple(outside)] = image[tuple(inside)]
    return out


def center_start(shape: Sequence[int], patch: Shape3) -> Shape3:
    """Start of the patch in the middle of a volume (D, H, W); negative where the volume is smaller."""
    d, h, w = ((size - wanted) // 2 for size, wanted in zip(shape[:3], patch, strict=True))
    return d, h, w


def center_patch(image: np.ndarray, patch: Shape3) -> np.ndarray:
    """Crop or zero-pad ``image`` (D, H, W, C) around its middle to ``patch``: float32 ``(*patch, C)``."""
    return extract(image, center_start(image.shape, patch), patch)


def sliding_window(
    predict: Predict,
    image: np.ndarray,
    patch: Shape3,
    classes: int,
    overlap: float = 0.5,
    batch: int = 1,
    memory_bytes: int = MEMORY_BYTES,
    mode: Literal["probabilities", "labels"] = "probabilities",
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Predict a whole volume.

    Args:
        predict: the network, see `Predict`.
        image: ``(D, H, W, C)``, preprocessed.
        patch: what the network sees, voxels (D, H, W).
        classes: K, channels of the prediction.
        overlap: share of a patch that the next one covers again, 0 <= overlap < 1.
        batch: windows per call of ``predict``.
        memory_bytes: budget of the accumulator. It changes the work done, never the result.
        mode: "labels" keeps only the most likely class, so probabilities of the whole volume never exist.
        progress: called with (windows done, windows in all).

    Returns:
        ``(D, H, W, K)`` float32, or ``(D, H, W)`` uint8 for mode "labels".

    Raises:
        RunError: the budget does not hold one patch row, or the network returns another shape.
    """
    if image.ndim != 4:
        raise ValueError(f"an image is (D, H, W, C), not {image.shape}")
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap {overlap} is outside [0, 1)")
    shape = _shape3(image)
    if mode == "labels":
        if classes > 256:
            raise ValueError(f"a uint8 label map cannot hold {classes} classes")
        out = np.zeros(shape, np.uint8)
    else:
        out = np.zeros((*shape, classes), np.float32)
    for (d0, d1), (h0, h1), slab in _slabs(
        predict, image, patch, classes, overlap, max(1, batch), memory_bytes, progress
    ):
        out[d0:d1, h0:h1] = slab.argmax(-1) if mode == "labels" else slab
    return out


def _shape3(image: np.ndarray) -> Shape3:
    d, h, w = image.shape[:3]
    return d, h, w


def _strips(shape: Shape3, patch: Shape3, classes: int, memory_bytes: int) -> list[tuple[int, int]]:
    """Parts [start, stop) of H whose accumulators fit into the budget."""
    row = min(patch[0], shape[0]) * shape[2] * classes * 4
    rows = min(memory_bytes // row, shape[1])
    least = min(patch[1], shape[1])
    if rows < least:
        raise RunError(
            f"a memory budget of {memory_bytes / 2**20:.1f} MiB does not hold one row of patches of a volume of "
            f"{shape} voxels with {classes} classes: expected at least {least * row / 2**20:.1f} MiB"
        )
    count = -(-shape[1] // rows)
    return [(shape[1] * part // count, shape[1] * (part + 1) // count) for part in range(count)]


def _slabs(
    predict: Predict,
    image: np.ndarray,
    patch: Shape3,
    classes: int,
    overlap: float,
    batch: int,
    memory_bytes: int,
    progress: Callable[[int, int], None] | None,
) -> Iterator[tuple[tuple[int, int], tuple[int, int], np.ndarray]]:
    """Finished parts of the volume: ((d0, d1), (h0, h1), probabilities (d1 - d0, h1 - h0, W, K))."""
    shape = _shape3(image)
    starts = [window_starts(length, size, overlap) for length, size in zip(shape, patch, strict=True)]
    shares = [_shares(length, size, begin) for length, size, begin in zip(shape, patch, starts, strict=True)]
    strips = _strips(shape, patch, classes, memory_bytes)
    rows = [[h for h in starts[1] if h < stop and h + patch[1] > start] for start, stop in strips]
    total = len(starts[0]) * len(starts[2]) * sum(map(len, rows))
    done = 0
    depth = min(patch[0], shape[0])
    for (h0, h1), strip_starts in zip(strips, rows, strict=True):
        slab = np.zeros((depth, h1 - h0, shape[2], classes), np.float32)
        for index, d in enumerate(starts[0]):
            base = max(d, 0)  # the volume's plane that lies in slab[0]
            windows = list(product(strip_starts, starts[2]))
            for first in range(0, len(windows), batch):
                group = windows[first : first + batch]
                patches = np.stack([extract(image, (d, h, w), patch) for h, w in group])
                found = np.asarray(predict(patches))
                if found.shape != (len(group), *patch, classes):
                    raise RunError(
                        f"the model returned an array of shape {found.shape} for {len(group)} patches, "
                        f"expected {(len(group), *patch, classes)}"
                    )
                for (h, w), values in zip(group, found, strict=True):
                    _add(slab, values, (d, h, w), (base, h0, 0), (shape[0], h1, shape[2]), shares)
                done += len(group)
                if progress is not None:
                    progress(done, total)
            end = starts[0][index + 1] if index + 1 < len(starts[0]) else shape[0]
            finished = end - base
            yield (base, end), (h0, h1), slab[:finished]
            kept = depth - finished
            if kept > 0:
                slab[:kept] = slab[finished:].copy()
            slab[max(kept, 0) :] = 0


def _shares(length: int, patch: int, starts: list[int]) -> dict[int, np.ndarray]:
    """Start -> weights ``(patch,)`` of that window, scaled so that the weights of all windows sum to 1 at each voxel."""
    weight = importance(patch)
    low = min(starts)
    total = np.zeros(max(starts) + patch - low)
    for start in starts:
        total[start - low : start - low + patch] += weight
    return {start: weight / total[start - low : start - low + patch] for start in starts}


def _add(
    slab: np.ndarray,
    values: np.ndarray,
    start: Shape3,
    origin: Shape3,
    stop: Shape3,
    shares: list[dict[int, np.ndarray]],
) -> None:
    """Add the weighted ``values`` (patch, K) of the window at ``start`` to the part of the volume from ``origin`` on."""
    into, of = [], []
    for begin, size, low, high in zip(start, values.shape[:3], origin, stop, strict=True):
        first, last = max(begin, low), min(begin + size, high)
        into.append(slice(first - low, last - low))
        of.append(slice(first - begin, last - begin))
    wd, wh, ww = (share[begin][part] for share, begin, part in zip(shares, start, of, strict=True))
    weight = (wd[:, None, None] * wh[:, None] * ww).astype(np.float32)
    slab[tuple(into)] += values[tuple(of)] * weight[..., None]
