"""Versions of a dataset: what changed, which shards two of them share, which came before.

A dataset never changes. A new version is a folder of its own, in which shards that stay as they are stand as hard links:
they take no room twice, and each folder can be removed without harm to the others.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import DatasetError
from ..files import atomic_path
from . import manifest as manifests
from .manifest import Manifest, Parent, Sample, ShardFile, Version
from .schema import shard_name
from .writer import publish, refuse_existing

_STORED = ("id", "shape", "dtype", "scale", "offset", "spacing", "affine", "label", "sha256")
_NOT_CONTENT = {"split", "shard", "chunk", "block", "origin", "part"}


@dataclass(frozen=True)
class Plan:
    """A new version beside its parent; ids in the order of their names.

    Attributes:
        added, removed: samples of one of the two.
        changed: samples of both with other voxels, mask, label, geometry, patient, site or date.
        kept: samples of both that are equal; only their split may differ.
        shared: shards of the parent of which every sample is still there with the voxels that stand in it.
    """

    added: tuple[str, ...]
    kept: tuple[str, ...]
    changed: tuple[str, ...]
    removed: tuple[str, ...]
    shared: tuple[str, ...]

    def counts(self) -> dict[str, int]:
        """For the manifest's record."""
        return {name: len(getattr(self, name)) for name in ("added", "kept", "changed", "removed")}


def plan(parent: Manifest, samples: Iterable[Sample]) -> Plan:
    """Compare the samples of a new version with its parent. Pure; where the new ones are stored does not count."""
    old, new = {sample.id: sample for sample in parent.samples}, {sample.id: sample for sample in samples}
    both = sorted(old.keys() & new.keys())
    equal = {id for id in both if _content(old[id]) == _content(new[id])}
    broken = {s.shard for s in parent.samples if s.id not in new or not same_stored(s, new[s.id])}
    return Plan(
        added=tuple(sorted(new.keys() - old.keys())),
        kept=tuple(id for id in both if id in equal),
        changed=tuple(id for id in both if id not in equal),
        removed=tuple(sorted(old.keys() - new.keys())),
        shared=tuple(sorted({shard.name for shard in parent.shards} & {s.shard for s in parent.samples} - broken)),
    )


def same_stored(one: Sample, two: Sample) -> bool:
    """True if a shard would hold the same for both."""
    return all(getattr(one, name) == getattr(two, name) for name in _STORED)


def _content(sample: Sample) -> dict[str, Any]:
    return sample.model_dump(exclude=_NOT_CONTENT)


def free_names(parent: Manifest) -> Iterator[str]:
    """Names for new shards, above all numbers that the parent uses."""
    found = [re.fullmatch(r"shard-(\d+)\.h5", shard) for shard in {s.shard for s in parent.samples} | {s.name for s in parent.shards}]
    number = max((int(match[1]) for match in found if match), default=-1)
    while True:
        number += 1
        yield shard_name(number)


def parent_of(manifest: Manifest) -> Parent:
    """What a version's record says of its parent."""
    return Parent(hash=manifest.hash(), files_hash=manifest.files_hash())


def record(
    action: str, parent: Manifest | None, parameters: dict[str, Any], counts: Mapping[str, int], key: str = ""
) -> Version:
    """The record of a new version."""
    parents = () if parent is None else (parent_of(parent),)
    return Version(action=action, parents=parents, code=__version__, parameters=parameters, counts=dict(counts), key=key)


def link(source: Path, shards: Iterable[ShardFile], target: Path) -> None:
    """Let ``shards`` of the dataset ``source`` stand in the folder ``target`` too; copied where links cannot be made.

    Raises:
        DatasetError: a shard is missing, a link to a place outside of ``source``, of another size than its manifest says, or the folder
            cannot be written.
    """
    for shard in shards:
        place = (source / shard.name).resolve()
        if not place.is_relative_to(source.resolve()):
            raise DatasetError(
                f"{source / shard.name}: a link that leads out of the dataset's folder; put the shard itself there, then try again"
            )
        try:
            status = place.stat()
            size = status.st_size
            if not stat.S_ISREG(status.st_mode):
                raise DatasetError(f"{source / shard.name}: not a plain file; restore the shard from a copy")
        except OSError as error:
            raise DatasetError(f"{source / shard.name}: cannot be shared ({error.strerror}); restore the shard from a copy") from error
        if size != shard.bytes:
            raise DatasetError(
                f"{source / shard.name}: damaged: expected {shard.bytes} bytes, found {size}; restore the shard from a copy"
            )
        with contextlib.suppress(OSError):  # another filesystem, or one without links
            os.link(place, target / shard.name)
            continue
        try:
            with atomic_path(target / shard.name) as temporary:
                shutil.copyfile(place, temporary)
        except OSError as error:
            raise DatasetError(f"{target}: cannot be written ({error.strerror}); check space and permissions") from error


def derive(source: Path, out: Path, manifest: Manifest) -> None:
    """The folder ``out`` with the shards of the dataset ``source`` and another manifest for them, all or nothing.

    Raises:
        DatasetError: ``out`` is not free or cannot be written, or a shard is missing.
    """
    _materialize(out, manifest, [(source, shard) for shard in _files(source, manifest)])


def checkout(manifest: Manifest, candidates: Sequence[tuple[Path, Manifest]], out: Path, extra: Sequence[Path] = ()) -> None:
    """The version ``manifest`` as the folder ``out``, from the shards of whichever datasets hold them.

    Args:
        candidates: datasets to look in.
        extra: files that go along, such as its signature.

    Raises:
        DatasetError: a shard is nowhere, or ``out`` is not free or cannot be written.
    """
    holders = {shard: folder for folder, held in reversed(candidates) for shard in held.shards if (folder / shard.name).is_file()}
    missing = [shard.name for shard in manifest.shards if shard not in holders]
    if missing or not manifest.shards:
        raise DatasetError(
            f"{out}: version {manifest.files_hash()[:12]} cannot be put together: {len(missing)} of {len(manifest.shards)} shards are "
            f"in none of the {len(candidates)} datasets beside{', first ' + missing[0] if missing else ''}; restore one that holds them"
        )
    _materialize(out, manifest, [(holders[shard], shard) for shard in manifest.shards], extra)


def _materialize(out: Path, manifest: Manifest, places: Sequence[tuple[Path, ShardFile]], extra: Sequence[Path] = ()) -> None:
    refuse_existing(out)
    building = out.with_name(f".{out.name}.building")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        building.mkdir()
    except FileExistsError:
        raise DatasetError(f"{out}: is being made, or was begun and not finished; if nothing runs, remove {building}") from None
    except OSError as error:
        raise DatasetError(f"{out}: cannot be made ({error.strerror}); check the folder's permissions") from error
    try:
        for source, shard in places:
            link(source, [shard], building)
        for path in extra:
            shutil.copyfile(path, building / path.name)
        manifests.save(building, manifest)
        publish(building, out)
    except OSError as error:
        raise DatasetError(f"{out}: cannot be written ({error.strerror}); check space and permissions") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _files(source: Path, manifest: Manifest) -> list[ShardFile]:
    listed = {shard.name for shard in manifest.shards}
    missing = sorted({sample.shard for sample in manifest.samples} - listed)
    try:  # a manifest of an older version lists no shards
        return [*manifest.shards, *(ShardFile(name=name, bytes=(source / name).stat().st_size, sha256="") for name in missing)]
    except OSError as error:
        raise DatasetError(f"{source}: a shard is missing ({error.strerror}); restore it from a copy") from error


# --- history ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Known:
    """A version in a lineage.

    Attributes:
        hash, files_hash: its names.
        folder: where it was found; None: only its child tells of it.
        manifest: None likewise.
    """

    hash: str
    files_hash: str
    folder: Path | None
    manifest: Manifest | None


def beside(dataset: Path) -> Callable[[], list[tuple[Path, Manifest]]]:
    """Asks for the datasets in the folder that holds ``dataset``; it is searched once, when first asked for."""
    found: list[tuple[Path, Manifest]] | None = None

    def search() -> list[tuple[Path, Manifest]]:
        nonlocal found
        if found is None:
            found = []
            for path in sorted(dataset.absolute().parent.glob(f"*/{manifests.NAME}")):
                with contextlib.suppress(DatasetError):  # another schema, damaged: no ancestor that could be shown
                    found.append((path.parent, manifests.load(path.parent)))
        return found

    return search


def lineage(dataset: Path, candidates: Callable[[], Sequence[tuple[Path, Manifest]]] | None = None) -> list[Known]:
    """This version, its parents, their parents, and so on, as far as their folders lie beside.

    Raises:
        DatasetError: there is no readable manifest.
    """
    candidates = candidates or beside(dataset)
    manifest = manifests.load(dataset)
    result = [Known(manifest.hash(), manifest.files_hash(), dataset, manifest)]
    names, folders = {result[0].files_hash}, {dataset.absolute()}
    for known in result:  # grows
        for parent in known.manifest.version.parents if known.manifest is not None and known.manifest.version else ():
            # A version can be equal to its parent: the folder is what tells them apart.
            found = next(
                (item for item in candidates() if item[1].files_hash() == parent.files_hash and item[0] not in folders), None
            )
            if found is not None:
                folders.add(found[0])
                result.append(Known(parent.hash, parent.files_hash, *found))
            elif parent.files_hash not in names:
                result.append(Known(parent.hash, parent.files_hash, None, None))
            names.add(parent.files_hash)
    return result


def find_version(dataset: Path, prefix: str) -> tuple[Path, Manifest]:
    """The dataset beside ``dataset``, or itself, of which content or files hash begins with ``prefix``.

    Raises:
        DatasetError: none, or several of other content; or the prefix is too short.
    """
    wanted = prefix.lower()
    if not re.fullmatch(r"[0-9a-f]{6,64}", wanted):
        raise DatasetError(f"'{prefix}': expected at least 6 characters of a version's hash; `hvd-imaging dataset log` shows them")
    found = {
        manifest.files_hash(): (folder, manifest)
        for folder, manifest in beside(dataset)()
        if manifest.hash().startswith(wanted) or manifest.files_hash().startswith(wanted)
    }
    if not found:
        raise DatasetError(
            f"{dataset.absolute().parent}: no dataset in this folder is version {prefix}; `hvd-imaging dataset log {dataset}` "
            "shows which there are"
        )
    if len({manifest.hash() for _, manifest in found.values()}) > 1:
        raise DatasetError(f"{prefix}: {len(found)} versions begin so; give more of the hash")
    return min(found.values(), key=lambda item: str(item[0]))


def diff(one: Manifest, two: Manifest) -> dict[str, Any]:
    """What differs from ``one`` to ``two``; empty lists and objects where nothing does. Pure."""
    found = plan(one, two.samples)
    old, new = {s.id: s for s in one.samples}, {s.id: s for s in two.samples}
    splits = [
        {"sample": id, "patient": new[id].patient, "from": old[id].split, "to": new[id].split}
        for id in sorted(old.keys() & new.keys())
        if old[id].split != new[id].split
    ]
    changed = []
    for id in found.changed:
        before, after = _content(old[id]), _content(new[id])
        changed.append({"sample": id, "patient": new[id].patient, "fields": sorted(k for k in after if before[k] != after[k])})
    settings = {
        name: {"from": before, "to": after}
        for name, before, after in _settings(one, two)
        if before != after
    }
    return {
        "added": [{"sample": id, "patient": new[id].patient, "split": new[id].split} for id in found.added],
        "removed": [{"sample": id, "patient": old[id].patient, "split": old[id].split} for id in found.removed],
        "changed": changed,
        "kept": len(found.kept),
        "splits": splits,
        "settings": settings,
        "shared_shards": len({(s.name, s.sha256) for s in one.shards} & {(s.name, s.sha256) for s in two.shards}),
    }


def _settings(one: Manifest, two: Manifest) -> Iterator[tuple[str, Any, Any]]:
    yield "task", one.task, two.task
    yield "classes", list(one.classes), list(two.classes)
    yield "channels", one.channels, two.channels
    for section in ("preprocess", "split", "storage"):
        before, after = (getattr(m, section).model_dump(mode="json", exclude={"reason"}) for m in (one, two))
        for key in sorted(before.keys() | after.keys()):
            yield f"{section}.{key}", before.get(key), after.get(key)
