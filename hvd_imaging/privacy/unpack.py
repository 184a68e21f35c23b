"""Text that stands packed in files, for the search of `audit`: gzip, ZIP, PNG, deflated DICOM."""

from __future__ import annotations

import gzip
import lzma
import os
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

PIECE = 1 << 22
_DAMAGED = (gzip.BadGzipFile, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError)
"""What the unpackers raise on damaged or encrypted content: its bytes as they are were searched already."""
_PNG = b"\x89PNG\r\n\x1a\n"
_DEFLATED = b"1.2.840.10008.1.2.1.99"


def unpacked(path: Path) -> Iterator[bytes]:
    """What is packed in a file, in pieces; nothing for files that pack no text. What is damaged ends there.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        start = file.read(1024)
    try:
        if start[:2] == b"\x1f\x8b":
            with gzip.open(os.fspath(path), "rb") as packed:
                while piece := packed.read(PIECE):
                    yield piece
        elif start[:4] == b"PK\x03\x04":
            yield from _zip(path)
        elif start[:8] == _PNG:
            yield from _png(path)
        elif start[128:132] == b"DICM" and _DEFLATED in start:
            yield from _deflated(path)
    except _DAMAGED:
        return


def _zip(path: Path) -> Iterator[bytes]:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            yield f"\n{member.filename}\n".encode(errors="surrogateescape")
            try:
                with archive.open(member) as packed:
                    while piece := packed.read(PIECE):
                        yield piece
            except _DAMAGED:
                continue


def _png(path: Path) -> Iterator[bytes]:
    """Compressed text chunks (PNG, 11.3.3); plain ones stand in the file as they are."""
    with open(path, "rb") as file:
        file.seek(len(_PNG))
        while len(head := file.read(8)) == 8:
            length, kind = int.from_bytes(head[:4], "big"), head[4:]
            if kind not in (b"zTXt", b"iTXt"):
                file.seek(length + 4, os.SEEK_CUR)
                continue
            data = file.read(length)[:PIECE]
            file.seek(4, os.SEEK_CUR)
            # The stream begins behind a keyword, and in iTXt behind two more texts: wherever it can be unpacked.
            for place in range(len(data) - 1):
                if data[place] == 0x78 and (data[place] * 256 + data[place + 1]) % 31 == 0:
                    try:
                        yield b"\n" + zlib.decompressobj().decompress(data[place:], PIECE)
                        break
                    except zlib.error:
                        continue


def _deflated(path: Path) -> Iterator[bytes]:
    """The data set of a deflated DICOM file (PS3.5 A.5), which begins behind the file meta information."""
    with open(path, "rb") as file:
        file.seek(132)
        head = file.read(12)  # (0002,0000) UL: the length of the group
        file.seek(int.from_bytes(head[8:], "little"), os.SEEK_CUR)
        inflate = zlib.decompressobj(-zlib.MAX_WBITS)
        while not inflate.eof and (packed := inflate.unconsumed_tail or file.read(1 << 16)):
            yield inflate.decompress(packed, PIECE)
