"""What becomes of the prepared cases: order, shards, splits, the manifest. Pure."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..config import IngestConfig, PreprocessConfig, ShardConfig, check, stored_preprocess
from ..errors import SourceError
from ..preprocess.pipeline import resolve
from ..shards import manifest as manifests
from ..shards import schema, versions
from ..shards.chunks import plan_layout
from ..shards.manifest import Manifest, Sample
from ..shards.split import assign, known_among, patients_of, refuse_mixed_rules
from ..shards.writer import MEGABYTE
from ..sources.catalog import Catalog


@dataclass(frozen=True)
class Quarantined:
    """An input that was set aside: the reference of its file (see `privacy.redact`), and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Note:
    """What a reader corrected or dropped; ``path`` is the reference of the folder."""

    path: str
    note: str


@dataclass(frozen=True)
class Staged:
    """One case after preparation; shard and split of ``sample`` are not known yet.

    Attributes:
        index: place of the case in the catalog.
        path, folder: references of its first file and of the folder of it.
        reason: why it was set aside; then ``sample`` is None.
        notes: of the reader.
        bytes: size of image and mask.
        kept: it was not read: it stands in the parent's shards.
    """

    index: int
    path: str
    folder: str
    reason: str = ""
    notes: tuple[str, ...] = ()
    sample: Sample | None = None
    bytes: int = 0
    kept: bool = False


@dataclass(frozen=True)
class Before:
    """The version that a new one is made from."""

    folder: Path
    manifest: Manifest

    @functools.cached_property
    def by_origin(self) -> dict[str, Sample]:
        """Its samples by the fingerprint of files and settings."""
        return {sample.origin: sample for sample in self.manifest.samples if sample.origin}


def inherit(config: IngestConfig, parent: Manifest) -> IngestConfig:
    """The parent's settings, changed where ``config`` sets a key itself. Pure.

    Raises:
        ConfigError: keys of both contradict each other.
    """
    recorded = parent.version.parameters.get("config") if parent.version is not None else None
    base = dict(recorded) if isinstance(recorded, dict) else {
        "preprocess": parent.preprocess.model_dump(mode="json"),
        "shards": {"patch": parent.storage.patch},
        "split": parent.split.model_dump(mode="json"),
    }
    base["preprocess"] = stored_preprocess(base.get("preprocess") or {})
    return check(IngestConfig, _merged(base, config.model_dump(exclude_unset=True)), "the parent's settings with those of --set")


def _merged(base: dict[str, object], change: dict[str, object]) -> dict[str, object]:
    result = dict(base)
    for key, value in change.items():
        inner = result.get(key)
        result[key] = _merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return result


def stored_bytes(sample: Sample) -> int:
    """Size of image and mask before compression."""
    voxels = int(np.prod(sample.shape[:3]))
    image = voxels * sample.shape[3] * np.dtype(sample.dtype).itemsize
    return image + (voxels if sample.class_voxels is not None else 0)


def check_config(catalog: Catalog, config: IngestConfig) -> None:
    """What the configuration asks of this archive can be done.

    Raises:
        SourceError: naming the key to change.
    """
    resolve_all(config.preprocess, [case.modality for case in catalog.cases])
    if config.preprocess.crop == "body" and config.preprocess.units != "hu":
        raise SourceError("preprocess.crop=body needs HU, but preprocess.units=stored is set; set preprocess.units=hu or another crop")


def resolve_all(config: PreprocessConfig, modalities: Iterable[str]) -> PreprocessConfig:
    """One intensity rule for the whole dataset: a network cannot tell which rule a sample had.

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
    """Set aside cases whose id another case has already."""
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
    """Set aside cases with another channel count than most have (with equal numbers: the smaller count)."""
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
    quarantined: Sequence[Quarantined],
    before: Before | None = None,
    frozen: Collection[str] = (),
    key: str = "",
) -> Manifest:
    """The manifest. Samples of shards that the parent shares are as they stand there; the others have new shards' names.

    Args:
        before: the parent, of which test patients stay test, and all patients where they are while the rule is the same.
        frozen: pseudonyms of patients that are test.
        key: of `Version`.

    Raises:
        SourceError: no sample is left.
        ConfigError: a rule of splits that cannot be followed.
    """
    ready = sorted(((item.sample, item.bytes) for item in staged if item.sample is not None), key=lambda x: x[0].id)
    if not ready:
        reason = f"; {quarantined[0].path}: {quarantined[0].reason}" if quarantined else ""
        raise SourceError(f"none of {len(quarantined)} inputs can be used{reason}; no dataset was made")
    samples = {sample.id: sample for sample, _ in ready}
    split = config.split.model_copy(update={"frozen": None})  # a place on one machine
    dates = _last_dates(staged, catalog) if split.by == "date" else None
    people = patients_of(samples.values(), dates)
    known_among(frozen, samples.values())
    old = before.manifest if before is not None else None
    if old is None:
        splits = assign(people, split, frozen)
    else:
        known = earlier_splits(old, samples.values())
        refuse_mixed_rules(old.split, split)
        frozen = {*frozen, *(patient for patient, name in known.items() if name == "test")}
        splits = assign(people, split, frozen, known if old.split == split else None)
    change = None if old is None else versions.plan(old, samples.values())
    shared = set(change.shared) if change is not None else set()
    names = map(schema.shard_name, itertools.count()) if old is None else versions.free_names(old)
    if old is not None:
        for there in old.samples:
            if there.shard in shared:
                cut = {"shard": there.shard, "chunk": there.chunk, "block": there.block}
                samples[there.id] = samples[there.id].model_copy(update=cut)
    fresh = [(sample.id, size) for sample, size in ready if samples[sample.id].shard not in shared]
    for members, name in zip(
        schema.plan_shards([size for _, size in fresh], config.shards.shard_mb * MEGABYTE), names, strict=False
    ):
        for member in members:
            id = fresh[member][0]
            samples[id] = samples[id].model_copy(update={"shard": name})
    counts = change.counts() if change is not None else {"added": len(samples), "kept": 0, "changed": 0, "removed": 0}
    parameters = {"task": catalog.task, "config": config.model_copy(update={"split": split}).model_dump(mode="json")}
    return Manifest(
        schema=manifests.SCHEMA,
        task=catalog.task,
        classes=tuple(catalog.classes),
        channels=ready[0][0].shape[3],
        preprocess=settings,
        split=split,
        samples=tuple(sample.model_copy(update={"split": splits[sample.patient]}) for sample in samples.values()),
        shards=tuple(shard for shard in old.shards if shard.name in shared) if old is not None else (),
        version=versions.record("ingest", old, parameters, counts, key),
    )


def earlier_splits(old: Manifest, samples: Iterable[Sample]) -> dict[str, str]:
    """Patient -> split in the parent. Pure.

    Who is a patient may have changed (`split.patient`, a table, a corrected PatientID), so samples are followed as well. Where a
    patient's samples were in several splits, all go to test, else to validation: what was tested is never learned from.
    """
    where = _where(old, samples)
    return {patient: next(split for split in ("test", "val", "train") if split in found) for patient, found in where.items()}


def _where(old: Manifest, samples: Iterable[Sample]) -> dict[str, set[str]]:
    """The splits of the parent in which each patient of old and of the samples stands."""
    where: dict[str, set[str]] = {}
    for sample in old.samples:
        where.setdefault(sample.patient, set()).add(sample.split)
    by_id = {sample.id: sample.split for sample in old.samples}
    for sample in samples:
        if sample.id in by_id:
            where.setdefault(sample.patient, set()).add(by_id[sample.id])
    return where


def regrouped(old: Manifest, samples: Iterable[Sample]) -> tuple[str, ...]:
    """A note on patients whose samples were in several splits of the parent. Pure."""
    divided = sum(len(found) > 1 for found in _where(old, samples).values())
    if not divided:
        return ()
    return (
        f"{divided} patient{'s' * (divided > 1)} had samples in several splits of the parent, where other patients were told apart: all go to "
        "test if one was there, else to validation; `dataset split --test SHARE` chooses test patients anew",
    )


def _last_dates(staged: Sequence[Staged], catalog: Catalog) -> dict[str, str]:
    """Newest StudyDate of each patient, as the source has it: for the order of patients, never to be stored."""
    dates: dict[str, str] = {}
    for item in staged:
        if item.sample is not None:
            found = getattr(catalog.cases[item.index].image, "study_date", "").strip()[:8]
            if len(found) == 8 and found.isdigit():
                dates[item.sample.patient] = max(found, dates.get(item.sample.patient, ""))
    return dates


def cut_for(sample: Sample, config: ShardConfig) -> Sample:
    """The sample with the chunks and blocks that ``config``, with a definite compression, gives it."""
    voxel = np.dtype(sample.dtype).itemsize * sample.shape[3]
    layout = plan_layout(sample.shape, config.patch, voxel, config.compression != "none", config.chunk)
    return sample.model_copy(update={"chunk": layout.chunk, "block": layout.block})
