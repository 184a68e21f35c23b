"""How much memory a rank of a training takes, from its configuration alone: no TensorFlow, so that a login node can tell. Pure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..config import RunConfig
from ..errors import ConfigError, on_all_ranks
from ..parallel.grid import Grid, make_grid
from ..parallel.slabs import cut

FLOAT = 4
RUNTIME_BYTES = 700e6
"""Python, TensorFlow, Horovod, MPI and their threads."""
_VGG = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
_STATES = {"sgd": 1, "adam": 2, "adamw": 2}


@dataclass(frozen=True)
class Layer:
    """What a layer holds.

    Attributes:
        name: as in the network.
        parameters: numbers.
        kept: numbers that one sample leaves for the way back (its output, where a later layer's gradient needs it).
        output: numbers that it puts out for one sample.
        voxels: of its output.
        shared: whether ``parallel.dense: sharded`` gives each rank a part of its columns.
    """

    name: str
    parameters: int
    kept: int
    output: int
    voxels: int
    shared: bool = False


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of rank 0, which holds the most.

    Attributes:
        weights, gradients, optimizer: of the step; the gradients twice where they are clipped.
        copies: of weights and optimizer, for the checkpoint and the best model, which are written beside the steps.
        activations: what the way back needs.
        batch: samples that are read ahead.
        runtime: program and libraries.
    """

    weights: float
    gradients: float
    optimizer: float
    copies: float
    activations: float
    batch: float
    runtime: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.weights + self.gradients + self.optimizer + self.copies + self.activations + self.batch + self.runtime


def layers(config: RunConfig, channels: int, classes: int) -> list[Layer]:
    """The layers of ``model.name`` for one patch.

    Raises:
        ConfigError: a network of the user's own.
    """
    if config.model.name == "unet3d":
        return list(_unet(config, channels, classes))
    if config.model.name == "vgg16":
        return list(_vgg(config, channels, classes))
    if config.model.name == "cnn3d":
        return list(_cnn(config, channels, classes))
    raise ConfigError(f"model.name: the memory of '{config.model.name}' cannot be told from its configuration; measure one rank")


def rank_bytes(config: RunConfig, channels: int, classes: int, ranks: int, spatial: int | None = None) -> MemoryEstimate:
    """Bytes of the rank with the most samples and the largest slab, at the peak of a step.

    Args:
        channels, classes: of the dataset.
        ranks: world size.
        spatial: ranks to a volume; None: ``parallel.spatial``, for ``auto`` the grid that takes least.

    Raises:
        ConfigError: a network of the user's own, a depth that cannot be split so, ranks that cannot be grouped so.
    """
    if spatial is None and config.parallel.spatial == "auto":
        return min((found for _, found in grids(config, channels, classes, ranks)), key=lambda found: found.total)
    spatial = spatial or int(config.parallel.spatial)
    groups = make_grid(config.parallel, ranks, spatial).data
    found = layers(config, channels, classes)
    whole = FLOAT * sum(layer.parameters for layer in found)
    own = ranks if config.parallel.dense == "sharded" else 1
    weights = FLOAT * sum(layer.parameters / (own if layer.shared else 1) for layer in found)
    train = config.train
    together = math.ceil(train.batch_size / groups / train.accumulate)
    width = 2 if train.mixed_precision != "none" else FLOAT
    share = slab_share(config, spatial)
    kept = width * (recomputed(found) if train.recompute else sum(layer.kept for layer in found))
    # On the way back the two largest outputs have gradients at once, beside what is kept.
    passing = 2 * width * max(layer.kept for layer in found)
    sample = FLOAT * math.prod(config.data.patch) * (channels + 1) * share
    return MemoryEstimate(
        weights=weights,
        # Beside the gradients: clipped ones, their sums over micro-batches, and the buffer that they travel in.
        gradients=weights * (1 + (train.clip_norm > 0) + (train.accumulate > 1))
        + (min(weights, config.parallel.fusion_mb * 1e6) if ranks > 1 else 0),
        optimizer=weights * _STATES[train.optimizer],
        # Files are whole: so are the copies for them.
        copies=whole * (2 + _STATES[train.optimizer]),
        activations=together * share * (kept + passing),
        batch=sample * together * (2 + config.data.readers),
        runtime=RUNTIME_BYTES,
    )


def recomputed(found: Sequence[Layer]) -> int:
    """Numbers of one sample at the peak of the way back when every stage is computed again: what goes into each, and the largest stage."""
    stages = [list(group) for _, group in itertools.groupby(found, key=lambda layer: layer.voxels)]
    return sum(stage[-1].output for stage in stages) + max(sum(layer.kept for layer in stage) for stage in stages)


def slab_share(config: RunConfig, spatial: int) -> float:
    """Of the volume, what the rank with the largest slab has.

    Raises:
        ConfigError: the depth cannot be split so.
    """
    if spatial == 1:
        return 1.0
    cell = {"unet3d": 2 ** (config.model.depth - 1), "cnn3d": 16}.get(config.model.name, 1)
    bounds = cut(config.data.patch[0], spatial, cell)
    return max(stop - start for start, stop in itertools.pairwise(bounds)) / bounds[-1]


def grids(config: RunConfig, channels: int, classes: int, ranks: int) -> list[tuple[Grid, MemoryEstimate]]:
    """Every grid of so many ranks that the depth permits, from whole volumes on, and what its largest rank takes.

    Raises:
        ConfigError: a network of the user's own.
    """
    layers(config, channels, classes)
    found = []
    for spatial in (n for n in range(1, ranks + 1) if ranks % n == 0):
        try:
            if spatial > 1 and config.data.patch[0] < 2:
                continue
            estimate = rank_bytes(config, channels, classes, ranks, spatial)
        except ConfigError:
            continue
        if config.train.batch_size * spatial >= ranks:  # a group without a sample of the batch has nothing to do
            found.append((Grid(ranks // spatial, spatial), estimate))
    return found


def fitting(config: RunConfig, channels: int, classes: int, ranks: int, memory: float) -> Grid:
    """The grid with the fewest ranks to a volume whose largest rank takes at most ``memory`` bytes: slabs cost exchanges.

    Raises:
        ConfigError: none does.
    """
    found = grids(config, channels, classes, ranks)
    for grid, estimate in found:
        if estimate.total <= memory:
            return grid
    least, at = min(((estimate.total, grid) for grid, estimate in found), key=lambda pair: pair[0], default=(0.0, Grid(ranks)))
    raise on_all_ranks(ConfigError(
        f"parallel.spatial=auto: no grid of {ranks} rank{'s' * (ranks > 1)} fits into {memory / 1e9:.1f} GB a rank; the least that one takes is "
        f"{least / 1e9:.1f} GB (data {at.data} x spatial {at.spatial}): lower data.patch, train.batch_size or model.filters, or start more ranks "
        "(`hvd-imaging train --dry-run --ranks N` tells)"
    ))  # fmt: skip


def parameters(config: RunConfig, channels: int, classes: int) -> int:
    """Trainable numbers of the network whose gradients are summed over the ranks; see `layers`."""
    sharded = config.parallel.dense == "sharded"
    return sum(layer.parameters for layer in layers(config, channels, classes) if not (sharded and layer.shared))


def _conv(name: str, inputs: int, filters: int, kernel: int, voxels: int, norm: str) -> Layer:
    # A normalization keeps what it is given and what it gives, ReLU what it gives; some of it shares memory: measured.
    bias, scale, tensors = (filters, 0, 1.0) if norm == "none" else (0, 2 * filters, 2.5)
    return Layer(name, inputs * filters * kernel + bias + scale, round(voxels * filters * tensors), voxels * filters, voxels)


def _halved(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.ceil(side / 2) for side in shape)


def _unet(config: RunConfig, channels: int, classes: int) -> Iterator[Layer]:
    model = config.model
    shapes = [tuple(config.data.patch)]
    for _ in range(model.depth - 1):
        shapes.append(_halved(shapes[-1]))
    inputs, voxels = channels, math.prod(shapes[0])
    for level, shape in enumerate(shapes):
        filters, voxels = model.filters * 2**level, math.prod(shape)
        yield _conv(f"down{level}_conv1", inputs, filters, 27, voxels, model.norm)
        yield _conv(f"down{level}_conv2", filters, filters, 27, voxels, model.norm)
        inputs = filters
    for level in reversed(range(model.depth - 1)):
        filters, voxels = model.filters * 2**level, math.prod(shapes[level])
        yield Layer(f"up{level}_up", inputs * filters * 8 + filters, voxels * filters, voxels * filters, voxels)
        yield Layer(f"up{level}_skip", 0, voxels * 2 * filters, voxels * 2 * filters, voxels)
        yield _conv(f"up{level}_conv1", 2 * filters, filters, 27, voxels, model.norm)
        yield _conv(f"up{level}_conv2", filters, filters, 27, voxels, model.norm)
        if model.deep_supervision and level > 0:
            yield Layer(f"logits{level}", (filters + 1) * classes, voxels * classes * 3, voxels * classes, voxels)
        inputs = filters
    if model.dropout:
        yield Layer("dropout", 0, voxels * inputs, voxels * inputs, voxels)
    # Logits, probabilities and the loss' own terms.
    yield Layer("logits", (inputs + 1) * classes, voxels * classes * 4, voxels * classes, voxels)


def _scaled(filters: int, width: float) -> int:
    return max(4, round(filters * width / 4) * 4)


def _vgg(config: RunConfig, channels: int, classes: int) -> Iterator[Layer]:
    model, shape, inputs = config.model, tuple(config.data.patch[1:]), channels
    for block, (filters, count) in enumerate(_VGG, start=1):
        for index in range(1, count + 1):
            wide = _scaled(filters, model.width)
            yield _conv(f"block{block}_conv{index}", inputs, wide, 9, math.prod(shape), model.norm)
            inputs = wide
        shape = tuple(side // 2 for side in shape)
        size = math.prod(shape)
        yield Layer(f"block{block}_pool", 0, size * inputs, size * inputs, size)
    if model.head == "dense":
        inputs *= math.prod(shape)
        for index in (1, 2):
            wide = _scaled(4096, model.width)
            yield Layer(f"fc{index}", (inputs + 1) * wide, wide, wide, 1, shared=True)
            inputs = wide
    yield Layer("logits", (inputs + 1) * classes, classes, classes, 1)


def _cnn(config: RunConfig, channels: int, classes: int) -> Iterator[Layer]:
    model, shape, inputs = config.model, tuple(config.data.patch), channels
    for stage, filters in enumerate((16, 32, 64, 128), start=1):
        wide = _scaled(filters, model.width)
        yield _conv(f"stage{stage}_conv1", inputs, wide, 27, math.prod(shape), model.norm)
        shape = _halved(shape)
        yield _conv(f"stage{stage}_conv2", wide, wide, 27, math.prod(shape), model.norm)
        inputs = wide
    yield Layer("logits", (inputs + 1) * classes, classes, classes, 1)
