"""Small made datasets for tests: real shards and manifests, no DICOM in between."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hvd_imaging.config import PreprocessConfig, ShardConfig, SplitConfig
from hvd_imaging.shards.manifest import Manifest
from hvd_imaging.shards.writer import Record, write_dataset


def make_dataset(
    folder: Path, task: str = "segmentation", samples: int = 6, shape=(16, 24, 24), seed: int = 0, split=(0.2, 0.2)
) -> Manifest:
    """Bright balls on noise (segmentation: their mask; classification: whether there is one)."""
    random = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.arange(side) for side in shape], indexing="ij"), -1)
    records = []
    for index in range(samples):
        has_ball = task == "segmentation" or index % 2 == 1
        centre = np.array(shape) * random.uniform(0.35, 0.65, 3)
        radius = min(side for side in shape if side > 1) * random.uniform(0.2, 0.3)
        distance = np.linalg.norm(grid - centre, axis=-1)
        if shape[0] == 1:
            distance = np.linalg.norm((grid - centre)[..., 1:], axis=-1)
        ball = (distance < radius) & has_ball
        image = (0.2 + 0.5 * ball + random.normal(0, 0.05, shape)).clip(0, 1).astype(np.float32)[..., None]
        records.append(
            Record(
                id=f"{index:016x}",
                patient=f"{index:016x}",
                image=image,
                mask=ball.astype(np.uint8) if task == "segmentation" else None,
                affine=np.diag([2.0, 1.0, 1.0, 1.0]),
                modality="CT",
                label=int(has_ball) if task == "classification" else None,
            )
        )
    classes = ("background", "ball") if task == "segmentation" else ("empty", "ball")
    return write_dataset(
        folder,
        records,
        task=task,
        classes=classes,
        preprocess=PreprocessConfig(intensity="none"),
        shards=ShardConfig(chunk=(8, 16, 16)),
        split=SplitConfig(val=split[0], test=split[1]),
    )
