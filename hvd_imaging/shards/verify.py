"""Reads every sample again and compares it with the manifest, spread over the ranks."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..communicator import Communicator, together
from ..errors import DatasetError
from . import schema
from .manifest import Manifest, Sample, ShardFile, load
from .reader import ShardReader

Progress = Callable[[Sequence[Any], str], Iterable[Any]]


@dataclass(frozen=True)
class Problem:
    """One damaged sample.

    Attributes:
        sample: pseudonymous id; "" for the shard as a whole.
        shard: file name inside the dataset.
        reason: what was expected and found.
    """

    sample: str
    shard: str
    reason: str


def check_sample(reader: ShardReader, sample: Sample) -> Problem | None:
    """Compare one sample's stored content with its manifest entry."""
    try:
        image, mask = reader.read_stored(sample)
        found = schema.content_hash(image, mask, sample.label, sample.scale, sample.offset)
        if found != sample.sha256:
            return Problem(
                sample.id, sample.shard, f"content differs: expected SHA-256 {sample.sha256[:12]}, found {found[:12]}"
            )
        if mask is not None and not np.array_equal(reader.foreground(sample), schema.foreground_voxels(mask)):
            return Problem(sample.id, sample.shard, "the list of foreground voxels does not belong to the mask")
    except DatasetError as error:
        return Problem(sample.id, sample.shard, str(error.__cause__ or error))
    return None


def check_file(dataset: Path, shard: ShardFile) -> Problem | None:
    """Compare a shard's bytes with the manifest: finds also what no sample needs, such as HDF5's own tables."""
    digest = hashlib.sha256()
    try:
        status = (dataset / shard.name).stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            return Problem("", shard.name, "not a plain file")
        size = status.st_size
        if size != shard.bytes:
            return Problem("", shard.name, f"the file has {size} bytes, expected {shard.bytes}")
        with open(dataset / shard.name, "rb") as file:
            while piece := file.read(1 << 22):
                digest.update(piece)
    except FileNotFoundError:
        return Problem("", shard.name, "the shard is missing")
    except OSError as error:
        return Problem("", shard.name, f"the file cannot be read ({error.strerror})")
    found = digest.hexdigest()
    if found != shard.sha256:
        return Problem("", shard.name, f"the file differs: expected SHA-256 {shard.sha256[:12]}, found {found[:12]}")
    return None


def check_patients(manifest: Manifest) -> list[Problem]:
    """A patient in two splits, or an id that stands twice."""
    problems = []
    split_of: dict[str, str] = {}
    seen: set[str] = set()
    for sample in manifest.samples:
        known = split_of.setdefault(sample.patient, sample.split)
        if known != sample.split:
            problems.append(Problem(sample.id, sample.shard, f"its patient is in the splits {known} and {sample.split}"))
        if sample.id in seen:
            problems.append(Problem(sample.id, sample.shard, "the manifest holds this id twice"))
        seen.add(sample.id)
    return problems


def verify(
    dataset: str | Path, communicator: Communicator, progress: Progress | None = None
) -> list[Problem]:
    """All problems of a dataset, in manifest order, on every rank: first of samples, then of shards.

    Args:
        progress: called with this rank's samples or shards and a description; yields them and may draw a bar meanwhile.

    Raises:
        DatasetError: there is no readable manifest.
    """
    manifest = together(communicator, lambda: load(dataset))

    def check() -> list[Problem]:
        found = []
        with ShardReader(dataset, manifest) as reader:
            mine = communicator.world.part(manifest.samples)
            for sample in mine if progress is None else progress(mine, "verifying"):
                problem = check_sample(reader, sample)
                if problem is not None:
                    found.append(problem)
        return found

    def check_files() -> list[Problem]:
        mine = communicator.world.part(manifest.shards)
        results = [check_file(Path(dataset), shard) for shard in (mine if progress is None else progress(mine, "hashing shards"))]
        return [problem for problem in results if problem is not None]

    def everywhere(act: Callable[[], list[Problem]]) -> list[Problem]:
        parts = communicator.gather([[p.sample, p.shard, p.reason] for p in together(communicator, act)])
        return [Problem(*problem) for part in parts for problem in part]

    found = check_patients(manifest) + everywhere(check)
    named = {problem.shard for problem in found}
    # A sample that is named says more than its shard.
    return found + [problem for problem in everywhere(check_files) if problem.shard not in named]
