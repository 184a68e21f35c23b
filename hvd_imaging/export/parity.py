"""An export is only as good as its agreement with the network that it came from: measured on every export."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DatasetError, RunError
from ..inference.sliding import center_start
from ..models.spec import ModelSpec
from ..shards import manifest as manifests
from ..shards.reader import ShardReader

NAME = "parity.json"
TOLERANCE = 1e-4
PATCHES = 4


@dataclass(frozen=True)
class Parity:
    """The comparison's result.

    Attributes:
        max_abs_difference: of any probability.
        same_answer: share of voxels (cases) whose most likely class is the same.
        patches: compared.
        inputs: "dataset" (real patches) or "random".
        tolerance: that the difference must not exceed.
        least_same: that ``same_answer`` must reach.
    """

    max_abs_difference: float
    same_answer: float
    patches: int
    inputs: str
    tolerance: float = TOLERANCE
    least_same: float = 0.0

    @property
    def passed(self) -> bool:
        """False also for NaN."""
        return self.max_abs_difference <= self.tolerance and self.same_answer >= self.least_same

    def to_json(self) -> dict[str, Any]:
        """Plain values for `parity.json`."""
        return asdict(self)


def expected(kind: str, task: str) -> tuple[float, float]:
    """(largest difference, least share of same answers) that a format may show.

    Of integers some voxel at a border may change by much; that the conversion is right shows in how few do. How good the
    model still is, `compression.gate` judges on whole cases.
    """
    if kind == "tflite-float16":
        return 2e-2, 0.0
    if kind in ("tflite-dynamic", "tflite-int8", "onnx-int8"):
        return (1.0, 0.9) if task == "segmentation" else (0.5, 0.0)
    return TOLERANCE, 0.0


def parity_patches(spec: ModelSpec, dataset: str | Path, count: int = PATCHES) -> tuple[np.ndarray, str]:
    """Inputs for the comparison: float32 ``(count, *patch, C)`` in [0, 1], and where they come from.

    Centre patches of the run's dataset if it can still be read, else seeded noise.
    """
    try:
        manifest = manifests.load(dataset)
        if manifest.channels == spec.channels and manifest.samples:
            step = max(1, len(manifest.samples) // count)
            with ShardReader(Path(dataset), manifest) as reader:
                found = [
                    reader.read(sample, center_start(sample.shape, spec.patch), spec.patch)[0]
                    for sample in manifest.samples[::step][:count]
                ]
            return np.stack(found), "dataset"
    except DatasetError:
        pass  # an archived run: its dataset need not be there any more
    generator = np.random.default_rng(0)
    return generator.random((count, *spec.patch, spec.channels), np.float32), "random"


def compare(
    reference: Callable[[np.ndarray], np.ndarray],
    exported: Callable[[np.ndarray], np.ndarray],
    patches: np.ndarray,
    inputs: str,
    tolerance: float = TOLERANCE,
    least_same: float = 0.0,
) -> Parity:
    """Run both on ``patches`` one by one (as the exported model will be used) and compare probabilities."""
    worst, same, total = 0.0, 0, 0
    for patch in patches:
        a, b = reference(patch[None]), exported(patch[None])
        if a.shape != b.shape:
            raise RunError(f"the exported model returns {b.shape}, expected {a.shape}")
        worst = max(worst, float(np.abs(a - b).max())) if np.isfinite(b).all() else float("nan")
        if np.isnan(worst):
            break
        same += int((a.argmax(-1) == b.argmax(-1)).sum())
        total += a[..., 0].size
    return Parity(worst, same / total if total else 0.0, len(patches), inputs, tolerance, least_same)
