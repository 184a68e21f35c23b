"""A trained model as a callable, whatever its form: a run folder, or an export of any format.

A runtime (TensorFlow, LiteRT, ONNX Runtime) is imported when a model that needs it is opened, and no other one.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .. import bootstrap, trust
from ..bootstrap import native_notes_aside
from ..errors import RunError, SetupError
from ..models.spec import NAME as SPEC_NAME
from ..models.spec import ModelSpec
from ..texts import parse_json
from . import contained, exported
from .exported import INPUT, MODEL_FILE, OUTPUT

RUN_CONFIG, RUN_WEIGHTS = "run.yaml", "best.npz"
EDGE_FORMATS = tuple(kind for kind in MODEL_FILE if kind.startswith(("tflite", "onnx")))
"""Formats that need no TensorFlow to run."""


class Predictor(Protocol):
    """A model that answers with probabilities.

    Attributes:
        spec: the model's contract.
        kind: "run", or the export's format.
        runtime: what computes, with its version.
    """

    spec: ModelSpec
    kind: str
    runtime: str

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        """``(N, D, H, W, C)`` float32 -> probabilities float32: segmentation ``(N, D, H, W, K)``, else ``(N, K)``."""


def open_predictor(path: str | Path, threads: int = 0, edge: bool = False, trusted: bool = False) -> Predictor:
    """Open a run folder, a folder that `hvd-imaging export` wrote, or the model file of such a folder.

    Args:
        path: the model. A folder's files are checked against their hashes.
        threads: of the runtime; 0: all cores that the process may use. TensorFlow takes its number from
            `bootstrap.prepare`.
        edge: refuse what would need TensorFlow.
        trusted: open it also if it is a program, or holds one. One that this user's commands wrote on this machine is trusted.

    Raises:
        RunError: no model, no trained weights, damaged, of another schema, with ``edge`` of a format that needs TensorFlow, or a program
            that is not trusted.
        SetupError: the runtime is not installed.
    """
    place = Path(path)
    if not place.exists():
        raise RunError(f"{path}: no such model; expected {_EXPECTED}")
    if place.is_file():
        spec, kind = exported.read_metadata(place) if place.suffix in (".tflite", ".onnx", ".keras") else (None, "")
        if spec is None:
            raise RunError(f"{path}: not a model; expected {_EXPECTED}")
        return _open_export(place, spec, kind, threads, edge, trusted)
    if (place / RUN_CONFIG).is_file():
        if edge:
            raise _needs_tensorflow(path, "a run folder")
        return _open_run(place, trusted)
    if not (place / exported.NAME).is_file():
        if (place / SPEC_NAME).is_file():
            raise RunError(
                f"{path}: has no {exported.NAME} with the files' hashes: an unfinished copy, or written by another release; "
                "copy the whole folder, or export the run again"
            )
        raise RunError(f"{path}: not a model; expected {_EXPECTED}")
    kind = exported.check(place)
    trusted = trusted or trust.made_here(place / exported.NAME)
    return _open_export(place / MODEL_FILE[kind], ModelSpec.load(place), kind, threads, edge, trusted)


_EXPECTED = (
    f"a run folder ({RUN_CONFIG} and {RUN_WEIGHTS}), or an exported model "
    f"({SPEC_NAME} with {', '.join(dict.fromkeys(MODEL_FILE.values()))})"
)


def check_runtime(kind: str) -> None:
    """Whether what runs a format is installed, without importing it.

    Raises:
        SetupError: it is not; says how to get it.
    """
    needed: tuple[str, ...]
    if kind.startswith("onnx"):
        needed, extra = ("onnxruntime",), "edge"
    elif kind.startswith("tflite"):
        needed, extra = ("ai_edge_litert", "tensorflow"), "edge"
    else:
        needed, extra = ("tensorflow",), "train"
    if not any(map(installed, needed)):
        raise SetupError(
            f"format {kind} runs on {' or '.join(needed)}, which is not installed: pip install 'hvd_imaging[{extra}]'"
        )


def installed(name: str) -> bool:
    """Whether a package can be imported, without doing so."""
    try:
        return name in sys.modules or importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _needs_tensorflow(path: Any, what: str) -> RunError:
    return RunError(
        f"{path}: {what} needs TensorFlow, which --edge leaves out; expected an export of format {', '.join(EDGE_FORMATS)}: "
        "hvd-imaging export RUN_DIR --format tflite-int8 OUT"
    )


def _open_run(folder: Path, trusted: bool) -> Predictor:
    check_runtime("keras")
    bootstrap.load_tensorflow()
    from ..training.run import load_run, load_trained

    run = load_run(folder)
    return KerasPredictor(run.spec, load_trained(run, trusted))


def _open_export(path: Path, spec: ModelSpec, kind: str, threads: int, edge: bool, trusted: bool) -> Predictor:
    if edge and kind not in EDGE_FORMATS:
        raise _needs_tensorflow(path, f"format {kind}")
    if kind == "savedmodel" and not trusted:
        raise trust.refusal(path.parent, "a SavedModel is a program", "take another format (tflite, onnx, keras), which is none")
    check_runtime(kind)
    if kind.startswith("onnx"):
        return OnnxPredictor(spec, path, kind, threads)
    if kind.startswith("tflite"):
        return TflitePredictor(spec, path, kind, threads, edge)
    return KerasPredictor(spec, load_keras(path, trusted), kind) if kind == "keras" else SavedModelPredictor(spec, path)


def _version(package: str) -> str:
    """Name and version of a package, without importing it."""
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:  # such as a build of its own, under another name
        return package


def with_probabilities(model: Any) -> Any:
    """A Keras model of logits as a `tf.function`: ``(N, D, H, W, C)`` float32 -> softmax in float32."""
    import tensorflow as tf

    @tf.function(reduce_retracing=True)
    def probabilities(image: Any) -> Any:
        return tf.nn.softmax(tf.cast(model(image, training=False), tf.float32), axis=-1)

    return probabilities


class KerasPredictor:
    """A network in memory that gives logits."""

    def __init__(self, spec: ModelSpec, model: Any, kind: str = "run") -> None:
        self.spec, self.kind, self.runtime = spec, kind, _version("tensorflow")
        self._call = with_probabilities(model)

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        return self._call(np.asarray(batch, np.float32)).numpy()


def load_keras(path: Path, trusted: bool = False) -> Any:
    """The network of a ``.keras`` file: built from its description if that is data (`models.allowed`), with weights that are only numbers.

    Args:
        trusted: leave it to Keras where the description names what is not listed, such as layers of one's own; this can run code.

    Raises:
        RunError: damaged, or with what is not listed and not trusted.
    """
    bootstrap.load_tensorflow()
    import tensorflow as tf

    from ..models import architecture
    from ..shards.plain import check_arrays

    try:
        with tempfile.TemporaryDirectory(prefix="hvd_imaging.") as folder, zipfile.ZipFile(path) as archive:
            described = parse_json(_member(archive, KERAS_CONFIG, path))
            network = described["config"] if described["class_name"] == "Functional" else described
            if not architecture.check(network, path, trusted):
                return tf.keras.models.load_model(path, compile=False)
            model = architecture.build(network, path)
            weights = Path(folder) / KERAS_WEIGHTS
            weights.write_bytes(_member(archive, KERAS_WEIGHTS, path))
            check_arrays(weights)
            model.load_weights(weights)
            return model
    except (
        OSError, ValueError, TypeError, KeyError, AttributeError, IndexError, RuntimeError, RecursionError, NotImplementedError, zipfile.BadZipFile,
        zlib.error,
    ) as error:  # fmt: skip
        raise RunError(f"{path}: damaged Keras model, or with unknown layers ({_first_line(error)[:200]}); export the run again") from error


KERAS_CONFIG, KERAS_WEIGHTS = "config.json", "model.weights.h5"
"""Members of a ``.keras`` file."""
_MOST_PACKED = 20


def _member(archive: zipfile.ZipFile, name: str, path: Path) -> bytes:
    """A member of a ZIP. Keras stores them as they are; one that would become many times larger than its file is refused."""
    size, room = archive.getinfo(name).file_size, _MOST_PACKED * path.stat().st_size
    if size > room:
        raise ValueError(f"{name} says that it has {size} bytes, in a file of {path.stat().st_size}")
    return archive.read(name)


class SavedModelPredictor:
    """A SavedModel folder written by `export.savedmodel`."""

    kind = "savedmodel"

    def __init__(self, spec: ModelSpec, path: Path) -> None:
        bootstrap.load_tensorflow()
        import tensorflow as tf

        self.spec, self.runtime = spec, _version("tensorflow")
        try:
            # Kept: the loaded object owns the variables of the signature.
            self._loaded = tf.saved_model.load(str(path))
            self._call = self._loaded.signatures["serving_default"]
        except (OSError, ValueError, KeyError, AttributeError, tf.errors.OpError) as error:
            raise RunError(f"{path}: damaged SavedModel ({_first_line(error)}); export the run again") from error

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        import tensorflow as tf

        return self._call(**{INPUT: tf.constant(batch, tf.float32)})[OUTPUT].numpy()


class _OneByOne:
    """Base of runtimes whose models take a batch of 1."""

    def __init__(self, spec: ModelSpec, kind: str, runtime: str) -> None:
        self.spec, self.kind, self.runtime = spec, kind, runtime

    def _check_shape(self, path: Path, found: Any) -> None:
        wanted = (1, *self.spec.patch, self.spec.channels)
        if tuple(found) != wanted:
            raise RunError(
                f"{path}: takes an input of {tuple(map(int, found))}, expected {wanted} as {SPEC_NAME} says: the two files "
                "do not belong together; export the run again"
            )

    def _one(self, image: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        return np.concatenate([self._one(image[None]) for image in np.asarray(batch, np.float32)])


class TflitePredictor(_OneByOne):
    """A ``model.tflite`` written by `export.tflite`: built-in operations, batch 1.

    Runs in LiteRT, Google's interpreter alone, where that is installed, else in TensorFlow's copy of it.
    """

    def __init__(self, spec: ModelSpec, path: Path, kind: str = "tflite", threads: int = 0, edge: bool = False) -> None:
        contained.check_tflite(path)
        interpreter = _interpreter(edge)
        super().__init__(spec, kind, _version("tensorflow" if interpreter.__module__.startswith("tensorflow") else "ai-edge-litert"))
        try:
            with warnings.catch_warnings(), native_notes_aside():
                # TensorFlow announces that this interpreter moves to a package of its own.
                warnings.filterwarnings("ignore", message=r".*LiteRT.*")
                warnings.filterwarnings("ignore", message=r".*tf\.lite\.Interpreter.*")
                self._interpreter = interpreter(model_path=str(path), num_threads=threads or _threads())
                self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise RunError(f"{path}: damaged TFLite model ({_first_line(error)}); export the run again") from error
        self._input = self._interpreter.get_input_details()[0]
        self._output = self._interpreter.get_output_details()[0]
        self._check_shape(path, self._input["shape"])

    def _one(self, image: np.ndarray) -> np.ndarray:
        self._interpreter.set_tensor(self._input["index"], image)
        self._interpreter.invoke()
        return self._interpreter.get_tensor(self._output["index"])


def _interpreter(edge: bool) -> Callable[..., Any]:
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError as error:
        if edge:
            raise SetupError(
                "--edge runs TFLite models on ai_edge_litert, which is not installed: pip install 'hvd_imaging[edge]'"
            ) from error
        bootstrap.load_tensorflow()
        import tensorflow as tf

        return tf.lite.Interpreter
    return Interpreter


class OnnxPredictor(_OneByOne):
    """A ``model.onnx`` written by `export.onnx`: batch 1."""

    def __init__(self, spec: ModelSpec, path: Path, kind: str = "onnx", threads: int = 0) -> None:
        super().__init__(spec, kind, _version("onnxruntime"))
        import onnxruntime

        contained.check_onnx(path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or _threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its own private classes
            raise RunError(f"{path}: damaged ONNX model ({_first_line(error)[:200]}); export the run again") from error
        self._check_shape(path, self._session.get_inputs()[0].shape)

    def _one(self, image: np.ndarray) -> np.ndarray:
        return self._session.run([OUTPUT], {INPUT: image})[0]


def _threads() -> int:
    return int(os.environ.get("TF_NUM_INTRAOP_THREADS", "0")) or len(os.sched_getaffinity(0))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
