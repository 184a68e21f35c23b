"""`compress`: a trained run becomes smaller and faster models, each measured, and released only if it keeps the limits.

::

    OUT/recipe.yaml, compress.json   what was asked for, and everything that was measured
    OUT/steps/NN-kind/               see `stages`
    OUT/model/                       the compressed network as a run folder: evaluate, predict and export take it
    OUT/released/FORMAT/             exports that keep all limits
    OUT/refused/FORMAT/              exports that miss one
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from .. import processor
from ..communicator import root_works, together
from ..errors import HvdImagingError, RunError
from ..export import check_format, export_model
from ..export.calibration import calibration_patches, matching_manifest
from ..export.parity import Parity, parity_patches
from ..files import atomic_folder, write_json, write_text
from ..inference.evaluate import Overlay, evaluate_with
from ..inference.evaluate import check_dataset as check_split
from ..inference.predictors import KerasPredictor, open_predictor
from ..lowering.lower import lower
from ..models import architecture
from ..parallel.horovod import Horovod
from ..shards.manifest import Manifest
from ..texts import read_yaml
from ..training import checkpoint
from ..training.callbacks import Reporter, Silent
from ..training.run import BEST, Run, claim, load_run, load_trained, located
from . import gate, macs
from .gate import Measured
from .measure import measure_models
from .recipe import Quantize, Recipe
from .stages import Context, Stage, carry_out, stages

RECIPE, RESULT, MODEL = "recipe.yaml", "compress.json", "model"
RELEASED, REFUSED, EXPORTS = "released", "refused", "exports"
FLOAT = "run"
"""The format's name of the float model, as trained."""

Counter = Callable[[str], AbstractContextManager[Callable[[int, int], None] | None]]


@dataclass(frozen=True)
class Result:
    """Everything that a compression found out.

    Attributes:
        folder: OUT.
        run: the trained run.
        recipe: as asked for.
        manifest: of its dataset.
        steps: settings and outcome of each stage.
        reference: the float model.
        candidates: the formats, in the recipe's order.
        judged: format -> limits missed, as sentences; none: released.
        parity: format -> agreement with the compressed network.
        overlays: format -> worst and best cases.
        measured: runs, threads and the processor's instruction sets of the measurement.
    """

    folder: Path
    run: Run
    recipe: Recipe
    manifest: Manifest
    steps: Sequence[Mapping[str, Any]]
    reference: Measured
    candidates: Sequence[Measured]
    judged: Mapping[str, Sequence[str]]
    parity: Mapping[str, Parity] = field(default_factory=dict)
    overlays: Mapping[str, Sequence[Overlay]] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)

    @property
    def released(self) -> list[str]:
        """Formats that keep all limits."""
        return [one.format for one in self.candidates if not self.judged[one.format]]

    def place(self, kind: str) -> str:
        """Folder of a format inside OUT."""
        return f"{REFUSED if self.judged[kind] else RELEASED}/{kind}"

    def to_json(self) -> dict[str, Any]:
        """As in ``compress.json``."""
        return {
            "schema": 1,
            "run": self.run.spec.run,
            "dataset_hash": self.run.spec.dataset_hash,
            "recipe": self.recipe.model_dump(mode="json"),
            "steps": list(self.steps),
            "reference": self.reference.to_json(),
            "formats": [one.to_json() for one in self.candidates],
            "missed": {name: list(found) for name, found in self.judged.items()},
            "released": {name: self.place(name) for name in self.released},
            "parity": {name: asdict(found) for name, found in self.parity.items()},
            "measured": dict(self.measured),
        }


def compress(
    run_dir: str | Path,
    recipe: Recipe,
    out: str | Path,
    hvd: Horovod,
    resume: bool = False,
    dataset: str | Path | None = None,
    report: Reporter | None = None,
    counter: Counter = lambda description: nullcontext(),
    trusted: bool = False,
) -> Result | None:
    """Carry out a recipe, alone or on many ranks, and judge what comes out.

    Args:
        run_dir: a trained run.
        recipe: steps, formats, limits.
        out: folder to write; missing or empty, or with ``resume`` an unfinished compression of the same run and recipe.
        hvd: the connected ranks.
        resume: go on where an earlier try has ended; begin anew where there is none.
        dataset: where the run's dataset is now; None: where it was, or beside the run.
        report: progress on rank 0.
        counter: makes a progress function for a description, as `cli.console.counter` does.
        trusted: see `training.run.load_trained`.

    Returns:
        what was found, on every rank; None if training on was asked to leave (go on with ``resume``).

    Raises:
        RunError, DatasetError, SetupError: on all ranks alike for what all can see, before any work begins.
    """
    report = report if report is not None and hvd.world.is_root else Silent()
    out = Path(out)
    run, manifest = together(hvd, lambda: _open(run_dir, recipe, dataset))
    model = together(hvd, lambda: load_trained(run, trusted))
    planned = stages(recipe)
    together(hvd, lambda: check_network(model, recipe))
    together(hvd, lambda: _claim(out, run, recipe, resume) if hvd.world.is_root else None)
    hvd.barrier()
    context = Context(run.config, run.spec, hvd, out / "steps", report, report.message, trusted)

    steps: list[dict[str, Any]] = []
    for number, stage in enumerate(planned):
        report.message(f"step {number + 1} of {len(planned)}: {stage.name}")
        found = carry_out(stage, model, context)
        if found is None:
            return None
        model, outcome = found
        report.message(f"  {outcome['outcome']}")
        steps.append(_told(stage, outcome))

    together(hvd, lambda: _keep(out / MODEL, model, run, manifest, hvd) if hvd.world.is_root else None)
    exported = root_works(hvd, lambda: _export(out / EXPORTS, model, run, recipe, report))
    exported = {name: _Exported(**values) for name, values in hvd.broadcast(_plain(exported)).items()}

    judged_on = Path(run.config.data.dataset)
    reports: dict[str, Any] = {}
    overlays: dict[str, Any] = {}
    for name in [FLOAT, *(name for name, one in exported.items() if not one.reason)]:
        predictor = together(hvd, partial(_predictor, name, run, out, trusted))
        with counter(f"evaluate {name}") as progress:
            reports[name], overlays[name] = evaluate_with(
                predictor, run.spec, judged_on, manifest, recipe.split, hvd, progress
            )
    folders = {FLOAT: run.directory, **{name: out / EXPORTS / name for name in reports if name != FLOAT}}
    with counter("measure") as progress:
        rows = hvd.broadcast(root_works(hvd, lambda: measure_models(folders, repeats=recipe.repeats, progress=progress)))

    before = macs.totals(together(hvd, lambda: load_trained(run, trusted)))
    after = macs.totals(model)
    reference = gate.measured(FLOAT, rows[FLOAT], reports[FLOAT], counts=asdict(before))
    candidates = [
        gate.measured(name, rows[name], reports[name], reports[FLOAT], asdict(after))
        if name in reports
        else Measured(name, reason=one.reason)
        for name, one in exported.items()
    ]
    result = Result(
        out, run, recipe, manifest, steps, reference, candidates,
        gate.verdicts(reference, candidates, recipe.limits, run.spec.task, processor.kind(rows[FLOAT]["instruction_sets"])),
        {name: one.parity for name, one in exported.items() if one.parity is not None},
        overlays,
        {key: rows[FLOAT][key] for key in ("runs", "threads", "instruction_sets")},
    )  # fmt: skip
    together(hvd, lambda: _place(result) if hvd.world.is_root else None)
    return result


def _told(stage: Stage, outcome: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's settings and outcome; of a step in rounds, this round's."""
    settings = stage.step.model_dump(mode="json")
    if stage.share:
        settings |= {"remove": stage.share, "rounds": 1}
    sentence = outcome["outcome"]
    return {**settings, "stage": stage.name, **outcome, "outcome": f"{sentence[0].upper()}{sentence[1:]}."}


def check_network(model: Any, recipe: Recipe) -> None:
    """Refuse what could not be carried out, before hours of training on.

    Raises:
        RunError: a layer without a 2D form, where the recipe needs one.
        SetupError: a runtime that is not installed.
    """
    for name in recipe.formats:
        check_format(name)
    whole = [name for name in recipe.formats if name.startswith("onnx") or name.endswith("int8")]
    if whole or any(isinstance(step, Quantize) for step in recipe.steps):
        lower(model)


# --- the run and the folder -----------------------------------------------------------------------------------------


def _open(run_dir: str | Path, recipe: Recipe, dataset: str | Path | None) -> tuple[Run, Manifest]:
    run = located(load_run(run_dir), dataset)
    manifest = matching_manifest(run.config.data.dataset, run.spec, run.config.data.train_split)
    check_split(manifest, run.spec, Path(run.config.data.dataset), recipe.split)
    return run, manifest


def _claim(out: Path, run: Run, recipe: Recipe, resume: bool) -> None:
    """Make OUT, or check that it may be gone on with (rank 0 only)."""
    asked = {"run": str(run.directory.resolve()), **recipe.model_dump(mode="json")}
    if (out / RECIPE).is_file():
        if not resume:
            raise RunError(f"{out}: holds a compression already; go on with it by --resume, or choose another --out")
        try:
            before = read_yaml(out / RECIPE)
        except (OSError, ValueError) as error:
            raise RunError(f"{out / RECIPE}: damaged; choose another --out") from error
        # Limits, formats and the split are asked for anew; the steps and what they began from are not.
        for key in ("run", "steps"):
            if not isinstance(before, dict) or before.get(key) != asked[key]:
                raise RunError(f"{out}: {key} is another one than in this folder's {RECIPE}; choose another --out")
    elif out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise RunError(f"{out}: not empty and not a compression; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / RECIPE, yaml.safe_dump(asked, sort_keys=False))


def _keep(folder: Path, model: Any, run: Run, manifest: Manifest, hvd: Horovod) -> None:
    """The compressed network as a run folder (rank 0 only)."""
    with atomic_folder(folder, replace=True) as inside:
        claim(inside, run.config, run.spec, manifest, hvd.world, resume=False)
        architecture.save(model, inside)
        checkpoint.save(inside / BEST, checkpoint.State([w.numpy() for w in model.weights], [], {"compressed": True}))


def _predictor(name: str, run: Run, out: Path, trusted: bool) -> Any:
    # The exports were written by rank 0 just now.
    return KerasPredictor(run.spec, load_trained(run, trusted)) if name == FLOAT else open_predictor(out / EXPORTS / name, trusted=True)


# --- exports --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Exported:
    parity: Parity | None
    reason: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.parity, dict):  # as it came from rank 0
            object.__setattr__(self, "parity", Parity(**self.parity))


def _plain(exported: Mapping[str, _Exported] | None) -> dict[str, Any] | None:
    return None if exported is None else {name: asdict(one) for name, one in exported.items()}


def _export(folder: Path, model: Any, run: Run, recipe: Recipe, report: Reporter) -> dict[str, _Exported]:
    """All formats (rank 0 only). One that fails is a row of the table that says why: the others are worth their training."""
    dataset = run.config.data.dataset
    patches, inputs = parity_patches(run.spec, dataset)
    calibration = calibration_patches(dataset, run.spec, recipe.calibration, run.config.data.train_split)
    found: dict[str, _Exported] = {}
    for name in recipe.formats:
        report.message(f"export {name}")
        try:
            with atomic_folder(folder / name, replace=True) as inside:
                parity = export_model(model, run.spec, name, inside, patches, inputs, calibration)
                if not parity.passed:
                    raise RunError(
                        f"it differs from the compressed network by {parity.max_abs_difference:.2e} in probability, expected at most "
                        f"{parity.tolerance:g}, and gives the same answer in {parity.same_answer:.1%}, expected at least "
                        f"{parity.least_same:.0%}"
                    )
            found[name] = _Exported(parity)
        except HvdImagingError as error:
            found[name] = _Exported(None, f"not exported: {error}")
            report.message(f"  {error}")
    return found


def _place(result: Result) -> None:
    """Put exports where their verdict says, and write the result (rank 0 only)."""
    for folder in (RELEASED, REFUSED):
        shutil.rmtree(result.folder / folder, ignore_errors=True)
    for one in result.candidates:
        source, target = result.folder / EXPORTS / one.format, result.folder / result.place(one.format)
        if source.is_dir():
            target.parent.mkdir(exist_ok=True)
            os.replace(source, target)
    shutil.rmtree(result.folder / EXPORTS, ignore_errors=True)
    write_json(result.folder / RESULT, result.to_json())
