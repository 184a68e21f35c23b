"""Writes shards. The same samples give the same bytes."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin  # noqa: F401  registers its filters, outside h5py's lock: so not in a thread, later
import numpy as np
from h5py import h5a, h5d, h5p, h5s, h5t
from h5py._objects import phil

from ..config import PreprocessConfig, ShardConfig, SplitConfig
from ..errors import DatasetError
from ..files import atomic_path
from . import codec, frames, schema
from . import manifest as manifests
from .chunks import Layout, plan_layout
from .frames import CODECS
from .manifest import Manifest, Sample, ShardFile, Storage, Task
from .packing import pack_array
from .split import known_among, read_frozen, resplit
from .storage import encode

MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Record:
    """One preprocessed sample on its way into a shard.

    Attributes:
        id: pseudonym; the name of its HDF5 group.
        patient: pseudonym of the patient.
        image: ``(D, H, W, C)``, any real type; stored as ``ShardConfig.dtype``.
        mask: uint8 ``(D, H, W)`` or None.
        affine: ``(4, 4)`` index to LPS in mm.
        modality: "CT", "MR", ...
        label: class index or None.
        scale, offset, error: of a stored image, see `storage.Stored`.
        geometry, site, date, origin, part: see `manifest.Sample`.
        sha256: of the stored content, if it is known.
    """

    id: str
    patient: str
    image: np.ndarray
    mask: np.ndarray | None
    affine: np.ndarray
    modality: str = ""
    label: int | None = None
    scale: float = 1.0
    offset: float = 0.0
    error: float = 0.0
    geometry: str = "patient"
    site: str = ""
    date: str = ""
    origin: str = ""
    sha256: str = ""
    part: str = ""

    @property
    def spacing(self) -> tuple[float, float, float]:
        """mm along D, H, W, free of rounding noise in the last digits."""
        d, h, w = np.round(np.linalg.norm(self.affine[:3, :3], axis=0), 9)
        return float(d), float(h), float(w)

    def stored(self, config: ShardConfig) -> Record:
        """The same record with the image in its stored type."""
        stored = encode(self.image, config.dtype, config.max_error)
        return dataclasses.replace(
            self,
            image=stored.array,
            mask=None if self.mask is None else np.ascontiguousarray(self.mask, np.uint8),
            scale=stored.scale,
            offset=stored.offset,
            error=stored.error,
            sha256="",
        )

    def layout(self, config: ShardConfig) -> Layout:
        """The cut of a stored record's image and mask."""
        voxel = self.image.dtype.itemsize * self.image.shape[3]
        return plan_layout(self.image.shape, config.patch, voxel, config.compression != "none", config.chunk)

    @property
    def bytes(self) -> int:
        """Size of image and mask before compression."""
        return int(self.image.nbytes) + (0 if self.mask is None else int(self.mask.nbytes))


def describe(record: Record, classes: int, shard: str, config: ShardConfig, split: str = "train") -> Sample:
    """The manifest's entry of a record that is in its stored type.

    Args:
        classes: number of classes, for `Sample.class_voxels`.
    """
    layout = record.layout(config)
    return Sample(
        id=record.id,
        patient=record.patient,
        shape=tuple(record.image.shape),
        dtype=record.image.dtype.name,
        scale=record.scale,
        offset=record.offset,
        error=record.error,
        chunk=layout.chunk,
        block=layout.block,
        spacing=record.spacing,
        affine=tuple((float(a), float(b), float(c), float(d)) for a, b, c, d in record.affine),
        modality=record.modality,
        label=record.label,
        class_voxels=None if record.mask is None else schema.class_voxels(record.mask, classes),
        split=split,
        shard=shard,
        sha256=_hash(record),
        geometry=record.geometry,
        site=record.site,
        date=record.date,
        origin=record.origin,
        part=record.part,
    )


def _hash(record: Record) -> str:
    return record.sha256 or schema.content_hash(record.image, record.mask, record.label, record.scale, record.offset)


def write_shard(path: Path, records: Iterable[Record], config: ShardConfig) -> ShardFile:
    """Write one HDF5 file atomically; records are taken one at a time, so one sample is in memory.

    Args:
        records: in their stored types (`Record.stored`).
        config: with a resolved compression.

    Raises:
        DatasetError: the file cannot be written (full disk, no permission).
    """
    try:
        with atomic_path(path) as temporary:
            with h5py.File(temporary, "w", locking=False) as file:
                file.attrs["format"] = np.bytes_(schema.FORMAT)
                file.attrs["schema"] = np.int64(manifests.SCHEMA)
                samples = file.create_group(schema.SAMPLES)
                for record in records:
                    _write_sample(samples, record, config)
            with open(temporary, "rb") as written:
                digest = hashlib.file_digest(written, "sha256") if hasattr(hashlib, "file_digest") else _digest(written)
            return ShardFile(name=path.name, bytes=temporary.stat().st_size, sha256=digest.hexdigest())
    except OSError as error:
        reason = error.strerror or str(error)
        raise DatasetError(f"{path.name}: cannot be written ({reason}); check space and permissions") from error


def _write_sample(samples: h5py.Group, record: Record, config: ShardConfig) -> None:
    group = samples.create_group(record.id)
    _attribute(group, "sha256", np.bytes_(_hash(record)))
    _attribute(group, "label", np.int64(-1 if record.label is None else record.label))
    _attribute(group, "spacing", np.asarray(record.spacing, np.float64))
    _attribute(group, "affine", np.asarray(record.affine, np.float64))
    layout = record.layout(config)
    tables = group.create_group(schema.BLOCKS)
    image = _write_array(group, tables, schema.IMAGE, record.image, layout, config.compression)
    _attribute(image, "scale", np.float64(record.scale))
    _attribute(image, "offset", np.float64(record.offset))
    if record.mask is not None:
        _write_array(group, tables, schema.MASK, record.mask, layout, config.compression)
        # Times of writing are left out everywhere: equal samples give equal bytes.
        group.create_dataset(schema.FOREGROUND, data=schema.foreground_voxels(record.mask), track_times=False)


def _write_array(
    group: h5py.Group, tables: h5py.Group, name: str, array: np.ndarray, layout: Layout, compression: str
) -> h5py.Dataset:
    tail = array.shape[3:]
    options: dict[str, Any] = {
        "chunks": (*layout.chunk, *tail),
        # HDF5 wants room for the whole of the last chunks.
        "maxshape": (*(max(n, c) for n, c in zip(array.shape[:3], layout.chunk, strict=True)), *tail),
        "track_times": False,
    }
    if compression == "gzip":
        return group.create_dataset(name, data=array, compression="gzip", shuffle=True, **options)
    if compression != "none":
        options |= frames.filter_options(compression)
    dataset = group.create_dataset(name, array.shape, array.dtype, **options)

    def emit(place: tuple[int, ...], data: Any) -> None:
        with phil:  # h5py lets go of its lock in this call, and HDF5 has none of its own
            dataset.id.write_direct_chunk(place, data)

    packed = pack_array(array, layout, compression, emit)
    table = tables.create_group(name)
    columns = packed.start, packed.check, packed.head
    for key, values in zip(("start", "check", "head"), columns, strict=True):
        _table(table, key, values)
    _attribute(table, "block", np.asarray(layout.block, np.int64))
    _attribute(table, "check", np.int64(frames.table_check(*columns)))
    return dataset


# A small image costs as much in attributes and tables as in voxels: the two below write what h5py's own ways write, in half the time.
def _attribute(place: h5py.Group | h5py.Dataset, name: str, value: np.ndarray | np.generic) -> None:
    array = np.asarray(value, order="C")
    space = h5s.create_simple(array.shape) if array.shape else h5s.create(h5s.SCALAR)
    h5a.create(place.id, name.encode(), h5t.py_create(array.dtype, logical=True), space).write(array)


def _table(group: h5py.Group, name: str, values: np.ndarray) -> None:
    """A data set in one piece, without times."""
    creation = h5p.create(h5p.DATASET_CREATE)
    creation.set_obj_track_times(False)
    creation.set_fill_time(h5d.FILL_TIME_IFSET)
    kind, space = h5t.py_create(values.dtype, logical=True), h5s.create_simple(values.shape)
    h5d.create(group.id, name.encode(), kind, space, creation).write(h5s.ALL, h5s.ALL, np.ascontiguousarray(values))


def _digest(file: Any) -> Any:
    digest = hashlib.sha256()
    while piece := file.read(1 << 22):
        digest.update(piece)
    return digest


def settle(config: ShardConfig, sizes: int, image: np.ndarray | None, folder: Path) -> tuple[ShardConfig, Storage]:
    """The configuration with a definite compression, and what the manifest says of it.

    Args:
        sizes: bytes of all samples.
        image: one stored image ``(D, H, W, C)`` to measure on.
        folder: on the disk that will hold the dataset.
    """
    if config.compression != "auto":
        return config, Storage(patch=config.patch, compression=config.compression, reason="as configured")
    name, reason = CODECS[0], "not measured: a small dataset stays in memory"
    if sizes >= codec.ENOUGH and image is not None:
        voxel = image.dtype.itemsize * image.shape[3]
        layout = plan_layout(image.shape, config.patch, voxel, True, config.chunk)
        try:
            speed = codec.disk_speed(folder)
        except OSError as error:
            raise DatasetError(f"{folder}: cannot be written ({error.strerror}); check space and permissions") from error
        name, reason = codec.choose(codec.measure(image, layout), speed, os.cpu_count() or 1)
    settled = config.model_copy(update={"compression": name})
    return settled, Storage(patch=config.patch, compression=name, reason=reason)


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
    dataset.parent.mkdir(parents=True, exist_ok=True)
    total = sum(record.bytes for record in ready)
    config, storage = settle(config, total, ready[0].image if ready else None, dataset.parent)
    samples, files = [], []
    building = dataset.parent / f".{dataset.name}.building"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        plan = schema.plan_shards([record.bytes for record in ready], config.shard_mb * MEGABYTE)
        for number, members in enumerate(plan):
            name = schema.shard_name(number)
            files.append(write_shard(building / name, [ready[i] for i in members], config))
            samples += [describe(ready[i], len(classes), name, config) for i in members]
        manifest = Manifest(
            schema=manifests.SCHEMA,
            task=task,
            classes=tuple(classes),
            channels=ready[0].image.shape[3] if ready else 1,
            preprocess=preprocess or PreprocessConfig(intensity="none"),
            split=split,
            storage=storage,
            samples=tuple(samples),
            shards=tuple(files),
        )
        manifest = resplit(manifest, split, known_among(read_frozen(split.frozen), samples) if split.frozen else ())
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
        raise DatasetError(f"{dataset}: cannot be made ({error.strerror}); check the folder's permissions") from error
