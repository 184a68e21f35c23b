"""Where a run's dataset is: where it was, or where it went. Reads manifests only, and not many."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..errors import DatasetError, RunError
from ..shards import manifest as manifests
from ..shards.manifest import Manifest
from .layout import CONFIG

LEVELS = 3
"""Folders above the run whose content is looked at."""
MOST = 100
"""Entries of a folder, and manifests in all, that are looked at."""


def find_dataset(run_dir: Path, stored: str, dataset_hash: str, given: str | Path | None = None) -> Path:
    """The dataset that a run learned from.

    Looked at are the stored place, the same place seen from the folders above the run (both were moved together), and the
    folders beside the run. Whatever is not at the stored place has to have the run's hash, and its shards.

    Args:
        run_dir: the run's folder.
        stored: ``data.dataset`` of its configuration.
        dataset_hash: `Manifest.hash` of what it learned from.
        given: by the user; nothing else is looked at then.

    Returns:
        an absolute path. A dataset of another hash at the stored place is returned if there is no better one: what it is good
        for is for the caller to say.

    Raises:
        DatasetError: none of these is a dataset of the run, or ``given`` is none at all.
        RunError: ``given`` is another dataset.
    """
    if given is not None:
        found = manifests.load(given).hash()
        if found != dataset_hash:
            raise RunError(
                f"--dataset {given}: expected the dataset {dataset_hash[:12]} that the run was trained on, found {found[:12]}; "
                "give that one (`hvd-imaging dataset info DIR` shows a hash)"
            )
        return Path(given).resolve()
    first, tried = Path(stored), 0
    for place in [first, *candidates(run_dir, stored)]:
        if tried == MOST:
            break
        manifest = _manifest(place)
        if manifest is None:
            continue
        tried += 1
        if manifest.hash() == dataset_hash and (place == first or _is_whole(place, manifest)):
            return place.resolve()
    if (first / manifests.NAME).is_file() and not (first / CONFIG).exists():
        return first.resolve()
    raise DatasetError(
        f"{stored}: the run's dataset is not there (no {manifests.NAME}), nor is dataset {dataset_hash[:12]} beside the run "
        f"{run_dir}; give its place with --dataset DIR, or restore it"
    )


def candidates(run_dir: Path, stored: str) -> Iterator[Path]:
    """Folders that may be the dataset, the likeliest first, none twice."""
    run_dir, path = run_dir.absolute(), Path(stored)
    above = [*run_dir.parents][:LEVELS]
    # ``/old/project/data/lung`` of ``/old/project/runs/a`` is ``data/lung``, or ``lung``, seen from a folder above the run.
    parts = path.parts[1:] if path.is_absolute() else path.parts
    ends = [Path(*parts[start:]) for start in range(max(len(parts) - LEVELS, 0), len(parts))]
    seen = {run_dir}
    for folder in above:
        for place in (*((folder / path,) if not path.is_absolute() else ()), *(folder / end for end in ends), *_inside(folder)):
            if place not in seen:
                seen.add(place)
                yield place


def _inside(folder: Path) -> list[Path]:
    try:
        return sorted(place for place in folder.iterdir() if place.is_dir())[:MOST]
    except OSError:
        return []


def _manifest(place: Path) -> Manifest | None:
    """None for what is no dataset; a run folder holds a copy of its dataset's manifest."""
    try:
        if (place / CONFIG).exists() or not (place / manifests.NAME).is_file():
            return None
        return manifests.load(place)
    except (OSError, DatasetError):
        return None


def _is_whole(place: Path, manifest: Manifest) -> bool:
    return all((place / shard).is_file() for shard in {sample.shard for sample in manifest.samples})
