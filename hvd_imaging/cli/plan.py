"""`hvd-imaging plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.command(
    epilog="""\b
Examples:
  hvd-imaging plan volume.csv --out plan                    month,gigabytes (and studies) of a year or more
  hvd-imaging plan --archive /archive --out plan            by dates and sizes of its files
  hvd-imaging plan volume.csv --measured runs/unet3d --train-hours 8 --trainings 30 --prices prices.yaml --out plan
\b
Writes plan.json, plan.html (for the head of department) and plan.png into --out; without it the table alone is shown.
Prices: hvd-imaging init prices -o prices.yaml.
"""
)
@click.argument("record", metavar="[volume.csv]", type=click.Path(path_type=Path), required=False)
@click.option("--archive", type=click.Path(path_type=Path), metavar="DIR", help="Count the files of an archive instead.")
@click.option("--measured", type=click.Path(path_type=Path), metavar="RUN_DIR", help="A run to learn the time of a step from.")
@click.option("--years", type=int, help="To plan for.  [default: 3]")
@click.option("--held-tb", type=float, metavar="TB", help="Images held today.  [default: what the record adds up to]")
@click.option("--copies", type=float, help="Raw bytes for each byte: replicas or parity.  [default: 2]")
@click.option("--fill", type=float, help="Share that disks may be filled to.  [default: 0.8]")
@click.option("--train-hours", type=float, metavar="H", help="Wanted for one training.  [default: 12]")
@click.option("--trainings", type=float, metavar="N", help="A month.  [default: 20]")
@click.option("--epochs", type=click.IntRange(1), help="Of a training.  [default: those of the run]")
@click.option("--batch", type=click.IntRange(1), help="Global batch.  [default: the run's]")
@click.option("--link-mbit", type=float, metavar="MBIT", help="Network between nodes.  [default: 10000]")
@click.option("--ranks-per-node", type=int, metavar="N", help="Ranks of a node.  [default: 1]")
@click.option("--prices", "prices_file", type=click.Path(path_type=Path), metavar="FILE", help="Price file.  [default: invented examples]")
@click.option("--out", "-o", type=click.Path(path_type=Path), metavar="DIR", help="Folder for JSON, page and picture.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
def command(
    record: Path | None, archive: Path | None, measured: Path | None, epochs: int | None, batch: int | None, prices_file: Path | None,
    out: Path | None, as_json: bool, **given: Any,
) -> None:  # fmt: skip
    """Forecast the volume of images, and what storage, computing and energy it will take and cost."""
    from .console import refuse_many_ranks, table_console

    refuse_many_ranks("plan")
    import datetime

    from ..config import check, load
    from ..errors import ConfigError
    from ..planning import records
    from ..planning.plan import Wishes, make_plan
    from ..planning.prices import Prices
    from ..planning.run import load_of_run

    if (record is None) == (archive is None):
        raise ConfigError("plan: expected a table volume.csv, or --archive DIR, and not both")
    wishes = check(Wishes, {key: value for key, value in given.items() if value is not None}, "plan")
    prices = load(Prices, prices_file) if prices_file is not None else Prices()
    source = record if record is not None else archive
    assert source is not None
    found = records.read_csv(source) if record is not None else records.scan_archive(source)
    months, notes = records.complete(records.without_the_running_month(found, datetime.date.today()), str(source))
    work = load_of_run(measured, wishes, epochs, batch) if measured is not None else None
    plan = make_plan(months, notes, wishes, prices, work)
    if prices_file is None:
        click.echo("prices are invented examples; hvd-imaging init prices -o prices.yaml makes a file for yours (--prices)", err=True)
    for note in notes:
        click.echo(note, err=True)
    if out is not None:
        from ..files import write_json, write_text
        from ..reporting.plan_page import draw_plan, plan_page
        from ..reporting.report import html

        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "plan.json", plan.to_json())
        write_text(out / "plan.html", html(plan_page(plan)))
        draw_plan(out / "plan.png", plan)
    if as_json:
        import json

        click.echo(json.dumps(plan.to_json(), allow_nan=False))
        return
    from rich.table import Table

    from ..reporting.plan_page import HEAD, plan_page, year_rows

    page = plan_page(plan)
    table = Table(*HEAD)
    for row in year_rows(plan.years):
        table.add_row(*row)
    console = table_console()
    console.print(table)
    cost = next(section.tables[0] for section in page.sections if section.title == "Three ways")
    table = Table(*cost.head, title=f"{plan.currency}, {wishes.years} years")
    for cells in cost.rows:
        table.add_row(*cells)
    console.print(table)
    for line in [*page.lead, *page.sections[-1].text]:
        click.echo(line)
    if out is not None:
        click.echo(f"written: {out / 'plan.html'}, plan.json, plan.png")
