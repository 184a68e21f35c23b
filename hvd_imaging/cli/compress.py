"""`hvd-imaging compress`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import NOT_RELEASED, TRY_AGAIN

if TYPE_CHECKING:
    from ..compression.run import Result


@click.command(
    epilog="""\b
Examples:
  hvd-imaging init compress-segmentation -o recipe.yaml
  hvd-imaging compress runs/unet3d --recipe recipe.yaml --out small
  mpirun -np 2 hvd-imaging compress runs/unet3d --recipe recipe.yaml --out small
\b
OUT/released holds the formats that keep all limits of the recipe, OUT/refused the others,
OUT/model the compressed network as a run folder, OUT/model_card.html what a reader has to know.
Exit code 0: a format was released; 11: none was; 75: asked to leave, go on with --resume.
"""
)
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--recipe", "recipe_file", type=click.Path(path_type=Path), required=True, help="Steps, formats and limits.")
@click.option("--out", "-o", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Change a key, as in limits.faster=2.")
@click.option("--dataset", type=click.Path(path_type=Path), metavar="DIR", help="Where the run's dataset is now.  [default: where it was, or beside the run]")
@click.option("--resume", is_flag=True, help="Go on where an earlier try has ended; begin anew where there is none.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    run_dir: Path, recipe_file: Path, out: Path, assignments: tuple[str, ...], dataset: Path | None, resume: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Make RUN_DIR's network smaller and faster, export it, and release what keeps the limits."""
    from .. import bootstrap
    from ..compression.recipe import Recipe
    from ..config import load

    recipe = load(Recipe, recipe_file, assignments)
    settings = _settings(run_dir)
    os.environ.update(bootstrap.horovod_variables(settings.parallel.fusion_mb, settings.parallel.cycle_ms))
    bootstrap.prepare(settings.threads_per_rank)
    bootstrap.load_tensorflow()

    from ..compression.run import compress
    from ..parallel.horovod import Horovod
    from .console import counter
    from .train import TrainingReport

    hvd = Horovod()
    with TrainingReport(hvd.world, quiet=as_json) as report:
        result = compress(
            run_dir, recipe, out, hvd, resume, dataset, report, lambda description: counter(description, hvd.world)
        )
    code = TRY_AGAIN if result is None else 0 if result.released else NOT_RELEASED
    if not hvd.world.is_root:
        sys.exit(code)
    if result is None:
        click.echo("left as asked; go on with --resume", err=True)
        sys.exit(code)

    from ..reporting.card import write_card

    write_card(out, card_of(result))
    if as_json:
        import json

        click.echo(json.dumps(result.to_json(), allow_nan=False))
    else:
        show(result)
    sys.exit(code)


def _settings(run_dir: Path) -> Any:
    """The run's configuration, read before TensorFlow is."""
    from ..config import RunConfig, load
    from ..errors import RunError

    path = run_dir / "run.yaml"
    if not path.is_file():
        raise RunError(f"{run_dir}: not a run folder (no run.yaml in it); `hvd-imaging train run.yaml` makes one")
    return load(RunConfig, path)


def card_of(result: Result) -> Any:
    """The model card of a compression."""
    import datetime

    from ..bench.report import machine
    from ..reporting.card import Card, data_facts, file_hashes, training_facts
    from ..training.run import versions

    released = [one for one in result.candidates if one.format in result.released]
    pictured = min(released, key=lambda one: one.latency_ms.get("one") or float("inf"), default=None)
    name = pictured.format if pictured is not None else next((f for f in result.overlays if f != "run"), "")
    place = result.place(name) if name else ""
    here = machine()
    return Card(
        spec=result.run.spec,
        created=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        data=data_facts(result.manifest),
        training=training_facts(result.run.config),
        steps=result.steps,
        split=result.recipe.split,
        reference=result.reference,
        candidates=result.candidates,
        limits=result.recipe.limits,
        judged=result.judged,
        parity={kind: found.to_json() for kind, found in result.parity.items()},
        files={
            f"{folder}/{path}": digest
            for folder in ("released", "refused")
            if (result.folder / folder).is_dir()
            for path, digest in file_hashes(result.folder / folder).items()
        },
        versions=versions(),
        machine={"cpu": here["cpu"], "cores": here["cores"]},
        measured=result.measured,
        latency_of="the trained network in TensorFlow, float32",
        commands=[
            ("a DICOM series, result as DICOM SEG" if result.run.spec.task == "segmentation" else "a DICOM series",
             f"hvd-imaging predict {place} SERIES_FOLDER " + ("mask.dcm" if result.run.spec.task == "segmentation" else "answer.csv")),
            ("without TensorFlow (pip install hvd_imaging[edge])",
             f"hvd-imaging predict --edge {place} SERIES_FOLDER " + ("mask.nii.gz" if result.run.spec.task == "segmentation" else "answer.csv")),
        ] if place else [],
        overlays=result.overlays.get(name, ()),
        pictured=name,
    )  # fmt: skip


def show(result: Result) -> None:
    """Print the tables and the verdicts."""
    from rich.table import Table

    from .. import processor
    from ..compression import gate
    from .console import table_console

    console = table_console()
    here = processor.kind(result.measured.get("instruction_sets", ()))
    for title, head, rows in (
        (f"cost, times on {here}", gate.COST_HEAD, gate.cost_rows(result.reference, result.candidates, result.judged)),
        (
            f"figures on the {result.recipe.split} split",
            gate.METRIC_HEAD,
            gate.metric_rows(result.reference, result.candidates),
        ),
    ):
        table = Table(title=title, title_justify="left")
        for number, name in enumerate(head):
            table.add_column(name, justify="left" if number == 0 else "right")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for name, missed in result.judged.items():
        for sentence in missed:
            click.echo(f"{name}: not released: {sentence}")
    found = ", ".join(result.released) or "nothing"
    click.echo(f"released: {found}; model card: {result.folder / 'model_card.html'}")
