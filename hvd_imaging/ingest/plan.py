"""What becomes of the prepared cases: order, shards, splits, the manifest. Pure."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ..config import IngestConfig, PreprocessConfig, ShardConfig
from ..errors import SourceError
from ..preprocess.pipeline import resolve
from ..shards import manifest as manifests
from ..shards import schema
from ..shards.chunks import plan_layout
from ..shards.manifest import Manifest, Sample
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
    """

    index: int
    path: str
    folder: str
    reason: str = ""
    notes: tuple[str, ...] = ()
    sample: Sample | None = None
    bytes: int = 0


def check_config(catalog: Catalog, config: IngestConfig) -> None:
    """What the configuration asks of this archive can be done.

    Raises:
        SourceError: naming the key to change.
    """
    resolve_all(config.preprocess, [case.modality for case in catalog.cases])
    if config.preprocess.crop == "body" and config.preprocess.units != "hu":
        raise SourceError("preprocess.crop=body needs HU, but preprocess.units=stored is set; set preprocess.units=hu or another crop")


def resolve_all(config: PreprocessConfig, modalities: Iterable[str]) -> PreprocessConfig:
    """One intensity rule for the whole dataset: a network can not tell which rule a sample had.

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
) -> Manifest:
    """The manifest.

    Raises:
        SourceError: no sample is left.
    """
    ready = sorted(((item.sample, item.bytes) for item in staged if item.sample is not None), key=lambda x: x[0].id)
    if not ready:
        reason = f"; {quarantined[0].path}: {quarantined[0].reason}" if quarantined else ""
        raise SourceError(f"none of {len(quarantined)} inputs can be used{reason}; no dataset was made")
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
    """The sample with the chunks and blocks that ``config``, with a definite compression, gives it."""
    voxel = np.dtype(sample.dtype).itemsize * sample.shape[3]
    layout = plan_layout(sample.shape, config.patch, voxel, config.compression != "none", config.chunk)
    return sample.model_copy(update={"chunk": layout.chunk, "block": layout.block})
