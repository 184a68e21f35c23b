"""`hvd-imaging export`."""

from __future__ import annotations

from pathlib import Path

import click

# As `export.FORMATS`, which would load NumPy for a --help.
FORMATS = ("keras", "savedmodel", "tflite", "tflite-float16", "tflite-dynamic", "tflite-int8", "onnx", "onnx-int8")


@click.command(
    epilog="""\b
Examples:
  hvd-imaging export runs/unet3d --format savedmodel models/unet3d
  hvd-imaging export runs/unet3d --format tflite-int8 models/unet3d-int8
  hvd-imaging export runs/unet3d --format onnx-int8 --dataset /data/lung models/unet3d-onnx
\b
OUT holds model.json, the model (input "image", output "probabilities"), export.json
(check sums), parity.json: how far it lies from the trained network, and golden.npz:
synthetic inputs with its answers, compared once on every other machine. Float formats
above 1e-4 (float16: 2e-2), and 8 bit that answer otherwise too often, are not written.
The 8-bit formats measure ranges of activations on the run's training split.
Released, measured models: hvd-imaging compress. Formats and runtimes: docs/edge.md.
"""
)
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--format", "kind", type=click.Choice(FORMATS), required=True, help="What to write.")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--dataset", type=click.Path(path_type=Path), metavar="DIR", help="Where the run's dataset is now.  [default: where it was, or beside the run]")
@click.option("--force", is_flag=True, help="Replace an earlier export at OUT.")
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as JSON.")
def command(run_dir: Path, kind: str, out: Path, dataset: Path | None, force: bool, as_json: bool) -> None:
    """Turn the best weights of RUN_DIR into a model that stands alone, in the new folder OUT."""
    from .. import bootstrap
    from .console import refuse_many_ranks

    refuse_many_ranks("export")
    from ..export import check_format, check_target

    check_format(kind)
    check_target(out, force)
    bootstrap.prepare()
    bootstrap.load_tensorflow()
    from ..export import export_run

    parity = export_run(run_dir, kind, out, force, dataset)
    if as_json:
        import json

        click.echo(json.dumps({"out": str(out), "format": kind, **parity.to_json()}))
        return
    where = "of the dataset" if parity.inputs == "dataset" else "of noise (the run's dataset is not reachable)"
    click.echo(
        f"{out}: {kind}, differs from the trained network by at most {parity.max_abs_difference:.1e} in probability "
        f"on {parity.patches} patches {where}; {parity.same_answer:.2%} of the answers are the same"
    )
