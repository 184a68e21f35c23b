"""One case: read, check for writing in its pixels, preprocess, describe."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import hmac
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config import IngestConfig, PreprocessConfig
from ..errors import DatasetError, SourceError
from ..preprocess.pipeline import preprocess
from ..privacy import burned_in, faces
from ..privacy.pseudonym import pseudonym, shifted_date
from ..privacy.redact import Redactor
from ..shards import manifest as manifests
from ..shards import schema
from ..shards.reader import ShardReader
from ..shards.writer import Record, describe
from ..sources import catalog as sources
from ..sources.catalog import Case, Catalog
from ..sources.nrrd import detached
from ..volume import Volume
from .plan import Before, Staged, stored_bytes
from .workspace import Workspace

_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_LEAST_SLICES = 8
"""A surface needs some."""
READING = 2
"""To be raised when readers give other voxels or masks for the same files: then a next version reads them again."""


@dataclass(frozen=True)
class Job:
    """What all cases of one ingest have in common; ``settings`` is the resolved preprocessing, ``before`` the parent version."""

    src: Path
    catalog: Catalog
    key: bytes
    config: IngestConfig
    settings: PreprocessConfig
    before: Before | None = None


def files_of(case: Case) -> tuple[Path, ...]:
    """All files that make the case: image, then masks."""
    named = (*case.image.files, *(file.path for file in case.mask))
    return (*named, *(data for path in named if (data := detached(path)) is not None))


def stage(index: int, job: Job, workspace: Workspace, redactor: Redactor) -> Staged:
    """Read, prepare and keep one case; what cannot be used comes back with a reason.

    A case that the parent, or an earlier, interrupted ingest has from the same files with the same settings is taken as it is.

    Raises:
        DatasetError: the work folder cannot be written.
    """
    case = job.catalog.cases[index]
    files = files_of(case)
    path, folder = redactor.reference(files[0]), redactor.folder(files[0].parent)
    origin = origin_of(case, job)
    patient = pseudonym(job.key, "patient", case.patient_id)
    known = job.before.by_origin.get(origin) if job.before is not None else None
    if known is not None and known.patient == patient:
        return Staged(index, path, folder, sample=known, bytes=stored_bytes(known), kept=True)
    found = workspace.find(origin)
    if found is not None and found.sample is not None and found.sample.patient == patient:
        return dataclasses.replace(found, index=index, path=path, folder=folder)
    try:
        record, notes = prepare(case, job)
    except SourceError as error:
        # The file stands in its own field: a reader's message that begins with it need not say it twice.
        reason = redactor.text(str(error), files).removeprefix(f"{path}: ") + (f" ({case.part})" if case.part else "")
        return Staged(index, path, folder, reason=reason)
    record = dataclasses.replace(record.stored(job.config.shards), origin=origin)
    sample = describe(record, max(len(job.catalog.classes), 1), "", job.config.shards)
    notes = tuple(redactor.text(note, files) for note in notes)
    staged = Staged(index, path, folder, notes=notes, sample=sample, bytes=record.bytes)
    workspace.keep(origin, staged, record)
    return staged


def prepare(case: Case, job: Job) -> tuple[Record, tuple[str, ...]]:
    """The case as it will be stored, and what its reader says about it.

    Raises:
        SourceError: it cannot be used; the text may name files of the archive.
    """
    catalog, config, key = job.catalog, job.config, job.key
    try:
        volume, mask = sources.load_case(case, catalog, config.preprocess.units)
    except SourceError:
        raise
    except Exception as error:
        # One odd file among a hundred thousand must not end the run. The text may hold identifiers: its type must do.
        raise SourceError(f"cannot be read ({type(error).__name__})") from error
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
    volume = without_face(without_writing(volume, case, config), config)
    ready, mask = preprocess(volume, mask, job.settings, reuse=True)
    site, date = place_and_time(case, key)
    record = Record(
        id=pseudonym(key, "series", case.source_id),
        patient=pseudonym(key, "patient", case.patient_id),
        image=ready.array,
        mask=mask,
        affine=ready.affine,
        modality=case.modality,
        label=case.label if catalog.task == "classification" else None,
        geometry=volume.geometry,
        site=site,
        date=date,
        part=case.part,
    )
    return record, tuple(volume.notes)


def without_writing(volume: Volume, case: Case, config: IngestConfig) -> Volume:
    """The volume without writing in its pixels (names, dates), as ``privacy.burned_in`` wants it.

    Measured volumes (CT, MR) are searched only if they are screen captures or say themselves that there is writing.

    Raises:
        SourceError: there is, or must be, writing that is not to be blanked.
    """
    image, mode = case.image, config.privacy.burned_in
    if case.kind != "dicom" or mode == "keep":
        return volume
    declared = getattr(image, "burned_in", "")
    captured = any(header.sop_class.startswith(_SECONDARY_CAPTURE) for header in getattr(image, "headers", ()))
    if case.modality in burned_in.MEASURED and not captured and declared.strip().upper() != "YES":
        return volume
    boxes = burned_in.find_in_frames(volume.array)
    decision = burned_in.policy(case.modality, declared, boxes, mode)
    if decision == "quarantine":
        what = f"writing in the pixels at {len(boxes)} places" if boxes else "BurnedInAnnotation says that there is writing"
        raise SourceError(
            f"{what}; look at it, and set privacy.burned_in=blank to black it out, or keep if it identifies nobody"
        )
    if decision == "blank":
        array = burned_in.blank(volume.array, boxes)
        volume = dataclasses.replace(volume, array=array, notes=(*volume.notes, f"writing blanked at {len(boxes)} places"))
    return volume


def without_face(volume: Volume, config: IngestConfig) -> Volume:
    """The volume, without a face if ``privacy.faces`` wants that; projections and cines show none.

    Raises:
        SourceError: it shows one, and such series are to be set aside.
    """
    mode = config.privacy.faces
    if mode == "keep" or volume.geometry != "patient" or volume.shape[0] < _LEAST_SLICES:
        return volume
    first = volume.array if volume.array.ndim == 3 else volume.array[..., 0]
    risk = faces.face_risk(first, volume.affine)
    if risk.level != "face":
        return volume
    if mode == "quarantine":
        raise SourceError("a face can be seen; privacy.faces=deface cuts it off, keep leaves it")
    if mode == "note":
        return dataclasses.replace(volume, notes=(*volume.notes, "a face can be seen; privacy.faces=deface cuts it off"))
    channels = volume.array[..., np.newaxis] if volume.array.ndim == 3 else volume.array
    bare = np.stack([faces.deface(channels[..., c], volume.affine, risk) for c in range(channels.shape[3])], axis=3)
    return dataclasses.replace(volume, array=bare.reshape(volume.array.shape), notes=(*volume.notes, "a face was cut off"))


def place_and_time(case: Case, key: bytes) -> tuple[str, str]:
    """Pseudonym of the institution, and the study's date shifted by patient; "" where the source has none."""
    institution, studied = getattr(case.image, "institution", ""), getattr(case.image, "study_date", "")
    site = pseudonym(key, "site", institution) if institution.strip() else ""
    try:
        date = datetime.datetime.strptime(studied.strip()[:8], "%Y%m%d").date()
    except ValueError:
        return site, ""
    return site, shifted_date(key, case.patient_id, date).isoformat()


def origin_of(case: Case, job: Job) -> str:
    """Keyed fingerprint of the files (place, size, time) and of all that decides what becomes of them."""
    parts: Sequence[Any] = [
        case.source_id,
        case.label,
        job.catalog.task,
        job.catalog.classes,
        [_state(path, job.src) for path in files_of(case)],
        job.settings.named(),
        job.config.privacy.model_dump(mode="json"),
        job.config.labels.model_dump(mode="json"),
        job.config.shards.dtype,
        job.config.shards.max_error,
        manifests.SCHEMA,
        READING,
        # Two parts of one series have the same files.
        case.part,
    ]
    text = json.dumps(parts, separators=(",", ":"), sort_keys=True)
    return hmac.new(job.key, b"origin\0" + text.encode("utf-8", "surrogateescape"), hashlib.sha256).hexdigest()[:32]


def _state(path: Path, src: Path) -> tuple[str, int, int]:
    try:
        status = os.stat(path)
    except OSError:  # the reader will say what is wrong with it
        return os.path.relpath(path, src), -1, -1
    return os.path.relpath(path, src), status.st_size, status.st_mtime_ns


def image_bytes(case: Case) -> int:
    """About what the case costs to read, in bytes of decoded voxels: to begin with the largest."""
    known = getattr(case.image, "bytes", 0)
    if known:
        return int(known)
    size = 0
    for path in case.image.files:
        try:
            size += path.stat().st_size
        except OSError:
            continue
    return size


def load(sample: manifests.Sample, workspace: Workspace) -> Record:
    """A prepared case, on its way into a shard.

    Raises:
        DatasetError: another rank's work cannot be read here.
    """
    image, mask = workspace.arrays(sample)
    return _record(sample, image, mask)


def load_kept(sample: manifests.Sample, before: Before, reader: ShardReader) -> Record:
    """A sample of the parent on its way into another shard, because others of its shard have changed or gone.

    Raises:
        DatasetError: the parent's shard is damaged.
    """
    there = before.by_origin[sample.origin]
    image, mask = reader.read_stored(there)
    if schema.content_hash(image, mask, there.label, there.scale, there.offset) != there.sha256:
        raise DatasetError(
            f"{before.folder / there.shard}: sample {there.id}: damaged: its content is not what the manifest says; restore the "
            "shard from a copy, or ingest without --parent"
        )
    return _record(sample, image, mask)


def _record(sample: manifests.Sample, image: np.ndarray, mask: np.ndarray | None) -> Record:
    return Record(
        id=sample.id,
        patient=sample.patient,
        image=image,
        mask=mask,
        affine=np.array(sample.affine),
        modality=sample.modality,
        label=sample.label,
        scale=sample.scale,
        offset=sample.offset,
        error=sample.error,
        geometry=sample.geometry,
        site=sample.site,
        date=sample.date,
        origin=sample.origin,
        sha256=sample.sha256,
        part=sample.part,
    )
