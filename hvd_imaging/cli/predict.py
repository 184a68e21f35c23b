"""`hvd-imaging predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

EDGE_MB = 2048


@click.command(
    epilog="""\b
Examples:
  hvd-imaging predict runs/unet3d series/ mask.dcm          DICOM SEG of the series
  hvd-imaging predict runs/unet3d "series/#echo 2" mask.dcm one volume of a series of several
  hvd-imaging predict models/unet3d case.nii.gz mask.nii.gz label map on the same grid
  hvd-imaging predict runs/vgg16 series/ answer.csv         probability of each class
  hvd-imaging predict runs/unet3d dataset/ masks/           one NIfTI for each sample
  hvd-imaging predict --edge models/int8 case.nii.gz mask.nii.gz   without TensorFlow
\b
The suffix of OUT says what is written: .dcm, .nii, .nii.gz, .csv (volumes in ml, or
probabilities), or a folder for a dataset. Nothing found gives an empty mask.
"""
)
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("input", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
@click.option("--overlap", type=click.FloatRange(0, 0.95), help="Share that windows overlap [default: the model's own, 0.5].")
@click.option(
    "--memory-mb", type=click.IntRange(1),
    help=f"Budget of the whole process (MiB): Python, runtime, model, image, windows [default: {EDGE_MB} with --edge, else none].",
)  # fmt: skip
@click.option("--threads", type=click.IntRange(1), help="Threads to compute with [default: all cores of the process].")
@click.option("--edge", is_flag=True, help="Refuse a model that would need TensorFlow (docs/edge.md).")
@click.option("--unchecked", is_flag=True, help="Compute even where the model answers otherwise than at its export (docs/edge.md).")
@click.option("--json", "as_json", is_flag=True, help="Print the answers and the peak memory as JSON.")
def command(
    model: Path, input: Path, out: Path, force: bool, overlap: float | None, memory_mb: int | None, threads: int | None, edge: bool,
    unchecked: bool, as_json: bool,
) -> None:  # fmt: skip
    """Apply MODEL (a run or an export) to INPUT (a DICOM series folder, a NIfTI file, or a dataset) and write OUT."""
    from .. import bootstrap
    from .console import counter, refuse_many_ranks

    refuse_many_ranks("predict")
    bootstrap.prepare(threads or 0)  # for TensorFlow, should the model need it
    from ..inference import golden
    from ..inference.predict import predict
    from ..inference.predictors import open_predictor

    if memory_mb is None and edge:
        memory_mb = EDGE_MB
    memory_bytes = None if memory_mb is None else memory_mb << 20
    with counter("predict") as progress:
        predictor = open_predictor(model, threads or 0, edge)
        note = "" if unchecked else golden.check_once(model, predictor)
        if note:
            click.echo(f"note: {note}", err=True)
        if predictor.spec.preprocess.orientation == "source" and not (input / "manifest.json").is_file():
            click.echo(
                "note: this model takes voxels in the order of their file (preprocess.orientation=source): it answers rightly for images "
                "in the order that it learned from only, which may differ between DICOM and NIfTI of one scan; a dataset ingested again "
                "and a new training make it independent of that",
                err=True,
            )
        rows = predict(predictor, input, out, force, overlap, memory_bytes, progress)
    if as_json:
        import json

        from ..compression.measure_worker import peak_bytes

        found = {"out": str(out), "task": predictor.spec.task, "format": predictor.kind, "answers": rows, "peak_bytes": peak_bytes()}
        click.echo(json.dumps(found))
        return
    for row in rows[:10]:
        click.echo("  ".join([f"{row['id']}:", *_shown(row)]))
    if len(rows) > 10:
        click.echo(f"and {len(rows) - 10} more")
    if len(rows) == 1 and predictor.spec.task == "segmentation" and not any(_volumes(rows[0])):
        click.echo("nothing was found: the mask is empty", err=True)
    click.echo(f"written: {out}")


def _volumes(row: dict[str, Any]) -> list[float]:
    return [value for key, value in row.items() if key.endswith("_ml")]


def _shown(row: dict[str, Any]) -> list[str]:
    found = []
    for key, value in row.items():
        if key == "predicted":
            found.append(str(value))
        elif key.startswith("p_"):
            found.append(f"{key}={value:.3f}")
        elif key.endswith("_ml"):
            found.append(f"{key.removesuffix('_ml')} {value:.2f} ml")
    return found
