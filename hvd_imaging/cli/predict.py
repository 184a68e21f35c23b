"""`hvd-imaging predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.command(
    epilog="""\b
Examples:
  hvd-imaging predict runs/unet3d series/ mask.dcm          DICOM SEG of the series
  hvd-imaging predict models/unet3d case.nii.gz mask.nii.gz label map on the same grid
  hvd-imaging predict runs/vgg16 series/ answer.csv         probability of each class
  hvd-imaging predict runs/unet3d dataset/ masks/           one NIfTI for each sample
\b
The suffix of OUT says what is written: .dcm, .nii, .nii.gz, .csv (volumes in ml, or
probabilities), or a folder for a dataset. Nothing found gives an empty mask.
"""
)
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("input", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
@click.option(
    "--overlap", type=click.FloatRange(0, 0.95), default=0.5, show_default=True, help="Share that windows overlap."
)
@click.option(
    "--memory-mb", type=click.IntRange(1), default=1024, show_default=True, help="Budget of the sliding window."
)
@click.option("--json", "as_json", is_flag=True, help="Print the answers as JSON.")
def command(model: Path, input: Path, out: Path, force: bool, overlap: float, memory_mb: int, as_json: bool) -> None:
    """Apply MODEL (a run or an export) to INPUT (a DICOM series folder, a NIfTI file, or a dataset) and write OUT."""
    from .. import bootstrap
    from .console import counter, refuse_many_ranks

    refuse_many_ranks("predict")
    bootstrap.prepare()
    bootstrap.load_tensorflow()
    from ..inference.predict import predict
    from ..inference.predictors import open_predictor

    with counter("predict") as progress:
        predictor = open_predictor(model)
        rows = predict(predictor, input, out, force, overlap, memory_mb << 20, progress)
    if as_json:
        import json

        click.echo(json.dumps({"out": str(out), "task": predictor.spec.task, "answers": rows}))
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
