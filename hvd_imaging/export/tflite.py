"""TFLite in float32 with built-in operations only, for the edge. Batch 1, probabilities out.

Smaller and faster integer models are the work of `compression`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..bootstrap import native_notes_aside
from ..errors import RunError
from ..inference.predictors import INPUT, OUTPUT, TFLITE
from ..models.spec import ModelSpec


def write(model: Any, spec: ModelSpec, folder: Path) -> None:
    """Write ``folder/model.tflite``: input ``(1, D, H, W, C)`` float32.

    Raises:
        RunError: a layer has no built-in TFLite operation.
    """
    import tensorflow as tf

    signature = tf.TensorSpec((1, *spec.patch, spec.channels), tf.float32, name=INPUT)

    @tf.function(input_signature=[signature])
    def serve(image: Any) -> dict[str, Any]:
        return {OUTPUT: tf.nn.softmax(tf.cast(model(image, training=False), tf.float32), axis=-1)}

    converter = tf.lite.TFLiteConverter.from_concrete_functions([serve.get_concrete_function()], model)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    try:
        with native_notes_aside():
            data = converter.convert()
    except Exception as error:  # the converter raises its own private class
        lines = str(error).splitlines() or [type(error).__name__]
        why = next((line.strip() for line in lines if "is neither a custom op" in line), lines[0])
        raise RunError(
            f"{spec.model.name}: can not be converted with TFLite's built-in operations ({why[:300]}); "
            "export --format savedmodel takes any network"
        ) from error
    (folder / TFLITE).write_bytes(data)
