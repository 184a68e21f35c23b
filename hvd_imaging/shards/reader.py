"""Reads patches and whole samples from shards."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ..errors import DatasetError
from . import schema
from .manifest import SCHEMA, Manifest, Sample

Triple = tuple[int, int, int]

_OPEN_FILES = 32  # a large dataset has more shards than a process may hold open


class ShardFault(Exception):
    """What is wrong with a shard; the cause of the reader's DatasetError, which adds the place and the next step."""


class ShardReader:
    """Reads samples of one dataset. Files open at their first use, read-only, without locks (parallel filesystems).

    One lock guards all calls: h5py holds a lock for the whole process anyway.

    Args:
        dataset: the dataset's folder.
        manifest: its manifest.
    """

    def __init__(self, dataset: str | Path, manifest: Manifest) -> None:
        self.dataset = Path(dataset)
        self.manifest = manifest
        self._files: OrderedDict[str, h5py.File] = OrderedDict()
        self._lock = threading.RLock()

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all files; the reader may be used again."""
        with self._lock:
            while self._files:
                self._files.popitem()[1].close()

    def read(self, sample: Sample, start: Triple, shape: Triple) -> tuple[np.ndarray, np.ndarray | None]:
        """A patch; voxels outside the volume are 0.

        Args:
            sample: of this dataset's manifest.
            start: first voxel (d, h, w), may be negative.
            shape: (d, h, w) of the patch.

        Returns:
            image float32 ``(d, h, w, C)``, mask uint8 ``(d, h, w)`` or None.

        Raises:
            DatasetError: the shard is missing, damaged or foreign; names sample and shard.
        """
        image = np.zeros((*shape, sample.shape[3]), np.float32)
        mask = None if sample.class_voxels is None else np.zeros(shape, np.uint8)
        ranges = [
            (max(first, 0), min(first + wanted, size))
            for first, wanted, size in zip(start, shape, sample.shape[:3], strict=True)
        ]
        if any(low >= high for low, high in ranges):
            return image, mask
        inside = tuple(slice(low, high) for low, high in ranges)
        place = tuple(slice(low - first, high - first) for (low, high), first in zip(ranges, start, strict=True))
        image[place] = self._array(sample, schema.IMAGE, inside)
        if mask is not None:
            mask[place] = self._array(sample, schema.MASK, inside)
        return image, mask

    def read_whole(self, sample: Sample) -> tuple[np.ndarray, np.ndarray | None]:
        """The whole sample: image float32 ``(D, H, W, C)``, mask uint8 ``(D, H, W)`` or None. Raises as `read`."""
        image, mask = self.read_stored(sample)
        return image.astype(np.float32, copy=False), mask

    def read_stored(self, sample: Sample) -> tuple[np.ndarray, np.ndarray | None]:
        """As `read_whole`, with the image in its stored type: what the manifest's hash is made of."""
        image = self._array(sample, schema.IMAGE, ())
        return image, None if sample.class_voxels is None else self._array(sample, schema.MASK, ())

    def foreground(self, sample: Sample) -> np.ndarray:
        """int32 ``(N, 3)``: voxels (d, h, w) whose mask is above 0, equally many of each class; may be empty."""
        if sample.class_voxels is None:
            return np.zeros((0, 3), np.int32)
        return self._array(sample, schema.FOREGROUND, ())

    def _array(self, sample: Sample, name: str, where: tuple[slice, ...]) -> np.ndarray:
        try:
            with self._lock:
                return self._checked(sample, name, where)
        except ShardFault as fault:
            raise DatasetError(
                f"{self.dataset / sample.shard}: sample {sample.id}: {fault}; `hvd-imaging dataset verify "
                f"{self.dataset}` lists all problems; restore the shard from a copy or ingest again"
            ) from fault

    def _checked(self, sample: Sample, name: str, where: tuple[slice, ...]) -> np.ndarray:
        try:
            array = self._file(sample.shard)[f"{schema.SAMPLES}/{sample.id}/{name}"]
            expected: tuple[Any, Any] = {
                schema.IMAGE: (sample.shape, sample.dtype),
                schema.MASK: (sample.shape[:3], "uint8"),
                schema.FOREGROUND: ((array.shape[0], 3), "int32"),
            }[name]
            found = (tuple(array.shape), array.dtype.name)
            if found != expected:
                raise ShardFault(
                    f"{name}: expected {expected[0]} {expected[1]} (manifest), found {found[0]} {found[1]}"
                )
            return np.asarray(array[where])
        except KeyError as error:
            raise ShardFault(f"does not hold the sample's {name}") from error
        # A damaged file makes HDF5 raise many kinds of errors.
        except (OSError, RuntimeError, ValueError, TypeError, AttributeError, IndexError, MemoryError) as error:
            raise ShardFault(f"damaged: {name} can not be read") from error

    def _file(self, name: str) -> h5py.File:
        if name in self._files:
            self._files.move_to_end(name)
            return self._files[name]
        path = self.dataset / name
        if not path.is_file():
            raise ShardFault("the shard is missing")
        try:
            file = h5py.File(path, "r", locking=False)
        except PermissionError as error:
            raise ShardFault("no permission to read the shard") from error
        except (OSError, RuntimeError) as error:
            raise ShardFault("damaged, truncated, or not HDF5") from error
        try:
            kind, version = file.attrs.get("format"), file.attrs.get("schema")
            if kind != schema.FORMAT.encode():
                raise ShardFault("an HDF5 file that hvd_imaging did not write")
            if version != SCHEMA:
                raise ShardFault(f"shard of schema version {version}, expected {SCHEMA}")
        except BaseException:
            file.close()
            raise
        self._files[name] = file
        while len(self._files) > _OPEN_FILES:
            self._files.popitem(last=False)[1].close()
        return file
