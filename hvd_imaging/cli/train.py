"""`hvd-imaging train`."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import TRY_AGAIN, ConfigError
from ..world import World

if TYPE_CHECKING:
    from ..config import RunConfig
    from ..parallel.grid import Grid


@click.command(
    epilog="""\b
Three ways to run the same code:
  hvd-imaging train run.yaml                      one process
  mpirun -np 2 hvd-imaging train run.yaml         2 ranks under MPI
  horovodrun -np 2 hvd-imaging train run.yaml     2 ranks by Horovod's launcher
\b
The ranks share train.batch_size, so all three learn the same weights.
hvd-imaging launch -np 2 -- train run.yaml runs mpirun, and starts again when a rank or a host dies.
SIGTERM and SIGUSR1 mean: checkpoint, then leave with exit code 75 (go on with --resume).
"""
)
@click.argument("config", metavar="run.yaml", type=click.Path(path_type=Path))
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Change a key, as in train.epochs=20.")
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint; begin anew where there is none.")
@click.option("--run-dir", type=click.Path(path_type=Path), help="Where the run lives (default: output.run_dir).")
@click.option("--dataset", type=click.Path(path_type=Path), metavar="DIR", help="Where the dataset is, instead of data.dataset; with --resume it has to be the run's.")
@click.option("--dry-run", is_flag=True, help="Print what a rank takes of memory and which grids would fit; train nothing.")
@click.option("--ranks", type=click.IntRange(min=1), help="--dry-run: world size (default: the ranks that were started).")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def command(
    config: Path, assignments: tuple[str, ...], resume: bool, run_dir: Path | None, dataset: Path | None, dry_run: bool,
    ranks: int | None, as_json: bool,
) -> None:  # fmt: skip
    """Train a network on a dataset, alone or on many ranks."""
    from .. import bootstrap
    from ..config import RunConfig, load
    from ..world import world_from_environment

    settings = load(RunConfig, config, assignments)
    directory = run_dir or Path(settings.output.run_dir)
    settings = _with_dataset(settings, directory, resume, dataset)
    parallel, world = settings.parallel, world_from_environment()
    if dry_run:
        _tell_memory(settings, world, ranks, as_json)
        return
    if ranks is not None:
        raise click.UsageError("--ranks belongs to --dry-run; ranks are started by mpirun -np")
    grid = _grid(settings, world)
    os.environ.update(bootstrap.horovod_variables(parallel.fusion_mb, parallel.cycle_ms))
    threads = bootstrap.prepare(settings.threads_per_rank)
    bootstrap.load_tensorflow()

    from ..parallel.horovod import Horovod
    from ..training.loop import train

    hvd = Horovod(grid)
    with TrainingReport(hvd.world, quiet=as_json) as report:
        if hvd.world.is_root:
            report.message(f"{threads.compute} thread{'s' * (threads.compute > 1)} a rank; run folder {directory}")
        summary = train(settings, directory, hvd, resume, report)
    code = TRY_AGAIN if summary.left else 0
    if not hvd.world.is_root:
        sys.exit(code)
    if as_json:
        import json

        click.echo(
            json.dumps(
                {
                    "run_dir": str(summary.directory),
                    "steps": summary.steps,
                    "best": summary.best.to_json(),
                    "weights_sha256": summary.weights_sha256,
                    "stopped_early": summary.stopped_early,
                    "left": summary.left,
                }
            )
        )
    elif summary.left:
        report.message(f"left after {summary.steps} steps as asked; go on with --resume")
    else:
        report.message(
            f"done: {summary.steps} steps{', stopped early' * summary.stopped_early}"
            + (f", best epoch {summary.best.epoch + 1}" if summary.best.epoch >= 0 else "")
            + f"; next: hvd-imaging evaluate {summary.directory}"
        )
    sys.exit(code)


def _with_dataset(settings: RunConfig, directory: Path, resume: bool, given: Path | None) -> RunConfig:
    """The dataset as the user gave it; of a resumed run whose dataset has moved, where it is now."""
    from ..shards.manifest import NAME
    from ..training.layout import CONFIG
    from ..training.run import load_run, located, with_dataset

    missing = not (Path(settings.data.dataset) / NAME).is_file()
    if resume and (directory / CONFIG).is_file() and (given is not None or missing):
        return with_dataset(settings, Path(located(load_run(directory), given).config.data.dataset))
    return settings if given is None else with_dataset(settings, given)


def _memory(settings: RunConfig, world: World, ranks: int) -> float:
    """Bytes that a rank of this node may take."""
    import psutil

    if settings.parallel.memory_gb is not None:
        return 1e9 * settings.parallel.memory_gb
    sharing = world.local_size if world.size > 1 else ranks
    return psutil.virtual_memory().available / sharing


def _grid(settings: RunConfig, world: World) -> Grid:
    from ..parallel.grid import make_grid

    spatial = settings.parallel.spatial
    if spatial == "auto":
        from ..parallel.horovod import lowest
        from ..planning.memory import fitting
        from ..shards.manifest import load as load_manifest

        manifest = load_manifest(settings.data.dataset)
        memory = lowest(world, _memory(settings, world, 1))
        spatial = fitting(settings, manifest.channels, max(len(manifest.classes), 1), world.size, memory).spatial
    return make_grid(settings.parallel, world.size, spatial)


def _tell_memory(settings: RunConfig, world: World, ranks: int | None, as_json: bool) -> None:
    import json

    from rich.table import Table

    from ..planning.memory import fitting, grids
    from ..shards.manifest import load as load_manifest
    from .console import table_console

    if not world.is_root:
        return
    size = ranks or world.size
    manifest = load_manifest(settings.data.dataset)
    shape = manifest.channels, max(len(manifest.classes), 1)
    memory, wanted = _memory(settings, world, size), settings.parallel.spatial
    none: ConfigError | None = None
    if wanted == "auto":
        try:
            wanted = fitting(settings, *shape, size, memory).spatial
        except ConfigError as error:
            none = error  # told below the table, which shows by how much
    found = grids(settings, *shape, size)
    if as_json:
        rows = [
            {"data": grid.data, "spatial": grid.spatial, "bytes": round(estimate.total), "fits": estimate.total <= memory,
             "wanted": grid.spatial == wanted} for grid, estimate in found
        ]  # fmt: skip
        click.echo(json.dumps({"ranks": size, "rank_memory_bytes": round(memory), "grids": rows}))
        return
    table = Table("grid", "weights, optimizer", "activations", "rest", "a rank takes", "", title=f"{size} rank{'s' * (size > 1)}, estimated, GB")
    for grid, estimate in found:
        held = estimate.weights + estimate.gradients + estimate.optimizer + estimate.copies
        rest = estimate.batch + estimate.runtime
        words = ["wanted"] * (grid.spatial == wanted) + ["fits" if estimate.total <= memory else "does not fit"]
        numbers = (f"{number / 1e9:.2f}" for number in (held, estimate.activations, rest, estimate.total))
        table.add_row(f"data {grid.data} x spatial {grid.spatial}", *numbers, ", ".join(words))
    console = table_console()
    console.print(table)
    where = "parallel.memory_gb" if settings.parallel.memory_gb is not None else "this node's free memory, shared by its ranks"
    console.print(f"a rank may take {memory / 1e9:.2f} GB ({where})", markup=False)
    if none is not None:
        raise none
    if not any(grid.spatial == wanted for grid, _ in found):
        console.print(f"parallel.spatial={wanted} is not among them: {size} ranks, a depth of {settings.data.patch[0]} and a batch of "
                      f"{settings.train.batch_size} do not permit it", markup=False)  # fmt: skip


class TrainingReport:
    """Progress on rank 0: a bar on a terminal, one line an epoch everywhere; nothing on the other ranks."""

    def __init__(self, world: World, quiet: bool = False) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._active = world.is_root and not quiet
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}  rate {task.fields[rate]:.2e}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not (self._active and self._console.is_terminal),
        )
        self._task: Any = None
        self._shown = 0.0

    def __enter__(self) -> TrainingReport:
        if not self._bar.disable:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._bar.disable:
            self._bar.stop()

    def message(self, text: str) -> None:
        """One line."""
        if self._active:
            self._console.print(text, markup=False)

    # People count epochs from 1; files and JSON from 0.

    def step(self, epoch: int, step: int, steps: int, loss: float, rate: float) -> None:
        """Move the bar; without a terminal, a line every 30 s."""
        if self._bar.disable:
            if self._active and time.monotonic() - self._shown > 30:
                self._shown = time.monotonic()
                self.message(f"epoch {epoch + 1}: step {step}/{steps}, loss {loss:.4f}")
            return
        if self._task is None:
            self._task = self._bar.add_task("", total=steps, epoch=epoch + 1, loss=loss, rate=rate)
        self._bar.update(self._task, completed=step, total=steps, epoch=epoch + 1, loss=loss, rate=rate)

    def epoch(self, record: dict[str, Any]) -> None:
        """One line with the metrics of all ranks."""
        self._shown = time.monotonic()
        shown = ["loss", "accuracy", "val_loss", "val_dice", "val_accuracy"]
        metrics = "  ".join(f"{name} {record[name]:.4f}" for name in shown if name in record)
        star = "  *" if record.get("best") else ""
        self.message(f"epoch {record['epoch'] + 1:3d}  {metrics}  {record['samples_per_second']:.1f} samples/s{star}")
