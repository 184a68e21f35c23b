"""TFLite with built-in operations only, for the edge. Batch 1, float32 probabilities out.

Integers: activations and weights in 8 bit (Jacob et al., 2018), kernels per channel. Norms and the last softmax stay in float32:
a norm's statistics are of the image at hand, and 8 bit of a probability would leave steps of 1/256.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..bootstrap import native_notes_aside
from ..errors import RunError
from ..inference.exported import INPUT, OUTPUT, TFLITE
from ..models.spec import ModelSpec

NORM_OPERATIONS = ("MEAN", "SQUARED_DIFFERENCE", "RSQRT", "MUL", "ADD", "SUB", "DIV")
"""What a norm becomes."""


def write(
    model: Any, spec: ModelSpec, folder: Path, kind: str = "tflite", calibration: Sequence[np.ndarray] | np.ndarray | None = None
) -> None:
    """Write ``folder/model.tflite``: input ``(1, D, H, W, C)`` float32.

    Args:
        model: network of logits, lowered where it has 3D layers.
        spec: its contract.
        folder: where to.
        kind: "tflite", "tflite-float16" (weights), "tflite-dynamic" (weights in 8 bit, activations as each image needs)
            or "tflite-int8".
        calibration: for "tflite-int8": float32 patches ``(D, H, W, C)`` that give the ranges of activations; None if the
            network has them (quantization-aware training).

    Raises:
        RunError: a layer has no built-in TFLite operation.
    """
    import tensorflow as tf

    lite = tf.lite
    signature = tf.TensorSpec((1, *spec.patch, spec.channels), tf.float32, name=INPUT)

    @tf.function(input_signature=[signature])
    def serve(image: Any) -> dict[str, Any]:
        return {OUTPUT: tf.nn.softmax(tf.cast(model(image, training=False), tf.float32), axis=-1)}

    converter = lite.TFLiteConverter.from_concrete_functions([serve.get_concrete_function()], model)
    converter.target_spec.supported_ops = [lite.OpsSet.TFLITE_BUILTINS]
    if kind != "tflite":
        converter.optimizations = [lite.Optimize.DEFAULT]
    if kind == "tflite-float16":
        converter.target_spec.supported_types = [tf.float16]
    convert = converter.convert
    if kind == "tflite-int8" and calibration is not None:
        converter.target_spec.supported_ops = [lite.OpsSet.TFLITE_BUILTINS_INT8, lite.OpsSet.TFLITE_BUILTINS]
        convert = _calibrated(converter, model, calibration)
    try:
        with warnings.catch_warnings(), native_notes_aside():
            warnings.simplefilter("ignore")  # of the converter's own parts; a user can do nothing about them
            data = convert()
    except Exception as error:  # the converter raises its own private class
        lines = str(error).splitlines() or [type(error).__name__]
        why = next((line.strip() for line in lines if "is neither a custom op" in line), lines[0])
        raise RunError(
            f"{spec.model.name}: cannot be converted with TFLite's built-in operations ({why[:300]}); "
            "export --format savedmodel takes any network"
        ) from error
    (folder / TFLITE).write_bytes(data)


def _calibrated(converter: Any, model: Any, patches: Sequence[np.ndarray] | np.ndarray) -> Any:
    """Conversion with ranges of activations measured on ``patches``, and some operations left in float."""
    import tensorflow as tf

    names = {type(layer).__name__ for layer in model.submodules}
    left = ["SOFTMAX", *(NORM_OPERATIONS if names & {"DepthNorm", "GroupNorm", "GroupNormalization", "LayerNormalization"} else ())]

    def images() -> Any:
        for patch in patches:
            yield [np.asarray(patch, np.float32)[None]]

    converter.representative_dataset = images

    def convert() -> bytes:
        # Of all public ways the debugger's is the only one that leaves chosen operations in float.
        lite = tf.lite.experimental
        options = lite.QuantizationDebugOptions(denylisted_ops=left)
        return lite.QuantizationDebugger(converter=converter, debug_options=options).get_nondebug_quantized_model()

    return convert
