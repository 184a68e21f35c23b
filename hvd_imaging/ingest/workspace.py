"""The folder beside a dataset in which it is built. A killed ingest leaves it, and the next one goes on from there."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..errors import DatasetError
from ..shards import schema
from ..shards.manifest import Sample
from ..shards.writer import Record
from .plan import Staged


class Workspace:
    """``.<name>.building`` beside the dataset: prepared cases in ``staging``, shards in ``dataset``, an unpacked archive in ``source``."""

    def __init__(self, dataset: Path) -> None:
        self._dataset = dataset
        self.folder = dataset.with_name(f".{dataset.name}.building")
        self.staging = self.folder / "staging"
        self.built = self.folder / "dataset"
        self.source = self.folder / "source"

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Make the folders and keep other ingests of this dataset out, on one rank.

        Raises:
            DatasetError: another one is at it, or the folder can not be made.
        """
        try:
            self.staging.mkdir(parents=True, exist_ok=True)
            lock = open(self.folder / "lock", "w")  # noqa: SIM115
        except OSError as error:
            raise DatasetError(
                f"{self._dataset}: can not be made ({error.strerror}); check the folder's permissions"
            ) from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise DatasetError(
                    f"{self._dataset}: another ingest is making this dataset now; wait for it, or choose another name"
                ) from error
            except OSError:
                pass  # some network filesystems have no locks
            shutil.rmtree(self.built, ignore_errors=True)  # half-written shards of a killed one
            self.built.mkdir()
            yield

    def remove(self) -> None:
        """Nothing of it is needed any more."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def prepared(self) -> int:
        """How many cases stand ready."""
        return sum(1 for _ in self.staging.glob("*.json")) if self.staging.is_dir() else 0

    def find(self, origin: str) -> Staged | None:
        """A case that was prepared before, whole."""
        try:
            plain = json.loads((self.staging / f"{origin}.json").read_text(encoding="utf-8"))
            sample = Sample.model_validate(plain.pop("sample"))
            staged = Staged(**{**plain, "notes": tuple(plain["notes"]), "sample": sample})
            image, mask = self._load(origin, sample.class_voxels is not None)
        except (OSError, ValueError, TypeError, KeyError):
            return None
        whole = schema.content_hash(image, mask, sample.label, sample.scale, sample.offset) == sample.sha256
        return staged if whole else None

    def keep(self, origin: str, staged: Staged, record: Record) -> None:
        """Store a prepared case; the description comes last and makes it count.

        Raises:
            DatasetError: full disk, no permission.
        """
        assert staged.sample is not None
        plain = {**dataclasses.asdict(dataclasses.replace(staged, sample=None)), "sample": staged.sample.model_dump(mode="json")}
        try:
            _save(self.staging / f"{origin}.image.npy", record.image)
            if record.mask is not None:
                _save(self.staging / f"{origin}.mask.npy", record.mask)
            part = self.staging / f"{origin}.part"
            part.write_text(json.dumps(plain), encoding="utf-8")
            # Not synced: after a power failure `find` sees that a file is not whole.
            os.replace(part, self.staging / f"{origin}.json")
        except OSError as error:
            raise DatasetError(
                f"{self.folder}: can not be written ({error.strerror}); check space and permissions"
            ) from error

    def arrays(self, origin: str, has_mask: bool) -> tuple[np.ndarray, np.ndarray | None]:
        """Image and mask of a prepared case.

        Raises:
            DatasetError: they can not be read here.
        """
        try:
            return self._load(origin, has_mask)
        except (OSError, ValueError) as error:
            raise DatasetError(
                f"{self.folder}: a prepared sample can not be read on this rank ({type(error).__name__}); "
                "DATASET must lie on a filesystem that all ranks share"
            ) from error

    def _load(self, origin: str, has_mask: bool) -> tuple[np.ndarray, np.ndarray | None]:
        image = np.load(self.staging / f"{origin}.image.npy", mmap_mode="r", allow_pickle=False)
        mask = np.load(self.staging / f"{origin}.mask.npy", mmap_mode="r", allow_pickle=False) if has_mask else None
        # As plain arrays: taking parts of NumPy's own class of maps is slow.
        return np.asarray(image), None if mask is None else np.asarray(mask)


def _save(path: Path, array: np.ndarray) -> None:
    with open(path, "wb") as file:
        np.save(file, array, allow_pickle=False)
