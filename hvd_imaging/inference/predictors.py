"""A trained model as a callable, whatever its form: run folder, SavedModel, or TFLite.

TensorFlow is imported when a model is opened (call `bootstrap.prepare()` first), not when this module is.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..bootstrap import native_notes_aside
from ..errors import RunError
from ..models.spec import NAME as SPEC_NAME
from ..models.spec import ModelSpec

SAVED_MODEL = "saved_model"
TFLITE = "model.tflite"
RUN_CONFIG, RUN_WEIGHTS = "run.yaml", "best.npz"
INPUT, OUTPUT = "image", "probabilities"


class Predictor(Protocol):
    """A model that answers with probabilities.

    Attributes:
        spec: the model's contract.
        kind: "run", "savedmodel" or "tflite".
    """

    spec: ModelSpec
    kind: str

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        """``(N, D, H, W, C)`` float32 -> probabilities float32: segmentation ``(N, D, H, W, K)``, else ``(N, K)``."""


def open_predictor(path: str | Path) -> Predictor:
    """Open a run folder, or a folder that `hvd-imaging export` wrote.

    Raises:
        RunError: neither of them, no trained weights, or a damaged model.
    """
    folder = Path(path)
    if not folder.exists():
        raise RunError(f"{path}: no such model; expected {_EXPECTED}")
    if (folder / RUN_CONFIG).is_file():
        from ..training.run import load_run, load_trained

        run = load_run(folder)
        return KerasPredictor(run.spec, load_trained(run))
    exports: dict[str, Callable[[ModelSpec, Path], Predictor]] = {
        SAVED_MODEL: SavedModelPredictor,
        TFLITE: TflitePredictor,
    }
    found = [name for name in exports if (folder / name).exists()] if (folder / SPEC_NAME).is_file() else []
    if len(found) != 1:
        raise RunError(f"{path}: not a model; expected {_EXPECTED}")
    return exports[found[0]](ModelSpec.load(folder), folder / found[0])


_EXPECTED = (
    f"a run folder ({RUN_CONFIG} and {RUN_WEIGHTS}), or an exported model "
    f"({SPEC_NAME} with {SAVED_MODEL}/ or {TFLITE})"
)


def with_probabilities(model: Any) -> Any:
    """A Keras model of logits as a `tf.function`: ``(N, D, H, W, C)`` float32 -> softmax in float32."""
    import tensorflow as tf

    @tf.function(reduce_retracing=True)
    def probabilities(image: Any) -> Any:
        return tf.nn.softmax(tf.cast(model(image, training=False), tf.float32), axis=-1)

    return probabilities


class KerasPredictor:
    """A network in memory that gives logits."""

    kind = "run"

    def __init__(self, spec: ModelSpec, model: Any) -> None:
        self.spec = spec
        self._call = with_probabilities(model)

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        return self._call(np.asarray(batch, np.float32)).numpy()


class SavedModelPredictor:
    """A SavedModel folder written by `export.savedmodel`."""

    kind = "savedmodel"

    def __init__(self, spec: ModelSpec, path: Path) -> None:
        import tensorflow as tf

        self.spec = spec
        try:
            # Kept: the loaded object owns the variables of the signature.
            self._loaded = tf.saved_model.load(str(path))
            self._call = self._loaded.signatures["serving_default"]
        except (OSError, ValueError, KeyError, AttributeError, tf.errors.OpError) as error:
            raise RunError(f"{path}: damaged SavedModel ({_first_line(error)}); export the run again") from error

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        import tensorflow as tf

        return self._call(**{INPUT: tf.constant(batch, tf.float32)})[OUTPUT].numpy()


class TflitePredictor:
    """A ``model.tflite`` written by `export.tflite`: built-in operations, batch 1."""

    kind = "tflite"

    def __init__(self, spec: ModelSpec, path: Path) -> None:
        import tensorflow as tf

        self.spec = spec
        threads = int(os.environ.get("TF_NUM_INTRAOP_THREADS", "0")) or None
        try:
            with warnings.catch_warnings(), native_notes_aside():
                # TensorFlow announces that this interpreter moves to a package of its own; the pinned one has it.
                warnings.filterwarnings("ignore", message=r".*LiteRT.*")
                warnings.filterwarnings("ignore", message=r".*tf\.lite\.Interpreter.*")
                self._interpreter = tf.lite.Interpreter(model_path=str(path), num_threads=threads)
                self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise RunError(f"{path}: damaged TFLite model ({_first_line(error)}); export the run again") from error
        self._input = self._interpreter.get_input_details()[0]
        self._output = self._interpreter.get_output_details()[0]
        wanted = (1, *spec.patch, spec.channels)
        if tuple(self._input["shape"]) != wanted:
            raise RunError(
                f"{path}: takes an input of {tuple(map(int, self._input['shape']))}, expected {wanted} as "
                f"{SPEC_NAME} says: the two files do not belong together; export the run again"
            )

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        answers = []
        for image in np.asarray(batch, np.float32):
            self._interpreter.set_tensor(self._input["index"], image[None])
            self._interpreter.invoke()
            answers.append(self._interpreter.get_tensor(self._output["index"])[0])
        return np.stack(answers)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
