"""How a volume is cut for reading: blocks inside chunks. Pure.

A *chunk* is what HDF5 knows: a narrow column of many slices. A *block* is a run of its slices, the least that a patch reads and
decodes; in the file the blocks of a chunk lie one after another, compressed or not. So a patch at any place reads little more
than it needs, and HDF5's index stays small. Chunks are written in C order: those beside each other along W are neighbours in the
file and are read in one piece.
"""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Triple = tuple[int, int, int]

AMPLIFICATION = 1.6
"""Most bytes that a patch at a random place may read, as a multiple of those that it needs, on average."""
CHUNK_BYTES = 256 * 1024
_BLOCKS = 32  # of a chunk, at most: each has 8 bytes of tables
_BLOCK_BYTES = 32 * 1024  # of a first-level cache
_ROW = 32  # voxels: longer rows gain nothing


@dataclass(frozen=True)
class Layout:
    """Cut of one volume, voxels along (D, H, W); all channels of a voxel lie together.

    Attributes:
        chunk: may reach over the volume's end.
        block: as the chunk along H and W; along D it divides the chunk.
    """

    chunk: Triple
    block: Triple

    def grid(self, shape: Sequence[int]) -> Triple:
        """Chunks along each axis of a volume ``(D, H, W, ...)``."""
        d, h, w = (math.ceil(side / step) for side, step in zip(shape[:3], self.chunk, strict=True))
        return d, h, w

    @property
    def blocks(self) -> int:
        """Blocks of one chunk."""
        return self.chunk[0] // self.block[0]


def expected_amplification(block: Sequence[int], patch: Sequence[int], shape: Sequence[int]) -> float:
    """Bytes of the blocks that a patch at a random place touches, over its own bytes: the mean over all places.

    A run of p voxels touches (p + b - 1) / b blocks of b voxels on average. Along an axis that the patch covers whole, all n
    voxels are read, and what fills up the last block.
    """
    return math.prod(_along(p, b, max(n, 1)) for p, b, n in zip(patch, block, shape[:3], strict=True))


def _along(p: int, b: int, n: int) -> float:
    return math.ceil(n / b) * b / n if p >= n else (p + b - 1) / p


def plan_layout(
    shape: Sequence[int], patch: Triple, voxel_bytes: int, compressed: bool, chunk: Triple | None = None
) -> Layout:
    """The cut of a volume ``(D, H, W, ...)`` for reading patches.

    Of the blocks whose `expected_amplification` stays within `AMPLIFICATION`, at most 32 KiB: those of the largest slices where
    each has to be decoded, those with the longest rows where rows are only copied. A block divides the patch, so that an aligned
    patch reads nothing else; an axis that the patch covers and more is cut into equal parts.

    Args:
        patch: (d, h, w) that will be read; longer than the volume: the volume's side counts.
        voxel_bytes: of all channels.
        chunk: by hand; then only the slices of a block are chosen.
    """
    depth, height, width = (max(int(n), 1) for n in shape[:3])
    return _planned((depth, height, width), patch, voxel_bytes, compressed, chunk)


@functools.lru_cache(maxsize=4096)
def _planned(shape: Triple, patch: Triple, voxel_bytes: int, compressed: bool, chunk: Triple | None) -> Layout:
    depth = shape[0]
    if chunk is not None:
        d, h, w = (min(c, n) for c, n in zip(chunk, shape, strict=True))
        fits = [b for b in _divisors(d) if b * h * w * voxel_bytes <= _BLOCK_BYTES and d // b <= _BLOCKS]
        return Layout((d, h, w), (max(fits, default=d), h, w))
    block = _best_block(shape, patch, voxel_bytes, compressed)
    count = min(CHUNK_BYTES // (math.prod(block) * voxel_bytes), _BLOCKS, math.ceil(depth / block[0]))
    # As few chunks as that along the depth, all of one length.
    columns = math.ceil(depth / (max(count, 1) * block[0]))
    count = math.ceil(math.ceil(depth / columns) / block[0])
    return Layout((count * block[0], block[1], block[2]), block)


def lengths(p: int, n: int) -> list[int]:
    """Lengths of a block worth a thought along an axis of n voxels of which a patch covers p, rising.

    Where it covers all, k blocks are read whole, so of all lengths that make k blocks the shortest is the best: it fills up
    least, in the file and in each read.
    """
    return _divisors(p) if p <= n else _parts(n)


def _best_block(shape: Triple, patch: Triple, voxel_bytes: int, compressed: bool) -> Triple:
    """The block of the greatest worth that fits, of all `lengths`, without a look at most of them.

    One slice costs nothing along the depth (its factor is 1), so a height and a width fit if they fit with one slice. Worth
    grows with the height before it grows with the depth: for each width the greatest height, then the greatest depth.
    """
    depths, heights, widths = (lengths(p, n) for p, n in zip(patch, shape, strict=True))
    factors = [{b: _along(p, b, n) for b in axis} for p, n, axis in zip(patch, shape, (depths, heights, widths), strict=True)]
    most = _BLOCK_BYTES // voxel_bytes

    def worth(block: Triple) -> tuple[int, ...]:
        d, h, w = block
        row = min(w, _ROW)
        return (h * row, w <= _ROW, w, d) if compressed else (row, w <= _ROW, h, d)

    def down(axis: list[int], limit: int) -> Iterator[int]:
        return (axis[i] for i in range(bisect.bisect_right(axis, limit) - 1, -1, -1))

    best: Triple = (1, 1, 1)
    for w in widths:
        h = next((h for h in down(heights, most // w) if factors[1][h] * factors[2][w] <= AMPLIFICATION), 0)
        if h:
            # In the order of `expected_amplification`, which rounds alike.
            d = next(d for d in down(depths, most // (h * w)) if factors[0][d] * factors[1][h] * factors[2][w] <= AMPLIFICATION)
            best = max(best, (d, h, w), key=worth)
    return best


def explain(layout: Layout, patch: Triple, shape: Sequence[int]) -> str:
    """One line for `hvd-imaging dataset info`."""
    return (
        f"chunks {_cross(layout.chunk)} of blocks {_cross(layout.block)}: a patch {_cross(patch)} reads "
        f"{expected_amplification(layout.block, patch, shape):.2f} x its bytes at a random place, 1 x aligned"
    )


def _cross(sides: Sequence[int]) -> str:
    return " x ".join(map(str, sides))


def _divisors(n: int) -> list[int]:
    small = [b for b in range(1, math.isqrt(n) + 1) if n % b == 0]
    return sorted({*small, *(n // b for b in small)})


def _parts(n: int) -> list[int]:
    """The shortest parts that cut n into 1, 2, ... n of one length, the last one filled up; rising."""
    found = [n]
    while found[-1] > 1:
        found.append(-(-n // -(-n // (found[-1] - 1))))
    return found[::-1]
