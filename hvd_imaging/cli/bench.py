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


def _show(name: str, rows: Sequence[Row], figures: Sequence[Figure], path: str | None) -> None:
    from rich.console import Console
    from rich.table import Table

    from ..bench.report import result
    from ..files import write_json

    console = Console(highlight=False)
    table = Table("case", "system", "metric", "median", "lowest", "highest", "runs", title=f"bench {name}")
    for row in rows:
        numbers = [row.value, min(row.runs, default=None), max(row.runs, default=None)]
        shown = [f"{n:,.0f} {row.unit}" if n is not None else row.reason or "not measured" for n in numbers]
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
