"""How a volume is cut for reading: blocks inside chunks. Pure.

A *chunk* is what HDF5 knows: a narrow column of many slices. A *block* is a run of its slices, the least that a patch reads and
decodes; in the file the blocks of a chunk lie one after another, compressed or not. So a patch at any place reads little more
than it needs, and HDF5's index stays small. Chunks are written in C order: those beside each other along W are neighbours in the
file and are read in one piece.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
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

    def along(p: int, b: int, n: int) -> float:
        return math.ceil(n / b) * b / n if p >= n else (p + b - 1) / p

    return math.prod(along(p, b, max(n, 1)) for p, b, n in zip(patch, block, shape[:3], strict=True))


def plan_layout(
    shape: Sequence[int], patch: Triple, voxel_bytes: int, compressed: bool, chunk: Triple | None = None
) -> Layout:
    """The cut of a volume ``(D, H, W, ...)`` for reading patches.

    Of the blocks whose `expected_amplification` stays within `AMPLIFICATION`, at most 32 KiB: those of the largest slices where
    each has to be decoded, those with the longest rows where rows are only copied. A block divides the patch, so that an aligned
    patch reads nothing else.

    Args:
        patch: (d, h, w) that will be read; longer than the volume: the volume's side counts.
        voxel_bytes: of all channels.
        chunk: by hand; then only the slices of a block are chosen.
    """
    depth = max(shape[0], 1)
    if chunk is not None:
        d, h, w = (min(c, max(n, 1)) for c, n in zip(chunk, shape[:3], strict=True))
        fits = [b for b in _divisors(d) if b * h * w * voxel_bytes <= _BLOCK_BYTES and d // b <= _BLOCKS]
        return Layout((d, h, w), (max(fits, default=d), h, w))
    choices = [
        [b for b in _divisors(p) if b <= max(n, 1)] if p <= max(n, 1) else list(range(1, n + 1))
        for p, n in zip(patch, shape[:3], strict=True)
    ]
    allowed = [
        (d, h, w)
        for d, h, w in itertools.product(*choices)
        if d * h * w * voxel_bytes <= _BLOCK_BYTES and expected_amplification((d, h, w), patch, shape) <= AMPLIFICATION
    ]

    def worth(block: Triple) -> tuple[int, ...]:
        d, h, w = block
        row = min(w, _ROW)
        return (h * row, w <= _ROW, w, d) if compressed else (row, w <= _ROW, h, d)

    block = max(allowed, key=worth)
    count = min(CHUNK_BYTES // (math.prod(block) * voxel_bytes), _BLOCKS, math.ceil(depth / block[0]))
    # As few chunks as that along the depth, all of one length.
    columns = math.ceil(depth / (max(count, 1) * block[0]))
    count = math.ceil(math.ceil(depth / columns) / block[0])
    return Layout((count * block[0], block[1], block[2]), block)


def explain(layout: Layout, patch: Triple, shape: Sequence[int]) -> str:
    """One line for `hvd-imaging dataset info`."""
    return (
        f"chunks {_cross(layout.chunk)} of blocks {_cross(layout.block)}: a patch {_cross(patch)} reads "
        f"{expected_amplification(layout.block, patch, shape):.2f} x its bytes at a random place, 1 x aligned"
    )


def _cross(sides: Sequence[int]) -> str:
    return " x ".join(map(str, sides))


def _divisors(n: int) -> list[int]:
    return [b for b in range(1, n + 1) if n % b == 0]
