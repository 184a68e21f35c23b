"""One process of `bench io`: ``io_worker JOB.json`` writes or reads one format and prints its rates as a line of JSON."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .io_peers import FORMATS, Reader, Request, dataset_reader, forget

_MOST_PASSES = 10_000


def main() -> None:
    """Do the job: see `write`, `check`, `read` and `at_once`."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    job["requests"] = {mode: requests_of(found) for mode, found in job["requests"].items()}
    actions = {"write": write, "check": check, "read": read, "at_once": at_once}
    print(json.dumps(actions[job["action"]](job)))


def requests_of(found: Sequence[Any]) -> list[Request]:
    """Requests as JSON gives them back."""
    return [(volume, tuple(start), tuple(shape)) for volume, start, shape in found]


def write(job: Mapping[str, Any]) -> dict[str, Any]:
    """Store the volumes of ``job["volumes"]`` in the format: seconds and bytes of all files."""
    form, folder = FORMATS[job["format"]], Path(job["folder"])
    volumes = [np.load(path) for path in job["volumes"]]
    folder.mkdir(parents=True)
    began = time.perf_counter()
    form.write(folder, volumes, tuple(job["patch"]))
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())}


def check(job: Mapping[str, Any]) -> dict[str, Any]:
    """Compare what the format reads with the volumes; raises at the first difference."""
    form = FORMATS[job["format"]]
    volumes = [np.load(path, mmap_mode="r") for path in job["volumes"]]
    reader = form.open(Path(job["folder"]), 1)
    for mode, requests in job["requests"].items():
        for (volume, start, shape), found in zip(requests, reader.boxes(requests), strict=True):
            if not np.array_equal(found.reshape(shape), form.truth(volumes[volume], start, shape)):
                raise ValueError(f"{job['format']} read other voxels than were written: {mode}, {volume} {start} {shape}")
    reader.close()
    return {}


def read(job: Mapping[str, Any]) -> dict[str, Any]:
    """Rates of each kind of request by threads: ``{"warm": {mode: {threads: seconds a pass}}, "cold": {...}, "read": {mode: bytes}}``.

    "read" are the bytes of a warm pass by the process's own count of read calls (mapped files are not in it).
    """
    warm: dict[str, dict[str, float]] = {}
    cold: dict[str, dict[str, float]] = {}
    counted: dict[str, float] = {}
    for threads in job["threads"]:
        reader = _open(job, threads)
        for mode, requests in job["requests"].items():
            go = reader.ready(requests, threads)
            go(1)
            before = _bytes_read()
            began = time.perf_counter()
            go(1)
            once = time.perf_counter() - began
            counted[mode] = _bytes_read() - before
            passes = min(math.ceil(job["seconds"] / max(once, 1e-6)), _MOST_PASSES)
            if passes > 1:  # else that pass was long enough to count itself
                began = time.perf_counter()
                go(passes)
                once = (time.perf_counter() - began) / passes
            warm.setdefault(mode, {})[str(threads)] = once
        reader.close()
    if job["cold"]:
        threads = max(job["threads"])
        for mode, requests in job["requests"].items():
            reader = _open(job, threads)
            go = reader.ready(requests, threads)
            # After opening, which maps files and starts pipelines: what a format reads later counts.
            forget(Path(job["folder"]))
            began = time.perf_counter()
            go(1)
            cold.setdefault(mode, {})[str(threads)] = time.perf_counter() - began
            reader.close()
    return {"warm": warm, "cold": cold, "read": counted}


def at_once(job: Mapping[str, Any]) -> dict[str, Any]:
    """Read as one of ``job["ranks"]`` processes that begin together: seconds a pass, warm, one thread.

    Each goes on until all have measured, so that none has the machine for itself.
    """
    (mode,) = job["requests"]
    reader, place, ranks = _open(job, 1), Path(job["place"]), job["ranks"]
    go = reader.ready(job["requests"][mode], 1)
    go(1)
    _gather(place, f"ready{job['rank']}", "ready*", ranks)
    began, passes = time.perf_counter(), 0
    while time.perf_counter() - began < job["seconds"] or not passes:
        go(1)
        passes += 1
    seconds = (time.perf_counter() - began) / passes
    (place / f"done{job['rank']}").touch()
    while len(list(place.glob("done*"))) < ranks and time.perf_counter() - began < 60:
        go(1)
    reader.close()
    return {"seconds": seconds}


def _gather(place: Path, mine: str, all_of: str, count: int) -> None:
    (place / mine).touch()
    end = time.monotonic() + 60
    while len(list(place.glob(all_of))) < count:
        if time.monotonic() > end:
            raise TimeoutError(f"the other processes were not ready within 60 s: {all_of}")
        time.sleep(0.001)


def _open(job: Mapping[str, Any], threads: int) -> Reader:
    if job["format"] == "dataset":
        return dataset_reader(Path(job["folder"]))
    return FORMATS[job["format"]].open(Path(job["folder"]), threads)


def _bytes_read() -> int:
    try:
        text = Path("/proc/self/io").read_text(encoding="ascii")
    except OSError:
        return 0
    return int(text.split("rchar:")[1].split()[0])


if __name__ == "__main__":
    main()
