"""From an archive to a dataset: scan, read, preprocess, write shards; alone or on many ranks with the same result.

Each rank preprocesses its part of the cases into a staging folder. What goes into which shard is then a pure function of
the staged sizes in the order of the samples' ids, so the files do not depend on the number of ranks. The dataset is
built beside its final place and takes its name when it is whole.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .communicator import Alone, Communicator, together
from .config import IngestConfig, PreprocessConfig, ShardConfig
from .errors import DatasetError, SourceError
from .files import write_json
from .preprocess.pipeline import preprocess, resolve
from .privacy.pseudonym import load_or_make_key, pseudonym
from .shards import manifest as manifests
from .shards import schema
from .shards.chunks import plan_layout
from .shards.manifest import Manifest, Sample, ShardFile, Storage
from .shards.writer import MEGABYTE, Record, describe, publish, refuse_existing, settle, write_shard
from .sources import catalog as sources
from .sources.catalog import Case, Catalog

QUARANTINE = "quarantine.json"

Progress = Callable[[Sequence[int], str], Iterable[int]]
"""Called with what is to be done and a description; yields the same items and may draw a bar meanwhile."""


@dataclass(frozen=True)
class Quarantined:
    """An input that was set aside: its path relative to the source folder, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Note:
    """What a reader corrected or dropped; ``path`` is the folder relative to the source folder."""

    path: str
    note: str


@dataclass(frozen=True)
class IngestResult:
    """What ingest made; equal on all ranks."""

    manifest: Manifest
    quarantined: list[Quarantined]
    notes: list[Note]


@dataclass(frozen=True)
class Staged:
    """One case after preprocessing; shard and split of ``sample`` are not known yet.

    Attributes:
        index: place of the case in the catalog; names the staged files.
        path: its first file, relative to the source folder.
        reason: why it was set aside; then ``sample`` is None.
        notes: of the reader.
        bytes: size of image and mask.
    """

    index: int
    path: str
    reason: str = ""
    notes: tuple[str, ...] = ()
    sample: Sample | None = None
    bytes: int = 0


def ingest(
    src: str | Path,
    dataset: str | Path,
    config: IngestConfig,
    labels_csv: str | Path | None = None,
    task: str | None = None,
    key_file: str | Path | None = None,
    communicator: Communicator | None = None,
    progress: Progress | None = None,
) -> IngestResult:
    """Make a dataset. All ranks call it together, and each gets the result.

    Args:
        src: folder with DICOM files or NIfTI volumes.
        dataset: the folder to make; its parent must be shared by all ranks.
        labels_csv: labels for classification.
        task: "segmentation", "classification" or "unlabelled"; None: what the labels found tell.
        key_file: pseudonym key; default ``<dataset>.key`` beside the dataset, made if missing.

    Raises:
        SourceError: nothing usable in ``src``, or labels or modalities contradict each other.
        DatasetError: ``dataset`` exists, or can not be written.
        SetupError: the key file can not be used.
    """
    src, dataset = Path(src), Path(dataset)
    communicator = communicator or Alone()
    world = communicator.world

    def start() -> tuple[Catalog, bytes, str] | None:
        if not world.is_root:
            return None
        if not dataset.name:
            raise DatasetError(f"DATASET: expected the name of a new folder, found '{dataset}'")
        refuse_existing(dataset)
        found = sources.scan(src, None if labels_csv is None else Path(labels_csv), task)
        check_config(found, config)
        key = load_or_make_key(Path(key_file) if key_file else dataset.with_name(dataset.name + ".key"))
        return found, key, str(_building_folder(dataset))

    started = together(communicator, start)
    plain = communicator.broadcast(
        None if started is None else {"catalog": to_plain(started[0]), "key": started[1].hex(), "folder": started[2]}
    )
    catalog: Catalog = from_plain(plain["catalog"]) if started is None else started[0]
    key, building = bytes.fromhex(plain["key"]), Path(plain["folder"])
    try:
        return _build(src, dataset, building, catalog, key, config, communicator, progress)
    finally:
        # Every way out of _build has passed a collective call: no rank writes any more.
        if world.is_root:
            shutil.rmtree(building, ignore_errors=True)


def _build(
    src: Path,
    dataset: Path,
    building: Path,
    catalog: Catalog,
    key: bytes,
    config: IngestConfig,
    communicator: Communicator,
    progress: Progress | None,
) -> IngestResult:
    world = communicator.world
    show: Progress = progress or (lambda items, _: items)
    settings = resolve_all(config.preprocess, [case.modality for case in catalog.cases])
    staging = building / "staging"

    def stage() -> list[dict[str, Any]]:
        # Every size-th case: neighbours in an archive are alike, so the ranks get equal work.
        mine = range(world.rank, len(catalog.cases), world.size)
        done = (
            _stage(index, src, catalog, key, config, settings, staging) for index in show(mine, "reading and preparing")
        )
        return [_staged_to_plain(staged) for staged in done]

    parts = communicator.gather(together(communicator, stage))
    staged = sorted((_staged_from_plain(item) for part in parts for item in part), key=lambda item: item.index)
    staged = refuse_minority(refuse_repeated(staged))
    quarantined = [Quarantined(_relative(item.path, src), _clean(item.reason, src)) for item in catalog.rejected]
    quarantined += [Quarantined(item.path, item.reason) for item in staged if item.sample is None]
    notes = [Note(Path(item.path).parent.as_posix(), note) for item in staged for note in item.notes]
    notes += [Note(".", note) for note in getattr(catalog, "notes", ())]
    manifest = together(communicator, lambda: compose(staged, catalog, settings, config, src, quarantined))

    def settled() -> tuple[str, str] | None:
        if not world.is_root:
            return None
        first = manifest.samples[0]
        image = _load_staged(staging, places[first.id], first).image
        _, storage = settle(config.shards, sum(item.bytes for item in staged if item.sample is not None), image, building)
        return storage.compression, storage.reason

    places = {item.sample.id: item.index for item in staged if item.sample is not None}
    compression, reason = communicator.broadcast(together(communicator, settled))
    shard_config = config.shards.model_copy(update={"compression": compression})
    storage = Storage(patch=shard_config.patch, compression=compression, reason=reason)
    manifest = manifest.model_copy(
        update={"storage": storage, "samples": tuple(cut_for(sample, shard_config) for sample in manifest.samples)}
    )

    shards: dict[str, list[Sample]] = {}
    for sample in manifest.samples:
        shards.setdefault(sample.shard, []).append(sample)
    names = sorted(shards)

    def write() -> list[dict[str, Any]]:
        written = []
        for number in show(range(world.rank, len(names), world.size), "writing shards"):
            records = (_load_staged(staging, places[sample.id], sample) for sample in shards[names[number]])
            written.append(write_shard(building / names[number], records, shard_config).model_dump(mode="json"))
        return written

    written = [ShardFile(**file) for part in communicator.gather(together(communicator, write)) for file in part]
    manifest = manifest.model_copy(update={"shards": tuple(sorted(written, key=lambda file: file.name))})

    def finish() -> None:
        if not world.is_root:
            return
        shutil.rmtree(staging, ignore_errors=True)
        try:
            write_json(
                building / QUARANTINE,
                {
                    "quarantined": [dataclasses.asdict(item) for item in quarantined],
                    "notes": [dataclasses.asdict(item) for item in notes],
                },
            )
            manifests.save(building, manifest)
        except OSError as error:
            raise DatasetError(f"{dataset}: can not be written ({error.strerror}); check space and permissions") from error
        publish(building, dataset)

    together(communicator, finish)
    return IngestResult(manifest, quarantined, notes)


def check_config(catalog: Catalog, config: IngestConfig) -> None:
    """What the configuration asks of this archive can be done. Pure.

    Raises:
        SourceError: naming the key to change.
    """
    resolve_all(config.preprocess, [case.modality for case in catalog.cases])
    if config.preprocess.crop == "body" and config.preprocess.units != "hu":
        raise SourceError("preprocess.crop=body needs HU, but preprocess.units=stored is set; set preprocess.units=hu or another crop")


def resolve_all(config: PreprocessConfig, modalities: Iterable[str]) -> PreprocessConfig:
    """One intensity rule for the whole dataset: a network can not tell which rule a sample had. Pure.

    Raises:
        SourceError: "auto", and there are CT and other images.
    """
    found = sorted(set(modalities))
    if config.intensity == "auto" and "CT" in found and len(found) > 1:
        others = ", ".join(m or "unknown" for m in found if m != "CT")
        raise SourceError(
            f"preprocess.intensity is 'auto', but the folder holds CT and other modalities ({others}); choose one rule "
            "for all with --set preprocess.intensity=window|percentile|zscore|none, or ingest them apart"
        )
    return resolve(config, found[0] if found else "")


def refuse_repeated(staged: Sequence[Staged]) -> list[Staged]:
    """Set aside cases whose id another case has already. Pure."""
    seen: set[str] = set()
    result = []
    for item in staged:
        if item.sample is not None and item.sample.id in seen:
            item = dataclasses.replace(item, sample=None, reason="another input has the same series or case name")
        elif item.sample is not None:
            seen.add(item.sample.id)
        result.append(item)
    return result


def refuse_minority(staged: Sequence[Staged]) -> list[Staged]:
    """Set aside cases with another channel count than most have (with equal numbers: the smaller count). Pure."""
    counts = Counter(item.sample.shape[3] for item in staged if item.sample is not None)
    if len(counts) < 2:
        return list(staged)
    common = min(counts, key=lambda channels: (-counts[channels], channels))
    return [
        dataclasses.replace(
            item,
            sample=None,
            reason=f"expected {common} channel(s) as most inputs have, found {item.sample.shape[3]}",
        )
        if item.sample is not None and item.sample.shape[3] != common
        else item
        for item in staged
    ]


def compose(
    staged: Sequence[Staged],
    catalog: Catalog,
    settings: PreprocessConfig,
    config: IngestConfig,
    src: Path,
    quarantined: Sequence[Quarantined],
) -> Manifest:
    """The manifest: order, shards and splits as a pure function of the staged samples.

    Raises:
        SourceError: no sample is left.
    """
    ready = sorted(((item.sample, item.bytes) for item in staged if item.sample is not None), key=lambda x: x[0].id)
    if not ready:
        reason = f"; {quarantined[0].path}: {quarantined[0].reason}" if quarantined else ""
        raise SourceError(f"{src}: none of {len(quarantined)} inputs can be used{reason}; no dataset was made")
    splits = manifests.assign_splits([sample.patient for sample, _ in ready], config.split)
    plan = schema.plan_shards([size for _, size in ready], config.shards.shard_mb * MEGABYTE)
    samples = [
        ready[member][0].model_copy(
            update={"shard": schema.shard_name(number), "split": splits[ready[member][0].patient]}
        )
        for number, members in enumerate(plan)
        for member in members
    ]
    return Manifest(
        schema=manifests.SCHEMA,
        task=catalog.task,
        classes=tuple(catalog.classes),
        channels=samples[0].shape[3],
        preprocess=settings,
        split=config.split,
        samples=tuple(samples),
    )


def cut_for(sample: Sample, config: ShardConfig) -> Sample:
    """The sample with the chunks and blocks that ``config``, with a definite compression, gives it. Pure."""
    voxel = np.dtype(sample.dtype).itemsize * sample.shape[3]
    layout = plan_layout(sample.shape, config.patch, voxel, config.compression != "none", config.chunk)
    return sample.model_copy(update={"chunk": layout.chunk, "block": layout.block})


def _stage(
    index: int, src: Path, catalog: Catalog, key: bytes, config: IngestConfig, settings: PreprocessConfig, staging: Path
) -> Staged:
    """Read, prepare and stage one case; what can not be used comes back with a reason."""
    case = catalog.cases[index]
    path = _relative(_files(case)[0], src)
    try:
        record, notes = _prepare(case, catalog, key, config, settings)
    except SourceError as error:
        # The path stands in its own field: a reader's message that begins with it need not say it twice.
        return Staged(index, path, reason=_clean(str(error), src).removeprefix(f"{path}: "))
    record = record.stored(config.shards)
    sample = describe(record, max(len(catalog.classes), 1), "", config.shards)
    try:
        staging.mkdir(parents=True, exist_ok=True)
        np.save(staging / f"{index}.image.npy", record.image, allow_pickle=False)
        if record.mask is not None:
            np.save(staging / f"{index}.mask.npy", record.mask, allow_pickle=False)
    except OSError as error:
        raise DatasetError(
            f"{staging.parent}: can not be written ({error.strerror}); check space and permissions"
        ) from error
    return Staged(index, path, notes=tuple(_clean(note, src) for note in notes), sample=sample, bytes=record.bytes)


def _prepare(
    case: Case, catalog: Catalog, key: bytes, config: IngestConfig, settings: PreprocessConfig
) -> tuple[Record, tuple[str, ...]]:
    try:
        volume, mask = sources.load_case(case, catalog, config.preprocess.units)
    except SourceError:
        raise
    except Exception as error:
        # One odd file among a hundred thousand must not end the run. The text may hold identifiers: its type must do.
        raise SourceError(f"can not be read ({type(error).__name__})") from error
    if catalog.task == "segmentation":
        if mask is None:
            raise SourceError("no mask for this image (ingest with --task unlabelled to keep images without)")
        largest = int(mask.max(initial=0))
        if largest >= len(catalog.classes):
            raise SourceError(f"mask: expected values below {len(catalog.classes)} (the classes), found {largest}")
    else:
        mask = None
    if catalog.task == "classification" and case.label is None:
        raise SourceError("no label for this image (ingest with --task unlabelled to keep images without)")
    ready, mask = preprocess(volume, mask, settings)
    record = Record(
        id=pseudonym(key, "series", case.source_id),
        patient=pseudonym(key, "patient", case.patient_id),
        image=ready.array,
        mask=mask,
        affine=ready.affine,
        modality=case.modality,
        label=case.label if catalog.task == "classification" else None,
    )
    return record, tuple(volume.notes)


def _load_staged(staging: Path, index: int, sample: Sample) -> Record:
    try:
        image = np.load(staging / f"{index}.image.npy", allow_pickle=False)
        mask = None
        if sample.class_voxels is not None:
            mask = np.load(staging / f"{index}.mask.npy", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DatasetError(
            f"{staging.parent}: a staged sample of another rank can not be read ({type(error).__name__}); "
            "DATASET must lie on a filesystem that all ranks share"
        ) from error
    return Record(
        sample.id, sample.patient, image, mask, np.array(sample.affine), sample.modality, sample.label,
        sample.scale, sample.offset, sample.error,
    )  # fmt: skip


def _building_folder(dataset: Path) -> Path:
    try:
        dataset.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{dataset.name}.", suffix=".building", dir=dataset.parent))
        umask = os.umask(0)
        os.umask(umask)
        folder.chmod(0o777 & ~umask)
    except OSError as error:
        raise DatasetError(f"{dataset}: can not be made ({error.strerror}); check the folder's permissions") from error
    return folder


def _files(case: Case) -> tuple[Path, ...]:
    return tuple(case.image.files)


def _relative(path: str | Path, src: Path) -> str:
    """The path as reports show it: relative to the source folder."""
    path = Path(path)
    if not path.is_absolute() and not path.is_relative_to(src):
        return path.as_posix()
    return Path(os.path.relpath(path, src)).as_posix()


def _clean(text: str, src: Path) -> str:
    """A message without the source folder's own place."""
    return text.replace(f"{src}/", "").replace(f"{src.resolve()}/", "")


def _staged_to_plain(staged: Staged) -> dict[str, Any]:
    sample = None if staged.sample is None else staged.sample.model_dump(mode="json")
    return {**{f.name: getattr(staged, f.name) for f in dataclasses.fields(staged)}, "sample": sample}


def _staged_from_plain(plain: dict[str, Any]) -> Staged:
    sample = None if plain["sample"] is None else Sample.model_validate(plain["sample"])
    return Staged(**{**plain, "notes": tuple(plain["notes"]), "sample": sample})


_SOURCE_MODULES = ("dicom", "headers", "nifti", "labels", "catalog")


def to_plain(value: Any) -> Any:
    """A catalog as JSON values, for the way to the other ranks."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        inner = {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"class": f"{type(value).__module__.rpartition('.')[2]}.{type(value).__name__}", "fields": inner}
    if isinstance(value, Path):
        return {"path": str(value)}
    if isinstance(value, tuple | list):
        return [to_plain(item) for item in value]
    if isinstance(value, dict):
        return {"items": [[to_plain(k), to_plain(v)] for k, v in value.items()]}
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"a catalog can not hold {type(value).__name__}")


def from_plain(value: Any) -> Any:
    """What `to_plain` was given; sequences come back as tuples, classes are those of `hvd_imaging.sources` only."""
    if isinstance(value, list):
        return tuple(from_plain(item) for item in value)
    if not isinstance(value, dict):
        return value
    if "path" in value:
        return Path(value["path"])
    if "items" in value:
        return {from_plain(k): from_plain(v) for k, v in value["items"]}
    module, _, name = value["class"].partition(".")
    if module not in _SOURCE_MODULES:
        raise ValueError(f"{value['class']} is not of hvd_imaging.sources")
    kind = getattr(importlib.import_module(f".sources.{module}", __package__), name)
    return kind(**{key: from_plain(item) for key, item in value["fields"].items()})

