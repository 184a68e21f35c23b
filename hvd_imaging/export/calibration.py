"""Patches of the training split, on which ranges of activations are measured for 8-bit networks."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..errors import DatasetError, RunError
from ..inference.sliding import Shape3, center_start
from ..models.spec import ModelSpec
from ..shards import manifest as manifests
from ..shards.manifest import Manifest, Sample
from ..shards.reader import ShardReader

COUNT = 32


def matching_manifest(dataset: str | Path, spec: ModelSpec, split: str = "train") -> Manifest:
    """The manifest of a dataset that is as the one that the model learned from.

    Raises:
        DatasetError: the dataset is missing, or has no sample in ``split``.
        RunError: preprocessed in another way than the model's training data, or of other classes or channels.
    """
    if not (Path(dataset) / manifests.NAME).is_file():
        raise DatasetError(
            f"{dataset}: the run's dataset is not there (no {manifests.NAME}), but its training split is needed; "
            "restore it, or give its new place with --dataset FOLDER; float formats (tflite, tflite-float16, onnx) are exported without"
        )
    manifest = manifests.load(dataset)
    for what, found, expected in (
        ("preprocess", manifest.preprocess.model_dump(mode="json"), spec.preprocess.model_dump(mode="json")),
        ("classes", list(manifest.classes), list(spec.classes)),
        ("channels", manifest.channels, spec.channels),
    ):
        if found != expected:
            raise RunError(
                f"{dataset}: {what} is {found}, expected {expected} as the model was trained on: its patches would calibrate "
                "something else; ingest it with the run's settings"
            )
    if not manifest.of_split(split):
        raise DatasetError(
            f"{dataset}: no sample in split '{split}' to calibrate on; `hvd-imaging dataset split` spreads the patients anew"
        )
    return manifest


def calibration_patches(dataset: str | Path, spec: ModelSpec, count: int = COUNT, split: str = "train") -> np.ndarray:
    """Patches float32 ``(count, *patch, C)``: sample after sample, a third around foreground, the others anywhere; seeded.

    Classification sees the middle of each volume first, as it is used.

    Raises as `matching_manifest`.
    """
    manifest = matching_manifest(dataset, spec, split)
    samples = manifest.of_split(split)
    generator = np.random.default_rng(0)
    with ShardReader(Path(dataset), manifest) as reader:
        found_patches = []
        for number in range(count):
            sample = samples[number % len(samples)]
            start = _start(generator, reader, sample, spec, number)
            found_patches.append(reader.read(sample, start, spec.patch)[0])
    return np.stack(found_patches)


def _start(generator: np.random.Generator, reader: ShardReader, sample: Sample, spec: ModelSpec, number: int) -> Shape3:
    shape = sample.shape[:3]
    middle = center_start(shape, spec.patch)
    if spec.task == "classification" and number < 2 * COUNT:
        return middle
    if number % 3 == 0:
        voxels = reader.foreground(sample)
        if len(voxels):
            at = voxels[generator.integers(len(voxels))]
            wanted = [int(v) - size // 2 for v, size in zip(at, spec.patch, strict=True)]
            return _inside(wanted, shape, spec.patch, middle)
    return _inside([int(generator.integers(max(n - p, 0) + 1)) for n, p in zip(shape, spec.patch, strict=True)], shape, spec.patch, middle)


def _inside(wanted: list[int], shape: tuple[int, ...], patch: Shape3, middle: Shape3) -> Shape3:
    d, h, w = (
        m if n <= p else min(max(a, 0), n - p) for a, n, p, m in zip(wanted, shape, patch, middle, strict=True)
    )
    return d, h, w
