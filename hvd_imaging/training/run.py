"""How a run directory is begun, opened and described; what lies in it is told by `layout`."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .. import __version__
from ..config import RunConfig, load
from ..errors import ConfigError, RunError
from ..files import write_json, write_text
from ..models.spec import ModelSpec
from ..shards.manifest import Manifest
from ..shards.manifest import save as save_manifest
from ..world import World
from . import checkpoint
from .layout import BEST, CONFIG, RECORD, SCRIPTS
from .place import find_dataset

# A resumed run may change these and nothing else: all other keys decide what is learned.
_FREE_ON_RESUME = (
    "output.", "parallel.", "monitor.", "data.dataset", "data.public_key", "train.epochs", "train.max_steps", "train.checkpoint_",
    "train.keep_checkpoints", "train.early_stop", "train.validate_every", "train.accumulate", "train.balance",
    "train.guard_steps", "train.on_nonfinite", "train.recompute",
)  # fmt: skip
_PACKAGES = ("tensorflow", "tf_keras", "horovod", "mpi4py", "numpy", "h5py", "scipy")


@dataclass(frozen=True)
class Run:
    """An opened run.

    Attributes:
        directory: its folder.
        config: as resolved at its start.
        spec: the model's contract.
    """

    directory: Path
    config: RunConfig
    spec: ModelSpec


def load_run(run_dir: str | Path) -> Run:
    """Open a run directory.

    Raises:
        RunError: not a run directory, or damaged.
    """
    directory = Path(run_dir)
    if not (directory / CONFIG).is_file():
        raise RunError(f"{run_dir}: not a run folder (no {CONFIG} in it); `hvd-imaging train run.yaml` makes one")
    try:
        config = load(RunConfig, directory / CONFIG)
    except ConfigError as error:
        raise RunError(f"the run's own configuration is damaged: {error}") from error
    return Run(directory, config, ModelSpec.load(directory))


def located(run: Run, dataset: str | Path | None = None) -> Run:
    """The run with the place where its dataset is now; see :func:`hvd_imaging.training.place.find_dataset`.

    Args:
        dataset: given by the user.

    Raises:
        DatasetError, RunError: it is not found, or ``dataset`` is another one.
    """
    found = find_dataset(run.directory, run.config.data.dataset, run.spec.dataset_hash, dataset)
    return Run(run.directory, with_dataset(run.config, found), run.spec)


def with_dataset(config: RunConfig, dataset: Path) -> RunConfig:
    """The configuration with ``data.dataset`` as an absolute path, which means the same from every folder."""
    return config.model_copy(update={"data": config.data.model_copy(update={"dataset": str(dataset.resolve())})})


def load_trained(run: Run) -> Any:
    """The network with its best weights, giving logits; see :func:`hvd_imaging.models.build`.

    Raises:
        RunError: no weights yet, damaged, or of another network.
    """
    from .. import models
    from ..models import architecture

    path = run.directory / BEST
    if not path.exists():
        raise RunError(f"{run.directory}: no {BEST}: the run has not finished an epoch yet; train it further with --resume")
    state = checkpoint.load(path)
    model = architecture.load(run.directory) if (run.directory / architecture.NAME).exists() else models.build(run.spec)
    checkpoint.restore(model.weights, state.weights, "weight", str(path))
    return models.inference_model(model)


def claim(
    directory: Path, config: RunConfig, spec: ModelSpec, manifest: Manifest, world: World, resume: bool, hosts: Sequence[str] = ()
) -> None:
    """Make the run directory, or check that it may be resumed (rank 0 only).

    Raises:
        RunError: it holds another run, or files that are not ours.
    """
    # A run that failed before its first checkpoint has learned nothing: trying again is no loss.
    learned = (directory / BEST).exists() or bool(checkpoint.newest_first(directory))
    if (directory / CONFIG).exists() and learned:
        if not resume:
            raise RunError(
                f"{directory}: holds a run already; continue it with --resume, or choose another --run-dir"
            )
        _check_same(load_run(directory), config, spec)
    elif directory.exists() and {path.name for path in directory.iterdir()} - {SCRIPTS} and not (directory / CONFIG).exists():
        raise RunError(f"{directory}: not empty and not a run folder; choose another --run-dir")
    directory.mkdir(parents=True, exist_ok=True)
    save_manifest(directory, manifest)
    spec.save(directory)
    write_json(directory / RECORD, record(spec, world, manifest.files_hash(), hosts))
    config = with_dataset(config, Path(config.data.dataset))
    write_text(directory / CONFIG, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def record(spec: ModelSpec, world: World, files_hash: str, hosts: Sequence[str] = ()) -> dict[str, Any]:
    """Where the results come from: dataset, code, versions, machines by rank, job."""
    return {
        "dataset_hash": spec.dataset_hash,
        "dataset_files_hash": files_hash,
        "hvd_imaging": __version__,
        "code": commit(),
        "code_sha256": source_hash(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions(),
        "world_size": world.size,
        "hosts": list(hosts),
        "job_id": os.environ.get("SLURM_JOB_ID"),
        "restart_count": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
    }


def commit(package: Path | None = None) -> str | None:
    """Git's commit of the checkout that this program runs from; None for an installed package."""
    git = (package or Path(__file__).parents[1]).parent / ".git"
    try:
        head = (git / "HEAD").read_text(encoding="utf-8").strip()
        if not head.startswith("ref: "):
            return head
        name = head.removeprefix("ref: ")
        if (git / name).is_file():
            return (git / name).read_text(encoding="utf-8").strip()
        packed = (git / "packed-refs").read_text(encoding="utf-8").splitlines()
        return next((line.split()[0] for line in packed if line.endswith(f" {name}")), None)
    except OSError:
        return None


@functools.cache
def source_hash(package: Path | None = None) -> str:
    """SHA-256 over the program's own modules, names and content: also right where a checkout was changed after its commit."""
    folder = package or Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def versions() -> dict[str, str | None]:
    """Installed versions of what a result depends on, without importing any of it."""
    found: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _check_same(before: Run, config: RunConfig, spec: ModelSpec) -> None:
    if before.spec.dataset_hash != spec.dataset_hash:
        raise RunError(
            f"{before.directory}: was trained on dataset {before.spec.dataset_hash[:12]}, expected the same, found "
            f"{spec.dataset_hash[:12]}; restore the dataset or choose another --run-dir"
        )
    old, new = flatten(before.config.model_dump(mode="json")), flatten(config.model_dump(mode="json"))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key) and not key.startswith(_FREE_ON_RESUME):
            raise RunError(
                f"{before.directory}: {key} was {json.dumps(old.get(key))} in this run and is now "
                f"{json.dumps(new.get(key))}; resume with the same value, or choose another --run-dir"
            )


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys."""
    if not isinstance(values, dict):
        return {prefix: values}
    return {
        key: value
        for name, inner in values.items()
        for key, value in flatten(inner, f"{prefix}.{name}" if prefix else name).items()
    }
