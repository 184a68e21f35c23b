"""A functional Keras network as an ONNX graph, channels first inside: what ONNX Runtime's kernels want.

Keras tensors are channels last, ``(N, ..., C)``; here they are ``(N, C, ...)``, and in a lowered network N is the depth of the one volume.
Only where a layer mixes channels and places (flattening, the output) are values brought back to Keras' order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from ..errors import RunError
from ..inference.exported import INPUT, OUTPUT
from ..lowering import layers as own
from ..lowering.lower import same_padding
from ..models.blocks import Dropout, GroupNorm
from ..models.graph import check_functional
from ..models.spec import ModelSpec

OPSET, IR = 17, 8
layers = tf.keras.layers


def make(model: Any, spec: ModelSpec) -> Any:
    """The ONNX model: input ``image (1, D, H, W, C)``, output ``probabilities`` in Keras' order.

    Args:
        model: gives logits; as trained, or lowered.

    Raises:
        RunError: a layer that is not known here, named.
    """
    from onnx import TensorProto, checker, helper

    check_functional(model)
    shape = [1, *spec.patch, spec.channels]
    writer = _Writer(model.name)
    name = writer.run(model, INPUT, shape)
    rank = len(writer.shapes[name])
    logits = writer.last(name) if rank > 2 else name
    writer.node("Softmax", [logits], OUTPUT, axis=-1)
    answer = _final_shape(model, shape)
    graph = helper.make_graph(
        writer.nodes, spec.model.name.split(":")[-1],
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, answer)], writer.constants,
    )  # fmt: skip
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR, producer_name="hvd_imaging")
    checker.check_model(made)
    return made


def _final_shape(model: Any, shape: Sequence[int]) -> list[int]:
    return [int(side) for side in model.compute_output_shape(tuple(shape))]


Rule = Callable[["_Writer", Any, list[str]], str]


class _Writer:
    """Nodes and constants, and the channels-first shape of every value."""

    def __init__(self, network: str) -> None:
        self.network, self.nodes, self.constants = network, [], []  # type: ignore[var-annotated]
        self.shapes: dict[str, list[int]] = {}
        self.count = 0

    def run(self, model: Any, name: str, shape: Sequence[int]) -> str:
        """Write all layers; returns the value of the output."""
        (given,) = model.inputs
        self.shapes[name] = list(shape)
        values = {id(given): self.first(name)}
        for depth in sorted(model._nodes_by_depth, reverse=True):
            for node in model._nodes_by_depth[depth]:
                if not node.keras_inputs:
                    continue
                (output,) = tf.nest.flatten(node.outputs)
                values[id(output)] = self.one(node.layer, [values[id(t)] for t in node.keras_inputs])
        return values[id(model.outputs[0])]

    def one(self, layer: Any, given: list[str]) -> str:
        for kind in type(layer).__mro__:
            rule = RULES.get(kind)
            if rule is not None:
                if getattr(layer, "data_format", "channels_last") != "channels_last":
                    break
                return rule(self, layer, given)
        raise RunError(
            f"network '{self.network}', layer '{layer.name}': {type(layer).__name__} is not known to the ONNX writer; replace it, "
            "or export --format savedmodel, which takes any network"
        )

    def node(self, kind: str, inputs: Sequence[str], output: str = "", **attributes: Any) -> str:
        """Add a node; returns its output's name."""
        from onnx import helper

        self.count += 1
        output = output or f"{kind.lower()}_{self.count}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], name=f"node_{self.count}", **attributes))
        return output

    def constant(self, values: Any, kind: type = np.float32) -> str:
        """Add a constant; returns its name."""
        from onnx import numpy_helper

        self.count += 1
        name = f"constant_{self.count}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(values, kind), name))
        return name

    def put(self, kind: str, inputs: Sequence[str], shape: Sequence[int], **attributes: Any) -> str:
        """Add a node whose output has ``shape``."""
        name = self.node(kind, inputs, **attributes)
        self.shapes[name] = [int(side) for side in shape]
        return name

    def transpose(self, name: str, order: Sequence[int]) -> str:
        return self.put("Transpose", [name], [self.shapes[name][axis] for axis in order], perm=list(order))

    def first(self, name: str) -> str:
        """Channels last -> channels first."""
        rank = len(self.shapes[name])
        return self.transpose(name, [0, rank - 1, *range(1, rank - 1)])

    def last(self, name: str) -> str:
        """Channels first -> channels last."""
        rank = len(self.shapes[name])
        return self.transpose(name, [0, *range(2, rank), 1])

    def reshape(self, name: str, shape: Sequence[int]) -> str:
        return self.put("Reshape", [name, self.constant(shape, np.int64)], shape)

    def slice(self, name: str, axis: int, start: int, stop: int, step: int = 1) -> str:
        shape = list(self.shapes[name])
        shape[axis] = len(range(start, stop, step))
        bounds = [self.constant([value], np.int64) for value in (start, stop, axis, step)]
        return self.put("Slice", [name, *bounds], shape)

    def pad(self, name: str, pads: Sequence[tuple[int, int]]) -> str:
        """Zeros on every axis: (before, after)."""
        if not any(map(any, pads)):
            return name
        flat = [before for before, _ in pads] + [after for _, after in pads]
        shape = [side + a + b for side, (a, b) in zip(self.shapes[name], pads, strict=True)]
        return self.put("Pad", [name, self.constant(flat, np.int64)], shape)

    def activate(self, layer: Any, name: str) -> str:
        return self.activation(layer, getattr(layer, "activation", None), name)

    def activation(self, layer: Any, function: Any, name: str) -> str:
        """An activation by its Keras function."""
        kind = getattr(function, "__name__", "linear")
        shape = self.shapes[name]
        simple = {"relu": "Relu", "sigmoid": "Sigmoid", "tanh": "Tanh", "softplus": "Softplus", "elu": "Elu"}
        if kind == "linear":
            return name
        if kind in simple:
            return self.put(simple[kind], [name], shape)
        if kind == "softmax":
            return self.put("Softmax", [name], shape, axis=1)
        if kind in ("swish", "silu"):
            return self.put("Mul", [name, self.put("Sigmoid", [name], shape)], shape)
        raise RunError(
            f"network '{self.network}', layer '{layer.name}': the activation {kind} is not known to the ONNX writer; use one of "
            f"{', '.join(simple)}, or export --format savedmodel"
        )


def _conv(w: _Writer, layer: Any, given: list[str]) -> str:
    kernel, *bias = layer.get_weights()
    axes = len(layer.kernel_size)
    shape = w.shapes[given[0]]
    sides = shape[2:]
    if layer.padding == "same":
        pads = [same_padding(*each) for each in zip(sides, layer.kernel_size, layer.strides, layer.dilation_rate, strict=True)]
    else:
        pads = [(0, 0)] * axes
    out = [
        (side + a + b - (size - 1) * dilation - 1) // stride + 1
        for side, (a, b), size, stride, dilation in zip(
            sides, pads, layer.kernel_size, layer.strides, layer.dilation_rate, strict=True
        )
    ]
    weights = kernel.transpose(axes + 1, axes, *range(axes))
    found = w.put(
        "Conv", [given[0], w.constant(weights), *[w.constant(b) for b in bias]], [shape[0], layer.filters, *out],
        kernel_shape=list(layer.kernel_size), strides=list(layer.strides), dilations=list(layer.dilation_rate), group=layer.groups,
        pads=[a for a, _ in pads] + [b for _, b in pads],
    )  # fmt: skip
    return w.activate(layer, found)


def _conv_transpose(w: _Writer, layer: Any, given: list[str]) -> str:
    kernel, *bias = layer.get_weights()
    axes = len(layer.kernel_size)
    shape = w.shapes[given[0]]
    if any(d != 1 for d in layer.dilation_rate) or layer.output_padding is not None:
        raise RunError(f"network '{w.network}', layer '{layer.name}': dilation and output_padding are not known to the ONNX writer")
    out, pads, more = [], [], []
    for side, size, stride in zip(shape[2:], layer.kernel_size, layer.strides, strict=True):
        extra = max(size - stride, 0)
        before = extra // 2 if layer.padding == "same" else 0
        after = extra - before if layer.padding == "same" else 0
        wanted = side * stride + (extra if layer.padding == "valid" else 0)
        whole = (side - 1) * stride + size - before - after
        pads.append((before, after))
        more.append(wanted - whole)
        out.append(wanted)
    found = w.put(
        "ConvTranspose",
        [given[0], w.constant(kernel.transpose(axes + 1, axes, *range(axes))), *[w.constant(b) for b in bias]],
        [shape[0], layer.filters, *out],
        kernel_shape=list(layer.kernel_size), strides=list(layer.strides), output_padding=more,
        pads=[a for a, _ in pads] + [b for _, b in pads],
    )  # fmt: skip
    return w.activate(layer, found)


def _dense(w: _Writer, layer: Any, given: list[str]) -> str:
    kernel, *bias = layer.get_weights()
    shape = w.shapes[given[0]]
    if len(shape) == 2:
        inputs = [given[0], w.constant(kernel), *[w.constant(b) for b in bias]]
        return w.activate(layer, w.put("Gemm", inputs, [shape[0], layer.units]))
    ones = [1] * (len(shape) - 2)
    weights = kernel.T.reshape(layer.units, kernel.shape[0], *ones)
    inputs = [given[0], w.constant(weights), *[w.constant(b) for b in bias]]
    return w.activate(layer, w.put("Conv", inputs, [shape[0], layer.units, *shape[2:]], kernel_shape=ones))


def _pool(w: _Writer, layer: Any, given: list[str]) -> str:
    largest = isinstance(layer, layers.MaxPooling1D | layers.MaxPooling2D | layers.MaxPooling3D)
    shape = w.shapes[given[0]]
    pads, out = [], []
    for side, size, stride in zip(shape[2:], _sides(layer.pool_size), _sides(layer.strides), strict=True):
        pad = same_padding(side, size, stride) if layer.padding == "same" else (0, 0)
        pads.append(pad)
        out.append((side + sum(pad) - size) // stride + 1)
    return w.put(
        "MaxPool" if largest else "AveragePool", [given[0]], [*shape[:2], *out], kernel_shape=list(_sides(layer.pool_size)),
        strides=list(_sides(layer.strides)), pads=[a for a, _ in pads] + [b for _, b in pads],
    )  # fmt: skip


def _sides(value: Any) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _global(kind: str) -> Rule:
    def rule(w: _Writer, layer: Any, given: list[str]) -> str:
        shape = w.shapes[given[0]]
        axes = list(range(2, len(shape)))
        keep = bool(layer.keepdims)
        out = [*shape[:2], *([1] * len(axes) if keep else [])]
        return w.put(kind, [given[0]], out, axes=axes, keepdims=int(keep))

    return rule


def _upsample(w: _Writer, layer: Any, given: list[str]) -> str:
    if getattr(layer, "interpolation", "nearest") != "nearest":
        raise RunError(f"network '{w.network}', layer '{layer.name}': the ONNX writer knows interpolation='nearest' only")
    shape, sizes = w.shapes[given[0]], _sides(layer.size)
    out = [*shape[:2], *[side * size for side, size in zip(shape[2:], sizes, strict=True)]]
    return w.put(
        "Resize", [given[0], "", w.constant([1, 1, *sizes])], out, mode="nearest", nearest_mode="floor",
        coordinate_transformation_mode="asymmetric",
    )  # fmt: skip


def _pad(w: _Writer, layer: Any, given: list[str]) -> str:
    return w.pad(given[0], [(0, 0), (0, 0), *layer.padding])


def _crop(w: _Writer, layer: Any, given: list[str]) -> str:
    name = given[0]
    for axis, (before, after) in enumerate(layer.cropping, 2):
        if before or after:
            name = w.slice(name, axis, before, w.shapes[name][axis] - after)
    return name


def _relu(w: _Writer, layer: Any, given: list[str]) -> str:
    shape = w.shapes[given[0]]
    if layer.threshold or (layer.negative_slope and layer.max_value is not None):
        raise RunError(f"network '{w.network}', layer '{layer.name}': a ReLU with a threshold is not known to the ONNX writer")
    if layer.negative_slope:
        return w.put("LeakyRelu", given, shape, alpha=float(layer.negative_slope))
    if layer.max_value is not None:
        return w.put("Clip", [given[0], w.constant(0.0), w.constant(float(layer.max_value))], shape)
    return w.put("Relu", given, shape)


def _leaky(w: _Writer, layer: Any, given: list[str]) -> str:
    return w.put("LeakyRelu", given, w.shapes[given[0]], alpha=float(layer.alpha))


def _elu(w: _Writer, layer: Any, given: list[str]) -> str:
    return w.put("Elu", given, w.shapes[given[0]], alpha=float(layer.alpha))


def _softmax(w: _Writer, layer: Any, given: list[str]) -> str:
    if layer.axis not in (-1, len(w.shapes[given[0]]) - 1):
        raise RunError(f"network '{w.network}', layer '{layer.name}': the ONNX writer knows a softmax of channels (axis=-1) only")
    return w.put("Softmax", given, w.shapes[given[0]], axis=1)


def _average(w: _Writer, layer: Any, given: list[str]) -> str:
    total = _join("Add")(w, layer, given)
    return w.put("Mul", [total, w.constant(1.0 / len(given))], w.shapes[total])


def _activation(w: _Writer, layer: Any, given: list[str]) -> str:
    return w.activate(layer, given[0])


def _join(kind: str) -> Rule:
    def rule(w: _Writer, layer: Any, given: list[str]) -> str:
        name = given[0]
        for other in given[1:]:
            name = w.put(kind, [name, other], np.broadcast_shapes(w.shapes[name], w.shapes[other]))
        return name

    return rule


def _concatenate(w: _Writer, layer: Any, given: list[str]) -> str:
    rank = len(w.shapes[given[0]])
    axis = layer.axis % rank
    axis = 1 if axis == rank - 1 else axis if axis == 0 else axis + 1
    shape = list(w.shapes[given[0]])
    shape[axis] = sum(w.shapes[name][axis] for name in given)
    return w.put("Concat", given, shape, axis=axis)


def _flatten(w: _Writer, layer: Any, given: list[str]) -> str:
    name = given[0] if len(w.shapes[given[0]]) == 2 else w.last(given[0])
    shape = w.shapes[name]
    return w.reshape(name, [shape[0], int(np.prod(shape[1:]))])


def _reshape(w: _Writer, layer: Any, given: list[str]) -> str:
    name = given[0] if len(w.shapes[given[0]]) == 2 else w.last(given[0])
    shape = [w.shapes[name][0], *[int(side) for side in layer.compute_output_shape(tuple(w.shapes[name]))[1:]]]
    name = w.reshape(name, shape)
    return name if len(shape) == 2 else w.first(name)


def _batch_norm(w: _Writer, layer: Any, given: list[str]) -> str:
    mean, variance = layer.moving_mean.numpy(), layer.moving_variance.numpy()
    scale = (layer.gamma.numpy() if layer.scale else 1.0) / np.sqrt(variance + layer.epsilon)
    shift = (layer.beta.numpy() if layer.center else 0.0) - mean * scale
    return _affine(w, given[0], w.constant(_across(scale, w.shapes[given[0]])), w.constant(_across(shift, w.shapes[given[0]])))


def _across(values: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """``(C,)`` as it meets a channels-first value."""
    return np.reshape(values, (1, -1, *[1] * (len(shape) - 2)))


def _affine(w: _Writer, name: str, scale: str, shift: str) -> str:
    shape = w.shapes[name]
    return w.put("Add", [w.put("Mul", [name, scale], shape), shift], shape)


def _group_norm(w: _Writer, layer: Any, given: list[str]) -> str:
    """Statistics over a group's channels and all voxels; in a lowered network the planes are in the batch axis."""
    planes = isinstance(layer, own.DepthNorm)
    name, shape = given[0], w.shapes[given[0]]
    channels = shape[1]
    axes = ([0] if planes else []) + list(range(2, len(shape)))
    one = [1 if axis in axes else side for axis, side in enumerate(shape)]
    mean = w.put("ReduceMean", [name], one, axes=axes, keepdims=1)
    difference = w.put("Sub", [name, mean], shape)
    variance = w.put("ReduceMean", [w.put("Mul", [difference, difference], shape)], one, axes=axes, keepdims=1)
    if layer.groups != channels:
        each = channels // layer.groups
        groups = [one[0], layer.groups, each]

        def spread(value: str) -> str:
            wide = [one[0], layer.groups, each]
            value = w.put("Expand", [value, w.constant(wide, np.int64)], wide)
            return w.reshape(value, one)

        means, variances = w.reshape(mean, groups), w.reshape(variance, groups)
        middle = w.put("ReduceMean", [means], [one[0], layer.groups, 1], axes=[2], keepdims=1)
        apart = w.put("Sub", [means, middle], groups)
        inner = w.put("Add", [variances, w.put("Mul", [apart, apart], groups)], groups)
        variance = spread(w.put("ReduceMean", [inner], [one[0], layer.groups, 1], axes=[2], keepdims=1))
        mean = spread(middle)
    gamma, beta = layer.get_weights()
    deviation = w.put("Sqrt", [w.put("Add", [variance, w.constant(float(layer.epsilon))], one)], one)
    scale = w.put("Div", [w.constant(_across(gamma, shape)), deviation], one)
    shift = w.put("Sub", [w.constant(_across(beta, shape)), w.put("Mul", [mean, scale], one)], one)
    return _affine(w, name, scale, shift)


def _fold(w: _Writer, layer: Any, given: list[str]) -> str:
    """(1, C, D, H, W) -> (D, C, H, W)."""
    _, c, d, h, width = w.shapes[given[0]]
    return w.reshape(w.transpose(given[0], [0, 2, 1, 3, 4]), [d, c, h, width])


def _unfold(w: _Writer, layer: Any, given: list[str]) -> str:
    """(D, C, H, W) -> (1, C, D, H, W), and (D, C) -> (1, C, D)."""
    shape = w.shapes[given[0]]
    return w.transpose(w.reshape(given[0], [1, *shape]), [0, 2, 1, *range(3, len(shape) + 1)])


def _window(w: _Writer, layer: Any, given: list[str]) -> str:
    name = w.pad(given[0], [(max(layer.before, 0), max(layer.after, 0))] + [(0, 0)] * (len(w.shapes[given[0]]) - 1))
    parts = []
    for k in range(layer.size):
        first = k * layer.dilation + max(-layer.before, 0)
        parts.append(w.slice(name, 0, first, first + (layer.depth_out - 1) * layer.stride + 1, layer.stride))
    if len(parts) == 1:
        return parts[0]
    shape = w.shapes[parts[0]]
    return w.put("Concat", parts, [shape[0], shape[1] * len(parts), *shape[2:]], axis=1)


def _interleave(w: _Writer, layer: Any, given: list[str]) -> str:
    if len(given) == 1:
        return given[0]
    depth, *rest = w.shapes[given[0]]
    flat = [w.reshape(name, [depth, 1, int(np.prod(rest))]) for name in given]
    joined = w.put("Concat", flat, [depth, len(given), int(np.prod(rest))], axis=1)
    return w.reshape(joined, [depth * len(given), *rest])


def _depth_pool(w: _Writer, layer: Any, given: list[str]) -> str:
    largest = layer.kind == "max"
    planes = []
    for out in range(layer.depth_out):
        first = out * layer.stride - layer.before
        inside = (max(first, 0), min(first + layer.size, layer.depth))
        part = w.slice(given[0], 0, *inside)
        shape = [1, *w.shapes[part][1:]]
        planes.append(w.put("ReduceMax" if largest else "ReduceMean", [part], shape, axes=[0], keepdims=1))
    return w.put("Concat", planes, [len(planes), *w.shapes[planes[0]][1:]], axis=0) if len(planes) > 1 else planes[0]


def _nothing(w: _Writer, layer: Any, given: list[str]) -> str:
    return given[0]


RULES: dict[type, Rule] = {
    **dict.fromkeys((layers.Conv1D, layers.Conv2D, layers.Conv3D), _conv),
    **dict.fromkeys((layers.Conv2DTranspose, layers.Conv3DTranspose), _conv_transpose),
    layers.Dense: _dense,
    **dict.fromkeys(
        (layers.MaxPooling1D, layers.MaxPooling2D, layers.MaxPooling3D, layers.AveragePooling1D, layers.AveragePooling2D,
         layers.AveragePooling3D),
        _pool,
    ),
    **dict.fromkeys(
        (layers.GlobalAveragePooling1D, layers.GlobalAveragePooling2D, layers.GlobalAveragePooling3D), _global("ReduceMean")
    ),
    **dict.fromkeys((layers.GlobalMaxPooling1D, layers.GlobalMaxPooling2D, layers.GlobalMaxPooling3D), _global("ReduceMax")),
    **dict.fromkeys((layers.UpSampling2D, layers.UpSampling3D), _upsample),
    **dict.fromkeys((layers.ZeroPadding2D, layers.ZeroPadding3D), _pad),
    **dict.fromkeys((layers.Cropping2D, layers.Cropping3D), _crop),
    layers.ReLU: _relu,
    layers.LeakyReLU: _leaky,
    layers.ELU: _elu,
    layers.Softmax: _softmax,
    layers.Activation: _activation,
    layers.Add: _join("Add"),
    layers.Multiply: _join("Mul"),
    layers.Subtract: _join("Sub"),
    layers.Maximum: _join("Max"),
    layers.Minimum: _join("Min"),
    layers.Average: _average,
    layers.Concatenate: _concatenate,
    layers.Flatten: _flatten,
    layers.Reshape: _reshape,
    layers.BatchNormalization: _batch_norm,
    GroupNorm: _group_norm,
    own.DepthNorm: _group_norm,
    own.FoldDepth: _fold,
    own.UnfoldDepth: _unfold,
    own.DepthWindow: _window,
    own.InterleaveDepth: _interleave,
    own.DepthPool: _depth_pool,
    **dict.fromkeys(
        (Dropout, layers.Dropout, layers.SpatialDropout1D, layers.SpatialDropout2D, layers.SpatialDropout3D, layers.GaussianNoise,
         layers.GaussianDropout, layers.AlphaDropout, layers.ActivityRegularization),
        _nothing,
    ),
}  # fmt: skip
