"""A trained run as a model that stands alone: a folder with ``model.json``, the model, and ``parity.json``.

The folder appears under its name only when the reloaded model has agreed with the trained network.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import RunError

if TYPE_CHECKING:
    from .parity import Parity

FORMATS = ("savedmodel", "tflite")


def export_run(run_dir: str | Path, kind: str, out: str | Path, force: bool = False) -> Parity:
    """Export the best weights of a run.

    Args:
        run_dir: a trained run.
        kind: one of `FORMATS`.
        out: folder to write; must be missing or empty.
        force: replace an earlier export there.

    Raises:
        RunError: ``out`` is in use, the run has no weights, the network does not convert, or the export disagrees with
            the trained network; nothing is left behind.
    """
    from ..files import atomic_folder, write_json
    from ..inference.predictors import KerasPredictor, open_predictor
    from ..training.run import load_run, load_trained
    from . import parity, savedmodel, tflite

    if kind not in FORMATS:
        raise RunError(f"--format {kind}: expected one of {', '.join(FORMATS)}")
    target = Path(out)
    check_target(target, force)
    run = load_run(run_dir)
    model = load_trained(run)
    patches, inputs = parity.parity_patches(run.spec, run.config.data.dataset)
    with atomic_folder(target, replace=force) as folder:
        {"savedmodel": savedmodel.write, "tflite": tflite.write}[kind](model, run.spec, folder)
        run.spec.save(folder)
        result = parity.compare(KerasPredictor(run.spec, model), open_predictor(folder), patches, inputs)
        if not result.passed:
            raise RunError(
                f"{out}: the exported model differs from the trained one by {result.max_abs_difference:.2e} in "
                f"probability, expected at most {result.tolerance:g}; nothing was written"
            )
        write_json(folder / parity.NAME, result.to_json())
    return result


def check_target(target: Path, force: bool) -> None:
    """Refuse to write where something lies that is not an earlier export.

    Raises:
        RunError: with what was found and the next step.
    """
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
