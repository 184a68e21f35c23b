"""`manifest.json`: what a dataset holds, and the hash that names its content.

A dataset is a folder::

    manifest.json          this file: schema, classes, preprocessing, splits, one entry a sample
    shard-00000.h5 ...     HDF5: /samples/<id>/image (D, H, W, C), mask (D, H, W) uint8, foreground (N, 3) int32
    manifest.sig           signature of manifest.json, see `signing`; optional
    quarantine.json        inputs that were set aside, with the reason
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from ..config import ClassName, PreprocessConfig, SplitConfig, stored_preprocess
from ..errors import DatasetError
from ..files import write_json
from ..texts import read_json

SCHEMA = 2
NAME = "manifest.json"
SIGNATURE = "manifest.sig"
SPLITS = ("train", "val", "test")

Task = Literal["segmentation", "classification", "unlabelled"]


Side = Annotated[int, pydantic.Field(ge=1, le=1 << 24)]
"""Voxels along an axis, or channels."""
Count = Annotated[int, pydantic.Field(ge=0, lt=1 << 62)]
Number = Annotated[float, pydantic.Field(allow_inf_nan=False)]
_MOST_ITEMS = 1 << 40
"""Items of one image, above which no index into it is safe."""


class _Entry(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class Sample(_Entry):
    """One sample.

    Attributes:
        id: pseudonym of the series or case; the HDF5 group's name.
        patient: pseudonym of the patient; splits are made by it.
        shape: (D, H, W, C) of the stored image.
        dtype: of the stored image.
        scale, offset: value = stored * scale + offset.
        error: largest difference that storing made to a voxel.
        chunk, block: voxels (D, H, W) of the cut, see `chunks.py`; of image and mask alike.
        spacing: mm along D, H, W.
        affine: rows of the (4, 4) index-to-LPS matrix of the stored grid.
        label: class index (classification), None otherwise.
        class_voxels: voxels of each class in the mask (segmentation), None otherwise.
        split: train, val or test.
        shard: file name inside the dataset folder.
        sha256: of the content, `schema.content_hash`.
        geometry: "patient": the affine maps to the patient; "image": spacing in mm, no place; "none": no known size.
        site: pseudonym of the institution, "" if unknown.
        date: of the study, shifted by patient, ISO 8601; "" if unknown.
        origin: keyed fingerprint of the files and settings that made it.
        part: which volume of its series it is ("echo 2", "b=1000", "image 1"), "" if the series has one. A name, no content.
    """

    id: str
    patient: str
    shape: tuple[Side, Side, Side, Side]
    dtype: Literal["uint8", "int16", "float16", "float32"]
    scale: Number = 1.0
    offset: Number = 0.0
    error: float = 0.0
    chunk: tuple[Side, Side, Side] = (1, 1, 1)
    block: tuple[Side, Side, Side] = (1, 1, 1)
    spacing: tuple[Number, Number, Number]
    affine: tuple[tuple[Number, Number, Number, Number], ...]
    modality: str
    label: Count | None
    class_voxels: tuple[Count, ...] | None
    split: Literal["train", "val", "test"]
    shard: str
    sha256: str
    geometry: str = "patient"
    site: str = ""
    date: str = ""
    origin: str = ""
    part: str = ""

    @pydantic.field_validator("shape")
    @classmethod
    def _believable(cls, shape: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
        if math.prod(shape) > _MOST_ITEMS:
            raise ValueError(f"expected at most 2^40 items, found {math.prod(shape)}")
        return shape


class Storage(_Entry):
    """How the samples were stored.

    Attributes:
        patch: (D, H, W) for which chunks and blocks were planned.
        compression: none, lz4, zstd or gzip.
        reason: why this compression.
    """

    patch: tuple[Side, Side, Side]
    compression: str
    reason: str = ""


class ShardFile(_Entry):
    """One shard: file name, bytes, hex SHA-256 of the file."""

    name: str
    bytes: Count
    sha256: str


class Parent(_Entry):
    """The version that another one was made from, by `Manifest.hash` and `Manifest.files_hash`."""

    hash: str
    files_hash: str


class Version(_Entry):
    """How this version came to be. Nothing of it is content.

    Attributes:
        action: ingest, split, or write (from memory).
        parents: the versions it was made from.
        code: version of this package.
        parameters: task and settings of the action.
        counts: samples added, kept, changed and removed since the parent.
        key: pseudonym of the pseudonym key itself: tells whether a key belongs to the dataset, and nothing about the key.
    """

    action: str
    parents: tuple[Parent, ...] = ()
    code: str = ""
    parameters: dict[str, Any] = {}
    counts: dict[str, int] = {}
    key: str = ""


class Manifest(_Entry):
    """A dataset's content. ``preprocess.intensity`` is resolved: never "auto"."""

    schema_version: int = pydantic.Field(SCHEMA, alias="schema")
    task: Task
    classes: tuple[ClassName, ...]
    channels: Side
    preprocess: PreprocessConfig
    split: SplitConfig
    storage: Storage = Storage(patch=(1, 1, 1), compression="none")
    samples: tuple[Sample, ...]
    shards: tuple[ShardFile, ...] = ()
    version: Version | None = None

    _meant = pydantic.field_validator("preprocess", mode="before")(stored_preprocess)

    def hash(self) -> str:
        """Hex SHA-256 of the canonical JSON: equal hashes mean equal content, order, splits and preprocessing.

        How it is stored (storage, chunks, in which shard) and how it came to be (sources, parents, the rule of the splits) is
        not content: the same samples have the same hash, whether they were ingested at once or version by version.
        """
        other: dict[str, Any] = {
            **dict.fromkeys(("storage", "shards", "version", "split"), True),
            "samples": {"__all__": {"chunk", "block", "origin", "shard", "part"}},
        }
        values = self.model_dump(mode="json", by_alias=True, exclude=other) | {"preprocess": self.preprocess.named()}
        text = json.dumps(values, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def files_hash(self) -> str:
        """Hex SHA-256 of content and files: equal hashes mean equal shards, to the byte."""
        text = "\n".join([self.hash(), *(f"{shard.name} {shard.sha256}" for shard in self.shards)])
        return hashlib.sha256(text.encode()).hexdigest()

    def of_split(self, split: str) -> list[Sample]:
        """The samples of one split, in manifest order."""
        return [sample for sample in self.samples if sample.split == split]

    def counts(self) -> dict[str, int]:
        """Samples of each split."""
        return {split: len(self.of_split(split)) for split in SPLITS}


def load(dataset: str | Path) -> Manifest:
    """Read and check ``dataset/manifest.json``.

    Raises:
        DatasetError: no such dataset, damaged JSON, another schema version, or a shard path outside the folder.
    """
    path = Path(dataset) / NAME
    try:
        values = read_json(path)
    except FileNotFoundError as error:
        raise DatasetError(
            f"{dataset}: no {NAME} in this folder; `hvd-imaging ingest SRC {dataset}` makes a dataset"
        ) from error
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path}: cannot be read as JSON ({error}); ingest again or restore the file") from error
    found = values.get("schema") if isinstance(values, dict) else None
    if found != SCHEMA:
        raise DatasetError(
            f"{path}: schema version {found!r}, expected {SCHEMA}; ingest again with this version of hvd_imaging"
        )
    try:
        manifest = Manifest.model_validate(values)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise DatasetError(f"{path}: {place}: {first['msg']}; the manifest is damaged, ingest again") from None
    for sample in manifest.samples:
        if Path(sample.shard).name != sample.shard or sample.shard in ("", ".", ".."):
            raise DatasetError(f"{path}: sample {sample.id}: shard '{sample.shard}' is not a file of this folder")
    for shard in manifest.shards:
        if Path(shard.name).name != shard.name or shard.name in ("", ".", ".."):
            raise DatasetError(f"{path}: shard '{shard.name}' is not a file of this folder")
    return manifest


def save(dataset: str | Path, manifest: Manifest) -> None:
    """Write ``dataset/manifest.json`` atomically: the last step of ingest, which makes the dataset exist."""
    write_json(Path(dataset) / NAME, manifest.model_dump(mode="json", by_alias=True))
