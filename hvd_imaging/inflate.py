"""Deflated DICOM files (PS3.5 A.5) with a bound: a few KB can stand for terabytes, and pydicom unpacks them at once."""

from __future__ import annotations

import io
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import pydicom
from pydicom.filereader import _read_file_meta_info, read_preamble
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian

from . import limits
from .errors import SourceError


def dcmread(path: str | Path, **options: Any) -> pydicom.FileDataset:
    """`pydicom.dcmread`, which takes the same options, of any file.

    Raises:
        SourceError: a deflated data set that is damaged, or larger than `limits.INFLATED_LIMIT`.
    """
    with open(path, "rb") as file:
        plain = inflated(file)
        dataset = pydicom.dcmread(plain or file, **options)
    if plain is not None:
        dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    return dataset


def inflated(file: BinaryIO) -> io.BytesIO | None:
    """A deflated file as an explicit little endian one in memory; None, and the file at its start, if it is not deflated.

    Raises:
        SourceError: damaged, or larger than `limits.INFLATED_LIMIT`.
    """
    begin = _data_set(file)
    file.seek(0)
    if begin is None:
        return None
    head = file.read(begin)
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        body = unpacker.decompress(file.read(), limits.INFLATED_LIMIT)
    except zlib.error:
        raise SourceError("deflated data set is damaged or truncated") from None
    if not unpacker.eof:
        what = f"is larger than {limits.INFLATED_LIMIT >> 20} MiB" if len(body) >= limits.INFLATED_LIMIT else "is truncated"
        raise SourceError(f"deflated data set {what}")
    file.seek(0)
    return io.BytesIO(
        head.replace(DeflatedExplicitVRLittleEndian.encode(), ExplicitVRLittleEndian.encode().ljust(22, b"\0")) + body
    )


def _data_set(file: BinaryIO) -> int | None:
    """Where the data set of a deflated file begins; found by pydicom's own functions, so that none is deflated for it alone."""
    try:
        read_preamble(file, force=True)
        meta = _read_file_meta_info(file)
        return file.tell() if meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian else None
    except Exception:  # of many kinds, for damaged files: reading it raises the same
        return None
