"""`hvd-imaging launch`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(
    # What follows `train` belongs to it.
    context_settings={"allow_interspersed_args": False},
    epilog="""\b
  hvd-imaging launch -np 4 -- train run.yaml
  hvd-imaging launch -np 4 --min-np 2 --hosts n1:2,n2:2 -- train run.yaml --run-dir runs/a
\b
SIGTERM, SIGINT and SIGUSR1 mean: write a checkpoint, then leave with exit code 75 (go on with --resume).
SIGINT or SIGTERM a second time ends all ranks at once.
""",
)
@click.option("-np", "ranks", type=int, required=True, metavar="N", help="Number of ranks.")
@click.option("--min-np", "least", type=int, metavar="M", help="Go on with so few when hosts are lost (default: N).")
@click.option("--max-restarts", "restarts", type=int, default=3, show_default=True, metavar="K", help="Restarts in all.")
@click.option("--hosts", metavar="h1:2,h2:2", help="Machines and their slots, as of mpirun -H.")
@click.option("--mpirun-arg", "mpirun_args", multiple=True, metavar="ARG", help="One word for mpirun; may be repeated.")
@click.option(
    "--leave-lost-hosts", is_flag=True,
    help="End with exit code 205 when a host is lost, for a scheduler that gives another one.",
)  # fmt: skip
@click.option(
    "--grace", type=click.FloatRange(min=0), default=120, show_default=True, metavar="S",
    help="Seconds for the last checkpoint when asked to stop.",
)  # fmt: skip
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="-- train run.yaml [OPTIONS]")
def command(
    ranks: int, least: int | None, restarts: int, hosts: str | None, mpirun_args: tuple[str, ...], leave_lost_hosts: bool,
    grace: float, words: tuple[str, ...],
) -> None:  # fmt: skip
    """Train under mpirun, and start again from the last checkpoint when a rank or a host dies."""
    from ..config import RunConfig, load
    from ..errors import ConfigError
    from .console import refuse_many_ranks
    from .train import command as train

    refuse_many_ranks("launch")
    if words[:1] != ("train",):
        found = f"'{words[0]}'" if words else "nothing"
        raise ConfigError(f"launch: expected `-- train run.yaml ...` after the options, found {found}")
    # Said once and before any rank starts: a wrong option of `train`, or a wrong key.
    names = click.get_current_context().help_option_names
    with train.make_context("hvd-imaging train", list(words[1:]), help_option_names=names) as inner:
        given = inner.params
    settings = load(RunConfig, given["config"], given["assignments"])

    from ..training.restart import Policy, parse_hosts
    from ..training.supervise import Job, supervise

    policy = Policy(
        ranks=ranks,
        least=ranks if least is None else least,
        restarts=restarts,
        hosts=parse_hosts(hosts),
        powers_of_two=settings.train.reproducible == "exact",
        leave_lost=leave_lost_hosts,
    )
    run_dir = given["run_dir"] or Path(settings.output.run_dir)
    beat = settings.parallel.heartbeat_seconds
    code = supervise(Job(words, run_dir, policy, mpirun_args=mpirun_args, grace_s=grace, heartbeat_s=beat))
    click.get_current_context().exit(code)
