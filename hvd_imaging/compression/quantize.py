"""Quantization-aware training: tensorflow-model-optimization's 8-bit scheme on the lowered network.

The ranges of activations are measured once, on the same patches on every rank, and stay; moving ones would differ between ranks
and depend on how a batch is spread. The rounded weights that come out go back into the float network: every export then
measures its own ranges.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from ..errors import RunError
from ..lowering import layers as own
from ..lowering.lower import lower
from ..lowering.weights import take_back
from ..models.blocks import GroupNorm

keras = tf.keras
OWN = (own.FoldDepth, own.UnfoldDepth, own.DepthWindow, own.InterleaveDepth, own.DepthPool)


def prepare(model: Any, patches: Sequence[np.ndarray]) -> Any:
    """The lowered network with simulated 8-bit rounding, ranges measured on ``patches``.

    Args:
        model: float network without norms.
        patches: float32 ``(n, D, H, W, C)`` each; the same on all ranks.

    Raises:
        RunError: a norm is left, or a layer that the 8-bit scheme does not know; both named.
    """
    import tensorflow_model_optimization as tfmot

    norm = next((x.name for x in model.layers if isinstance(x, GroupNorm | keras.layers.BatchNormalization)), None)
    if norm is not None:
        raise RunError(f"quantize: layer '{norm}' is a norm, which integers cannot hold; put the step freeze_norms before")
    lowered = lower(model)
    quantization = tfmot.quantization.keras

    class Untouched(quantization.QuantizeConfig):  # type: ignore[name-defined]
        """Layers that move voxels and compute nothing: the range of what they are given holds behind them."""

        def get_weights_and_quantizers(self, layer):
            return []

        def get_activations_and_quantizers(self, layer):
            return []

        def set_quantize_weights(self, layer, quantize_weights):
            pass

        def set_quantize_activations(self, layer, quantize_activations):
            pass

        def get_output_quantizers(self, layer):
            return []

        def get_config(self):
            return {}

    def annotate(layer):
        untouched = isinstance(layer, OWN)
        return quantization.quantize_annotate_layer(layer, Untouched() if untouched else None)

    with quantization.quantize_scope({"Untouched": Untouched}):
        try:
            annotated = keras.models.clone_model(lowered, clone_function=annotate)
            quantized = quantization.quantize_apply(annotated)
        except (RuntimeError, ValueError) as error:
            raise RunError(
                f"quantize: {(str(error).splitlines() or ['the network does not fit'])[0][:300]}; leave the step out: integers "
                "after training (tflite-int8, onnx-int8) need no such support"
            ) from error
    _copy(lowered, quantized)
    calibrate(lowered, quantized, patches)
    return quantized


def _learned(quantized: Any, name: str) -> list[Any]:
    """Kernel and bias variables of the layer that was ``name``; the wrapper around it holds them in no fixed order."""
    found = {v.name.split("/")[-1].split(":")[0]: v for v in quantized.get_layer(f"quant_{name}").weights}
    return [found[key] for key in ("kernel", "bias") if key in found]


def _copy(lowered: Any, quantized: Any) -> None:
    """Weights by layer name: cloning has drawn new ones."""
    for layer in lowered.layers:
        if layer.weights:
            for variable, value in zip(_learned(quantized, layer.name), layer.get_weights(), strict=True):
                variable.assign(value)


def calibrate(lowered: Any, quantized: Any, patches: Sequence[np.ndarray]) -> None:
    """Set the ranges of activations to the smallest and largest values in the float network, over ``patches``.

    Not by passes through ``quantized``: its moving averages begin with +-6 and would take thousands of patches to come down.
    """
    outputs, ranges = [], []
    for layer in quantized.layers:
        # Ranges of kernels follow the weights.
        own_ranges = [v for v in layer.non_trainable_weights if v.name.endswith(("_min:0", "_max:0")) and "kernel" not in v.name]
        if own_ranges:
            # A layer that wraps none rounds the input; Keras numbers its name when it is not the first of the process.
            wraps = layer.name.startswith("quant_")
            outputs.append(lowered.get_layer(layer.name.removeprefix("quant_")).output if wraps else lowered.input)
            ranges.append(own_ranges)
    look = tf.function(keras.Model(lowered.input, [[tf.reduce_min(x), tf.reduce_max(x)] for x in outputs]))
    seen = np.array([tf.nest.flatten(look(image)) for image in patches], np.float32).reshape(len(patches), -1, 2)
    # The ranges hold 0, so that zero padding is exact.
    low, high = np.minimum(seen[..., 0].min(0), 0), np.maximum(seen[..., 1].max(0), 0)
    quantized(patches[0], training=True)  # sets the ranges of the kernels; it moves the others, so it comes first
    for variables, smallest, largest in zip(ranges, low, high, strict=True):
        for variable in variables:
            variable.assign(smallest if "_min" in variable.name else largest)


def finish(model: Any, quantized: Any) -> None:
    """Put the trained weights of ``quantized`` back into the 3D network ``model``."""
    take_back(model, lambda name: [v.numpy() for v in _learned(quantized, name)])
