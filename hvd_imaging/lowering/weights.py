"""The way back: weights of a lowered network in the 3D network that it came from."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

layers = tf.keras.layers


def take_back(model: Any, weights_of: Any) -> None:
    """Set the weights of ``model`` from its lowered form.

    Args:
        model: 3D network without batch norms that `lower` would have folded.
        weights_of: callable, name of a lowered layer -> its weights (kernel, bias).
    """
    for layer in model.layers:
        shapes = [w.shape for w in layer.get_weights()]
        if not shapes:
            continue
        if isinstance(layer, layers.Conv3DTranspose):
            layer.set_weights(_transposed(layer, weights_of))
        else:
            # A Conv3D's kernel (kd, kh, kw, in, out) was laid as (kh, kw, kd * in, out); a Dense on voxels as a 1 x 1 convolution.
            found = list(weights_of(layer.name))
            if isinstance(layer, layers.Conv3D):
                kd, kh, kw, inner, outer = shapes[0]
                found[0] = np.asarray(found[0]).reshape(kh, kw, kd, inner, outer).transpose(2, 0, 1, 3, 4)
            layer.set_weights([np.asarray(w).reshape(shape) for w, shape in zip(found, shapes, strict=True)])


def _transposed(layer: Any, weights_of: Any) -> list[np.ndarray]:
    size, stride = layer.kernel_size[0], layer.strides[0]
    pad = max(size - stride, 0) // 2 if layer.padding == "same" else 0
    kernel, *bias = layer.get_weights()
    inner = kernel.shape[-1]
    kernel = kernel.copy()
    biases = []
    for phase in range(stride):
        found = weights_of(layer.name if stride == 1 else f"{layer.name}_plane{phase}")
        taps = list(range((phase + pad) % stride, size, stride))[::-1]
        for place, tap in enumerate(taps):
            kernel[tap] = found[0][..., place * inner : (place + 1) * inner]
        biases += [found[1]] if bias else []
    # Each phase has a bias of its own where a lowered network was trained; the 3D layer has one.
    return [kernel, np.mean(biases, 0)] if bias else [kernel]
