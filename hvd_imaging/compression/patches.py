"""What a compression looks at: the training split as training sees it, every rank its part."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..config import RunConfig
from ..errors import DatasetError, RunError
from ..models.spec import ModelSpec
from ..pipeline.dataset import TrainingData
from ..pipeline.plan import equal_cut
from ..shards import manifest as manifests
from ..shards.reader import ShardReader
from ..world import World


def check_dataset(config: RunConfig, spec: ModelSpec) -> None:
    """Refuse a dataset that is not the one the network learned from.

    Raises:
        DatasetError: it is missing, or has no training split.
        RunError: preprocessed in another way, or of other classes or channels.
    """
    dataset = config.data.dataset
    if not (Path(dataset) / manifests.NAME).is_file():
        raise DatasetError(
            f"{dataset}: the run's dataset is not there (no {manifests.NAME}), but compression learns from and is judged by it; "
            "restore it, or give its new place with --dataset FOLDER"
        )
    manifest = manifests.load(dataset)
    for what, found, expected in (
        ("preprocess", manifest.preprocess.model_dump(mode="json"), spec.preprocess.model_dump(mode="json")),
        ("classes", list(manifest.classes), list(spec.classes)),
        ("channels", manifest.channels, spec.channels),
    ):
        if found != expected:
            raise RunError(
                f"{dataset}: {what} is {found}, expected {expected} as the network was trained on: its patches would calibrate "
                "something else; ingest it with the run's settings"
            )
    if not manifest.of_split(config.data.train_split):
        raise DatasetError(f"{dataset}: no training split to calibrate on; `hvd-imaging dataset split` spreads the patients anew")


def training_batches(config: RunConfig, world: World, patches: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """This rank's part of the first ``patches`` training patches, as the first epoch draws them.

    Yields:
        image float32 ``(n, D, H, W, C)``, label int32 ``(n, ...)``; nothing where a rank has no part of a batch.
    """
    manifest = manifests.load(config.data.dataset)
    cut = equal_cut(world.size, 1)
    with ShardReader(Path(config.data.dataset), manifest) as reader:
        data = TrainingData(reader, config.data, config.train.seed, config.train.batch_size)
        items = np.concatenate(list(data.plan(0).batches(0)))[:patches]
        for first in range(0, len(items), data.batch):
            mine = cut.part(items[first : first + data.batch], world.rank, 0)
            if len(mine):
                image, label, _ = zip(*(data.example(0, int(item)) for item in mine), strict=True)
                yield np.stack(image), np.stack(label)
