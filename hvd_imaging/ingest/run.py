"""From an archive to a dataset: scan, read, preprocess, write shards; alone or on many ranks with the same result.

Whoever is free takes the next case, the largest first, and prepares it into a work folder beside the dataset. What goes into
which shard is then a pure function of the prepared sizes in the order of the samples' ids, so the files do not depend on the
number of ranks. The dataset takes its name when it is whole. A killed ingest, started again, goes on where it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from ..communicator import Alone, Sharing, Taken, together
from ..config import IngestConfig
from ..errors import DatasetError, SourceError, on_all_ranks
from ..files import write_json
from ..privacy.pseudonym import load_or_make_key
from ..privacy.redact import Redactor
from ..shards import manifest as manifests
from ..shards import versions
from ..shards.manifest import Manifest, Sample, ShardFile, Storage
from ..shards.reader import ShardReader
from ..shards.split import read_frozen
from ..shards.writer import Record, publish, refuse_existing, settle, write_shard
from ..sources import archives, patients
from ..sources import catalog as sources
from ..sources.archives import Opened
from ..sources.catalog import Catalog
from ..sources.dicom import DicomScan, Rejected
from . import prepare
from .classes import refuse_one_class
from .parent import check_key, key_mark, key_place
from .plan import (
    Before,
    Note,
    Quarantined,
    Staged,
    check_config,
    compose,
    cut_for,
    inherit,
    refuse_minority,
    refuse_repeated,
    regrouped,
    resolve_all,
)
from .prepare import Job, image_bytes, stage
from .scan import scan_together
from .workspace import Workspace

QUARANTINE = "quarantine.json"

Progress = Callable[[str, str], AbstractContextManager[Callable[[int, int], None]]]
"""Called with what is done and in which unit; gives a function that takes (done, total)."""


@dataclass(frozen=True)
class IngestResult:
    """What ingest made; equal on all ranks.

    Attributes:
        files: JSON beside the key that tells which file each reference stands for; only its owner can read it.
    """

    manifest: Manifest
    quarantined: list[Quarantined]
    notes: list[Note]
    files: Path


def ingest(
    src: str | Path,
    dataset: str | Path,
    config: IngestConfig,
    labels_csv: str | Path | None = None,
    task: str | None = None,
    key_file: str | Path | None = None,
    parent: str | Path | None = None,
    communicator: Sharing | None = None,
    progress: Progress | None = None,
) -> IngestResult:
    """Make a dataset. All ranks call it together, and each gets the result.

    Args:
        src: folder with DICOM files or NIfTI volumes, or another archive that `sources.archives` opens.
        dataset: the folder to make; its parent must be shared by all ranks.
        labels_csv: labels for classification.
        task: "segmentation", "classification" or "unlabelled"; None: what the labels found tell.
        key_file: pseudonym key; default ``<dataset>.key`` beside the dataset, made if missing; with a parent: the parent's.
        parent: dataset of which the new one is the next version: what is unchanged is not read again, unchanged shards are
            shared, and its settings hold where ``config`` does not set them.

    Raises:
        SourceError: nothing usable in ``src``, or labels or modalities contradict each other.
        DatasetError: ``dataset`` exists, or cannot be written, or another ingest is making it.
            Or the parent has no manifest, or was made with another key, or for another task.
        SetupError: the key file cannot be used.
    """
    dataset = Path(dataset)
    if not dataset.name:
        raise on_all_ranks(DatasetError(f"DATASET: expected the name of a new folder, found '{dataset}'"))
    communicator = communicator or Alone()
    world = communicator.world
    show: Progress = progress or (lambda text, unit: contextlib.nullcontext(lambda done, total: None))
    workspace = Workspace(dataset)
    with contextlib.ExitStack() as held:

        def start() -> tuple[Path, str, Before | None, IngestConfig, frozenset[str]] | None:
            if not world.is_root:
                return None
            refuse_existing(dataset)
            archives.kind_of(src)
            before = Before(Path(parent), manifests.load(parent)) if parent is not None else None
            settings = inherit(config, before.manifest) if before is not None else config
            frozen = read_frozen(settings.split.frozen) if settings.split.frozen else frozenset()
            path = key_place(dataset, key_file, before)
            key = load_or_make_key(path)
            if before is not None:
                check_key(key, before, path)
            held.enter_context(workspace.held())
            return path, key.hex(), before, settings, frozen

        key_path, key_text, before, config, frozen = communicator.broadcast(together(communicator, start))
        key = bytes.fromhex(key_text)

        def open_archive() -> Opened | None:
            if not world.is_root:
                return None
            if Path(src).is_dir():
                return Opened(Path(src))
            with show(*("fetching", "instances") if archives.is_address(src) else ("unpacking", "bytes")) as report:
                return archives.opened(src, workspace.source, report)

        try:
            archive: Opened = communicator.broadcast(together(communicator, open_archive))
            redactor = Redactor(key, archive.folder, archives.shown(src))
            result = _build(
                archive.folder, dataset, workspace, key, redactor, config, labels_csv, task, communicator, show, key_path, before,
                frozen, archive.refused,
            )  # fmt: skip
        except BaseException:
            # Every way out of here has passed a collective call: no rank writes any more.
            if world.is_root and not workspace.prepared() and not archives.worth_keeping(workspace.source):
                workspace.remove()
            raise
        if world.is_root:
            workspace.remove()
    return result


def _build(
    src: Path,
    dataset: Path,
    workspace: Workspace,
    key: bytes,
    redactor: Redactor,
    config: IngestConfig,
    labels_csv: str | Path | None,
    task: str | None,
    communicator: Sharing,
    show: Progress,
    key_path: Path,
    before: Before | None,
    frozen: frozenset[str],
    refused: Sequence[Rejected] = (),
) -> IngestResult:
    world = communicator.world
    with show("reading headers", "files") as report:
        dicom = scan_together(src, communicator, report)

    def find() -> Catalog | None:
        if not world.is_root:
            return None
        found = _catalog(src, labels_csv, task or (before.manifest.task if before is not None else None), config, dicom, redactor)
        if before is not None and found.task != before.manifest.task:
            raise DatasetError(
                f"{before.folder}: is for {before.manifest.task}, but this ingest for {found.task}: no version of it; ingest "
                "without --parent"
            )
        return found

    catalog: Catalog = communicator.broadcast(together(communicator, find))
    redactor.words = catalog.classes
    settings = resolve_all(config.preprocess, [case.modality for case in catalog.cases])
    job = Job(src, catalog, key, config, settings, before)
    sizes = {index: image_bytes(case) for index, case in enumerate(catalog.cases)} if world.is_root else {}
    # The largest first: no rank is left with a long one at the end.
    order = communicator.broadcast(sorted(sizes, key=lambda index: (-sizes[index], index)))
    weights = [0, *accumulate(sizes.get(index, 0) for index in order)]

    def prepare_all(report: Callable[[int, int], None]) -> list[Staged]:
        # Taken is not done: the bar shows what was taken before.
        taken: Taken = lambda number: report(weights[number - 1], weights[-1])  # noqa: E731
        with communicator.share(len(order), taken) as mine:
            return [stage(order[number], job, workspace, redactor) for number in mine]

    with show("reading and preparing", "bytes") as report:
        parts = communicator.gather(together(communicator, lambda: prepare_all(report)))
    staged = sorted((item for part in parts for item in part), key=lambda item: item.index)
    staged = refuse_minority(refuse_repeated(staged))
    quarantined = [Quarantined(redactor.reference(src / item.path), redactor.text(item.reason, [src / item.path])) for item in catalog.rejected]
    quarantined += [Quarantined(redactor.reference(item.path), item.reason) for item in refused]
    quarantined += [Quarantined(item.path, item.reason) for item in staged if item.sample is None]
    notes = [Note(item.folder, note) for item in staged for note in item.notes]
    notes += [Note(redactor.reference(src / item.path), item.reason) for item in catalog.remarks]  # they name no files
    notes += [Note(".", note) for note in catalog.notes]
    if before is not None:
        notes += [Note(".", note) for note in regrouped(before.manifest, [item.sample for item in staged if item.sample is not None])]
    for known in communicator.gather(redactor.known):
        redactor.add(known)
    files = key_path.with_name(f"{dataset.name}.files.json")

    def told() -> Manifest:
        if world.is_root:
            redactor.save(files)
        refuse_one_class(staged, catalog)
        return compose(staged, catalog, settings, config, quarantined, before, frozen, key_mark(key))

    manifest = together(communicator, told)

    shared = {shard.name: shard for shard in manifest.shards}
    kept = {item.sample.id for item in staged if item.sample is not None and item.kept}

    def settled() -> tuple[str, str] | None:
        if not world.is_root:
            return None
        if before is not None and config.shards.compression == "auto":
            return before.manifest.storage.compression, "as its parent"
        image = prepare.load(manifest.samples[0], workspace).image
        size = sum(item.bytes for item in staged if item.sample is not None)
        _, storage = settle(config.shards, size, image, workspace.folder)
        return storage.compression, storage.reason

    compression, reason = communicator.broadcast(together(communicator, settled))
    shard_config = config.shards.model_copy(update={"compression": compression})
    storage = Storage(patch=shard_config.patch, compression=compression, reason=reason)
    manifest = manifest.model_copy(
        update={
            "storage": storage,
            "samples": tuple(
                sample if sample.shard in shared else cut_for(sample, shard_config)
                for sample in manifest.samples
            ),
        }
    )

    shards: dict[str, list[Sample]] = {}
    for sample in manifest.samples:
        shards.setdefault(sample.shard, []).append(sample)
    for name in shared:
        del shards[name]
    names = sorted(shards)

    def write(report: Callable[[int, int], None]) -> list[ShardFile]:
        with contextlib.ExitStack() as stack:
            reader = stack.enter_context(ShardReader(before.folder, before.manifest)) if before is not None and kept else None

            def load(sample: Sample) -> Record:
                if reader is None or sample.id not in kept:
                    return prepare.load(sample, workspace)
                assert before is not None
                return prepare.load_kept(sample, before, reader)

            mine = stack.enter_context(communicator.share(len(names), lambda number: report(number - 1, len(names))))
            return [
                write_shard(workspace.built / names[number], map(load, shards[names[number]]), shard_config)
                for number in mine
            ]

    with show("writing shards", "shards") as report:
        parts_written = communicator.gather(together(communicator, lambda: write(report)))
    written = [file for part in parts_written for file in part]
    manifest = manifest.model_copy(update={"shards": tuple(sorted([*shared.values(), *written], key=lambda file: file.name))})

    def finish() -> None:
        if not world.is_root:
            return
        if before is not None:
            versions.link(before.folder, shared.values(), workspace.built)
        try:
            write_json(
                workspace.built / QUARANTINE,
                {
                    "quarantined": [dataclasses.asdict(item) for item in quarantined],
                    "notes": [dataclasses.asdict(item) for item in notes],
                },
            )
            manifests.save(workspace.built, manifest)
        except OSError as error:
            raise DatasetError(f"{dataset}: cannot be written ({error.strerror}); check space and permissions") from error
        publish(workspace.built, dataset)

    together(communicator, finish)
    return IngestResult(manifest, quarantined, notes, files)


def _catalog(
    src: Path,
    labels_csv: str | Path | None,
    task: str | None,
    config: IngestConfig,
    dicom: DicomScan,
    redactor: Redactor,
) -> Catalog:
    """The cases of the archive; what is wrong with it as a whole is said without its files' names."""
    try:
        found = sources.scan(src, None if labels_csv is None else Path(labels_csv), task, dicom=dicom)
        found = sources.choose(found, config.labels, redactor.label)
        found = patients.assign(found, config.split.patient, src)
        check_config(found, config)
    except SourceError as error:
        raise SourceError(redactor.text_of_archive(str(error)).replace("SRC", redactor.shown, 1)) from None
    return found
