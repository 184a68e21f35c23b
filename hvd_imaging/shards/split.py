"""Another division into training, validation and test, without touching the shards."""

from __future__ import annotations

from ..config import SplitConfig, check
from .manifest import Manifest, assign_splits


def resplit(manifest: Manifest, val: float, test: float, seed: int) -> Manifest:
    """The manifest with other splits, by patient. Pure.

    Raises:
        ConfigError: shares outside [0, 1] or a sum above 1.
    """
    config = check(SplitConfig, {"val": val, "test": test, "seed": seed}, "dataset split")
    splits = assign_splits([sample.patient for sample in manifest.samples], config)
    samples = tuple(
        sample.model_copy(update={"split": splits[sample.patient]}) for sample in manifest.samples
    )
    return manifest.model_copy(update={"split": config, "samples": samples})
