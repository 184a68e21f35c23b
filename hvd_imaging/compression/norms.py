"""Norms with fixed statistics, inside the convolutions before them.

Group and instance norms scale a patch by its own mean and variance (Wu and He, 2018): for patch i the norm is the affine map
``a_i x + b_i``. Frozen, it is the mean of these maps over the training split, ``mean(a_i) x + mean(b_i)``: the one fixed map that is
nearest to all of them where they are the same for every patch, and exact there. Means are sums and counts, so that ranks can add them.

A norm's statistics depend on what the norms before it do, so they are frozen one after another, from the image to the output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from ..errors import RunError
from ..lowering.lower import with_batch_norm
from ..models.blocks import GroupNorm
from .graph import CONVOLUTIONS, TRANSPOSED, copy, nodes, rebuild

keras = tf.keras
layers = keras.layers
Reduce = Callable[[list[np.ndarray]], list[np.ndarray]]
_FOLDS = (*CONVOLUTIONS, *TRANSPOSED, layers.Dense)


def count(model: Any) -> int:
    """Norms of a network."""
    return sum(isinstance(layer, GroupNorm | layers.BatchNormalization) for layer in model.layers)


def freeze(
    model: Any, batches: Callable[[], Iterable[np.ndarray]], reduce: Reduce = lambda arrays: arrays
) -> Any:
    """The network with every norm folded into the layer before it, where that is a convolution that nobody else reads.

    Args:
        model: functional network; stays as it is.
        batches: a fresh iterator over float32 ``(N, D, H, W, C)`` of this rank.
        reduce: sums float64 arrays over the ranks.

    Returns:
        a network without norms; one that cannot be folded stays as a batch norm that is not trained.

    Raises:
        RunError: no rank has a patch.
    """
    scaled = _with_fixed(model)
    for node in nodes(model):
        if isinstance(node.layer, GroupNorm):
            # Weight order of a batch norm: gamma, beta, moving mean, moving variance.
            scale, shift = _mean_map(node.layer, scaled, batches, reduce)
            fixed = scaled.get_layer(node.layer.name)
            fixed.set_weights([scale, shift, np.zeros_like(shift), np.full_like(scale, 1 - fixed.epsilon)])
    return fold(scaled)


def _with_fixed(model: Any) -> Any:
    """The same network, its group norms as batch norms of unset statistics."""

    def change(layer: Any) -> Any:
        if isinstance(layer, GroupNorm):
            return layers.BatchNormalization(name=layer.name, epsilon=layer.epsilon, trainable=False)
        return copy(layer)

    changed = rebuild(model, change)
    for layer in model.layers:
        if layer.weights and not isinstance(layer, GroupNorm):
            changed.get_layer(layer.name).set_weights(layer.get_weights())
    return changed


def _mean_map(
    norm: Any, scaled: Any, batches: Callable[[], Iterable[np.ndarray]], reduce: Reduce
) -> tuple[np.ndarray, np.ndarray]:
    """float32 ``(C,)`` scale and shift of ``norm``, over what its stand-in in ``scaled`` reads."""
    before = keras.Model(scaled.input, scaled.get_layer(norm.name).input)
    gamma, beta = (np.asarray(w, np.float64) for w in norm.get_weights())
    groups, each = norm.groups, gamma.size // norm.groups

    @tf.function(reduce_retracing=True)
    def moments(image: Any) -> tuple[Any, Any]:
        x = tf.cast(before(image, training=False), tf.float32)
        return tf.nn.moments(x, list(range(1, len(x.shape) - 1)))

    sums = np.zeros((2, gamma.size))
    seen = 0
    for image in batches():
        mean, variance = (np.asarray(m, np.float64).reshape(len(image), groups, each) for m in moments(image))
        middle = mean.mean(-1, keepdims=True)
        whole = (variance + (mean - middle) ** 2).mean(-1, keepdims=True)
        scale = gamma * np.repeat(1 / np.sqrt(whole + norm.epsilon), each, -1).reshape(len(image), -1)
        shift = beta - scale * np.repeat(middle, each, -1).reshape(len(image), -1)
        sums += scale.sum(0), shift.sum(0)
        seen += len(image)
    total, number = reduce([sums, np.array([float(seen)])])
    if not number[0]:
        raise RunError("freeze_norms: no patch of the training split was seen; give it more `patches`")
    found = (total / number[0]).astype(np.float32)
    return found[0], found[1]


def fold(model: Any) -> Any:
    """The network with batch norms inside the convolutions before them, in their inference form; exact."""
    folded = {before.name: norm for before, norm in _pairs(model)}
    gone = {norm.name for norm in folded.values()}

    def change(layer: Any) -> Any:
        if layer.name in gone:
            return None
        return copy(layer, use_bias=True) if layer.name in folded else copy(layer)

    changed = rebuild(model, change)
    for layer in model.layers:
        if not layer.weights or layer.name in gone:
            continue
        norm = folded.get(layer.name)
        weights = layer.get_weights() if norm is None else with_batch_norm(layer, layer.get_weights(), norm)
        changed.get_layer(layer.name).set_weights(weights)
    return changed


def _pairs(model: Any) -> Iterator[tuple[Any, Any]]:
    """(convolution, batch norm) where nothing but the norm reads the convolution, and each is used once."""
    found = list(nodes(model))
    readers: dict[int, list[Any]] = {}
    for node in found:
        for tensor in node.keras_inputs:
            readers.setdefault(id(tensor), []).append(node)
    uses = [node.layer.name for node in found]
    kept = {id(t) for t in model.outputs}
    for node in found:
        (output,) = tf.nest.flatten(node.outputs)
        following = readers.get(id(output), [])
        if len(following) != 1 or id(output) in kept or not isinstance(node.layer, _FOLDS):
            continue
        norm = following[0].layer
        linear = getattr(node.layer, "activation", None) in (None, keras.activations.linear)
        once = uses.count(node.layer.name) == uses.count(norm.name) == 1
        if isinstance(norm, layers.BatchNormalization) and linear and once:
            yield node.layer, norm
