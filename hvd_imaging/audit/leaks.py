"""What connects two splits that should know nothing of each other. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..shards.manifest import Sample
from .fingerprint import Fingerprint, differing_bits, distance

# Largest distances; docs/splits.md tells how they were found.
SAME, SAME_FLAT = 0.075, 0.04
"""Of one and the same volume, or image of one slice."""
NEIGHBOUR = 0.2
"""Of neighbouring frames of one volume that were stored as images of their own."""
NEAREST, ALIKE, TELLING = 8, 0.65, 0.4
"""Volumes are suspected to be of one patient if they are nearer than this share of the distance to the 8th nearest patient of
another split, and that is at least so large."""
UNLIKE = 0.6
"""Taken for that distance where fewer than 8 have like hashes: those of unlike hashes are hardly ever nearer."""
_CANDIDATE, _CANDIDATE_FLAT = 0.35, 0.4  # share of differing bits of a hash up to which two images are compared closely
_ROWS = 64


@dataclass(frozen=True)
class Leak:
    """A connection between two splits.

    Attributes:
        kind: "same patient", "same pixels", "same image" (perceptual) or "neighbouring frames"; or "like anatomy", a suspicion.
        samples, patients, splits: pseudonyms and names of both sides.
        distance: of the images, 0 for equal ones; None for "same patient".
        usual: of "like anatomy": how far the 8th nearest patient of another split is.
    """

    kind: str
    samples: tuple[str, str]
    patients: tuple[str, str]
    splits: tuple[str, str]
    distance: float | None = None
    usual: float | None = None


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


def compared(
    samples: Sequence[Sample], prints: Mapping[str, Fingerprint], part: tuple[int, int] = (0, 1)
) -> Iterator[tuple[Sample, Sample, float]]:
    """(one, other, distance) of images of two splits with like hashes, whose voxels differ.

    Args:
        part: (number, count) of the share of the comparisons to do here.
    """
    for flat in (False, True):
        members = [s for s in samples if prints[s.id].flat == flat and prints[s.id].hash.size]
        if len(members) < 2:
            continue
        hashes = np.stack([prints[s.id].hash for s in members])
        names = sorted({s.split for s in members})
        split = np.array([names.index(s.split) for s in members])
        candidate = _CANDIDATE_FLAT if flat else _CANDIDATE
        for block, start in enumerate(range(0, len(members), _ROWS)):
            if block % part[1] != part[0]:
                continue
            rows = slice(start, start + _ROWS)
            near = (differing_bits(hashes[rows], hashes) <= candidate) & (split[rows, None] < split[None])
            for row, column in np.argwhere(near):
                one, two = members[start + row], members[column]
                a, b = prints[one.id], prints[two.id]
                if a.digest != b.digest:
                    yield one, two, distance(a.spectrum, b.spectrum)


def same_image(one: Sample, two: Sample, found: float, flat: bool, frames: bool = True) -> Leak | None:
    """What two images of this distance are to each other.

    Args:
        flat: of one slice.
        frames: images of one slice may be frames of a volume, neighbours of each other; not so if they are projections.
    """
    same = SAME_FLAT if flat else SAME
    if found > (NEIGHBOUR if flat and frames else same):
        return None
    return _leak("same image" if found <= same else "neighbouring frames", one, two, round(max(found, 0.0), 4))


Nearest = dict[str, list[tuple[float, str]]]
"""Sample -> (distance, other sample) of the `NEAREST` images of other splits and patients that are most alike."""


def note_near(near: Nearest, one: str, two: str, found: float) -> None:
    """Keep a comparison of two volumes."""
    for id, other in ((one, two), (two, one)):
        row = near.setdefault(id, [])
        row.append((found, other))
        if len(row) > 8 * NEAREST:
            row[:] = sorted(row)[:NEAREST]


def merged(parts: Iterable[Nearest]) -> Nearest:
    """What several ranks have found."""
    near: Nearest = {}
    for part in parts:
        for id, row in part.items():
            near.setdefault(id, []).extend(row)
    return {id: sorted(row)[:NEAREST] for id, row in near.items()}


def like_anatomy(samples: Sequence[Sample], near: Nearest) -> list[Leak]:
    """Volumes of two splits that are much more alike than either is to the patients that are most like it.

    The measure is the data set's own: images of one organ in one frame are more alike than images of a whole trunk. Where all
    patients are alike (`TELLING`), nothing can be said.

    Args:
        samples: the volumes.
        near: of `merged`.
    """
    known = {sample.id: sample for sample in samples}
    order = {sample.id: number for number, sample in enumerate(samples)}
    others = {split: sum(sample.split != split for sample in samples) for split in {sample.split for sample in samples}}
    found = []
    for id, row in sorted(near.items(), key=lambda item: order[item[0]]):
        for how_far, other in row:
            if order[id] > order[other] and any(each == id for _, each in near[other]):
                continue  # told from the other side
            if min(others[known[id].split], others[known[other].split]) < NEAREST:
                continue  # too few to know what is usual
            usual = min(each[-1][0] if len(each) == NEAREST else UNLIKE for each in (row, near[other]))
            if usual >= TELLING and how_far <= ALIKE * usual:
                leak = _leak("like anatomy", known[id], known[other], round(how_far, 4))
                found.append(replace(leak, usual=round(usual, 4)))
    return found
