"""What the benchmarks of training share: a made dataset, a configuration, and ways to start ranks and read their times."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from ..config import PreprocessConfig, ShardConfig, SplitConfig
from ..errors import HvdImagingError
from ..shards.writer import Record, write_dataset
from .processes import clean_environment, run_at_once

Times = Mapping[str, Any]
WARMUP = 3


@dataclass(frozen=True)
class Workshop:
    """A temporary place with datasets; gone at the end."""

    folder: Path

    def config(self, name: str, task: str, steps: int, **changes: Any) -> Path:
        """Write ``name.yaml``: the network of the design page or a VGG16, for ``WARMUP + steps`` steps.

        Args:
            changes: ``section__key=value``.
        """
        values: dict[str, dict[str, Any]] = {
            "data": {"dataset": str(self.folder / task), "patch": [48, 48, 48], "augment": None},
            "model": {"name": "unet3d", "filters": 16, "depth": 3, "norm": "none"},
            "train": {
                "batch_size": 2, "max_steps": WARMUP + steps, "epochs": 10_000, "loss": "ce", "guard_steps": 0,
                "validate_every": 10_000, "checkpoint_epochs": 10_000, "learning_rate": 1e-4,
            },
            "parallel": {},
            "monitor": {},
            "output": {"tensorboard": False},
        }  # fmt: skip
        if task == "images":
            values["data"]["patch"] = [1, 64, 64]
            values["model"] = {"name": "vgg16", "head": "dense", "norm": "none"}
            values["train"] |= {"optimizer": "sgd", "learning_rate": 1e-5}
        for key, value in changes.items():
            section, _, rest = key.partition("__")
            values[section][rest] = value
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return path

    def worker(self, config: Path, run: str) -> list[str]:
        """The command of one rank; its run folder is made anew."""
        shutil.rmtree(self.folder / run, ignore_errors=True)
        return [sys.executable, "-m", "hvd_imaging.bench.training_worker", str(config), str(self.folder / run), str(WARMUP)]


@contextlib.contextmanager
def workshop(volumes: int = 12, images: int = 0, side: int = 64) -> Iterator[Workshop]:
    """Make datasets of noise with a bright ball (volumes: 64^3; images: ``side``^2)."""
    with tempfile.TemporaryDirectory(prefix="hvd_imaging_bench.") as name:
        folder = Path(name)
        if volumes:
            write_volumes(folder / "volumes", volumes)
        if images:
            _write(folder / "images", "classification", images, (1, side, side))
        yield Workshop(folder)


def write_volumes(folder: Path, count: int, split: SplitConfig | None = None) -> None:
    """A dataset of volumes of 64^3, all for training where no split is given."""
    _write(folder, "segmentation", count, (64, 64, 64), split)


def _write(
    folder: Path, task: Literal["segmentation", "classification"], count: int, shape: tuple[int, int, int],
    split: SplitConfig | None = None,
) -> None:  # fmt: skip
    random = np.random.default_rng(0)
    axes = np.meshgrid(*[np.arange(side) - side / 2 for side in shape], indexing="ij")
    ball = (np.linalg.norm(axes[1:] if shape[0] == 1 else axes, axis=0) < shape[2] / 4).astype(np.uint8)
    records = []
    for index in range(count):
        has = index % 2 or task == "segmentation"
        image = (0.3 + 0.4 * ball * has + random.normal(0, 0.1, shape)).clip(0, 1).astype(np.float32)[..., None]
        records.append(Record(
            id=f"{index:016x}", patient=f"{index:016x}", image=image, mask=ball if task == "segmentation" else None,
            affine=np.eye(4), modality="CT", label=int(has) if task == "classification" else None,
        ))  # fmt: skip
    classes = ("background", "ball") if task == "segmentation" else ("empty", "ball")
    write_dataset(
        folder, records, task=task, classes=classes, preprocess=PreprocessConfig(intensity="none"),
        shards=ShardConfig(), split=split or SplitConfig(val=0, test=0),
    )  # fmt: skip


def ranks(command: Sequence[str], count: int, cores: Sequence[int] | None = None, timeout: float = 600) -> Times:
    """Times of rank 0 of ``count`` ranks under mpirun, each bound to a core of its own (Open MPI's default for two)."""
    program = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if program is None:
        raise HvdImagingError("bench: no mpirun on PATH; activate the environment of scripts/setup_env.sh")
    return parse(launch([program, "-np", str(count), "--bind-to", "core", *command], timeout))


def launch(command: Sequence[str], timeout: float) -> str:
    """What a launcher's ranks print."""
    return run_at_once([command], environment(), timeout)[0]


def alone(commands: Sequence[Sequence[str]], timeout: float = 600) -> list[Times]:
    """Times of independent processes that run at the same time, one core each."""
    cores = sorted(os.sched_getaffinity(0))
    bound = [["taskset", "-c", str(cores[i % len(cores)]), *command] for i, command in enumerate(commands)]
    return [parse(text) for text in run_at_once(bound, environment(), timeout)]


def environment() -> dict[str, str]:
    """For all processes: nothing of the user's settings but what lets mpirun run here."""
    keep = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "OMPI_MCA_rmaps_base_oversubscribe")
    return clean_environment(os.environ) | {name: os.environ[name] for name in keep if name in os.environ}


def parse(text: str) -> Times:
    """The JSON line among what a worker printed."""
    line = next((line for line in reversed(text.splitlines()) if line.startswith("{")), None)
    if line is None:
        raise HvdImagingError("bench: a worker printed no times; run `hvd-imaging doctor`")
    return json.loads(line)


def slowest(found: Sequence[Times]) -> Times:
    """The process with the longest median step: the others would wait for it."""
    return max(found, key=lambda times: statistics.median(times["steps"]))


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a helper process."""
    process.kill()
    process.wait()
