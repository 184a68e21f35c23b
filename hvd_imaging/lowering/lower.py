"""A trained 3D network as an equal one of 2D layers.

A 3D convolution of depth k over C channels is a 2D convolution over the k * C channels of k neighbouring planes; planes stand
in the batch axis. So a network needs no 3D kernels, which TFLite has in float only and ONNX Runtime not in integers, and
tensorflow-model-optimization can train it with quantization.

Weights are only moved; a batch norm goes into the convolution before it. Equal up to the rounding of sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from ..errors import RunError
from ..models.blocks import Dropout, GroupNorm
from ..models.graph import check_functional
from . import layers as own

keras = tf.keras
layers = keras.layers


@dataclass(frozen=True)
class Value:
    """A tensor of the lowered network: as it was, or folded ``(N * depth, H, W, C)``."""

    tensor: Any
    depth: int | None = None


Rule = Callable[["_Walk", Any, list[Value]], Value]


def lower(model: Any) -> Any:
    """The equal network of 2D layers.

    Args:
        model: functional Keras model; inputs ``(N, D, H, W, C)`` or ``(N, H, W, C)``, any outputs.

    Returns:
        a new model with the same inputs and outputs; ``model`` stays as it is.

    Raises:
        RunError: a layer that has no 2D form; the message names it.
    """
    check_functional(model)
    walk = _Walk(model)
    inputs = [keras.Input(t.shape[1:], dtype=t.dtype, name=_base(t.name)) for t in model.inputs]
    found = walk.run(model, [Value(t) for t in inputs])
    outputs = [walk.plain(v).tensor for v in found]
    return keras.Model(inputs, outputs if len(outputs) > 1 else outputs[0], name=model.name)


def same_padding(length: int, size: int, stride: int, dilation: int = 1) -> tuple[int, int]:
    """(before, after) of TensorFlow's "same" padding along one axis."""
    reach = (size - 1) * dilation + 1
    total = max((-(-length // stride) - 1) * stride + reach - length, 0)
    return total // 2, total - total // 2


def _base(name: str) -> str:
    return name.split(":")[0]


class _Walk:
    """The way through a network, layer by layer."""

    def __init__(self, model: Any) -> None:
        self.names: dict[str, int] = {}
        self.model = model.name

    def run(self, model: Any, inputs: list[Value]) -> list[Value]:
        """Values of the model's outputs."""
        check_functional(model)
        values = {id(t): v for t, v in zip(model.inputs, inputs, strict=True)}
        consumers: dict[int, list[Any]] = {}
        nodes = [node for depth in sorted(model._nodes_by_depth, reverse=True) for node in model._nodes_by_depth[depth]]
        for node in nodes:
            for tensor in node.keras_inputs:
                consumers.setdefault(id(tensor), []).append(node)
        kept = {id(t) for t in model.outputs}
        folded_away: set[int] = set()
        for node in nodes:
            if not node.keras_inputs:
                continue
            layer = node.layer
            given = [values[id(t)] for t in node.keras_inputs]
            outputs = tf.nest.flatten(node.outputs)
            if id(node) in folded_away:
                values[id(outputs[0])] = given[0]
                continue
            if isinstance(layer, keras.Model):
                found = self.run(layer, given)
                values.update({id(t): v for t, v in zip(outputs, found, strict=True)})
                continue
            weights = layer.get_weights()
            users = consumers.get(id(outputs[0]), [])
            norm = users[0] if len(users) == 1 and id(outputs[0]) not in kept else None
            if norm is not None and isinstance(norm.layer, layers.BatchNormalization) and _takes_scale(layer, norm.layer):
                weights = with_batch_norm(layer, weights, norm.layer)
                folded_away.add(id(norm))
            self.weights = weights
            values[id(outputs[0])] = self.one(layer, given)
        return [values[id(t)] for t in model.outputs]

    def one(self, layer: Any, given: list[Value]) -> Value:
        """The value of one layer's output."""
        for kind in type(layer).__mro__:
            rule = RULES.get(kind)
            if rule is not None:
                return rule(self, layer, given)
        if all(v.depth is None and len(v.tensor.shape) < 5 for v in given):
            return _as_it_is(self, layer, given)
        raise self.refusal(layer, f"{type(layer).__name__} has no known 2D form")

    def refusal(self, layer: Any, why: str) -> RunError:
        """The error for a layer that cannot be lowered."""
        return RunError(
            f"network '{self.model}', layer '{layer.name}': {why}; replace it in the network by one of "
            f"{', '.join(sorted(kind.__name__ for kind in RULES if kind.__module__.startswith(('keras', 'tf_keras'))))}, "
            "or export the net as it is (--format savedmodel)"
        )

    def name(self, wanted: str) -> str:
        """``wanted``, with a number where it is taken (a layer that is used twice)."""
        count = self.names.get(wanted, 0)
        self.names[wanted] = count + 1
        return wanted if count == 0 else f"{wanted}_{count}"

    def folded(self, value: Value, layer: Any) -> Value:
        """``value`` with its planes in the batch axis."""
        if value.depth is not None:
            return value
        if len(value.tensor.shape) != 5 or value.tensor.shape[1] is None:
            raise self.refusal(layer, f"expected an input (N, D, H, W, C) of known size, found {tuple(value.tensor.shape)}")
        return Value(own.FoldDepth(name=self.name(f"{layer.name}_fold"))(value.tensor), value.tensor.shape[1])

    def plain(self, value: Value) -> Value:
        """``value`` as it was in the network."""
        if value.depth is None:
            return value
        return Value(own.UnfoldDepth(value.depth, name=self.name("unfold"))(value.tensor))

    def put(self, layer: Any, weights: Sequence[np.ndarray], inputs: Any) -> Any:
        """Apply a new ``layer`` and give it ``weights``."""
        found = layer(inputs)
        if weights:
            layer.set_weights(list(weights))
        return found

    def window(self, value: Value, layer: Any, **what: int) -> Value:
        """A `DepthWindow`, left out where it would change nothing."""
        assert value.depth is not None
        window = own.DepthWindow(value.depth, name=self.name(f"{layer.name}_planes"), **what)
        if window.size == window.stride == 1 and window.before == window.after == 0:
            return value
        if window.depth_out < 1:
            raise self.refusal(layer, f"needs more than {value.depth} planes")
        return Value(window(value.tensor), window.depth_out)


def _takes_scale(layer: Any, norm: Any) -> bool:
    """True if a batch norm behind ``layer`` can go into its weights."""
    kinds = (layers.Conv2D, layers.Conv3D, layers.Conv2DTranspose, layers.Conv3DTranspose, layers.Dense)
    axis = norm.axis[0] if isinstance(norm.axis, list | tuple) else norm.axis
    rank = len(norm.input_shape)
    return (
        type(layer) in kinds and layer.activation is keras.activations.linear and axis in (-1, rank - 1)
    )


def with_batch_norm(layer: Any, weights: list[np.ndarray], norm: Any) -> list[np.ndarray]:
    """Kernel and bias of ``layer`` with the trained batch norm behind it inside (Jacob et al., 2018, section 3.2)."""
    channels = norm.moving_mean.shape[0]
    gamma = norm.gamma.numpy() if norm.scale else np.ones(channels, np.float32)
    beta = norm.beta.numpy() if norm.center else np.zeros(channels, np.float32)
    scale = gamma / np.sqrt(norm.moving_variance.numpy() + norm.epsilon)
    kernel, bias = weights[0], weights[1] if len(weights) > 1 else 0.0
    transposed = isinstance(layer, layers.Conv2DTranspose | layers.Conv3DTranspose)
    return [kernel * (scale[:, None] if transposed else scale), (bias - norm.moving_mean.numpy()) * scale + beta]


def _bias(weights: Sequence[np.ndarray]) -> list[np.ndarray]:
    return list(weights[1:2])


def _conv3d(walk: _Walk, layer: Any, given: list[Value]) -> Value:
    weights = walk.weights
    if layer.groups != 1:
        raise walk.refusal(layer, f"a convolution in {layer.groups} groups has no known 2D form")
    (size, *plane), (stride, *strides), (dilation, *dilations) = layer.kernel_size, layer.strides, layer.dilation_rate
    value = walk.folded(given[0], layer)
    before, after = same_padding(value.depth, size, stride, dilation) if layer.padding == "same" else (0, 0)
    value = walk.window(value, layer, size=size, stride=stride, before=before, after=after, dilation=dilation)
    kernel = weights[0]
    kernel = kernel.transpose(1, 2, 0, 3, 4).reshape(*plane, size * kernel.shape[3], layer.filters)
    conv = layers.Conv2D(
        layer.filters, plane, strides=strides, padding=layer.padding, dilation_rate=dilations,
        use_bias=len(weights) > 1, activation=layer.activation, name=walk.name(layer.name),
    )  # fmt: skip
    return Value(walk.put(conv, [kernel, *_bias(weights)], value.tensor), value.depth)


def _conv3d_transpose(walk: _Walk, layer: Any, given: list[Value]) -> Value:
    """Output plane ``q * stride + phase`` sums the input planes that reach it: a 2D layer for each phase."""
    weights = walk.weights
    if any(d != 1 for d in layer.dilation_rate) or layer.output_padding is not None:
        raise walk.refusal(layer, "a transposed convolution with dilation or output_padding has no known 2D form")
    (size, *plane), (stride, *strides) = layer.kernel_size, layer.strides
    value = walk.folded(given[0], layer)
    depth = value.depth
    pad = max(size - stride, 0) // 2 if layer.padding == "same" else 0
    planes = depth * stride + (max(size - stride, 0) if layer.padding == "valid" else 0)
    each = -(-planes // stride)
    kernel = weights[0]  # (kd, kh, kw, out, in)
    parts = []
    for phase in range(stride):
        first, base = (phase + pad) % stride, (phase + pad) // stride
        taps = list(range(first, size, stride))[::-1]  # the window's planes rise, and the taps fall with them
        found = [kernel[tap] for tap in taps] or [np.zeros_like(kernel[0])]
        count = len(found)
        seen = walk.window(value, layer, size=count, before=count - 1 - base, after=each + base - depth)
        name = layer.name if stride == 1 else f"{layer.name}_plane{phase}"
        conv = layers.Conv2DTranspose(
            layer.filters, plane, strides=strides, padding=layer.padding,
            use_bias=len(weights) > 1, activation=layer.activation, name=walk.name(name),
        )  # fmt: skip
        parts.append(walk.put(conv, [np.concatenate(found, -1), *_bias(weights)], seen.tensor))
    if stride == 1:
        return Value(parts[0], each)
    value = Value(own.InterleaveDepth(each, name=walk.name(f"{layer.name}_interleave"))(parts), each * stride)
    return walk.window(value, layer, size=1, after=planes - each * stride)


def _pool3d(walk: _Walk, layer: Any, given: list[Value]) -> Value:
    value = walk.folded(given[0], layer)
    (size, *plane), (stride, *strides) = layer.pool_size, layer.strides
    largest = isinstance(layer, layers.MaxPooling3D)
    kind = layers.MaxPooling2D if largest else layers.AveragePooling2D
    x = value.tensor
    if any(n != 1 for n in (*plane, *strides)):
        x = kind(plane, strides, padding=layer.padding, name=walk.name(layer.name))(x)
    if size == stride == 1:
        return Value(x, value.depth)
    before, after = same_padding(value.depth, size, stride) if layer.padding == "same" else (0, 0)
    pool = own.DepthPool(
        value.depth, size, stride, before, after, "max" if largest else "average", name=walk.name(f"{layer.name}_planes")
    )  # fmt: skip
    return Value(pool(x), pool.depth_out)


def _upsample3d(walk: _Walk, layer: Any, given: list[Value]) -> Value:
    value = walk.folded(given[0], layer)
    times, *plane = layer.size
    x = layers.UpSampling2D(plane, name=walk.name(layer.name))(value.tensor)
    if times > 1:
        x = own.InterleaveDepth(value.depth, name=walk.name(f"{layer.name}_interleave"))([x] * times)
    return Value(x, value.depth * times)


def _pad3d(walk: _Walk, layer: Any, given: list[Value]) -> Value:
    value = walk.folded(given[0], layer)
    crop = isinstance(layer, layers.Cropping3D)
    (before, after), *plane = layer.cropping if crop else layer.padding
    kind = layers.Cropping2D if crop else layers.ZeroPadding2D
    x = kind(tuple(plane), name=walk.name(layer.name))(value.tensor) if any(map(any, plane)) else value.tensor
    sign = -1 if crop else 1
    return walk.window(Value(x, value.depth), layer, size=1, before=sign * before, after=sign * after)


def _group_norm(walk: _Walk, layer: Any, given: list[Value]) -> Value:
    weights = walk.weights
    if given[0].depth is None and len(given[0].tensor.shape) < 5:
        return _as_it_is(walk, layer, given)
    value = walk.folded(given[0], layer)
    channels = value.tensor.shape[-1]
    groups = channels if layer.groups == -1 else layer.groups
    if isinstance(layer, layers.GroupNormalization):
        if layer.axis not in (-1, 4):
            raise walk.refusal(layer, f"normalizes along axis {layer.axis}, expected the channels (-1)")
        rest = list(weights)
        gamma = rest.pop(0) if layer.scale else np.ones(channels, np.float32)
        beta = rest.pop(0) if layer.center else np.zeros(channels, np.float32)
        weights = [gamma, beta]
    norm = own.DepthNorm(value.depth, groups, layer.epsilon, name=walk.name(layer.name))
    return Value(walk.put(norm, weights, value.tensor), value.depth)


def _dense(walk: _Walk, layer: Any, given: list[Value]) -> Value:
    if given[0].depth is None and len(given[0].tensor.shape) < 5:
        return _as_it_is(walk, layer, given)
    value, weights = walk.folded(given[0], layer), walk.weights
    conv = layers.Conv2D(
        layer.units, 1, use_bias=len(weights) > 1, activation=layer.activation, name=walk.name(layer.name)
    )
    return Value(walk.put(conv, [weights[0][None, None], *_bias(weights)], value.tensor), value.depth)


def _global_pool3d(walk: _Walk, layer: Any, given: list[Value]) -> Value:
    if layer.keepdims or given[0].depth is None:
        return _unfolded(walk, layer, given)
    mean = isinstance(layer, layers.GlobalAveragePooling3D)
    plane = layers.GlobalAveragePooling2D if mean else layers.GlobalMaxPooling2D
    line = layers.GlobalAveragePooling1D if mean else layers.GlobalMaxPooling1D
    x = plane(name=walk.name(f"{layer.name}_planes"))(given[0].tensor)
    x = own.UnfoldDepth(given[0].depth, name=walk.name("unfold"))(x)
    return Value(line(name=walk.name(layer.name))(x))


def _each_voxel(walk: _Walk, layer: Any, given: list[Value]) -> Value:
    """Layers that know no neighbours: the same on planes."""
    axis = getattr(layer, "axis", -1)
    axis = axis[0] if isinstance(axis, list | tuple) else axis
    rank = len(given[0].tensor.shape) + (given[0].depth is not None)
    if axis not in (-1, rank - 1):
        return _unfolded(walk, layer, given)
    if any(v.depth is not None for v in given) and all(v.depth is not None or len(v.tensor.shape) == 5 for v in given):
        given = [walk.folded(v, layer) for v in given]
    elif any(v.depth is not None for v in given):
        given = [walk.plain(v) for v in given]
    config = _config(walk, layer)
    if "axis" in config:
        config["axis"] = -1
    return _apply(walk, type(layer).from_config(config), walk.weights, given)


def _prelu(walk: _Walk, layer: Any, given: list[Value]) -> Value:
    if given[0].depth is None:
        return _as_it_is(walk, layer, given)
    if layer.shared_axes is None or not {1, 2, 3} <= set(layer.shared_axes):
        raise walk.refusal(layer, "a PReLU with a slope for each voxel has no known 2D form (set shared_axes=[1, 2, 3])")
    config = _config(walk, layer) | {"shared_axes": [a - 1 for a in layer.shared_axes if a > 1]}
    return _apply(walk, layers.PReLU.from_config(config), [walk.weights[0][0]], given)


def _nothing(walk: _Walk, layer: Any, given: list[Value]) -> Value:
    """Layers of training only."""
    return given[0]


def _unfolded(walk: _Walk, layer: Any, given: list[Value]) -> Value:
    """Layers that want the tensor as it was."""
    return _as_it_is(walk, layer, [walk.plain(v) for v in given])


def _as_it_is(walk: _Walk, layer: Any, given: list[Value]) -> Value:
    weights, config = walk.weights, _config(walk, layer)
    if len(weights) > len(layer.get_weights()):
        config["use_bias"] = True  # of a batch norm that went into it
    return _apply(walk, type(layer).from_config(config), weights, given)


def _config(walk: _Walk, layer: Any) -> dict[str, Any]:
    """Settings of a copy: its own name, float32 whatever it was trained in."""
    return layer.get_config() | {"name": walk.name(layer.name), "dtype": "float32"}


def _apply(walk: _Walk, copy: Any, weights: Sequence[np.ndarray], given: list[Value]) -> Value:
    tensors = [v.tensor for v in given]
    depth = given[0].depth
    return Value(walk.put(copy, weights, tensors if len(tensors) > 1 else tensors[0]), depth)


RULES: dict[type, Rule] = {
    layers.Conv3D: _conv3d,
    layers.Conv3DTranspose: _conv3d_transpose,
    layers.MaxPooling3D: _pool3d,
    layers.AveragePooling3D: _pool3d,
    layers.UpSampling3D: _upsample3d,
    layers.ZeroPadding3D: _pad3d,
    layers.Cropping3D: _pad3d,
    layers.GlobalAveragePooling3D: _global_pool3d,
    layers.GlobalMaxPooling3D: _global_pool3d,
    GroupNorm: _group_norm,
    layers.GroupNormalization: _group_norm,
    layers.Dense: _dense,
    layers.PReLU: _prelu,
    Dropout: _nothing,
    **dict.fromkeys(
        (layers.Dropout, layers.SpatialDropout1D, layers.SpatialDropout2D, layers.SpatialDropout3D, layers.GaussianNoise,
         layers.GaussianDropout, layers.AlphaDropout, layers.ActivityRegularization),
        _nothing,
    ),
    **dict.fromkeys(
        (layers.ReLU, layers.LeakyReLU, layers.ELU, layers.ThresholdedReLU, layers.Activation, layers.Softmax,
         layers.BatchNormalization, layers.LayerNormalization, layers.Rescaling, layers.Add, layers.Subtract,
         layers.Multiply, layers.Average, layers.Maximum, layers.Minimum, layers.Concatenate),
        _each_voxel,
    ),
    **dict.fromkeys((layers.Flatten, layers.Reshape, layers.Permute), _unfolded),
    # Of a net that is lowered already.
    **dict.fromkeys(
        (own.FoldDepth, own.UnfoldDepth, own.DepthWindow, own.InterleaveDepth, own.DepthPool, own.DepthNorm), _as_it_is
    ),
}  # fmt: skip
"""Layer classes and how they become 2D. An own layer of a user's net can be added here."""
