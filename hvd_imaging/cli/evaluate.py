"""`hvd-imaging evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .options import check_signed, trust


@click.command(
    epilog="""\b
Examples:
  hvd-imaging evaluate runs/unet3d
  hvd-imaging evaluate runs/unet3d --split val --json -
  mpirun -np 2 hvd-imaging evaluate runs/unet3d       the ranks share the cases
\b
Writes RUN_DIR/evaluation-<split>.json, and pictures into RUN_DIR/plots.
"""
)
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option(
    "--split", type=click.Choice(["train", "val", "test"]), default="test", show_default=True, help="Which cases."
)
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path, allow_dash=True), metavar="FILE",
    help="Write the report there as well; - prints it, and nothing else, to stdout.",
)  # fmt: skip
@click.option("--dataset", type=click.Path(path_type=Path), metavar="DIR", help="Where the run's dataset is now.  [default: where it was, or beside the run]")
@trust
@click.option("--plots/--no-plots", default=True, help="Draw the pictures.  [default: plots]")
def command(
    run_dir: Path, split: str, json_file: Path | None, dataset: Path | None, trusted: bool, public_key: Path | None, plots: bool
) -> None:
    """Measure the best weights of RUN_DIR on a split of its dataset, alone or on many ranks."""
    from .. import bootstrap

    check_signed(run_dir, public_key)
    bootstrap.prepare()
    bootstrap.load_tensorflow()
    from ..communicator import together
    from ..files import check_writable
    from ..inference.evaluate import evaluate
    from ..parallel.horovod import Horovod
    from ..reporting.plots import draw_evaluation
    from .console import counter

    communicator = Horovod()
    world = communicator.world
    together(communicator, lambda: check_writable(run_dir / f"evaluation-{split}.json") if world.is_root and run_dir.is_dir() else None)
    with counter("evaluate", world) as progress:
        report = evaluate(run_dir, split, communicator, progress, draw_evaluation if plots else None, dataset, trusted)
    if not world.is_root:
        return
    if json_file is not None and str(json_file) == "-":
        import json

        click.echo(json.dumps(report, indent=1, allow_nan=False))
        return
    if json_file is not None:
        from ..files import write_json

        write_json(json_file, report)
    show(report)
    click.echo(f"written: {run_dir / f'evaluation-{split}.json'}" + (f", pictures in {run_dir / 'plots'}" * plots))


def rows_of(report: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """(figure, value, 95% interval, cases) of a report, as text."""
    names = {
        "dice": "Dice", "hd95_mm": "HD95 (mm)", "recall": "recall", "specificity": "specificity",
        "precision": "precision", "accuracy": "accuracy", "auc": "AUC",
    }  # fmt: skip
    rows = []
    for key, name in names.items():
        if key not in report["mean"]:
            continue
        estimate = report["mean"][key]
        rows.append((name, *_texts(estimate)))
        per_class = estimate.get("per_class", {})
        if len(per_class) > 1:
            rows += [(f"  {label}", *_texts(inner)) for label, inner in per_class.items()]
    return rows


def _texts(estimate: dict[str, Any]) -> tuple[str, str, str]:
    value, interval = estimate["value"], estimate["interval"]
    return (
        "-" if value is None else f"{value:.4f}",
        "-" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}",
        str(estimate["count"]),
    )


def show(report: dict[str, Any]) -> None:
    """Print the summary as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{report['run']}, split {report['split']}, {len(report['cases'])} cases", title_justify="left")
    table.add_column("")
    for name in ("mean", "95% interval", "cases"):
        table.add_column(name, justify="right")
    for row in rows_of(report):
        table.add_row(*row)
    Console(highlight=False).print(table)
    for what in ("missed", "invented"):
        found = {name: count for name, count in report.get(what, {}).items() if count}
        if found:
            click.echo(f"{what} in whole cases: " + ", ".join(f"{name} {count}" for name, count in found.items()))
