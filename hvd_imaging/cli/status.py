"""`hvd-imaging status`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ..cluster.status import Status


@click.command(
    epilog="""\b
Examples:
  hvd-imaging status                   all runs below runs/, and this folder if it is one
  hvd-imaging status runs/unet3d
  hvd-imaging status runs/*            several runs, a line each
  hvd-imaging status runs/unet3d --json
\b
States: new, waiting (in the queue), starting, running, saving, ending; done, stopped (asked to leave), failed;
stalled (some ranks wait for one that does not come), silent (no rank shows a sign of life).
"""
)
@click.argument("run_dirs", metavar="[RUN_DIR]...", type=click.Path(path_type=Path), nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON: an object for one RUN_DIR, else a list.")
def command(run_dirs: tuple[Path, ...], as_json: bool) -> None:
    """Say how a run stands: its jobs in the queue, epoch, loss, speed, time left, and slow ranks."""
    from .console import refuse_many_ranks, table_console

    refuse_many_ranks("status")
    from ..cluster.status import look, runs_below
    from ..errors import RunError

    one = len(run_dirs) == 1
    run_dirs = run_dirs or tuple(runs_below(Path()))
    if not run_dirs:
        raise RunError(
            "no runs below runs/, and this folder is none; name a RUN_DIR, go to the folder where `hvd-imaging train` was started, or "
            "begin a run: `hvd-imaging train run.yaml`"
        )
    found = []
    for directory in run_dirs:
        try:
            found.append(look(directory, jobs_of(directory)))
        except RunError:
            if one:
                raise  # of several, other folders are passed over: a shell's * names them all
    if as_json:
        import json

        values = [status.to_json() for status in found]
        click.echo(json.dumps(values[0] if one else values))
        return
    if not one:
        from rich.table import Table

        table = Table("run", "state", "epoch", "loss", "samples/s", "left", "job")
        for status in found:
            table.add_row(
                status.run_dir, status.state, _of(status.epoch, status.epochs), _metric(status), _rate(status), _left(status),
                " ".join(row["id"] for row in status.jobs),
            )  # fmt: skip
        table_console().print(table)
        return
    for line in lines(found[0]):
        click.echo(line)


def jobs_of(directory: Path) -> dict | None:
    """What Slurm knows of the run's jobs; None where there are none, or no Slurm to ask."""
    from ..cluster import slurm
    from ..cluster.status import submissions
    from ..errors import SetupError

    rows = submissions(directory)
    if not rows:
        return None
    try:
        return slurm.jobs([str(row["id"]) for row in rows])
    except SetupError as error:
        click.echo(f"warning: {error}", err=True)
        return None


def lines(status: Status) -> list[str]:
    """For people, one run."""
    from ..cluster.judge import clock

    found = [f"{status.run_dir}: {status.state}" + (f" ({status.why})" if status.why else "")]
    for row in status.jobs:
        facts = [row["nodes"], row["reason"], f"{clock(row['left_s'])} of its limit left" if row["left_s"] else ""]
        facts += [f"queued again {row['restarts']} time{'s' * (row['restarts'] != 1)}" if row["restarts"] else "", f"exit code {row['code']}" if row["code"] else ""]
        facts += [", ".join(f"{count} {state}" for state, count in row["tasks"].items())]
        found.append(f"  {row['step']:9} job {row['id']}: {row['state']}" + "".join(f", {fact}" for fact in facts if fact))
    if status.step is not None:
        ranks = f", {status.ranks} ranks on {', '.join(status.hosts)}" if status.ranks else ""
        found.append(f"  epoch {_of(status.epoch, status.epochs)}, step {_of(status.step, status.steps)}{ranks}")
    if status.metrics:
        found.append("  " + "  ".join(f"{name} {value:.4f}" for name, value in status.metrics.items()))
    facts = [f"{_rate(status)} samples/s" if status.samples_per_second else "", f"{_left(status)} left" if status.left_s else ""]
    facts += [f"newest checkpoint at step {status.checkpoint}" if status.checkpoint is not None else ""]
    facts += [f"started {status.starts} times" if status.starts > 1 else ""]
    if any(facts):
        found.append("  " + ", ".join(fact for fact in facts if fact))
    return found + [f"  slow: {text}" for text in status.stragglers]


def _of(value: int | None, total: int | None) -> str:
    return "-" if value is None else f"{value}" + (f" of {total}" if total is not None else "")


def _metric(status: Status) -> str:
    return f"{status.metrics['loss']:.4f}" if "loss" in status.metrics else "-"


def _rate(status: Status) -> str:
    return f"{status.samples_per_second:.1f}" if status.samples_per_second else "-"


def _left(status: Status) -> str:
    from ..cluster.judge import clock

    return clock(status.left_s) if status.left_s else "-"
