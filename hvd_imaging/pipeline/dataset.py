"""From shards to `tf.data`: this rank's part of each global batch, prefetched.

A batch is ``(image (B, D, H, W, C) float32, label, weight (B,) float32, draw (B, 2) int32)``; ``label`` is int32
``(B, D, H, W)`` for segmentation, ``(B,)`` for classification; ``draw`` seeds the random layers, row by row. ``B`` is fixed:
short parts are filled up with zeros of weight 0, so that one traced graph serves every step and a rank without items still
takes part in the sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from ..config import DataConfig
from ..errors import HvdImagingError
from ..shards.manifest import Manifest, Sample
from ..shards.reader import ShardReader
from ..world import World, bounds
from .augment import augment, draw, source_slices
from .plan import Cut, EpochPlan, Tile, generator, tiles

Triple = tuple[int, int, int]
Interval = tuple[int, int]
Example = tuple[np.ndarray, ...]

_NO_DRAW = np.zeros(2, np.int32)  # validation has no random layers


class TrainingData:
    """Draws training examples; one object a run.

    Args:
        reader: of the dataset.
        config: what is read.
        seed: of the run.
        batch: the global one.
        slab: slices [start, stop) of each patch that this rank has, where ranks share volumes; only they are read. Default: all.
    """

    def __init__(self, reader: ShardReader, config: DataConfig, seed: int, batch: int, slab: Interval | None = None) -> None:
        manifest = reader.manifest
        self.slab = slab or (0, config.patch[0])
        self.manifest, self.config, self.seed, self.batch = manifest, config, seed, batch
        self.hash = manifest.hash()
        self.samples = manifest.of_split(config.train_split)
        self.draws = config.patches_per_volume if manifest.task == "segmentation" else 1
        self.reader = reader

    def plan(self, epoch: int) -> EpochPlan:
        """The plan of one epoch."""
        return EpochPlan(self.hash, self.seed, epoch, len(self.samples) * self.draws, self.batch)

    def example(self, epoch: int, item: int) -> Example:
        """One augmented example: a pure function of (seed, epoch, item) and the dataset."""
        sample, number = self.samples[item // self.draws], item % self.draws
        patch, how = self.config.patch, self.config.augment
        random = generator(self.seed, "example", epoch, sample.id, number)
        segments = self.manifest.task == "segmentation"
        if segments:
            voxels = self.reader.foreground(sample)
            start = patch_start(sample.shape[:3], patch, voxels, self.config.foreground, random)
        else:
            start = centre(sample, patch)
        draws = None if how is None else draw(how, random)
        image, mask = read_slices(self.reader, sample, start, patch, source_slices(draws, patch[0], self.slab))
        mask = mask if segments else None
        if how is not None and draws is not None:
            image, mask = augment(image, mask, how, draws, self.slab[0])
        label = np.int32(sample.label or 0) if mask is None else mask.astype(np.int32)
        return image, np.asarray(label), random.integers(-(2**31), 2**31, 2).astype(np.int32)

    def batches(self, epochs: range, first_step: int, cut: Cut, rank: int) -> Iterator[Any]:
        """This rank's micro-batches of all ``epochs``, read and augmented ahead of the training step.

        The first epoch begins at ``first_step``; each step has ``cut.micro`` of them. One stream over all epochs: while an
        epoch is validated and saved, the next one's first batches are made.
        """
        rows = cut.rows(self.batch, rank)

        def parts() -> Iterator[tuple[np.ndarray, ...]]:
            with ThreadPoolExecutor(self.config.readers, "reader") as pool:
                # What one thread does needs no pool: the generator's own thread is ahead of the step already.
                each = map if self.config.readers == 1 else pool.map
                for epoch in epochs:
                    for batch in self.plan(epoch).batches(first_step if epoch == epochs.start else 0):
                        for micro in range(cut.micro):
                            items = cut.part(batch, rank, micro)
                            yield fill(list(each(partial(self.example, epoch), map(int, items))), rows, self._empty())

        return prefetched(parts, self._empty(), rows)

    def blank(self, rows: int) -> tuple[np.ndarray, ...]:
        """A batch of zeros that all count, for measuring."""
        return fill([self._empty()] * rows, rows, self._empty())

    def class_weights(self, wanted: list[float] | str | None) -> np.ndarray:
        """float32 ``(K,)`` from the configuration; "balanced" is inverse frequency with a mean of 1.

        Segmentation counts voxels of the training split (square root, as the background would all but vanish else).
        """
        count = len(self.manifest.classes)
        if wanted is None:
            return np.ones(count, np.float32)
        if wanted == "balanced":
            if self.manifest.task == "segmentation":
                voxels = np.sum([sample.class_voxels or () for sample in self.samples], axis=0, dtype=np.float64)
                inverse = 1 / np.sqrt(np.maximum(voxels, 1))
            else:
                cases = np.bincount([sample.label or 0 for sample in self.samples], minlength=count)
                inverse = 1 / np.maximum(cases, 1)
            return (inverse / inverse.mean()).astype(np.float32)
        return np.asarray(wanted, np.float32)

    def _empty(self) -> Example:
        return empty_example(self.config.patch, self.manifest, self.slab)


class ValidationData:
    """The whole validation split in a fixed order: tiles of each volume, or each image once."""

    def __init__(self, reader: ShardReader, config: DataConfig, batch: int, slab: Interval | None = None) -> None:
        manifest = reader.manifest
        self.slab = slab or (0, config.patch[0])
        self.manifest, self.config, self.batch = manifest, config, batch
        self.samples = manifest.of_split(config.val_split)
        self.reader = reader
        whole: list[Tile | None] = [None]
        self.items: list[tuple[int, Tile | None]] = [
            (index, tile)
            for index, sample in enumerate(self.samples)
            for tile in (tiles(sample.shape[:3], config.patch) if manifest.task == "segmentation" else whole)
        ]

    def batches(self, world: World) -> Iterator[tuple[Sequence[int], Any]]:
        """(item index of each row, batch) of this rank's share; as many batches on all ranks, so the last may hold no item."""
        start, stop = bounds(len(self.items), world.size, world.rank)
        count = math.ceil(math.ceil(len(self.items) / world.size) / self.batch)
        groups = [range(min(at, stop), min(at + self.batch, stop)) for at in range(start, start + count * self.batch, self.batch)]
        empty = empty_example(self.config.patch, self.manifest, self.slab)

        def parts() -> Iterator[tuple[np.ndarray, ...]]:
            for group in groups:
                yield fill([self._example(*self.items[item]) for item in group], self.batch, empty)

        yield from zip(groups, prefetched(parts, empty, self.batch), strict=True)

    def _example(self, index: int, tile: Tile | None) -> Example:
        sample, patch = self.samples[index], self.config.patch
        if tile is None:
            image, _ = read_slices(self.reader, sample, centre(sample, patch), patch, self.slab)
            return image, np.asarray(np.int32(sample.label or 0)), _NO_DRAW
        image, mask = read_slices(self.reader, sample, tile.start, patch, self.slab)
        assert mask is not None
        # Voxels outside the volume, or of another tile, are not scored.
        label = np.full(mask.shape, -1, np.int32)
        start = (tile.start[0] + self.slab[0], *tile.start[1:])
        own = tuple(slice(max(0, first - at), max(0, stop - at)) for at, (first, stop) in zip(start, tile.own, strict=True))
        label[own] = mask[own]
        return image, label, _NO_DRAW


def patch_start(
    shape: Triple, patch: Triple, foreground: np.ndarray, share: float, random: np.random.Generator
) -> Triple:
    """Where a random patch begins: with probability ``share`` it holds a random foreground voxel, else it is uniform.

    The patch stays inside the volume on axes that are long enough; a shorter axis is centred (and padded by the reader).
    """
    free = np.array(shape) - np.array(patch)
    spot, uniform = random.random(3), random.random(3)
    pick, wants = random.random(), random.random() < share
    if wants and len(foreground):
        voxel = foreground[int(pick * len(foreground))]
        # The voxel lies anywhere in the middle half of the patch, so that the centre carries no hint.
        start = np.round(voxel - (0.25 + 0.5 * spot) * np.array(patch)).astype(int)
    else:
        start = np.floor(uniform * (np.maximum(free, 0) + 1)).astype(int)
    start = np.where(free >= 0, np.clip(start, 0, np.maximum(free, 0)), free // 2)
    return int(start[0]), int(start[1]), int(start[2])


def centre(sample: Sample, patch: Triple) -> Triple:
    """Where the central ``patch`` of a sample begins; it is zero-padded where the sample is smaller."""
    depth, height, width = ((side - wanted) // 2 for side, wanted in zip(sample.shape[:3], patch, strict=True))
    return depth, height, width


def read_slices(
    reader: ShardReader, sample: Sample, start: Triple, patch: Triple, slices: Interval
) -> tuple[np.ndarray, np.ndarray | None]:
    """Some slices of the patch that begins at ``start``; nothing else of it is read."""
    first, last = slices
    return reader.read(sample, (start[0] + first, *start[1:]), (last - first, *patch[1:]))


def empty_example(patch: Triple, manifest: Manifest, slab: Interval | None = None) -> Example:
    """Zeros in the shapes of an example, or of a slab of it."""
    patch = patch if slab is None else (slab[1] - slab[0], *patch[1:])
    label = np.zeros(patch if manifest.task == "segmentation" else (), np.int32)
    return np.zeros((*patch, manifest.channels), np.float32), label, np.zeros(2, np.int32)


def fill(examples: list[Example], size: int, empty: Example) -> tuple[np.ndarray, ...]:
    """Stack examples to a batch of ``size`` rows; rows that were filled up have weight 0."""
    image, label, draw = (np.stack(values) for values in zip(*examples, *[empty] * (size - len(examples)), strict=True))
    weight = np.zeros(size, np.float32)
    weight[: len(examples)] = 1
    return image, label, weight, draw


def prefetched(parts: Callable[[], Iterator[Any]], empty: Example, size: int, ahead: int = 2) -> Iterator[Any]:
    """`tf.data` around a generator: reading and augmentation run in a thread beside the training step.

    Raises:
        HvdImagingError: as the generator raised it; TensorFlow alone would hide it in a traceback of its own.
    """
    import tensorflow as tf

    failures: list[HvdImagingError] = []

    def guarded() -> Iterator[Any]:
        try:
            yield from parts()
        except HvdImagingError as error:
            failures.append(error)
            raise

    signature = (
        tf.TensorSpec((size, *empty[0].shape), tf.float32),
        tf.TensorSpec((size, *empty[1].shape), tf.int32),
        tf.TensorSpec((size,), tf.float32),
        tf.TensorSpec((size, 2), tf.int32),
    )
    try:
        yield from tf.data.Dataset.from_generator(guarded, output_signature=signature).prefetch(ahead)
    except tf.errors.OpError:
        if failures:
            raise failures[0] from None
        raise
