"""VGG16 (Simonyan and Zisserman, 2015) for 2D images, and a small 3D classifier."""

from __future__ import annotations

import tensorflow as tf

from ..errors import ConfigError
from .blocks import Dropout, conv
from .spec import ModelSpec

keras = tf.keras
layers = keras.layers

VGG16 = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))


def vgg16(spec: ModelSpec) -> keras.Model:
    """Thirteen convolutions in five blocks, each closed by 2x2 max pooling.

    Input ``(N, 1, H, W, C)``, output logits ``(N, K)``. ``head="dense"`` has VGG's two dense layers (4096 x width),
    ``"average"`` and ``"max"`` pool globally: the maximum keeps a finding that is small against the image. ``norm="none"``, ``width=1``, ``head="dense"`` is the paper's net.
    """
    depth, height, width = spec.patch
    if depth != 1:
        raise ConfigError(
            f"data.patch: vgg16 is a 2D network and takes a depth of 1, found {list(spec.patch)}; "
            "ingest with --set preprocess.projection=mip, or use model.name=cnn3d"
        )
    if min(height, width) < 32:
        raise ConfigError(f"data.patch: vgg16 halves the image five times and wants at least 32 x 32, found {height} x {width}")
    model = spec.model
    inputs = keras.Input((1, height, width, spec.channels), name="image")
    x = layers.Reshape((height, width, spec.channels), name="drop_depth")(inputs)
    for block, (filters, count) in enumerate(VGG16, start=1):
        for index in range(1, count + 1):
            x = conv(x, scaled(filters, model.width), norm=model.norm, name=f"block{block}_conv{index}")
        x = layers.MaxPool2D(2, name=f"block{block}_pool")(x)
    if model.head == "average":
        x = layers.GlobalAveragePooling2D(name="average")(x)
    elif model.head == "max":
        x = layers.GlobalMaxPooling2D(name="max")(x)
    else:
        x = layers.Flatten(name="flatten")(x)
        for index in (1, 2):
            x = layers.Dense(
                scaled(4096, model.width), activation="relu", kernel_initializer="he_normal", name=f"fc{index}"
            )(x)
    return _classify(inputs, x, spec)


def cnn3d(spec: ModelSpec) -> keras.Model:
    """Four strided 3D stages and global average pooling. Input ``(N, D, H, W, C)``, output logits ``(N, K)``."""
    inputs = keras.Input((*spec.patch, spec.channels), name="image")
    x = inputs
    for stage, filters in enumerate((16, 32, 64, 128), start=1):
        x = conv(x, scaled(filters, spec.model.width), norm=spec.model.norm, name=f"stage{stage}_conv1")
        x = conv(x, scaled(filters, spec.model.width), norm=spec.model.norm, strides=2, name=f"stage{stage}_conv2")
    x = layers.GlobalAveragePooling3D(name="average")(x)
    return _classify(inputs, x, spec)


def scaled(filters: int, width: float) -> int:
    """``filters`` x ``width``, a positive multiple of 4 (so that normalization finds groups)."""
    return max(4, round(filters * width / 4) * 4)


def _classify(inputs, features, spec: ModelSpec) -> keras.Model:
    if spec.model.dropout:
        features = Dropout(spec.model.dropout, name="dropout")(features)
    logits = layers.Dense(len(spec.classes), dtype="float32", name="logits")(features)
    return keras.Model(inputs, logits, name=spec.model.name)
