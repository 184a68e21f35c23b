"""A trained network as a model that stands alone: a folder of one format (`inference.exported` says what lies in it).

The folder appears under its name only when the reloaded model has agreed with the trained network.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DatasetError, RunError, SetupError
from ..inference.exported import MODEL_FILE
from ..models.spec import ModelSpec

if TYPE_CHECKING:
    from .parity import Parity

FORMATS = tuple(MODEL_FILE)
"""keras, savedmodel, tflite, tflite-float16, tflite-dynamic, tflite-int8, onnx, onnx-int8."""


def check_format(kind: str) -> None:
    """Whether a format is known, and what writes and runs it is installed.

    Raises:
        RunError: unknown.
        SetupError: a package is missing; says which extra has it.
    """
    from ..inference.predictors import check_runtime, installed

    if kind not in FORMATS:
        raise RunError(f"--format {kind}: expected one of {', '.join(FORMATS)}")
    if kind.startswith("onnx") and not installed("onnx"):
        raise SetupError(f"--format {kind}: the package onnx is not installed: pip install 'hvd_imaging[onnx]'")
    check_runtime(kind)


def needs_calibration(kind: str) -> bool:
    """True for formats whose activations are integers."""
    return kind.endswith("-int8")


def export_model(
    model: Any,
    spec: ModelSpec,
    kind: str,
    folder: str | Path,
    patches: np.ndarray,
    inputs: str,
    calibration: Sequence[np.ndarray] | np.ndarray | None = None,
    lowered: Any = None,
) -> Parity:
    """Write one format of a Keras model into an existing empty folder, reopen it and compare; golden patches go with it.

    Args:
        model: functional network of logits, ``(N, D, H, W, C)`` to ``(N, D, H, W, K)`` or ``(N, K)``.
        spec: its contract.
        kind: one of `FORMATS`.
        folder: existing and empty.
        patches: float32 ``(n, D, H, W, C)`` for the comparison.
        inputs: where they come from, see `parity`.
        calibration: float32 ``(n, D, H, W, C)``, for 8-bit formats.
        lowered: the network's 2D form, if it is known already, for TFLite and ONNX; one with simulated 8-bit rounding (tfmot)
            brings its own ranges and needs no ``calibration`` for tflite-int8.

    Returns:
        the comparison; whether it is good enough is the caller's to judge.

    Raises:
        RunError: unknown format, a layer that does not convert (named), or missing calibration.
        SetupError: a package is missing.
    """
    from .. import trust
    from ..files import write_json
    from ..inference import exported, golden
    from ..inference.predictors import KerasPredictor, open_predictor
    from . import keras, parity, savedmodel, tflite

    check_format(kind)
    folder = Path(folder)
    if kind == "keras":
        keras.write(model, spec, folder)
    elif kind == "savedmodel":
        savedmodel.write(model, spec, folder)
    else:
        network = lowered if lowered is not None else _lowered(model, kind)
        if needs_calibration(kind) and calibration is None and not (kind == "tflite-int8" and _has_ranges(network)):
            raise RunError(f"--format {kind}: 8 bit need calibration patches of the training split, found none; give the dataset")
        if kind.startswith("tflite"):
            tflite.write(network, spec, folder, kind, calibration)
        else:
            from . import onnx

            onnx.write(network, spec, folder, kind, calibration)
    exported.embed(folder / MODEL_FILE[kind], spec, kind)
    spec.save(folder)
    exported.seal(folder, spec, kind)
    trained, again = KerasPredictor(spec, model), open_predictor(folder, trusted=True)
    result = parity.compare(trained, again, patches, inputs, *parity.expected(kind, spec.task))
    write_json(folder / parity.NAME, result.to_json())
    if result.passed:
        golden.save(golden.make(spec, kind, trained, again, *_range(spec, patches)), folder)
    exported.seal(folder, spec, kind, again.runtime)
    trust.remember(folder / exported.NAME)
    return result


def _range(spec: ModelSpec, patches: np.ndarray) -> tuple[float, float]:
    """Of the model's inputs: preprocessing scales to [0, 1], unless it was told to leave values as they are."""
    return (float(patches.min()), float(patches.max())) if spec.preprocess.intensity == "none" else (0.0, 1.0)


def export_run(
    run_dir: str | Path, kind: str, out: str | Path, force: bool = False, dataset: str | Path | None = None, trusted: bool = False
) -> Parity:
    """Export the best weights of a run.

    Args:
        run_dir: a trained run.
        kind: one of `FORMATS`.
        out: folder to write; must be missing or empty.
        force: replace an earlier export there.
        dataset: where the run's dataset is now; None: where it was, or beside the run.
        trusted: see `training.run.load_trained`.

    Raises:
        RunError: ``out`` is in use, ``dataset`` is another one, the run has no weights, the network does not convert, or the export disagrees with
            the trained network; nothing is left behind.
        DatasetError: an 8-bit format, and the dataset to calibrate on is missing.
        SetupError: a package is missing.
    """
    from ..files import atomic_folder
    from ..training.run import load_run, load_trained, located
    from . import parity
    from .calibration import calibration_patches

    check_format(kind)
    target = Path(out)
    check_target(target, force)
    run = load_run(run_dir)
    # A float format needs no dataset: without one it is compared on noise.
    with contextlib.nullcontext() if dataset is not None or needs_calibration(kind) else contextlib.suppress(DatasetError):
        run = located(run, dataset)
    where = run.config.data.dataset
    calibration = None
    if needs_calibration(kind):
        calibration = calibration_patches(where, run.spec, split=run.config.data.train_split)
    model = load_trained(run, trusted)
    patches, inputs = parity.parity_patches(run.spec, where)
    with atomic_folder(target, replace=force) as folder:
        result = export_model(model, run.spec, kind, folder, patches, inputs, calibration)
        if not result.passed:
            raise RunError(
                f"{out}: the exported model differs from the trained one by {result.max_abs_difference:.2e} in "
                f"probability, expected at most {result.tolerance:g}"
                + (f", and {result.same_answer:.1%} of answers are the same, expected {result.least_same:.0%}" if result.least_same else "")
                + "; nothing was written"
            )
    return result


def _lowered(model: Any, kind: str) -> Any:
    """What is converted: the network's 2D form, which 8 bit need and TFLite is faster with; a network without one as it is.

    ONNX Runtime's float kernels for volumes are faster than its kernels on planes, so there it stays as it is too.
    """
    if kind == "onnx":
        return model
    from ..lowering.lower import lower

    try:
        return lower(model)
    except RunError:
        if kind in ("tflite", "tflite-float16", "tflite-dynamic"):
            return model
        raise


def _has_ranges(network: Any) -> bool:
    """True for a network of quantization-aware training."""
    return any(type(layer).__name__.startswith("Quantize") for layer in network.layers)


def check_target(target: Path, force: bool) -> None:
    """Refuse to write where something lies that is not an earlier export.

    Raises:
        RunError: with what was found and the next step.
        SetupError: nothing can be written there.
    """
    from ..files import check_writable

    _check_free(target, force)
    check_writable(target)


def _check_free(target: Path, force: bool) -> None:
    from ..models.spec import NAME as SPEC_NAME
    from .parity import NAME as PARITY_NAME

    if not target.exists() and not target.is_symlink():
        return
    if not target.is_dir() or target.is_symlink():
        raise RunError(f"{target}: is not a folder; an export writes a folder, choose another name")
    if not any(target.iterdir()):
        return
    if not ((target / SPEC_NAME).is_file() and (target / PARITY_NAME).is_file()):
        raise RunError(f"{target}: not empty and not an earlier export; choose another name")
    if not force:
        raise RunError(f"{target}: holds an export already; replace it with --force, or choose another name")
