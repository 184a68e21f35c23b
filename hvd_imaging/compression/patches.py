"""What a compression looks at: the training split as training sees it, every rank its part."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..config import RunConfig
from ..pipeline.dataset import TrainingData
from ..pipeline.plan import equal_cut
from ..shards import manifest as manifests
from ..shards.reader import ShardReader
from ..world import World


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
