"""Filters that leave, with everything that reads them: importance, choice, and the smaller network.

Importance is the first-order estimate of the squared change of the loss when a filter leaves (Molchanov et al., 2019): the
square of the sum of weight times gradient over the filter's weights, for each patch alone, summed over patches. So it can be
added over ranks, however the patches are spread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import tensorflow as tf

from ..errors import RunError
from ..models.blocks import GroupNorm
from .graph import CONVOLUTIONS, TRANSPOSED, Channels, Lane, copy, describe, nodes, rebuild

layers = tf.keras.layers
Reduce = Callable[[list[np.ndarray]], list[np.ndarray]]
MULTIPLE = 4
"""Filters leave in blocks of so many where a layer has at least `WIDE`: kernels of all runtimes work on some channels at once."""
WIDE = 8


def importance(
    model: Any,
    batches: Callable[[], Iterable[tuple[np.ndarray, np.ndarray]]],
    loss: Callable[[Any, Any], Any],
    reduce: Reduce = lambda arrays: arrays,
) -> dict[int, np.ndarray]:
    """Score of every channel of every space that may lose some.

    Args:
        model: functional network, logits out.
        batches: a fresh iterator over (image ``(N, D, H, W, C)``, label) of this rank.
        loss: ``(labels, logits)`` -> ``(N,)``.
        reduce: sums float64 arrays over the ranks.

    Returns:
        space -> float64 ``(channels,)``.

    Raises:
        RunError: every channel is pinned; the message says by what.
    """
    channels = describe(model)
    free = {number: space for number, space in channels.spaces.items() if not space.pinned}
    if not free:
        why = sorted({space.pinned for space in channels.spaces.values()})
        raise RunError(
            f"filters: network '{model.name}' has no layer whose filters may leave ({'; '.join(why)}); leave the step out"
        )
    layers_of = {number: [model.get_layer(name) for name in space.openers] for number, space in free.items()}
    variables = [v for number in free for layer in layers_of[number] for v in layer.trainable_variables]
    axes = [_output_axis(layer, v) for number in free for layer in layers_of[number] for v in layer.trainable_variables]

    @tf.function(reduce_retracing=True)
    def scores(image: Any, label: Any) -> list[Any]:
        with tf.GradientTape() as tape:
            value = tf.reduce_sum(loss(label, model(image, training=False)))
        gradients = tape.gradient(value, variables)
        sums = []
        for variable, gradient, axis in zip(variables, gradients, axes, strict=True):
            if gradient is None:
                gradient = tf.zeros_like(variable)
            product = tf.cast(variable * gradient, tf.float64)
            sums.append(tf.reduce_sum(product, [i for i in range(len(variable.shape)) if i != axis]))
        return sums

    found = {number: np.zeros(space.size) for number, space in free.items()}
    for images, labels in batches():
        for image, label in zip(images, labels, strict=True):
            parts = iter(scores(image[None], label[None]))
            for number in free:
                whole = sum(next(parts).numpy() for layer in layers_of[number] for _ in layer.trainable_variables)
                found[number] += whole**2
    return dict(zip(found, reduce(list(found.values())), strict=True))


def _output_axis(layer: Any, variable: Any) -> int:
    if len(variable.shape) == 1:
        return 0
    return len(variable.shape) - (2 if isinstance(layer, TRANSPOSED) else 1)


# --- the choice -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """A layer with a kernel, as `choose` sees it: its cost is a bilinear function of the channels that it reads and makes.

    Attributes:
        given: spaces that it reads, one after another; a space that it reads twice is there twice.
        made: space that it puts out.
        repeat: times that what it reads is repeated (after a flattening).
        parameters: of one pair of a channel read and a channel made.
        macs: likewise.
        each: parameters for every channel made (bias).
    """

    given: tuple[int, ...]
    made: int
    repeat: int
    parameters: int
    macs: int
    each: int


def works(model: Any, channels: Channels) -> list[Work]:
    """The layers with kernels."""
    found = []
    for node in nodes(model):
        layer = node.layer
        if isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED, layers.Dense)):
            (output,) = tf.nest.flatten(node.outputs)
            taps = int(np.prod(layer.kernel_size)) if hasattr(layer, "kernel_size") else 1
            grid = node.keras_inputs[0].shape if isinstance(layer, TRANSPOSED) else output.shape
            places = int(np.prod([int(side) for side in grid[1:-1]]))
            lane, (made,) = channels.given[layer.name], channels.made[layer.name].segments
            found.append(Work(lane.segments, made, lane.repeat, taps, taps * places, int(layer.use_bias)))
    return found


def cost(found: Iterable[Work], left: Mapping[int, int]) -> np.ndarray:
    """int64 (parameters, multiply-accumulates) with ``left`` channels in each space; pure."""
    total = np.zeros(2, np.int64)
    for work in found:
        pairs = sum(left[space] for space in work.given) * work.repeat * left[work.made]
        total += pairs * work.parameters + work.each * left[work.made], pairs * work.macs
    return total


Measure = Literal["parameters", "macs", "both"]
_WEIGHTS = {"parameters": (1.0, 0.0), "macs": (0.0, 1.0), "both": (0.5, 0.5)}


def select(
    scores: Mapping[int, np.ndarray],
    sizes: Mapping[int, int],
    found: list[Work],
    remove: float,
    measure: Measure = "both",
    floor: float = 0.1,
    groups: Mapping[int, int] | None = None,
) -> dict[int, np.ndarray]:
    """Which channels stay; pure.

    Blocks of the weakest channels leave one after another, that with the smallest loss of importance for what it saves first,
    until ``remove`` of the cost has gone (of both costs, where both are measured). A space that keeps only ``floor`` of its channels loses no more.

    Args:
        scores: space -> importance of its channels; others stay whole.
        sizes: channels of every space.
        found: layers that cost.
        remove: share of the cost, in [0, 1).
        measure: of the cost: "parameters", "macs", or "both".
        floor: share of its channels that every space keeps, at least one.
        groups: space -> groups of a norm that have to stay equally large.

    Returns:
        space -> indices that stay, rising; of the spaces that lose any.
    """
    groups = groups or {}
    left = dict(sizes)
    # For each space its blocks from the weakest on; a block takes as many channels from each group.
    blocks: dict[int, list[np.ndarray]] = {}
    for space, score in scores.items():
        count = groups.get(space, 1)
        each = sizes[space] // count
        order = np.argsort(score.reshape(count, each), axis=1, kind="stable") + np.arange(count)[:, None] * each
        step = max(1, MULTIPLE // count) if sizes[space] >= WIDE else 1
        least = max(1, int(np.ceil(floor * each)))
        blocks[space] = [order[:, at : at + step].ravel() for at in range(0, each - step + 1, step) if each - at - step >= least]
    weights = np.array(_WEIGHTS[measure])
    start = cost(found, left)
    gone: dict[int, list[np.ndarray]] = {space: [] for space in blocks}
    now = start
    while ((start - now) < remove * start)[weights > 0].any():
        best = None
        for space, waiting in blocks.items():
            if waiting:
                size = len(waiting[0])
                saved = (now - cost(found, {**left, space: left[space] - size})) / np.maximum(start, 1)
                price = float(scores[space][waiting[0]].sum()) / max(float(saved @ weights), 1e-12)
                if best is None or price < best[0]:
                    best = (price, space)
        if best is None:
            break
        space = best[1]
        block = blocks[space].pop(0)
        gone[space].append(block)
        left[space] -= len(block)
        now = cost(found, left)
    return {
        space: np.setdiff1d(np.arange(sizes[space]), np.concatenate(taken)) for space, taken in gone.items() if taken
    }


def choose(
    model: Any, scores: Mapping[int, np.ndarray], remove: float, measure: Measure, floor: float
) -> dict[int, np.ndarray]:
    """`select` for a network: space -> channels that stay."""
    channels = describe(model)
    sizes = {number: space.size for number, space in channels.spaces.items()}
    groups = {number: space.groups for number, space in channels.spaces.items()}
    return select(scores, sizes, works(model, channels), remove, measure, floor, groups)


# --- the smaller network --------------------------------------------------------------------------------------------


def remove(model: Any, keep: Mapping[int, np.ndarray]) -> Any:
    """The network without the channels that are not kept: smaller layers with the weights that are left.

    Exact where the channels that leave are zero behind their activation; group norms aside, whose statistics they had part in.

    Args:
        model: functional network; stays as it is.
        keep: space (of `graph.describe`) -> indices that stay.
    """
    channels = describe(model)

    def places(lane: Lane) -> np.ndarray:
        """Indices of a lane that stay."""
        found, offset = [], 0
        for segment in lane.segments:
            size = channels.spaces[segment].size
            found.append(offset + np.asarray(keep.get(segment, np.arange(size)), np.int64))
            offset += size
        one = np.concatenate(found)
        return (one[None] + np.arange(lane.repeat)[:, None] * offset).ravel()

    def change(layer: Any) -> Any:
        if layer.name not in channels.made:
            return copy(layer)
        size = len(places(channels.made[layer.name]))
        if isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED)):
            return copy(layer, filters=size)
        if isinstance(layer, layers.Dense):
            return copy(layer, units=size)
        if isinstance(layer, GroupNorm) and layer.groups == layer.gamma.shape[0]:
            return copy(layer, groups=size)
        if isinstance(layer, layers.Reshape):
            return copy(layer, target_shape=(*layer.target_shape[:-1], size))
        return copy(layer)

    changed = rebuild(model, change)
    for layer in model.layers:
        weights = layer.get_weights()
        if not weights:
            continue
        given, made = places(channels.given[layer.name]), places(channels.made[layer.name])
        if isinstance(layer, TRANSPOSED):
            weights[0] = weights[0][..., made, :][..., given]
        elif isinstance(layer, (*CONVOLUTIONS, layers.Dense)):
            weights[0] = weights[0][..., given, :][..., made]
        else:
            weights = [w[made] if w.ndim == 1 and w.size == sum(_sizes(channels, layer)) else w for w in weights]
        if isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED, layers.Dense)):
            weights[1:] = [w[made] for w in weights[1:]]
        changed.get_layer(layer.name).set_weights(weights)
    return changed


def _sizes(channels: Channels, layer: Any) -> list[int]:
    return [channels.spaces[s].size for s in channels.made[layer.name].segments]
