"""From a run folder to what a training of it takes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from ..config import RunConfig, load
from ..errors import ConfigError, RunError
from ..shards import manifest as manifests
from ..training.events import read_events
from ..training.layout import CONFIG
from .compute import Load
from .memory import parameters
from .pace import measured_pace
from .plan import Wishes


def load_of_run(run_dir: Path, wishes: Wishes, epochs: int | None = None, batch: int | None = None) -> Load:
    """The load of trainings like this one.

    Args:
        epochs, batch: other ones than the run's.

    Raises:
        RunError: not a run folder, or no finished epoch.
    """
    if not (run_dir / CONFIG).is_file():
        raise RunError(f"{run_dir}: not a run folder (no {CONFIG} in it)")
    try:
        config = load(RunConfig, run_dir / CONFIG)
        manifest = manifests.load(run_dir)
        weights = 4.0 * parameters(config, manifest.channels, max(len(manifest.classes), 1))
    except ConfigError as error:
        raise RunError(f"--measured {run_dir}: {error}") from error
    size = batch or config.train.batch_size
    pace = measured_pace(read_events(run_dir), size, weights)
    if pace is None:
        raise RunError(f"--measured {run_dir}: no finished epoch to learn the pace from; train it for two epochs at least")
    draws = config.data.patches_per_volume if manifest.task == "segmentation" else 1
    samples = draws * sum(sample.split == config.data.train_split for sample in manifest.samples)
    steps = math.ceil(samples / size) * (epochs or config.train.epochs)
    return Load(
        job=replace(pace.job, samples=size), steps=steps, hours=wishes.train_hours, trainings=wishes.trainings,
        ranks_per_node=wishes.ranks_per_node, busy=wishes.busy, sample_bytes=math.prod(config.data.patch) * (4.0 * manifest.channels + 1),
    )  # fmt: skip
