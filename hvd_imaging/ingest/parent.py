"""The pseudonym key of a dataset that continues another one: it must be the parent's, else nobody is known again."""

from __future__ import annotations

from pathlib import Path

from ..errors import DatasetError, SetupError
from ..privacy.pseudonym import pseudonym
from ..shards import versions
from .plan import Before


def key_mark(key: bytes) -> str:
    """Pseudonym of the key itself, which the manifest keeps: tells whether a key is the right one, and nothing else."""
    return pseudonym(key, "key", "")


def key_place(dataset: Path, given: str | Path | None, before: Before | None) -> Path:
    """Where the key is, or will be made: as given; beside the dataset; with a parent, beside it or its nearest ancestor.

    Raises:
        SetupError: a parent has no key beside it.
        DatasetError: the parent's manifest cannot be read.
    """
    if before is None:
        return Path(given) if given else _beside(dataset)
    first = Path(given) if given else _beside(before.folder.absolute())
    if first.exists():
        return first
    if not given:
        for known in versions.lineage(before.folder):
            if known.folder is not None and _beside(known.folder.absolute()).exists():
                return _beside(known.folder.absolute())
    raise SetupError(f"{first}: no key file; a new version needs the key that its parent was made with: give it with --key-file")


def check_key(key: bytes, before: Before, path: Path) -> None:
    """The key belongs to the parent, as far as the parent tells.

    Raises:
        DatasetError: it does not.
    """
    known = before.manifest.version.key if before.manifest.version is not None else ""
    if known and known != key_mark(key):
        raise DatasetError(
            f"{before.folder}: was made with another pseudonym key than {path}: its patients would not be known again; give the "
            "parent's key with --key-file"
        )


def _beside(dataset: Path) -> Path:
    return dataset.with_name(dataset.name + ".key")
