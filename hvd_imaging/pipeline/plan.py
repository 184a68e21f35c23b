"""The epoch plan: which items form which global batch, and which rank computes which part. Pure, NumPy only.

An *item* is one training example: draw ``item % draws`` of sample ``item // draws`` (segmentation takes several random
patches of a volume in an epoch; classification has ``draws = 1``). The order depends on (manifest hash, seed, epoch) only;
world size decides who computes which part of a global batch and nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import ConfigError
from ..world import World


@dataclass(frozen=True)
class EpochPlan:
    """All global batches of one epoch.

    Attributes:
        dataset_hash: of the manifest.
        seed: of the run.
        epoch: from 0.
        items: examples in an epoch.
        global_batch: items in a step; the last step of an epoch may have fewer.
    """

    dataset_hash: str
    seed: int
    epoch: int
    items: int
    global_batch: int

    @property
    def steps(self) -> int:
        """Steps in the epoch, the same on all ranks."""
        return -(-self.items // self.global_batch)

    def order(self) -> np.ndarray:
        """int64 ``(items,)``: every item exactly once."""
        return generator(self.dataset_hash, self.seed, "order", self.epoch).permutation(self.items)

    def batches(self, first_step: int = 0) -> Iterator[np.ndarray]:
        """The global batches from ``first_step`` on (a resumed run enters in the middle of an epoch)."""
        order = self.order()
        for step in range(first_step, self.steps):
            yield order[step * self.global_batch : (step + 1) * self.global_batch]


@dataclass(frozen=True)
class Cut:
    """How every global batch is cut: into one contiguous part a rank, and each part into micro-batches.

    Attributes:
        shares: relative size of each rank's part, positive. Equal shares: (1,) * world size.
        micro: micro-batches that a rank computes one after another.
    """

    shares: tuple[int, ...]
    micro: int = 1

    def part(self, batch: np.ndarray, rank: int, micro: int = 0) -> np.ndarray:
        """The items of one micro-batch; may be empty. Those of all ranks in order are ``batch``.

        Equal shares cut by (size x micro) alone: 4 x 1, 2 x 2 and 1 x 4 give the same four micro-batches.
        """
        before, share, total = sum(self.shares[:rank]), self.shares[rank], sum(self.shares)
        first, last = before * self.micro + share * micro, before * self.micro + share * (micro + 1)
        whole = total * self.micro
        return batch[len(batch) * first // whole : len(batch) * last // whole]

    def rows(self, global_batch: int, rank: int) -> int:
        """Items of this rank's largest micro-batch: its batch shape in every step."""
        return -(-global_batch * self.shares[rank] // (sum(self.shares) * self.micro))


def equal_cut(size: int, micro: int = 1) -> Cut:
    """Parts that differ by one item at most."""
    return Cut((1,) * size, micro)


def balanced_cut(seconds_per_item: Sequence[float], global_batch: int, micro: int = 1) -> Cut:
    """Shares under which all ranks end their part of a full global batch as close together as whole items allow.

    Each item goes to the rank that would be done with it first (optimal for equal items); every rank keeps one at least.

    Args:
        seconds_per_item: of each rank, positive.
        global_batch: items to share, at least one a rank.
    """
    sizes = [1] * len(seconds_per_item)
    for _ in range(global_batch - len(sizes)):
        rank = min(range(len(sizes)), key=lambda r: (seconds_per_item[r] * (sizes[r] + 1), r))
        sizes[rank] += 1
    return Cut(tuple(sizes), micro)


def busiest(cut: Cut, seconds_per_item: Sequence[float]) -> float:
    """Seconds that the slowest rank needs for its share of ``sum(shares)`` items."""
    return max(share * seconds for share, seconds in zip(cut.shares, seconds_per_item, strict=True))


def generator(*key: object) -> np.random.Generator:
    """A random generator that depends on ``key`` alone, on any machine and rank.

    Philox is counter-based: its stream is fixed by NumPy for a given 128-bit key.
    """
    digest = hashlib.sha256("\x1f".join(str(part) for part in key).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def check_fits(samples: int, global_batch: int, world: World, split: str) -> None:
    """Refuse a world in which ranks would have nothing to do in every step.

    Raises:
        ConfigError: naming the key to change.
    """
    if samples == 0:
        raise ConfigError(f"data.{split}_split: this split of the dataset has no samples; see `hvd-imaging dataset split`")
    if world.size > samples:
        raise ConfigError(
            f"{world.size} ranks, but only {samples} samples in the {split} split: start at most {samples} ranks "
            "(mpirun -np), or ingest more data"
        )
    if world.size > global_batch:
        raise ConfigError(
            f"train.batch_size: {world.size} ranks share a global batch of {global_batch}, so some would never compute; "
            f"expected at least {world.size}"
        )


@dataclass(frozen=True)
class Tile:
    """A patch of a volume and the part of it that is its own.

    Attributes:
        start: first voxel (d, h, w) of the patch; negative where the volume is smaller than the patch.
        own: [first, stop) of the patch's own voxels on each axis, in volume coordinates.
    """

    start: tuple[int, int, int]
    own: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


def tiles(shape: tuple[int, int, int], patch: tuple[int, int, int]) -> list[Tile]:
    """Patches that cover ``shape``; each voxel is the own one of exactly one.

    The last patch of an axis is moved back inside instead of reaching over the border: zeros there would change the
    statistics of instance and group norm. A volume smaller than the patch lies in its middle, as in training.
    """

    def axis(side: int, wanted: int) -> list[tuple[int, tuple[int, int]]]:
        if side <= wanted:
            return [((side - wanted) // 2, (0, side))]
        return [
            (min(first, side - wanted), (first, min(first + wanted, side))) for first in range(0, side, wanted)
        ]

    d, h, w = (axis(side, wanted) for side, wanted in zip(shape, patch, strict=True))
    return [Tile((a[0], b[0], c[0]), (a[1], b[1], c[1])) for a in d for b in h for c in w]
