"""`hvd-imaging export`."""

from __future__ import annotations

from pathlib import Path

import click

from ..export import FORMATS


@click.command(
    epilog="""\b
Examples:
  hvd-imaging export runs/unet3d --format savedmodel models/unet3d
  hvd-imaging export runs/unet3d --format tflite models/unet3d-tflite
\b
OUT holds model.json, the model (input "image", output "probabilities"), and
parity.json: how far it lies from the trained network. Above 1e-4 nothing is written.
"""
)
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--format", "kind", type=click.Choice(FORMATS), required=True, help="What to write.")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Replace an earlier export at OUT.")
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as JSON.")
def command(run_dir: Path, kind: str, out: Path, force: bool, as_json: bool) -> None:
    """Turn the best weights of RUN_DIR into a model that stands alone, in the new folder OUT."""
    from .. import bootstrap
    from .console import refuse_many_ranks

    refuse_many_ranks("export")
    from ..export import check_target

    check_target(out, force)
    bootstrap.prepare()
    bootstrap.load_tensorflow()
    from ..export import export_run

    parity = export_run(run_dir, kind, out, force)
    if as_json:
        import json

        click.echo(json.dumps({"out": str(out), "format": kind, **parity.to_json()}))
        return
    where = "of the dataset" if parity.inputs == "dataset" else "of noise (the run's dataset is not reachable)"
    click.echo(
        f"{out}: {kind}, differs from the trained network by at most {parity.max_abs_difference:.1e} in probability "
        f"on {parity.patches} patches {where}"
    )
