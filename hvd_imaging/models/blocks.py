"""Layers that the networks share. All of them export to TFLite's built-in operations."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

keras = tf.keras
layers = keras.layers


@keras.utils.register_keras_serializable("hvd_imaging")
class GroupNorm(layers.Layer):
    """Group normalization (Wu and He, 2018) with statistics over the group's channels and all voxels of one sample.

    ``groups`` = channels is instance normalization. Input and output ``(N, ..., C)``. Computed in float32. No value
    depends on other samples of the batch, so the way a global batch is split over ranks cannot change the result.
    """

    def __init__(self, groups: int, epsilon: float = 1e-5, **kwargs) -> None:
        super().__init__(**kwargs)
        self.groups, self.epsilon = groups, epsilon

    def build(self, input_shape) -> None:
        channels = int(input_shape[-1])
        if channels % self.groups:
            raise ValueError(f"{channels} channels cannot be cut into {self.groups} groups")
        self.gamma = self.add_weight("gamma", (channels,), initializer="ones")
        self.beta = self.add_weight("beta", (channels,), initializer="zeros")

    def call(self, x):
        channels, kind = x.shape[-1], x.dtype
        x = tf.cast(x, tf.float32)
        voxels = list(range(1, len(x.shape) - 1))
        # Moments by channel first, then by group: no 6-dimensional tensors, which TFLite does not take.
        mean = tf.reduce_mean(x, voxels, keepdims=True)
        variance = tf.reduce_mean(tf.math.squared_difference(x, mean), voxels, keepdims=True)
        if self.groups != channels:
            flat = [-1, self.groups, channels // self.groups]
            means, variances = tf.reshape(mean, flat), tf.reshape(variance, flat)
            group = tf.reduce_mean(means, 2, keepdims=True)
            spread = tf.reduce_mean(variances + tf.math.squared_difference(means, group), 2, keepdims=True)
            one = [-1, *[1] * len(voxels), channels]
            mean = tf.reshape(tf.repeat(group, channels // self.groups, 2), one)
            variance = tf.reshape(tf.repeat(spread, channels // self.groups, 2), one)
        scale = tf.math.rsqrt(variance + self.epsilon) * tf.cast(self.gamma, tf.float32)
        return tf.cast(x * scale + (tf.cast(self.beta, tf.float32) - mean * scale), kind)

    def get_config(self):
        return {**super().get_config(), "groups": self.groups, "epsilon": self.epsilon}


_draws: list[Any] = []


@contextlib.contextmanager
def draws(of_rows: Any) -> Iterator[None]:
    """Seeds of the batch's rows, int32 ``(N, 2)``, for the random layers of a network called inside."""
    _draws.append(of_rows)
    try:
        yield
    finally:
        _draws.pop()


@keras.utils.register_keras_serializable("hvd_imaging")
class Dropout(layers.Layer):
    """Dropout (Srivastava et al., 2014) whose draws belong to the sample: no rank, no batch and no resume changes them.

    ``spatial`` drops whole channels. Input and output ``(N, ..., C)``. Outside :func:`draws` it draws from the clock. Slices of a
    volume ``(N, D, H, W, C)`` have draws of their own, so that a slab that begins at slice ``first`` drops what the volume would.
    """

    def __init__(self, rate: float, spatial: bool = False, **kwargs) -> None:
        super().__init__(**kwargs)
        self.rate, self.spatial = rate, spatial

    def call(self, x, training=None, first=0):
        if not training or not self.rate:
            return x
        shape = [1] * (len(x.shape) - 2) + [x.shape[-1]] if self.spatial else x.shape[1:]
        if _draws:
            seeds = _draws[-1] + tf.constant([0, zlib.crc32(self.name.encode()) & 0x7FFFFFFF], tf.int32)

            def uniform(seed):
                if self.spatial or len(x.shape) != 5:
                    return tf.random.stateless_uniform(shape, seed)
                fold = tf.random.experimental.stateless_fold_in
                slices = tf.range(first, first + x.shape[1])
                return tf.map_fn(lambda z: tf.random.stateless_uniform(shape[1:], fold(seed, z)), slices, fn_output_signature=tf.float32)

            draw = tf.map_fn(uniform, seeds, fn_output_signature=tf.float32)
        else:
            draw = tf.random.uniform([tf.shape(x)[0], *shape])
        return tf.where(draw >= self.rate, x / (1 - self.rate), tf.zeros_like(x))

    def get_config(self):
        return {**super().get_config(), "rate": self.rate, "spatial": self.spatial}


def group_count(channels: int, most: int = 8) -> int:
    """The largest number of groups up to ``most`` that divides ``channels``."""
    return next(groups for groups in range(min(most, channels), 0, -1) if channels % groups == 0)


def conv(x, filters: int, *, norm: str, strides: int = 1, name: str):
    """3-wide convolution (2D or 3D by the input's rank), normalization, ReLU.

    In front of a normalization the bias is left out: it has no true gradient there, and Adam would turn its rounding
    noise into full steps.
    """
    kind = layers.Conv3D if len(x.shape) == 5 else layers.Conv2D
    x = kind(
        filters, 3, strides=strides, padding="same", use_bias=norm == "none", kernel_initializer="he_normal", name=name
    )(x)
    if norm != "none":
        x = GroupNorm(filters if norm == "instance" else group_count(filters), name=f"{name}_norm")(x)
    return layers.ReLU(name=f"{name}_relu")(x)
