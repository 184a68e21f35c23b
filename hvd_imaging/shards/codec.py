"""Which compression pays: measured on the data, the cores and the disk at ingest."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import frames
from .chunks import Layout

ENOUGH = 64 << 20  # bytes: below this a dataset stays in memory anyway, and nothing is measured
_PROBE_BYTES = 64 << 20
_CHUNKS = 6
_WORTH = 1.1  # a more complicated choice must be so much faster


@dataclass(frozen=True)
class Measured:
    """One way to store.

    Attributes:
        name: none, lz4 or zstd.
        ratio: bytes before / after.
        decode_mb_s: MB of decoded data a second and core; infinite for none.
    """

    name: str
    ratio: float
    decode_mb_s: float


def choose(measured: Sequence[Measured], disk_mb_s: float, cores: int) -> tuple[str, str]:
    """(compression, why). Pure.

    Reading and decoding overlap, so a byte costs what the slower of both costs. The first entry wins unless a later one is a
    tenth faster.
    """

    def speed(one: Measured) -> float:
        return min(disk_mb_s * one.ratio, one.decode_mb_s * cores)

    best = measured[0]
    for one in measured[1:]:
        if speed(one) > _WORTH * speed(best):
            best = one
    text = ", ".join(f"{one.name} {one.ratio:.1f} x smaller {speed(one):.0f} MB/s" for one in measured)
    return best.name, f"measured: {text}; disk {disk_mb_s:.0f} MB/s, {cores} core(s)"


def measure(image: np.ndarray, layout: Layout) -> list[Measured]:
    """Ratio and speed of each codec on chunks from the middle of a stored image ``(D, H, W, C)``."""
    import blosc2

    places = frames.places(image, layout)
    middle = max((len(places) - _CHUNKS) // 2, 0)
    chunks = [frames.chunk_at(image, layout, place) for place in places[middle : middle + _CHUNKS]]
    total = sum(chunk.nbytes for chunk in chunks)
    results = []
    for name in frames.CODECS:
        packed = [frames.pack(chunk, layout, name).data for chunk in chunks]
        times = []
        for _ in range(3):
            begun = time.perf_counter()
            for data in packed:
                blosc2.schunk_from_cframe(data).decompress_chunk(0)
            times.append(time.perf_counter() - begun)
        results.append(Measured(name, total / max(sum(map(len, packed)), 1), total / 1e6 / max(statistics.median(times), 1e-9)))
    return [*results, Measured("none", 1.0, float("inf"))]


def disk_speed(folder: Path) -> float:
    """MB/s of reading a file in ``folder`` that is not in memory, as far as the system lets go of it."""
    data = os.urandom(1 << 20)
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(_PROBE_BYTES >> 20):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        buffer = bytearray(4 << 20)
        begun = time.perf_counter()
        place = 0
        while got := os.preadv(file.fileno(), [buffer], place):
            place += got
        return place / 1e6 / (time.perf_counter() - begun)
