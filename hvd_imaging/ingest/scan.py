"""The headers of an archive, read by all ranks together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..communicator import Sharing, together
from ..sources.dicom import DicomScan, group_headers, walk
from ..sources.headers import Header, read_header

_BLOCK = 32  # files taken at once


def scan_together(src: Path, communicator: Sharing, report: Callable[[int, int], None]) -> DicomScan:
    """`sources.dicom.scan_dicom` on all ranks; each gets the whole result.

    Args:
        report: told on rank 0 how many files are done, of how many.
    """
    files = communicator.broadcast(list(walk(src)) if communicator.world.is_root else None)
    blocks = [files[start : start + _BLOCK] for start in range(0, len(files), _BLOCK)]

    def read() -> list[Header]:
        with communicator.share(len(blocks), lambda number: report((number - 1) * _BLOCK, len(files))) as mine:
            return [read_header(path, src) for number in mine for path in blocks[number]]

    parts = communicator.gather(together(communicator, read))
    return group_headers((header for part in parts for header in part), src)
