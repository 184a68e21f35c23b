"""Writes shards. The same samples give the same bytes."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ..config import PreprocessConfig, ShardConfig, SplitConfig
from ..errors import DatasetError
from ..files import atomic_path
from . import manifest as manifests
from . import schema
from .manifest import Manifest, Sample, Task

MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Record:
    """One preprocessed sample on its way into a shard.

    Attributes:
        id: pseudonym; the name of its HDF5 group.
        patient: pseudonym of the patient.
        image: ``(D, H, W, C)``, any float type; stored as ``ShardConfig.dtype``.
        mask: uint8 ``(D, H, W)`` or None.
        affine: ``(4, 4)`` index to LPS in mm.
        modality: "CT", "MR", ...
        label: class index or None.
    """

    id: str
    patient: str
    image: np.ndarray
    mask: np.ndarray | None
    affine: np.ndarray
    modality: str = ""
    label: int | None = None

    @property
    def spacing(self) -> tuple[float, float, float]:
        """mm along D, H, W, free of rounding noise in the last digits."""
        d, h, w = np.round(np.linalg.norm(self.affine[:3, :3], axis=0), 9)
        return float(d), float(h), float(w)

    def stored(self, config: ShardConfig) -> Record:
        """The same record with the image in the stored type (values beyond float16's range are held at its ends)."""
        dtype = np.dtype(config.dtype)
        image = self.image
        if dtype == np.float16:
            limit = float(np.finfo(np.float16).max)
            image = np.clip(image, -limit, limit)
        return Record(
            self.id,
            self.patient,
            np.ascontiguousarray(image, dtype),
            None if self.mask is None else np.ascontiguousarray(self.mask, np.uint8),
            self.affine,
            self.modality,
            self.label,
        )

    @property
    def bytes(self) -> int:
        """Size of image and mask before compression."""
        return int(self.image.nbytes) + (0 if self.mask is None else int(self.mask.nbytes))


def describe(record: Record, classes: int, shard: str, split: str = "train") -> Sample:
    """The manifest's entry of a record that is in its stored type.

    Args:
        classes: number of classes, for `Sample.class_voxels`.
    """
    return Sample(
        id=record.id,
        patient=record.patient,
        shape=tuple(record.image.shape),
        dtype=record.image.dtype.name,
        spacing=record.spacing,
        affine=tuple((float(a), float(b), float(c), float(d)) for a, b, c, d in record.affine),
        modality=record.modality,
        label=record.label,
        class_voxels=None if record.mask is None else schema.class_voxels(record.mask, classes),
        split=split,
        shard=shard,
        sha256=schema.content_hash(record.image, record.mask, record.label),
    )


def write_shard(path: Path, records: Iterable[Record], config: ShardConfig) -> None:
    """Write one HDF5 file atomically; records are taken one at a time, so one sample is in memory.

    Raises:
        DatasetError: the file can not be written (full disk, no permission).
    """
    try:
        with atomic_path(path) as temporary, h5py.File(temporary, "w", locking=False) as file:
            file.attrs["format"] = np.bytes_(schema.FORMAT)
            file.attrs["schema"] = np.int64(manifests.SCHEMA)
            samples = file.create_group(schema.SAMPLES)
            for record in records:
                _write_sample(samples, record.stored(config), config)
    except OSError as error:
        reason = error.strerror or str(error)
        raise DatasetError(f"{path.name}: can not be written ({reason}); check space and permissions") from error


def _write_sample(samples: h5py.Group, record: Record, config: ShardConfig) -> None:
    group = samples.create_group(record.id)
    group.attrs["sha256"] = np.bytes_(schema.content_hash(record.image, record.mask, record.label))
    group.attrs["label"] = np.int64(-1 if record.label is None else record.label)
    group.attrs["spacing"] = np.asarray(record.spacing, np.float64)
    group.attrs["affine"] = np.asarray(record.affine, np.float64)
    _write_array(group, schema.IMAGE, record.image, config)
    if record.mask is not None:
        _write_array(group, schema.MASK, record.mask, config)
        # Times of writing are left out everywhere: equal samples give equal bytes.
        group.create_dataset(schema.FOREGROUND, data=schema.foreground_voxels(record.mask), track_times=False)


def _write_array(group: h5py.Group, name: str, array: np.ndarray, config: ShardConfig) -> None:
    options: dict[str, Any] = {}
    if config.compression != "none":
        options = {"compression": config.compression, "shuffle": True}
    group.create_dataset(
        name, data=array, chunks=schema.chunk_shape(array.shape, config.chunk), track_times=False, **options
    )


def write_dataset(
    dataset: str | Path,
    records: Sequence[Record],
    task: Task,
    classes: Sequence[str],
    preprocess: PreprocessConfig | None = None,
    split: SplitConfig | None = None,
    shards: ShardConfig | None = None,
) -> Manifest:
    """A whole dataset from records in memory, by one process (`ingest` is the way for archives).

    Args:
        preprocess: what made the records; ``intensity`` must not be "auto". Default: nothing was done.

    Raises:
        DatasetError: ``dataset`` exists and is not empty.
    """
    config = shards or ShardConfig()
    split = split or SplitConfig()
    dataset = Path(dataset)
    refuse_existing(dataset)
    ready = [record.stored(config) for record in sorted(records, key=lambda record: record.id)]
    splits = manifests.assign_splits([record.patient for record in ready], split)
    samples = []
    building = dataset.parent / f".{dataset.name}.building"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        plan = schema.plan_shards([record.bytes for record in ready], config.shard_mb * MEGABYTE)
        for number, members in enumerate(plan):
            name = schema.shard_name(number)
            write_shard(building / name, [ready[i] for i in members], config)
            samples += [describe(ready[i], len(classes), name, splits[ready[i].patient]) for i in members]
        manifest = Manifest(
            schema=manifests.SCHEMA,
            task=task,
            classes=tuple(classes),
            channels=ready[0].image.shape[3] if ready else 1,
            preprocess=preprocess or PreprocessConfig(intensity="none"),
            split=split,
            samples=tuple(samples),
        )
        manifests.save(building, manifest)
        publish(building, dataset)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return manifest


def refuse_existing(dataset: Path) -> None:
    """Raise unless ``dataset`` is free: missing, or an empty folder.

    Raises:
        DatasetError: it holds something.
    """
    if dataset.is_dir():
        if not any(dataset.iterdir()):
            return
        found = "a dataset" if (dataset / manifests.NAME).exists() else "a folder that is not empty"
    elif dataset.exists() or dataset.is_symlink():
        found = "a file"
    else:
        return
    raise DatasetError(
        f"{dataset}: expected a new or empty folder, found {found}; choose another DATASET or remove this one"
    )


def publish(building: Path, dataset: Path) -> None:
    """Let a finished folder take the name ``dataset``: from here on it exists, whole.

    Raises:
        DatasetError: something else took the name meanwhile.
    """
    refuse_existing(dataset)
    try:
        building.rename(dataset)  # replaces an empty folder
    except OSError as error:
        raise DatasetError(f"{dataset}: can not be made ({error.strerror}); check the folder's permissions") from error
