"""`hvd-imaging report`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ..cluster.slurm import Job
    from ..reporting.report import Page


@click.command(
    epilog="""\b
Examples:
  hvd-imaging report runs/unet3d                              runs/unet3d/report.html
  hvd-imaging report runs/cluster --compare runs/alone --out migration.html
  hvd-imaging report runs/unet3d --prices prices.yaml         with the cost (hvd-imaging init prices -o prices.yaml)
  hvd-imaging report runs/unet3d --serve                      a live run in a browser of this machine
"""
)
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--compare", "others", multiple=True, type=click.Path(path_type=Path), metavar="OTHER", help="Another run beside it; may be repeated.")
@click.option("--out", "-o", type=click.Path(path_type=Path), metavar="FILE.html", help="Where to.  [default: RUN_DIR/report.html]")
@click.option("--prices", "prices_file", type=click.Path(path_type=Path), metavar="FILE", help="Price file, for the cost.")
@click.option("--scaling", type=click.Path(path_type=Path), metavar="FILE", help="JSON of `bench scaling`, to be shown too.")
@click.option("--card", type=click.Path(path_type=Path), metavar="DIR", help="Folder of `compress`, for its model card.  [default: RUN_DIR/compressed]")
@click.option("--serve", is_flag=True, help="Show it on loopback, always new, until Ctrl-C.")
@click.option("--port", type=click.IntRange(0, 65535), default=8765, show_default=True, help="--serve: 0 takes any free one.")
@click.option("--json", "as_json", is_flag=True, help="Print what the page would show, without pictures, and write nothing.")
def command(
    run_dir: Path, others: tuple[Path, ...], out: Path | None, prices_file: Path | None, scaling: Path | None, card: Path | None, serve: bool, port: int, as_json: bool
) -> None:
    """Make one self-contained HTML page on RUN_DIR: curves, time, machines, energy, restarts, evaluation, cases."""
    from .console import refuse_many_ranks

    refuse_many_ranks("report")
    from ..config import load
    from ..files import write_text
    from ..planning.prices import Prices
    from ..reporting.report import gather, html, make_page, read_scaling

    prices = load(Prices, prices_file) if prices_file is not None else None
    measured = read_scaling(scaling) if scaling is not None else None

    def page(refresh_s: int = 0) -> Page:
        return make_page(gather(run_dir, card, _jobs(run_dir)), [gather(other) for other in others], prices, measured, refresh_s)

    if serve:
        from ..reporting.serve import serve as run_server

        run_server(lambda: html(page(5)), port, lambda address: click.echo(f"{address} (Ctrl-C ends it)", err=True))
        return
    made = page()
    if as_json:
        import dataclasses
        import json

        value = dataclasses.asdict(made)
        for section in value["sections"]:
            del section["pictures"], section["charts"]
        click.echo(json.dumps(value, default=str))
        return
    target = out or run_dir / "report.html"
    write_text(target, html(made))
    click.echo(f"written: {target}")


def _jobs(run_dir: Path) -> dict[str, Job] | None:
    """What Slurm knows of the run's jobs; None without jobs or without Slurm: the page then tells what the run itself says."""
    from ..cluster import slurm
    from ..cluster.status import submissions
    from ..errors import RunError, SetupError

    with contextlib.suppress(RunError, SetupError):
        if rows := submissions(run_dir):
            return slurm.jobs([str(row["id"]) for row in rows])
    return None
