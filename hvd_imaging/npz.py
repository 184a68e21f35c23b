"""NumPy's ``.npz`` files that may come from outside: what each array claims is compared with what the file holds before any is read."""

from __future__ import annotations

import math
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from . import limits

MOST_ARRAYS = 100_000
_MOST_HEAD = 1 << 16


def read(path: str | Path) -> dict[str, np.ndarray]:
    """All arrays of a file by their names, without pickles.

    Raises:
        OSError: it is not there, or cannot be read.
        ValueError: damaged, not of numbers, or its arrays claim more than the file can hold.
    """
    try:
        # Opened here: NumPy does not close a file that it finds damaged.
        with open(path, "rb") as file:
            _check(file, os.fstat(file.fileno()).st_size)
            with np.load(file, allow_pickle=False) as held:  # noqa: TID251
                return {name: held[name] for name in held.files}
    except (OSError, ValueError):
        raise
    except Exception as error:  # of many classes, for a damaged file
        raise ValueError(str(error).splitlines()[0] if str(error) else type(error).__name__) from error


def _check(file: Any, size: int) -> None:
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if len(members) > MOST_ARRAYS:
            raise ValueError(f"more than {MOST_ARRAYS} arrays")
        unpacked = sum(member.file_size for member in members)
        if why := limits.unbelievable(unpacked, size, "gzip"):
            raise ValueError(why)
        for member in members:
            with archive.open(member) as part:
                claimed = _claimed(part)
            if claimed > member.file_size:
                raise ValueError(f"an array asks for {limits.brief(claimed)} bytes and has {member.file_size}")
    file.seek(0)


def _claimed(part: Any) -> int:
    """Bytes of an array as its header has it (NEP 1)."""
    version = np.lib.format.read_magic(part)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"array format {version}")
    reader: Any = readers[version]  # its stub does not know the bound
    shape, _, dtype = reader(part, max_header_size=_MOST_HEAD)
    if dtype.hasobject or dtype.names or dtype.kind not in "biufSUV" or any(side < 0 for side in shape):
        raise ValueError(f"an array of {dtype} and shape {shape}"[:200])
    return math.prod(shape) * dtype.itemsize
