"""`hvd-imaging phantom`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(
    epilog="""\b
Examples:
  hvd-imaging phantom archive --patients 12 --seed 1
  hvd-imaging ingest archive dataset
"""
)
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--patients", type=click.IntRange(min=1), default=12, show_default=True, help="How many patients.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Same seed, same files.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(out: Path, patients: int, seed: int, as_json: bool) -> None:
    """Write a synthetic chest CT archive to OUT: DICOM series, DICOM SEG masks (lung, nodule), labels.csv.

    OUT must not exist yet, or be empty. About half of the patients have lung nodules.
    """
    import dataclasses
    import json

    from ..sources.phantom import make_archive
    from ..world import World
    from .console import progress

    made = make_archive(out, patients, seed, lambda indices: progress(indices, "writing patients", World()))
    if as_json:
        click.echo(json.dumps({"archive": str(out), "seed": seed, **dataclasses.asdict(made)}, indent=1))
        return
    click.echo(
        f"{out}: {made.patients} patients ({made.with_nodules} with nodules, {made.oblique} oblique series), "
        f"{made.slices} slices, {made.files} files"
    )
    name = f"'{out}'" if " " in str(out) else str(out)
    click.echo(f"next: hvd-imaging ingest {name} DATASET                       masks of lung and nodule")
    click.echo(f"  or: hvd-imaging ingest {name} DATASET --task classification  has a nodule or not (labels.csv)")
