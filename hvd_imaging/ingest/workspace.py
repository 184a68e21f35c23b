"""The folder beside a dataset in which it is built. A killed ingest leaves it, and the next one goes on from there."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..errors import DatasetError
from ..shards import schema
from ..shards.manifest import Sample
from ..shards.writer import Record
from ..texts import parse_json
from .plan import Staged

_CASE = ".case"  # length of the description (JSON), the description, then the bytes of image and mask
_LENGTH = 8
_MAP = 1 << 22  # bytes: making a map takes longer than reading less than these


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
            DatasetError: another one is at it, or the folder cannot be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._check_own()
            self.staging.mkdir(exist_ok=True)
            lock = open(os.open(self.folder / "lock", os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "w")  # noqa: SIM115
        except OSError as error:
            raise DatasetError(
                f"{self._dataset}: cannot be made ({error.strerror}); check the folder's permissions"
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

    def _check_own(self) -> None:
        """Where others may write, they can put a folder or a link of this name there, and would have the patients' images.

        Raises:
            DatasetError: they have.
        """
        found = os.lstat(self.folder)
        # Compared with a file made here: a server may give root's files another owner.
        with tempfile.TemporaryFile(dir=self.folder) as probe:
            mine = os.fstat(probe.fileno()).st_uid
        inside = [path for path in (self.staging, self.built, self.source) if path.is_symlink()]
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != mine or inside:
            what = "a link" if inside or stat.S_ISLNK(found.st_mode) else "of another user"
            raise DatasetError(f"{inside[0] if inside else self.folder}: {what}, where this dataset is to be built; remove it, or choose another name")

    def remove(self) -> None:
        """Nothing of it is needed any more."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def prepared(self) -> int:
        """How many cases stand ready."""
        return sum(1 for _ in self.staging.glob(f"*{_CASE}")) if self.staging.is_dir() else 0

    def find(self, origin: str) -> Staged | None:
        """A case that was prepared before, whole."""
        try:
            with open(self._place(origin), "rb") as file:
                plain = parse_json(file.read(int.from_bytes(file.read(_LENGTH), "little")))
            sample = Sample.model_validate(plain.pop("sample"))
            staged = Staged(**{**plain, "notes": tuple(plain["notes"]), "sample": sample})
            image, mask = self._load(sample, origin)
        except (OSError, ValueError, TypeError, KeyError, OverflowError, MemoryError):
            return None
        whole = schema.content_hash(image, mask, sample.label, sample.scale, sample.offset) == sample.sha256
        return staged if whole else None

    def keep(self, origin: str, staged: Staged, record: Record) -> None:
        """Store a prepared case in one file, which takes its name when it is whole.

        Raises:
            DatasetError: full disk, no permission.
        """
        assert staged.sample is not None
        plain = {**dataclasses.asdict(dataclasses.replace(staged, sample=None)), "sample": staged.sample.model_dump(mode="json")}
        text = json.dumps(plain).encode()
        part = self._place(origin).with_suffix(".part")
        try:
            with open(part, "wb") as file:
                file.write(len(text).to_bytes(_LENGTH, "little") + text + bytes(_begin(len(text)) - _LENGTH - len(text)))
                for array in (record.image, record.mask):
                    if array is not None:
                        file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            # Not synced: after a power failure `find` sees that a file is not whole.
            os.replace(part, self._place(origin))
        except OSError as error:
            raise DatasetError(
                f"{self.folder}: cannot be written ({error.strerror}); check space and permissions"
            ) from error

    def arrays(self, sample: Sample) -> tuple[np.ndarray, np.ndarray | None]:
        """Image and mask of a prepared case.

        Raises:
            DatasetError: they cannot be read here.
        """
        try:
            return self._load(sample, sample.origin)
        except (OSError, ValueError) as error:
            raise DatasetError(
                f"{self.folder}: a prepared sample cannot be read on this rank ({type(error).__name__}); "
                "DATASET must lie on a filesystem that all ranks share"
            ) from error

    def _place(self, origin: str) -> Path:
        return self.staging / f"{origin}{_CASE}"

    def _load(self, sample: Sample, origin: str) -> tuple[np.ndarray, np.ndarray | None]:
        with open(self._place(origin), "rb") as file:
            begin = _begin(int.from_bytes(file.read(_LENGTH), "little"))
            image, end = _read(file, begin, sample.shape, sample.dtype)
            if sample.class_voxels is None:
                return image, None
            return image, _read(file, end, sample.shape[:3], "uint8")[0]


def _begin(length: int) -> int:
    """Where the image begins, after a description of so many bytes."""
    return _LENGTH + length + 63 & ~63


def _read(file: BinaryIO, begin: int, shape: tuple[int, ...], dtype: str) -> tuple[np.ndarray, int]:
    """An array that stands at ``begin``, and where it ends."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size > _MAP:
        # As a plain array: taking parts of NumPy's own class of maps is slow.
        return np.asarray(np.memmap(file, dtype, "r", begin, shape)), begin + size
    file.seek(begin)
    return np.frombuffer(file.read(size), dtype).reshape(shape), begin + size
