"""`hvd-imaging bench`: how fast it is here, with the peers beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ..bench.report import Figure, Row


@click.group()
def command() -> None:
    """Measure this machine, with the peers in the same run."""


@command.command()
@click.option("--quick", is_flag=True, help="End within a minute.")
@click.option("--json", "path", type=click.Path(dir_okay=False), help="Write the measurements here.")
def step(quick: bool, path: str | None) -> None:
    """One training step of a small 3D U-Net on one core."""
    from ..bench.step import measure

    _show("step", *measure(quick, lambda text: click.echo(text, err=True)), path)


@command.command()
@click.option("--quick", is_flag=True, help="End within a minute.")
@click.option("--json", "path", type=click.Path(dir_okay=False), help="Write the measurements here.")
@click.option("--png", type=click.Path(dir_okay=False), help="Draw the picture here.")
def scaling(quick: bool, path: str | None, png: str | None) -> None:
    """Ranks against independent processes and MultiWorkerMirroredStrategy."""
    from ..bench.scaling import measure

    rows, figures = measure(quick, lambda text: click.echo(text, err=True))
    _show("scaling", rows, figures, path)
    if png:
        from pathlib import Path

        from ..reporting.plots import draw_scaling

        draw_scaling(Path(png), [row.to_json() for row in rows])
        click.echo(f"written: {png}")


@command.command()
@click.option("--quick", is_flag=True, help="End within a minute.")
@click.option("--json", "path", type=click.Path(dir_okay=False), help="Write the measurements here.")
def allreduce(quick: bool, path: str | None) -> None:
    """Compressed gradients over a link of 1 Gbit/s (needs root, ip and tc)."""
    from ..bench.allreduce import measure

    _show("allreduce", *measure(quick, lambda text: click.echo(text, err=True)), path)


@command.command()
@click.option("--quick", is_flag=True, help="End within a minute.")
@click.option("--json", "path", type=click.Path(dir_okay=False), help="Write the measurements here.")
def predict(quick: bool, path: str | None) -> None:
    """The planner's model of a step against steps on 2 to 4 ranks (the link needs root, ip and tc)."""
    from ..bench.predict import measure

    _show("predict", *measure(quick, lambda text: click.echo(text, err=True)), path)


@command.command()
@click.option("--quick", is_flag=True, help="End within a minute: a small volume.")
@click.option("--json", "path", type=click.Path(dir_okay=False), help="Write the measurements here.")
def spatial(quick: bool, path: str | None) -> None:
    """A volume shared by 2 and 4 ranks beside the unsplit one: time, memory, bytes (about 10 minutes)."""
    from ..bench.spatial import measure

    _show("spatial", *measure(quick, lambda text: click.echo(text, err=True)), path)


@command.command()
@click.option("--quick", is_flag=True, help="End within a minute: small images.")
@click.option("--json", "path", type=click.Path(dir_okay=False), help="Write the measurements here.")
def dense(quick: bool, path: str | None) -> None:
    """VGG16's dense layers shared out over four ranks, over a link of 1 Gbit/s (needs root, ip and tc)."""
    from ..bench.dense import measure

    _show("dense", *measure(quick, lambda text: click.echo(text, err=True)), path)


@command.command()
@click.option("--quick", is_flag=True, help="End within a minute.")
@click.option("--json", "path", type=click.Path(dir_okay=False), help="Write the measurements here.")
def guarantees(quick: bool, path: str | None) -> None:
    """What checkpoints, the replica guard and exact bits cost, and what balance gains."""
    from ..bench.guarantees import measure

    _show("guarantees", *measure(quick, lambda text: click.echo(text, err=True)), path)


@command.command()
@click.argument("dataset", required=False, type=click.Path(exists=True, file_okay=False))
@click.option("--quick", is_flag=True, help="End within a minute.")
@click.option("--json", "path", type=click.Path(dir_okay=False), help="Write the measurements here.")
@click.option("--png", type=click.Path(dir_okay=False), help="Draw the picture here.")
@click.option(
    "--step-ms",
    type=click.FloatRange(min=0, min_open=True),
    default=323.0,
    show_default=True,
    help="Step of the accelerator to be fed, batch 7 (MLPerf Storage: U-Net 3D on an H100).",
)
def io(dataset: str | None, quick: bool, path: str | None, png: str | None, step_ms: float) -> None:
    """Reading patches and volumes, beside raw reads and other formats.

    Made volumes are written to TMPDIR: set it to measure another disk. DATASET: its train samples are read too. "cold" asks
    the system to drop the files from its page cache, which it may decline.
    """
    from ..bench.io import measure

    rows, figures = measure(dataset, quick, step_ms, lambda text: click.echo(text, err=True))
    _show("io", rows, figures, path)
    if png:
        from pathlib import Path

        from ..reporting.io_plot import draw_io

        draw_io(Path(png), [row.to_json() for row in rows])
        click.echo(f"written: {png}")


@command.command()
@click.option("--quick", is_flag=True, help="End within a minute.")
@click.option("--json", "path", type=click.Path(dir_okay=False), help="Write the measurements here.")
def ingest(quick: bool, path: str | None) -> None:
    """From uncompressed CT to a dataset, beside what only reads it."""
    from ..bench.ingest import measure

    _show("ingest", *measure(quick, lambda text: click.echo(text, err=True)), path)


@command.command()
@click.option("--quick", is_flag=True, help="End within a minute: an untrained U-Net, sizes and times only.")
@click.option("--json", "path", type=click.Path(dir_okay=False), help="Write the measurements here.")
@click.option("--work", type=click.Path(file_okay=False), help="Keep data, runs and models here, and go on with them.")
def compress(quick: bool, path: str | None, work: str | None) -> None:
    """Compressed U-Net and VGG16 beside TensorFlow Lite, tfmot, ONNX Runtime and PyTorch (about 40 minutes)."""
    from pathlib import Path

    from ..bench.compress import measure

    _show("compress", *measure(quick, lambda text: click.echo(text, err=True), Path(work) if work else None), path)


@command.command()
@click.argument("config", required=False, type=click.Path(exists=True, dir_okay=False), metavar="[run.yaml]")
@click.option("--ranks", default=2, show_default=True, help="Ranks that one process is compared with.")
@click.option("--slurm", is_flag=True, help="The ranks are a Slurm job, one on each node (needs --work).")
@click.option("--quick", is_flag=True, help="End within a minute.")
@click.option("--json", "path", type=click.Path(dir_okay=False), help="Write the measurements here.")
@click.option("--work", type=click.Path(file_okay=False), help="Keep data and runs here, for `hvd-imaging report`.")
def migrate(config: str | None, ranks: int, slurm: bool, quick: bool, path: str | None, work: str | None) -> None:
    """One process against several ranks: the same data, the same configuration.

    With run.yaml your own training is compared; without it a small U-Net on made data.
    """
    from pathlib import Path

    from ..bench.migrate import measure

    rows, figures, report = measure(
        Path(config) if config else None, ranks, quick, slurm, lambda text: click.echo(text, err=True), Path(work) if work else None
    )
    _show("migrate", rows, figures, path)
    click.echo(f"next: {report}" if report else "--work DIR keeps the runs, for `hvd-imaging report`")


def _show(name: str, rows: Sequence[Row], figures: Sequence[Figure], path: str | None) -> None:
    from rich.table import Table

    from .. import processor
    from ..bench.report import result
    from ..files import write_json
    from .console import table_console

    console = table_console()
    table = Table("case", "system", "metric", "median", "lowest", "highest", "runs", title=f"bench {name}, on {processor.kind(processor.instruction_sets())}")
    for row in rows:
        numbers = [n for n in (row.value, min(row.runs, default=None), max(row.runs, default=None)) if n is not None]
        shown = [f"{n:,.4g} {row.unit}" for n in numbers] or [row.reason or "not measured", "", ""]
        table.add_row(row.case, row.system, row.metric, *shown, str(len(row.runs)))
    console.print(table)
    goals = Table("figure", "value", "goal", "")
    for figure in figures:
        sign = "at least" if figure.better == "higher" else "at most"
        value = "-" if figure.value is None else f"{figure.value:.3f}"
        word = {True: "reached", False: "missed", None: "not measured"}[figure.reached]
        goals.add_row(figure.name, value, f"{sign} {figure.goal:g}", word)
    console.print(goals)
    if path:
        write_json(path, result(name, rows, figures))
        console.print(f"written: {path}", markup=False)
