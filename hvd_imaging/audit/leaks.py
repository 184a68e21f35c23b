"""What connects two splits that should know nothing of each other. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..shards.manifest import Sample
from .fingerprint import Fingerprint, differing_bits, distance

# Largest distances; docs/splits.md tells how they were found.
SAME, SAME_FLAT = 0.075, 0.04
"""Of one and the same volume, or image of one slice."""
NEIGHBOUR = 0.2
"""Of neighbouring frames of one volume that were stored as images of their own."""
_CANDIDATE, _CANDIDATE_FLAT = 0.35, 0.4  # share of differing bits of a hash up to which two images are compared closely
_ROWS = 64


@dataclass(frozen=True)
class Leak:
    """A connection between two splits.

    Attributes:
        kind: "same patient", "same pixels", "same image" (perceptual) or "neighbouring frames".
        samples, patients, splits: pseudonyms and names of both sides.
        distance: of the images, 0 for equal ones; None for "same patient".
    """

    kind: str
    samples: tuple[str, str]
    patients: tuple[str, str]
    splits: tuple[str, str]
    distance: float | None = None


def _leak(kind: str, one: Sample, two: Sample, how_far: float | None = None) -> Leak:
    return Leak(kind, (one.id, two.id), (one.patient, two.patient), (one.split, two.split), how_far)


def same_patients(samples: Sequence[Sample]) -> list[Leak]:
    """One leak for each further split in which a patient has samples."""
    first: dict[str, dict[str, Sample]] = {}
    for sample in samples:
        first.setdefault(sample.patient, {}).setdefault(sample.split, sample)
    return [
        _leak("same patient", next(iter(splits.values())), other)
        for splits in first.values()
        for other in list(splits.values())[1:]
    ]


def same_pixels(samples: Sequence[Sample], digests: Mapping[str, str]) -> tuple[list[Leak], int]:
    """Equal voxels in two splits, and how many samples repeat another one of their own split."""
    groups: dict[str, dict[str, list[Sample]]] = {}
    for sample in samples:
        groups.setdefault(digests[sample.id], {}).setdefault(sample.split, []).append(sample)
    leaks, repeated = [], 0
    for splits in groups.values():
        members = list(splits.values())
        repeated += sum(len(group) - 1 for group in members)
        for one, two in ((one, two) for i, one in enumerate(members) for two in members[i + 1 :]):
            leaks += [_leak("same pixels", one[0], other, 0.0) for other in two]
            leaks += [_leak("same pixels", other, two[0], 0.0) for other in one[1:]]
    return leaks, repeated


def similar(
    samples: Sequence[Sample],
    prints: Mapping[str, Fingerprint],
    part: tuple[int, int] = (0, 1),
    frames: bool = True,
) -> Iterator[Leak]:
    """Like images of two splits whose voxels differ.

    Args:
        part: (number, count) of the share of the comparisons to do here.
        frames: images of one slice may be frames of a volume, neighbours of each other; not so if they are projections.
    """
    for flat in (False, True):
        members = [s for s in samples if prints[s.id].flat == flat and prints[s.id].hash.size]
        if len(members) < 2:
            continue
        hashes = np.stack([prints[s.id].hash for s in members])
        names = sorted({s.split for s in members})
        split = np.array([names.index(s.split) for s in members])
        same, candidate = (SAME_FLAT, _CANDIDATE_FLAT) if flat else (SAME, _CANDIDATE)
        limit = NEIGHBOUR if flat and frames else same
        for block, start in enumerate(range(0, len(members), _ROWS)):
            if block % part[1] != part[0]:
                continue
            rows = slice(start, start + _ROWS)
            near = (differing_bits(hashes[rows], hashes) <= candidate) & (split[rows, None] < split[None])
            for row, column in np.argwhere(near):
                one, two = members[start + row], members[column]
                a, b = prints[one.id], prints[two.id]
                if a.digest == b.digest:
                    continue
                found = distance(a.spectrum, b.spectrum)
                if found <= limit:
                    yield _leak("same image" if found <= same else "neighbouring frames", one, two, round(max(found, 0.0), 4))
