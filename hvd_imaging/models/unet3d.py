"""3D U-Net (Çiçek et al., 2016) with strided down-sampling and transposed up-sampling."""

from __future__ import annotations

import tensorflow as tf

from ..errors import ConfigError
from .blocks import Dropout, conv
from .spec import ModelSpec

keras = tf.keras
layers = keras.layers


def unet3d(spec: ModelSpec) -> keras.Model:
    """Input ``(N, D, H, W, C)``, output logits ``(N, D, H, W, K)``.

    ``model.depth`` levels, the first with ``model.filters`` filters, each further one with twice as many. No pooling:
    TFLite has no MaxPool3D. With ``deep_supervision`` the model has a list of outputs, full size first; the coarser ones
    (each half of the one before) are for the training loss only, see :func:`inference_model`.
    """
    config = spec.model
    step = 2 ** (config.depth - 1)
    if any(side % step for side in spec.patch):
        near = [max(step, round(side / step) * step) for side in spec.patch]
        raise ConfigError(
            f"data.patch: a unet3d of model.depth={config.depth} wants sides that {step} divides, "
            f"found {list(spec.patch)}; nearest: {near}"
        )
    inputs = keras.Input((*spec.patch, spec.channels), name="image")
    x, skips = inputs, []
    for level in range(config.depth):
        filters = config.filters * 2**level
        x = conv(x, filters, norm=config.norm, strides=1 if level == 0 else 2, name=f"down{level}_conv1")
        x = conv(x, filters, norm=config.norm, name=f"down{level}_conv2")
        skips.append(x)
    outputs = []
    for level in reversed(range(config.depth - 1)):
        filters = config.filters * 2**level
        x = layers.Conv3DTranspose(filters, 2, strides=2, name=f"up{level}_up")(x)
        x = layers.Concatenate(name=f"up{level}_skip")([x, skips[level]])
        x = conv(x, filters, norm=config.norm, name=f"up{level}_conv1")
        x = conv(x, filters, norm=config.norm, name=f"up{level}_conv2")
        if config.deep_supervision and level > 0:
            outputs.append(layers.Conv3D(len(spec.classes), 1, dtype="float32", name=f"logits{level}")(x))
    if config.dropout:
        x = Dropout(config.dropout, spatial=True, name="dropout")(x)
    outputs.append(layers.Conv3D(len(spec.classes), 1, dtype="float32", name="logits")(x))
    outputs.reverse()
    return keras.Model(inputs, outputs if len(outputs) > 1 else outputs[0], name="unet3d")
