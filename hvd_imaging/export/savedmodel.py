"""SavedModel: for TensorFlow Serving and everything that speaks it. Any batch size, probabilities out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..inference.exported import INPUT, OUTPUT, SAVED_MODEL
from ..models.spec import ModelSpec


def write(model: Any, spec: ModelSpec, folder: Path) -> None:
    """Write ``folder/saved_model``: signature ``serving_default``, ``image (N, D, H, W, C)`` -> ``probabilities``."""
    import tensorflow as tf

    signature = tf.TensorSpec((None, *spec.patch, spec.channels), tf.float32, name=INPUT)

    @tf.function(input_signature=[signature])
    def serve(image: Any) -> dict[str, Any]:
        return {OUTPUT: tf.nn.softmax(tf.cast(model(image, training=False), tf.float32), axis=-1)}

    module = tf.Module()
    module.weights = list(model.variables)  # the function captures them; the layers themselves are not needed
    module.serve = serve
    tf.saved_model.save(module, str(folder / SAVED_MODEL), signatures={"serving_default": serve})
