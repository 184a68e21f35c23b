"""A Keras network on slabs of its volumes: each rank of a group computes some slices of every layer.

The network is described once, unsplit. Here its layers are called one after another with their own weights, on a slab: those whose
output slice needs neighbouring slices get them by `halo`, norms and global poolings sum over the group, all others work as they are.
So checkpoints hold the unsplit network's weights, and know of no grid.

A rank's gradients are its part of a sum: they add up over all ranks, as those of data parallelism do (idea 2 of the design).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import tensorflow as tf

from ..errors import ConfigError
from ..models.blocks import Dropout, GroupNorm
from ..models.graph import nodes
from ..models.losses import WHOLE, Part
from .halo import Halo, largest, total
from .horovod import Group
from .slabs import Bounds, Spread, Window, check_bounds, check_halo, cut, fetches, spread, window

keras = tf.keras
layers = keras.layers

# Each voxel by itself, or all channels of a voxel.
_BY_VOXEL = (
    Dropout, layers.ReLU, layers.LeakyReLU, layers.ELU, layers.ThresholdedReLU, layers.Activation, layers.Rescaling, layers.Add,
    layers.Subtract, layers.Multiply, layers.Average, layers.Maximum, layers.Minimum, layers.Dense,
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """How one layer works on slabs.

    Attributes:
        bounds: of its output; None if every rank has the whole output.
        call: ``(inputs, training) -> output``.
    """

    bounds: Bounds | None
    call: Callable[[list[Any], bool], Any]


class SlabModel:
    """A functional network on one rank's slab; called like the network itself.

    Args:
        model: the unsplit network, of input ``(N, D, H, W, C)``.
        group: the ranks that share each volume; one of one rank computes the network as it is.
        recompute: keep of each stage (layers one after another between two changes of resolution) only what goes in and out, and compute
            it again on the way back (Chen et al., 2016).

    Attributes:
        model: as given; its weights are the only ones.
        bounds: of the input's depth.
        out_bounds: of each output; None where it is whole on each rank.

    Raises:
        ConfigError: a depth that cannot be split, a halo larger than a slab, a layer without a spatial version.
    """

    def __init__(self, model: Any, group: Group, recompute: bool = False) -> None:
        self.model, self.group = model, group
        (source,) = model.inputs
        resolutions = []
        self.bounds = cut(int(source.shape[1]), group.size, cell(model))
        held: dict[int, Bounds | None] = {id(source): self.bounds}
        self._calls: list[tuple[list[int], int, Plan]] = []
        self._input = id(source)
        counts: dict[str, int] = {}
        for node in nodes(model):
            given = list(node.keras_inputs)
            outputs = tf.nest.flatten(node.outputs)
            layer = node.layer
            if len(outputs) != 1:
                raise _unknown(layer)
            # A layer may be called several times: each call talks under a name of its own.
            name = layer.name + (f".{counts[layer.name]}" if layer.name in counts else "")
            counts[layer.name] = counts.get(layer.name, 0) + 1
            plan = _plan(layer, [held[id(t)] for t in given], given, outputs[0], group, name, given[0] is source)
            if plan.bounds is not None:
                check_bounds(plan.bounds, layer.name)
            held[id(outputs[0])] = plan.bounds
            self._calls.append(([id(t) for t in given], id(outputs[0]), plan))
            resolutions.append(tuple(outputs[0].shape[1:-1]))
        self._outputs = [id(t) for t in model.outputs]
        self._stages = stages(resolutions) if recompute else []
        self.out_bounds = [held[key] for key in self._outputs]

    @property
    def trainable_variables(self) -> list[Any]:
        """The network's."""
        return self.model.trainable_variables

    @property
    def outputs(self) -> list[Any]:
        """The unsplit network's symbolic outputs."""
        return self.model.outputs

    def parts(self) -> list[Part]:
        """Of the volume, for the loss of each output."""
        index = self.group.index
        return [
            WHOLE if bounds is None or self.group.size == 1
            else Part((bounds[index + 1] - bounds[index]) / bounds[-1], partial(self._sum, level))
            for level, bounds in enumerate(self.out_bounds)
        ]  # fmt: skip

    def _sum(self, level: int, tensor: Any, name: str) -> Any:
        return total(tensor, self.group, f"loss{level}.{name}")

    def __call__(self, image: Any, training: bool = False) -> Any:
        """Outputs of this rank's slab ``(N, d, H, W, C)``; a list if the network has several."""
        values = {self._input: image}
        if training and self._stages:
            for first, last in self._stages:
                self._run_again(self._calls[first:last], self._calls[last:], values)
        else:
            self._run(self._calls, values, training, set(self._outputs))
        found = [values[key] for key in self._outputs]
        return found if len(found) > 1 else found[0]

    def _run(self, calls: Sequence[Any], values: dict[int, Any], training: bool, wanted: set[int]) -> None:
        last = {key: at for at, (given, _, _) in enumerate(calls) for key in given}
        for at, (given, made, plan) in enumerate(calls):
            values[made] = plan.call([values[key] for key in given], training)
            for key in given:
                if last[key] == at and key not in wanted:
                    values.pop(key, None)

    def _run_again(self, calls: Sequence[Any], later: Sequence[Any], values: dict[int, Any]) -> None:
        """One stage, computed again on the way back."""
        made = {key for _, key, _ in calls}
        given = list(dict.fromkeys(key for keys, _, _ in calls for key in keys if key not in made))
        read = {key for keys, _, _ in later for key in keys} | set(self._outputs)
        wanted = [key for _, key, _ in calls if key in read]

        def stage(*inputs: Any) -> Any:
            inside = dict(zip(given, inputs, strict=True))
            self._run(calls, inside, True, set(wanted))
            return [inside[key] for key in wanted]

        values.update(zip(wanted, tf.recompute_grad(stage)(*(values[key] for key in given)), strict=True))


def stages(resolutions: Sequence[Any]) -> list[tuple[int, int]]:
    """Intervals of calls whose outputs have the same resolution; pure."""
    edges = [at for at in range(1, len(resolutions)) if resolutions[at] != resolutions[at - 1]]
    return list(itertools.pairwise([0, *edges, len(resolutions)]))


def cell(model: Any) -> int:
    """Slices that a network's strides keep together: the product of the strides on its longest way down."""
    deepest: dict[int, float] = {id(t): 1.0 for t in model.inputs}
    most = 1.0
    for node in nodes(model):
        layer = node.layer
        scale = max(deepest[id(t)] for t in node.keras_inputs)
        if isinstance(layer, layers.Conv3DTranspose):
            scale /= layer.strides[0]
        elif isinstance(layer, layers.UpSampling3D):
            scale /= layer.size[0]
        elif isinstance(layer, layers.Conv3D | layers.MaxPooling3D | layers.AveragePooling3D):
            scale *= layer.strides[0]
        for output in tf.nest.flatten(node.outputs):
            deepest[id(output)] = scale
        most = max(most, scale)
    return round(most)


def _unknown(layer: Any) -> ConfigError:
    return ConfigError(
        f"parallel.spatial: layer '{layer.name}' ({type(layer).__name__}) has no spatial version; take layers of "
        "docs/model-parallel.md's list (convolutions, transposed ones, poolings, GroupNorm, point-wise layers, concatenation over "
        "channels), or parallel.spatial=1"
    )


def _plan(
    layer: Any, given: list[Bounds | None], tensors: Sequence[Any], output: Any, group: Group, name: str, is_first: bool
) -> Plan:
    """The plan of one call of ``layer``; ``given`` are the bounds of its inputs ``tensors``."""
    bounds = given[0]
    if group.size == 1 or all(b is None for b in given):
        return Plan(None, partial(_as_it_is, layer))
    if any(b != bounds for b in given) or bounds is None:
        raise ConfigError(
            f"parallel.spatial: layer '{layer.name}' joins tensors whose depths are cut differently ({given}); take a depth in data.patch "
            "that the network's strides divide"
        )
    source, kind = tensors[0], type(layer)
    depth = bounds[-1]
    if kind is layers.Conv3D:
        plan = window(depth, layer.kernel_size[0], layer.strides[0], layer.dilation_rate[0], layer.padding)
        halo, out = _halo(plan, bounds, group, name)
        return Plan(out, partial(_conv, layer, halo, is_first))
    if kind is layers.Conv3DTranspose and set(layer.dilation_rate) == {1} and layer.output_padding is None:
        up = spread(depth, layer.kernel_size[0], layer.strides[0], layer.padding)
        halo, out = _halo(up, bounds, group, name)
        return Plan(out, partial(_transposed, layer, halo, up, out, output))
    if kind in (layers.MaxPooling3D, layers.AveragePooling3D):
        plan = window(depth, layer.pool_size[0], layer.strides[0], 1, layer.padding)
        halo, out = _halo(plan, bounds, group, name)
        return Plan(out, partial(_pool, layer, halo))
    if kind is layers.UpSampling3D:
        return Plan(tuple(edge * layer.size[0] for edge in bounds), partial(_as_it_is, layer))
    if kind is GroupNorm or (kind is layers.Concatenate and layer.axis in (-1, 4)) or (
        kind is layers.BatchNormalization and not layer.trainable
    ) or (kind is layers.Softmax and layer.axis in (-1, 4)) or kind in _BY_VOXEL:  # fmt: skip
        if kind is GroupNorm:
            return Plan(bounds, partial(_group_norm, layer, group, name, [stop - start for start, stop in itertools.pairwise(bounds)]))
        if kind is Dropout and not layer.spatial:
            return Plan(bounds, lambda x, training: layer(x[0], training=training, first=bounds[group.index]))
        return Plan(bounds, partial(_as_it_is, layer))
    if kind is layers.GlobalAveragePooling3D:
        return Plan(None, partial(_global_average, layer, group, name, source.shape))
    if kind is layers.GlobalMaxPooling3D:
        return Plan(None, lambda x, training: largest(layer(x[0]), group, name))
    raise _unknown(layer)


def _halo(plan: Window | Spread, bounds: Bounds, group: Group, name: str) -> tuple[Halo, Bounds]:
    out = plan.bounds(bounds)
    check_bounds(out, name)
    plans = fetches(bounds, [plan.needs(interval) for interval in itertools.pairwise(out)])
    check_halo(bounds, plans, name)
    return Halo(plans, group, name), out


def _as_it_is(layer: Any, inputs: list[Any], training: bool) -> Any:
    given = inputs if len(inputs) > 1 else inputs[0]
    if layer._expects_training_arg:
        return layer(given, training=training and layer.trainable)
    return layer(given)


def _conv(layer: Any, halo: Halo, is_first: bool, inputs: list[Any], training: bool) -> Any:
    kind = layer.compute_dtype
    x, kernel = tf.cast(inputs[0], kind), tf.cast(layer.kernel, kind)
    sides = [
        _padding(int(side), *options, layer.padding)
        for side, *options in zip(x.shape[2:4], layer.kernel_size[1:], layer.strides[1:], layer.dilation_rate[1:], strict=True)
    ]
    around = [[0, 0], list(halo.plan.pad), *sides, [0, 0]]
    if set(layer.dilation_rate) == {1} and layer.groups == 1:
        y = _plain_conv(x, kernel, halo, around, [1, *layer.strides, 1], is_first)
    else:
        y = tf.nn.convolution(tf.pad(widen(x, halo), around), kernel, layer.strides, "VALID", dilations=layer.dilation_rate)
    if layer.use_bias:
        y = tf.nn.bias_add(y, tf.cast(layer.bias, kind))
    return layer.activation(y) if layer.activation is not None else y


def _padding(side: int, kernel: int, stride: int, dilation: int, padding: str) -> list[int]:
    if padding == "valid":
        return [0, 0]
    reach = (kernel - 1) * dilation + 1
    over = max((-(-side // stride) - 1) * stride + reach - side, 0)
    return [over // 2, over - over // 2]


def widen(x: tf.Tensor, halo: Halo) -> tf.Tensor:
    """A slab with the slices that a layer needs beside it, without padding; differentiable."""

    @tf.custom_gradient
    def run(x):
        depth = int(x.shape[1])
        lower, own, upper = halo.take(x)

        def back(dy):
            d_lower, d_own, d_upper = tf.split(dy, [halo.plan.lower, dy.shape[1] - halo.plan.lower - halo.plan.upper, halo.plan.upper], 1)
            return halo.give(d_lower, d_own, d_upper, depth)

        return _joined(lower, own, upper, halo), back

    return run(x)


def _joined(lower: tf.Tensor, x: tf.Tensor, upper: tf.Tensor, halo: Halo) -> tf.Tensor:
    start, stop = halo.plan.own
    own = x if (start, stop) == (0, x.shape[1]) else x[:, start:stop]
    parts = [part for part in (lower, own, upper) if part.shape[1]]
    return tf.concat(parts, 1) if len(parts) > 1 else parts[0]


def _plain_conv(x: Any, kernel: Any, halo: Halo, around: list[list[int]], strides: list[int], is_first: bool) -> Any:
    """Convolution that keeps the slab and the few slices beside it for the way back, not the padded copy of both."""

    @tf.custom_gradient
    def run(x, kernel):
        depth = int(x.shape[1])
        lower, own, upper = halo.take(x)
        y = tf.nn.conv3d(tf.pad(_joined(lower, own, upper, halo), around), kernel, strides, "VALID")

        def back(dy):
            # Only now, and not kept from the way there: a control dependency stops the graph's optimizer from joining the two.
            with tf.control_dependencies([dy]):
                given = tf.pad(_joined(tf.identity(lower), tf.identity(x), tf.identity(upper), halo), around)
            d_kernel = tf.raw_ops.Conv3DBackpropFilterV2(
                input=given, filter_sizes=kernel.shape, out_backprop=dy, strides=strides, padding="VALID"
            )
            if is_first:
                return tf.zeros_like(x), d_kernel  # nobody asks for the image's gradient
            d_given = tf.raw_ops.Conv3DBackpropInputV2(
                input_sizes=tf.shape(given), filter=kernel, out_backprop=dy, strides=strides, padding="VALID"
            )
            d_given = tf.reshape(d_given, tf.shape(given))
            (top, _), (left, _), (near, _) = around[1], around[2], around[3]
            plan = halo.plan
            d_given = d_given[:, top : top + plan.depth, left : left + x.shape[2], near : near + x.shape[3]]
            d_lower, d_own, d_upper = tf.split(d_given, [plan.lower, plan.depth - plan.lower - plan.upper, plan.upper], 1)
            return halo.give(d_lower, d_own, d_upper, depth), d_kernel

        return y, back

    return run(x, kernel)


def _transposed(layer: Any, halo: Halo, up: Spread, out: Bounds, output: Any, inputs: list[Any], training: bool) -> Any:
    kind, rank = layer.compute_dtype, halo.group.index
    x = widen(tf.cast(inputs[0], kind), halo)
    # All that the slices reach, in the plane too; then what belongs to this slab, and to the image.
    sizes = [(int(side) - 1) * stride + max(kernel, stride) for side, stride, kernel in zip(x.shape[1:4], layer.strides, layer.kernel_size, strict=True)]
    y = tf.nn.conv3d_transpose(
        x, tf.cast(layer.kernel, kind), [tf.shape(x)[0], *sizes, layer.filters], layer.strides, "VALID"
    )
    first, _ = up.needs((out[rank], out[rank + 1]))
    sides = [spread(int(side), kernel, stride, layer.padding) for side, kernel, stride in
             zip(inputs[0].shape[2:4], layer.kernel_size[1:], layer.strides[1:], strict=True)]  # fmt: skip
    begins = [out[rank] - (first * up.stride - up.before), *(side.before for side in sides)]
    wanted = [out[rank + 1] - out[rank], *(side.outputs for side in sides)]
    if begins != [0, 0, 0] or wanted != sizes:
        (top, left, near), (high, wide, deep) = begins, wanted
        y = y[:, top : top + high, left : left + wide, near : near + deep]
    y.set_shape([None, *wanted, layer.filters])
    if layer.use_bias:
        y = tf.nn.bias_add(y, tf.cast(layer.bias, kind))
    return layer.activation(y) if layer.activation is not None else y


def _pool(layer: Any, halo: Halo, inputs: list[Any], training: bool) -> Any:
    x = inputs[0]
    sides = [
        _padding(int(side), size, stride, 1, layer.padding)
        for side, size, stride in zip(x.shape[2:4], layer.pool_size[1:], layer.strides[1:], strict=True)
    ]
    around = [[0, 0], list(halo.plan.pad), *sides, [0, 0]]
    window_, strides = [1, *layer.pool_size, 1], [1, *layer.strides, 1]
    wide = widen(x, halo)
    if isinstance(layer, layers.MaxPooling3D):
        return tf.nn.max_pool3d(tf.pad(wide, around, constant_values=x.dtype.min), window_, strides, "VALID")
    mean = tf.nn.avg_pool3d(tf.pad(wide, around), window_, strides, "VALID")
    if not any(map(sum, around)):
        return mean
    # Padding does not count, as in TensorFlow's own padding.
    inside = np.pad(np.ones([1, *wide.shape[1:4], 1], np.float32), around)
    return mean / tf.cast(tf.nn.avg_pool3d(inside, window_, strides, "VALID"), mean.dtype)


def _global_average(layer: Any, group: Group, name: str, shape: Any, inputs: list[Any], training: bool) -> Any:
    x = inputs[0]
    voxels = int(np.prod(shape[1:4]))
    summed = total(tf.reduce_sum(tf.cast(x, tf.float32), [1, 2, 3]), group, name) / voxels
    if layer.keepdims:
        summed = summed[:, None, None, None]
    return tf.cast(summed, x.dtype)


def _group_norm(layer: Any, group: Group, name: str, depths: Sequence[int], inputs: list[Any], training: bool) -> Any:
    """:class:`hvd_imaging.models.blocks.GroupNorm` with statistics over all slabs.

    Mean and variance of the slabs are put together as those of samples are (Chan et al., 1979): nothing cancels. It keeps its
    input for the way back, and nothing else of that size.
    """
    kind = inputs[0].dtype
    groups, channels = layer.groups, int(inputs[0].shape[-1])
    plane = int(np.prod(inputs[0].shape[2:4]))
    share = tf.reshape(tf.constant(np.asarray(depths) / sum(depths), tf.float32), [-1, 1, 1])
    voxels = [1, 2, 3]

    def per_group(values):  # (N, C) -> mean over each norm group's channels, (N, C)
        if groups == channels:
            return values
        means = tf.reduce_mean(tf.reshape(values, [-1, groups, channels // groups]), 2)
        return tf.repeat(means, channels // groups, 1)

    @tf.custom_gradient
    def run(x, gamma, beta):
        wide = tf.cast(x, tf.float32)
        mean = tf.reduce_mean(wide, voxels)
        variance = tf.reduce_mean(tf.math.squared_difference(wide, mean[:, None, None, None]), voxels)
        slabs = group.gather(tf.stack([mean, variance]), f"norm.{name}.statistics")  # (S, 2, N, C)
        means, variances = slabs[:, 0], slabs[:, 1]
        mean = per_group(tf.reduce_sum(share * means, 0))
        variance = per_group(tf.reduce_sum(share * (variances + tf.math.squared_difference(means, mean)), 0))
        rate = tf.math.rsqrt(variance + layer.epsilon)
        scale = rate * gamma
        y = tf.cast(wide * scale[:, None, None, None] + (beta - mean * scale)[:, None, None, None], kind)

        def back(dy):
            with tf.control_dependencies([dy]):
                again = tf.cast(tf.identity(x), tf.float32)
            dy = tf.cast(dy, tf.float32)
            normal = (again - mean[:, None, None, None]) * rate[:, None, None, None]
            own = tf.stack([tf.reduce_sum(dy, voxels), tf.reduce_sum(dy * normal, voxels)])  # (2, N, C)
            mean_dy, mean_moved = tf.unstack(group.sum(own, f"norm.{name}.back") / (sum(depths) * plane))
            mean_dy, mean_moved = per_group(gamma * mean_dy), per_group(gamma * mean_moved)
            dx = rate[:, None, None, None] * (
                dy * gamma - mean_dy[:, None, None, None] - normal * mean_moved[:, None, None, None]
            )
            return tf.cast(dx, kind), tf.reduce_sum(own[1], 0), tf.reduce_sum(own[0], 0)

        return y, back

    return run(inputs[0], tf.cast(layer.gamma, tf.float32), tf.cast(layer.beta, tf.float32))
