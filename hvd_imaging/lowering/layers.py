"""Layers of lowered networks: planes of a volume stand in the batch axis, so that 2D layers work on all of them at once.

A folded tensor is ``(N * D, H, W, C)``: plane ``d`` of sample ``n`` is row ``n * D + d``. All layers here only move, pad or
reduce planes; what is learned stays in Keras' own 2D layers, which every runtime has in integers too.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

keras = tf.keras
layers = keras.layers


class _Planes(layers.Layer):
    """Base of layers on folded tensors; ``depth`` is D of the input."""

    def __init__(self, depth: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.depth = depth

    def _unfold(self, x):
        return tf.reshape(x, (-1, self.depth, *x.shape[1:]))

    def _fold(self, x):
        return tf.reshape(x, (-1, *x.shape[2:]))

    def _alone(self, x) -> bool:
        """True if the batch is known to be one sample: then the planes' axis is the batch axis, with no reshape."""
        return x.shape[0] == self.depth

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "depth": self.depth}


@keras.utils.register_keras_serializable("hvd_imaging")
class FoldDepth(layers.Layer):
    """``(N, D, H, W, C)`` -> ``(N * D, H, W, C)``."""

    def call(self, x):
        n, d = x.shape[:2]
        return tf.reshape(x, (n * d if n is not None else -1, *x.shape[2:]))


@keras.utils.register_keras_serializable("hvd_imaging")
class UnfoldDepth(_Planes):
    """``(N * D, ...)`` -> ``(N, D, ...)``."""

    def call(self, x):
        return tf.reshape(x, (1 if self._alone(x) else -1, self.depth, *x.shape[1:]))


@keras.utils.register_keras_serializable("hvd_imaging")
class DepthWindow(_Planes):
    """Neighbouring planes become channels: ``(N * D, H, W, C)`` -> ``(N * Do, H, W, size * C)``.

    Output plane ``o`` holds planes ``o * stride + k * dilation - before`` for k = 0 .. size - 1, plane after plane; outside of the
    volume they are zeros. Do = (before + D + after - dilation * (size - 1) - 1) // stride + 1. ``before`` and ``after`` may be
    negative: so many planes are left out.
    """

    def __init__(
        self, depth: int, size: int, stride: int = 1, before: int = 0, after: int = 0, dilation: int = 1, **kwargs: Any
    ) -> None:
        super().__init__(depth, **kwargs)
        self.size, self.stride, self.before, self.after, self.dilation = size, stride, before, after, dilation

    @property
    def depth_out(self) -> int:
        """Do, planes of the output."""
        return (self.before + self.depth + self.after - self.dilation * (self.size - 1) - 1) // self.stride + 1

    def call(self, x):
        alone = self._alone(x)
        x = x if alone else self._unfold(x)
        axis = 0 if alone else 1
        if self.before > 0 or self.after > 0:
            pads = [[0, 0] for _ in x.shape]
            pads[axis] = [max(self.before, 0), max(self.after, 0)]
            x = tf.pad(x, pads)
        found = []
        for k in range(self.size):
            first = k * self.dilation + max(-self.before, 0)
            part = slice(first, first + (self.depth_out - 1) * self.stride + 1, self.stride)
            found.append(x[part] if alone else x[:, part])
        x = tf.concat(found, -1) if len(found) > 1 else found[0]
        return x if alone else self._fold(x)

    def get_config(self) -> dict[str, Any]:
        own = {"size": self.size, "stride": self.stride, "before": self.before, "after": self.after, "dilation": self.dilation}
        return {**super().get_config(), **own}


@keras.utils.register_keras_serializable("hvd_imaging")
class InterleaveDepth(_Planes):
    """s tensors ``(N * D, H, W, C)`` -> ``(N * D * s, H, W, C)``: plane ``d * s + i`` is plane ``d`` of tensor ``i``."""

    def call(self, inputs):
        if not isinstance(inputs, list | tuple):
            return inputs
        # As rows of bytes: joining whole planes is one copy, a transposition would move single voxels.
        shape = inputs[0].shape
        flat = [tf.reshape(x, (shape[0] if shape[0] is not None else -1, 1, shape[1] * shape[2] * shape[3])) for x in inputs]
        planes = shape[0] * len(inputs) if shape[0] is not None else -1
        return tf.reshape(tf.concat(flat, 1), (planes, *shape[1:]))


@keras.utils.register_keras_serializable("hvd_imaging")
class DepthPool(_Planes):
    """Pooling along the depth: ``(N * D, H, W, C)`` -> ``(N * Do, H, W, C)``, ``kind`` "max" or "average".

    ``before`` and ``after`` planes of padding are left out of maximum and mean, as Keras' "same" padding does.
    """

    def __init__(
        self, depth: int, size: int, stride: int, before: int = 0, after: int = 0, kind: str = "max", **kwargs: Any
    ) -> None:
        super().__init__(depth, **kwargs)
        self.size, self.stride, self.before, self.after, self.kind = size, stride, before, after, kind

    @property
    def depth_out(self) -> int:
        """Do, planes of the output."""
        return (self.before + self.depth + self.after - self.size) // self.stride + 1

    def call(self, x):
        alone = self._alone(x)
        x = x if alone else self._unfold(x)
        planes = []
        for out in range(self.depth_out):
            first = out * self.stride - self.before
            planes.append((max(first, 0), min(first + self.size, self.depth)))
        reduce = tf.reduce_max if self.kind == "max" else tf.reduce_mean
        axis = 0 if alone else 1
        if self.before == self.after == 0:
            # Regular windows: few large operations instead of one for each plane.
            last = (self.depth_out - 1) * self.stride + 1
            parts = [x[k : k + last : self.stride] if alone else x[:, k : k + last : self.stride] for k in range(self.size)]
            found = parts[0]
            for part in parts[1:]:
                found = tf.maximum(found, part) if self.kind == "max" else found + part
            found = found if self.kind == "max" else found * (1.0 / self.size)
        else:
            found = tf.concat(
                [reduce(x[a:b] if alone else x[:, a:b], axis, keepdims=True) for a, b in planes], axis
            )
        return found if alone else self._fold(found)

    def get_config(self) -> dict[str, Any]:
        own = {"size": self.size, "stride": self.stride, "before": self.before, "after": self.after, "kind": self.kind}
        return {**super().get_config(), **own}


@keras.utils.register_keras_serializable("hvd_imaging")
class DepthNorm(_Planes):
    """`models.blocks.GroupNorm` on a folded tensor: statistics over the group's channels and all voxels of a sample.

    Stays in float32 in every export: its statistics are of the image at hand, so no range can be calibrated for them.
    """

    def __init__(self, depth: int, groups: int, epsilon: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(depth, **kwargs)
        self.groups, self.epsilon = groups, epsilon

    def build(self, input_shape) -> None:
        channels = int(input_shape[-1])
        self.gamma = self.add_weight("gamma", (channels,), initializer="ones")
        self.beta = self.add_weight("beta", (channels,), initializer="zeros")

    def call(self, x):
        alone, channels = self._alone(x), x.shape[-1]
        y = x[None] if alone else self._unfold(x)
        mean = tf.reduce_mean(y, [1, 2, 3])
        variance = tf.reduce_mean(tf.math.squared_difference(y, mean[:, None, None, None, :]), [1, 2, 3])
        if self.groups != channels:
            flat = [-1, self.groups, channels // self.groups]
            means, variances = tf.reshape(mean, flat), tf.reshape(variance, flat)
            group = tf.reduce_mean(means, 2, keepdims=True)
            spread = tf.reduce_mean(variances + tf.math.squared_difference(means, group), 2, keepdims=True)
            mean = tf.reshape(tf.repeat(group, channels // self.groups, 2), [-1, channels])
            variance = tf.reshape(tf.repeat(spread, channels // self.groups, 2), [-1, channels])
        scale = tf.math.rsqrt(variance + self.epsilon) * self.gamma
        offset = self.beta - mean * scale
        if alone:
            return x * scale + offset
        return self._fold(y * scale[:, None, None, None, :] + offset[:, None, None, None, :])

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "groups": self.groups, "epsilon": self.epsilon}
