"""`hvd-imaging submit`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import click


@click.command(
    epilog="""\b
Examples:
  hvd-imaging submit run.yaml --nodes 4 --ntasks-per-node 1 --gres gpu:1 --time 01:00:00
  hvd-imaging submit run.yaml --nodes 2 --dry-run                 show the script, queue nothing
  hvd-imaging submit run.yaml --nodes 2 --chain ingest,train,evaluate --source /archive --for evaluate:nodes=1
  hvd-imaging submit run.yaml --array sweep.yaml                  a training for each row of sweep.yaml
  hvd-imaging submit run.yaml --nodes 8 --auto --measured runs/a  as many nodes, 8 at most, as end first
\b
What a site always wants (account, partition, modules) stands in site.yaml, beside templates of its own, in
~/.config/hvd-imaging/slurm/ or /etc/hvd-imaging/slurm/ (docs/slurm.md).
"""
)
@click.argument("config", metavar="run.yaml", type=click.Path(path_type=Path))
@click.option("--nodes", "-N", type=int, help="Machines.  [default: 1]")
@click.option("--ntasks-per-node", type=int, metavar="N", help="Ranks on each.  [default: 1]")
@click.option("--cpus-per-task", "-c", type=int, metavar="N", help="Cores of a rank.")
@click.option("--gres", help="Resources of a node, as in gpu:1.")
@click.option("--mem", help="Memory of a node, as in 64G.")
@click.option("--time", "-t", help="Limit of one start.  [default: 01:00:00]")
@click.option("--partition", "-p", help="Queue.")
@click.option("--account", "-A", help="Who pays.")
@click.option("--qos", help="Quality of service.")
@click.option("--constraint", "-C", help="Features of the nodes.")
@click.option("--exclusive", is_flag=True, default=None, help="Whole nodes.")
@click.option("--job-name", "-J", metavar="NAME", help="Default: step and run folder.")
@click.option("--mail-user", metavar="ADDRESS", help="Where mail goes when it ends or fails.")
@click.option("--launcher", type=click.Choice(["mpirun", "srun", "horovodrun"]), help="What starts the ranks.  [default: mpirun]")
@click.option("--container", metavar="IMAGE", help="Apptainer image with hvd-imaging in it (with --launcher srun).")
@click.option("--stage", type=click.Choice(["none", "node", "disk"]), help="Copy shards to memory or disk of each node first.")
@click.option("--requeue/--no-requeue", default=None, help="Go on after preemption, a lost node, the time limit.  [default: requeue]")
@click.option("--signal-seconds", type=int, metavar="S", help="Ask for a checkpoint so long before the limit.  [default: 180]")
@click.option("--option", "options", multiple=True, metavar="--X=Y", help="One more option for sbatch; may be repeated.")
@click.option("--module", "modules", multiple=True, metavar="NAME", help="Environment module to load; may be repeated.")
@click.option("--for", "single", multiple=True, metavar="STEP:OPTION=VALUE", help="For one step of a chain, as in evaluate:nodes=1.")
@click.option("--chain", "chain_text", default="train", show_default=True, help="Steps of ingest,train,evaluate,compress, in this order.")
@click.option("--source", metavar="ARCHIVE", help="ingest: folder, ZIP, TAR or address.")
@click.option("--recipe", type=click.Path(path_type=Path), help="compress: recipe file.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Change a key of run.yaml, as in train.epochs=20.")
@click.option("--ingest-set", multiple=True, metavar="KEY=VALUE", help="Change a key of ingest, as in preprocess.spacing=[2,1,1].")
@click.option("--run-dir", type=click.Path(path_type=Path), help="Where the run lives (default: output.run_dir).")
@click.option("--array", "array_file", type=click.Path(path_type=Path), metavar="FILE", help="Hyper-parameters: one training for each row.")
@click.option("--at-once", type=click.IntRange(0), default=0, help="--array: so many trainings together (default: all).")
@click.option("--template", metavar="NAME", help="Another template than the step's own.")
@click.option("--template-dir", type=click.Path(path_type=Path, exists=True, file_okay=False), help="Look for templates here first.")
@click.option("--var", "variables", multiple=True, metavar="NAME=VALUE", help="A variable for a template of your own.")
@click.option("--auto", is_flag=True, help="Choose the number of nodes, --nodes at most, by the queue and measured scaling.")
@click.option("--measured", type=click.Path(path_type=Path), metavar="RUN_DIR", help="--auto: an earlier run to learn the pace from.")
@click.option("--dry-run", is_flag=True, help="Show scripts and findings, write and queue nothing.")
@click.option("--force", is_flag=True, help="Submit in spite of findings that say it cannot run.")
@click.option("--json", "as_json", is_flag=True, help="Print jobs and findings as JSON.")
def command(
    config: Path, single: tuple[str, ...], chain_text: str, source: str | None, recipe: Path | None, assignments: tuple[str, ...],
    ingest_set: tuple[str, ...], run_dir: Path | None, array_file: Path | None, at_once: int, template: str | None,
    template_dir: Path | None, variables: tuple[str, ...], auto: bool, measured: Path | None, dry_run: bool, force: bool, as_json: bool,
    **given: Any,
) -> None:  # fmt: skip
    """Queue a training, or a chain of steps, on a Slurm cluster: scripts from templates, judged before they are queued."""
    from .console import refuse_many_ranks

    refuse_many_ranks("submit")
    import datetime

    from ..cluster import auto as choosing
    from ..cluster import submit as submitting
    from ..cluster.render import FOLDER, Wish, parse_chain, scripts
    from ..cluster.request import make_requests, site_folders
    from ..config import IngestConfig, RunConfig, load
    from ..errors import ConfigError, RunError, SetupError

    settings = load(RunConfig, config, assignments)
    load(IngestConfig, None, ingest_set)
    steps = parse_chain(chain_text)
    folders = [*([template_dir] if template_dir else []), *site_folders()]
    lists = {name: list(given.pop(name)) or None for name in ("options", "modules")}
    requests = make_requests(steps, given | lists, single, folders)
    directory = run_dir or Path(settings.output.run_dir)
    named = dict(_variable(text, ConfigError) for text in variables)
    for path, option in ((recipe, "--recipe"), (Path(source) if source and "://" not in source else None, "--source")):
        if path is not None and not path.exists():
            raise ConfigError(f"{option} {path}: no such file or folder")
    wish = Wish(
        run_dir=directory, folder=Path.cwd(), path=str(Path(sys.executable).parent), config=directory / FOLDER / "run.yaml",
        dataset=settings.data.dataset, source=source, recipe=recipe, template=template, variables=named,
        assignments={"train": assignments, "ingest": ingest_set},
        array=submitting.read_array(array_file, directory, config, at_once) if array_file else None,
    )  # fmt: skip
    reasons: list[str] = []
    if auto:
        requests, reasons = choosing.choose_nodes(steps, requests, wish, settings, measured or directory, folders)
    made = scripts(steps, wish, requests, folders)
    problems: list[Any] = []
    try:
        problems = submitting.findings(made, settings, directory)
    except (SetupError, RunError) as error:
        if not dry_run:
            raise
        reasons.append(f"not judged: {error}")
    fatal = [finding for finding in problems if finding.fatal]
    refused = bool(fatal) and not force and not dry_run
    if not as_json:
        # The first one that stops it is told last, as the error.
        told = [finding for finding in problems if not refused or finding is not fatal[0]]
        for line in [*reasons, *(f"{'error' if finding.fatal else 'warning'}: {finding.text}" for finding in told)]:
            click.echo(line, err=True)
    jobs: list[dict[str, Any]] = []
    if dry_run:
        if not as_json:
            for script in made:
                click.echo(f"# ---- {script.step}" + (f", after {script.after}" if script.after else ""))
                click.echo(script.text, nl=False)
    elif refused:
        raise ConfigError(f"not submitted: {fatal[0].text} (--force submits it all the same)")
    else:
        submitting.refuse_second(directory)
        files = submitting.write_scripts(made, wish, config, folders)
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        jobs = submitting.submit(made, files, directory, ["hvd-imaging", *sys.argv[1:]], now)
    if as_json:
        import json

        click.echo(
            json.dumps(
                {
                    "run_dir": str(directory),
                    "jobs": jobs,
                    "findings": [{"fatal": finding.fatal, "text": finding.text} for finding in problems],
                    "notes": reasons,
                    "scripts": {script.step: script.text for script in made} if dry_run else {},
                }
            )
        )
        return
    for job in jobs:
        after = f", after job {job['after']}" if job["after"] else ""
        click.echo(f"{job['step']}: job {job['id']}{after}")
    if jobs:
        shown = shlex.quote(str(directory))
        click.echo(f"next: hvd-imaging status {shown}; hvd-imaging logs --follow {shown}")


def _variable(text: str, error: type[Exception]) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier() or not value.isprintable():
        raise error(f"--var {text}: expected NAME=VALUE in one line, as in reservation=imaging")
    return name, value
