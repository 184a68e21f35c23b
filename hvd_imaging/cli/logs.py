"""`hvd-imaging logs`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(
    epilog="""\b
Examples:
  hvd-imaging logs runs/unet3d               the newest lines of the newest job
  hvd-imaging logs --follow runs/unet3d      and all that come, until it has ended
  hvd-imaging logs runs/unet3d --rank 3      what rank 3 wrote down
"""
)
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--follow", "-f", is_flag=True, help="Go on until the jobs have ended.")
@click.option("--lines", "-n", "count", type=click.IntRange(0), default=40, show_default=True, help="So many lines of the past.")
@click.option("--rank", type=click.IntRange(0), help="The log of one rank instead of the job's output.")
def command(run_dir: Path, follow: bool, count: int, rank: int | None) -> None:
    """Show the output of a run's jobs."""
    from .console import refuse_many_ranks

    refuse_many_ranks("logs")
    from ..cluster import logs, slurm
    from ..cluster.status import look
    from .status import jobs_of

    path = logs.files(run_dir, rank)[-1]
    lines, end = logs.tail(path, count)
    for line in lines:
        click.echo(line)
    if not follow:
        return

    asked = 0.0

    def ended() -> bool:
        # The queue is asked every few seconds only: the controller has other users.
        import time

        nonlocal asked
        if time.monotonic() - asked < 5:
            return False
        asked = time.monotonic()
        jobs = jobs_of(run_dir)
        if jobs is not None:
            return all(job.state in slurm.ENDED for job in jobs.values())
        return look(run_dir).state in ("done", "failed", "stopped", "silent")

    try:
        for line in logs.follow(run_dir, path, end, ended, rank):
            click.echo(line)
    except KeyboardInterrupt:
        click.echo()  # leaves the job alone
