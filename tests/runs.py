"""Run folders for tests, with everything that training leaves but made at once: the weights are random."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hvd_imaging import models
from hvd_imaging.config import RunConfig, check
from hvd_imaging.shards import manifest as manifests
from hvd_imaging.training import checkpoint
from hvd_imaging.training.events import EventLog
from hvd_imaging.training.loop import make_spec
from hvd_imaging.training.run import BEST, claim
from hvd_imaging.world import World

PATCH = (8, 16, 16)


def make_run(folder: Path, dataset: Path, task: str = "segmentation", **model) -> Path:
    """A run of a small U-Net, or of a narrow VGG16 of 32 x 32 images."""
    values = {
        "data": {"dataset": str(dataset), "patch": PATCH},
        "model": {"name": "unet3d", "filters": 4, "depth": 2} | model,
        "output": {"tensorboard": False},
    }
    score = "val_dice"
    if task == "classification":
        values["data"]["patch"], score = [1, 32, 32], "val_accuracy"
        values["model"] = {"name": "vgg16", "width": 0.125, "norm": "group"} | model
    config = check(RunConfig, values, "test")
    manifest = manifests.load(dataset)
    spec = make_spec(config, manifest, folder.name)
    claim(folder, config, spec, manifest, World(), resume=False)
    random = np.random.default_rng(0)
    # Away from the initial values, so that a forgotten bias or scale would show.
    weights = [w.numpy() + random.normal(0, 0.1, w.shape).astype(np.float32) for w in models.build(spec).weights]
    checkpoint.save(folder / BEST, checkpoint.State(weights, [], {}))
    log = EventLog(folder)
    for epoch in range(4):
        record = {"epoch": epoch, "loss": 1 / (epoch + 1), "val_loss": 1.2 / (epoch + 1), "learning_rate": 1e-3}
        log.write("epoch", **record, **{score: 1 - 0.8 / (epoch + 1)}, best=True)
    return folder
