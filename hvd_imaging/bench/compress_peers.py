"""What others make of the same trained network, as their documentation says: the peers of `bench compress`.

``python -m hvd_imaging.bench.compress_peers RUN_DIR OUT``: one process that writes files and ``peers.json``: name -> {"kind", "path"}, or
{"reason"} where a peer refuses or is not installed. A peer's own error is its answer, so it goes into the table.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import HvdImagingError
from ..files import write_json
from .processes import clean_environment

PEERS = "peers.json"
PATCHES, PRUNED, EPOCHS = 64, 0.85, 8


@dataclass(frozen=True)
class Given:
    """What all peers begin with.

    Attributes:
        model: the network, logits out.
        served: the same with softmax, batch 1.
        images: training patches, float32 ``(n, D, H, W, C)``; ``labels`` int32.
        spec: the run's contract.
        out: folder to write into.
        evaluate: network -> mean metric on the test split.
    """

    model: Any
    served: Any
    images: Any
    labels: Any
    spec: Any
    out: Path
    evaluate: Callable[[Any], float]


def tflite(given: Given, name: str, prepare: Callable[[Any], None] = lambda converter: None, model: Any = None) -> dict[str, Any]:
    """TensorFlow Lite's converter on the network as it is."""
    import tensorflow as tf

    net = given.served if model is None else served(model, given.spec)
    converter = tf.lite.TFLiteConverter.from_keras_model(net)
    prepare(converter)
    path = given.out / f"{name}.tflite"
    path.write_bytes(converter.convert())
    return {"kind": "tflite", "path": str(path)}


def tflite_dynamic(given: Given) -> dict[str, Any]:
    """Post-training dynamic range quantization."""

    return tflite(given, "dynamic", _default)


def _default(converter: Any) -> None:
    import tensorflow as tf

    converter.optimizations = [tf.lite.Optimize.DEFAULT]


def tflite_int8(given: Given) -> dict[str, Any]:
    """Post-training integer quantization with float fallback, as the guide says."""

    def prepare(converter: Any) -> None:
        import tensorflow as tf

        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = lambda: ([image[None]] for image in given.images[:32])

    return tflite(given, "int8", prepare)


def tfmot_pruning(given: Given) -> dict[str, Any]:
    """The pruning tutorial: polynomial decay, training by `fit`, wrappers stripped, TensorFlow Lite."""
    import tensorflow as tf
    import tensorflow_model_optimization as tfmot

    sparsity = tfmot.sparsity.keras
    batch = 4
    steps = -(-len(given.images) // batch) * EPOCHS
    schedule = sparsity.PolynomialDecay(0.5, PRUNED, 0, steps)
    pruned = sparsity.prune_low_magnitude(tf.keras.models.clone_model(given.model), pruning_schedule=schedule)
    for wrapped, layer in zip(pruned.layers, given.model.layers, strict=True):
        if layer.weights:
            getattr(wrapped, "layer", wrapped).set_weights(layer.get_weights())
    pruned.compile("adam", tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    pruned.fit(
        given.images, given.labels, batch_size=batch, epochs=EPOCHS, verbose=0, callbacks=[sparsity.UpdatePruningStep()]
    )
    final = sparsity.strip_pruning(pruned)
    return {**tflite(given, "tfmot", model=final), "metric": given.evaluate(final)}


def tfmot_quantization(given: Given) -> dict[str, Any]:
    """The tutorial of quantization-aware training: `quantize_model` on the whole network."""
    import tensorflow_model_optimization as tfmot

    quantized = tfmot.quantization.keras.quantize_model(given.model)
    return tflite(given, "tfmot_int8", _default, quantized)


def onnx_float(given: Given) -> dict[str, Any]:
    """The network's own 3D layers in ONNX."""
    import onnx

    from ..export import onnx_graph

    path = given.out / "plain.onnx"
    onnx.save(onnx_graph.make(given.model, given.spec), path)
    return {"kind": "onnx", "path": str(path)}


def onnx_int8(given: Given) -> dict[str, Any]:
    """ONNX Runtime's quantizer on it, with its defaults for static quantization."""
    import onnxruntime.quantization as quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    source, ready, path = (given.out / name for name in ("plain.onnx", "ready.onnx", "plain_int8.onnx"))
    import onnx

    name = onnx.load(source).graph.input[0].name
    images = iter(given.images[:16])

    class Reader(quantization.CalibrationDataReader):
        def get_next(self) -> Any:
            image = next(images, None)
            return None if image is None else {name: image[None]}

    quant_pre_process(str(source), str(ready))
    quantization.quantize_static(str(ready), str(path), Reader())
    return {"kind": "onnx", "path": str(path)}


MAKERS: dict[str, Callable[[Given], dict[str, Any]]] = {
    "TensorFlow Lite, float32": lambda given: tflite(given, "float32"),
    "TensorFlow Lite, dynamic range": tflite_dynamic,
    "TensorFlow Lite, int8": tflite_int8,
    "tfmot pruning by its tutorial": tfmot_pruning,
    "tfmot quantization by its tutorial": tfmot_quantization,
    "ONNX Runtime, float32": onnx_float,
    "ONNX Runtime's quantizer, int8": onnx_int8,
}


def untrained(folder: Path) -> Path:
    """A run folder of the design page's U-Net with random weights, on a dataset of noise: for times and sizes alone."""
    command = [sys.executable, "-m", "hvd_imaging.bench.compress_peers", str(folder)]
    done = subprocess.run(
        command, env=clean_environment(os.environ), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
    )
    if done.returncode:
        raise HvdImagingError(f"bench compress: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return folder / "run"


def _make_untrained(folder: Path) -> None:
    from .. import models
    from ..config import RunConfig, load
    from ..shards import manifest as manifests
    from ..training import checkpoint
    from ..training.loop import make_spec
    from ..training.run import BEST, claim
    from ..world import World
    from .training import Workshop, write_volumes

    write_volumes(folder / "volumes", 4)
    config = load(RunConfig, Workshop(folder).config("unet", "volumes", 1))
    manifest = manifests.load(folder / "volumes")
    spec = make_spec(config, manifest, "run")
    claim(folder / "run", config, spec, manifest, World(), resume=False)
    weights = [w.numpy() for w in models.build(spec).weights]
    checkpoint.save(folder / "run" / BEST, checkpoint.State(weights, [], {}))


def ours(given: Given, kind: str) -> dict[str, Any]:
    """The product's own export, where no compression has made one (the quick run)."""
    from ..export import export_model

    folder = given.out / kind
    folder.mkdir()
    export_model(given.model, given.spec, kind, folder, given.images[:2], "dataset", given.images)
    return {"kind": "tflite", "path": str(folder / "model.tflite")}


QUICK: dict[str, Callable[[Given], dict[str, Any]]] = {
    "ours, float32": lambda given: ours(given, "tflite"),
    "ours, int8": lambda given: ours(given, "tflite-int8"),
}


def served(model: Any, spec: Any) -> Any:
    """The network with a batch of 1 and probabilities out."""
    import tensorflow as tf

    image = tf.keras.Input((*spec.patch, spec.channels), 1)
    return tf.keras.Model(image, tf.keras.layers.Softmax()(model(image)))


def make_peers(run_dir: Path, out: Path, quick: bool, timeout: float = 3600) -> dict[str, dict[str, Any]]:
    """Every peer's file, made in a process of its own."""
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "hvd_imaging.bench.compress_peers", str(run_dir), str(out), "quick" if quick else "full"]
    done = subprocess.run(
        command, env=clean_environment(os.environ), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout
    )
    if done.returncode:
        raise HvdImagingError(f"bench compress: the peers failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    found: dict[str, dict[str, Any]] = json.loads((out / PEERS).read_text(encoding="utf-8"))
    return found


def gzip_bytes(path: str | Path) -> int:
    """Size after ``gzip -9``."""
    return len(gzip.compress(Path(path).read_bytes(), 9))


def main() -> None:
    """Make all peers."""
    from .. import bootstrap

    bootstrap.prepare()
    if len(sys.argv) == 2:
        _make_untrained(Path(sys.argv[1]))
        return
    run_dir, out, quick = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "quick"
    warnings.simplefilter("ignore")
    import numpy as np

    from ..communicator import Alone
    from ..compression.patches import training_batches
    from ..inference.evaluate import evaluate_with
    from ..inference.predictors import KerasPredictor
    from ..shards import manifest as manifests
    from ..training.run import load_run, load_trained, located
    from ..world import World

    run = located(load_run(run_dir))
    model = load_trained(run)
    batches = list(training_batches(run.config, World(), 4 if quick else PATCHES))
    manifest = manifests.load(run.config.data.dataset)

    def evaluate(net: Any) -> float:
        report, _ = evaluate_with(
            KerasPredictor(run.spec, net), run.spec, Path(run.config.data.dataset), manifest, "test", Alone(), pictures=False
        )
        return float(report["mean"]["dice" if run.spec.task == "segmentation" else "accuracy"]["value"])

    given = Given(
        model, served(model, run.spec), np.concatenate([x for x, _ in batches]), np.concatenate([y for _, y in batches]),
        run.spec, out, evaluate,
    )  # fmt: skip
    found: dict[str, dict[str, Any]] = {}
    for name, make in (MAKERS | QUICK if quick else MAKERS).items():
        if quick and make is tfmot_pruning:
            found[name] = {"reason": "trained in the full run only"}
            continue
        try:
            found[name] = make(given)
            found[name] |= {"bytes": os.path.getsize(found[name]["path"]), "gzip": gzip_bytes(found[name]["path"])}
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            found[name] = {"reason": lines[0][:200]}
    write_json(out / PEERS, found)


if __name__ == "__main__":
    main()
