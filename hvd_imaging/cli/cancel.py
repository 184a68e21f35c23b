"""`hvd-imaging cancel`."""

from __future__ import annotations

import time
from pathlib import Path

import click


@click.command(
    epilog="""\b
Examples:
  hvd-imaging cancel runs/unet3d           write a checkpoint, then end; `submit` again goes on from there
  hvd-imaging cancel runs/unet3d --now     end at once; the last checkpoint stays
"""
)
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--now", is_flag=True, help="Do not wait for a checkpoint.")
@click.option("--grace", type=click.FloatRange(0), default=120, show_default=True, metavar="S", help="Wait so long for the checkpoint.")
def command(run_dir: Path, now: bool, grace: float) -> None:
    """End a run's jobs, in the queue or running, with a checkpoint."""
    from .console import refuse_many_ranks

    refuse_many_ranks("cancel")
    from ..cluster import slurm
    from ..cluster.status import submissions
    from ..errors import RunError

    rows = submissions(run_dir)
    if not rows:
        raise RunError(f"{run_dir}: no jobs of `hvd-imaging submit` to end; what was started by hand is ended by hand (kill -TERM)")
    ids = [str(row["id"]) for row in rows]
    alive = {id: job for id, job in slurm.jobs(ids).items() if job.state not in slurm.ENDED}
    if not alive:
        click.echo(f"{run_dir}: all jobs have ended already")
        return
    running = [id for id, job in alive.items() if job.state == "RUNNING"]
    waiting = [id for id in alive if id not in running]
    if waiting:
        # First: a job that waits for the one that now ends must not begin.
        slurm.cancel(waiting)
        click.echo(f"taken from the queue: {', '.join(waiting)}")
    if running and not now:
        slurm.ask_to_leave(running)
        click.echo(f"asked for a checkpoint: {', '.join(running)}")
        until = time.monotonic() + grace
        while running and time.monotonic() < until:
            time.sleep(1)
            left = slurm.jobs(ids)
            running = [id for id in running if id in left and left[id].state not in (*slurm.ENDED, "COMPLETING")]
    if running:
        slurm.cancel(running)
        click.echo(f"ended: {', '.join(running)}")
    else:
        click.echo("left with a checkpoint" if not now and len(waiting) < len(alive) else "done")
