"""A dataset looked through for what should not be in it: leaks between splits, identifiers, combinations that few share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..communicator import Communicator, together
from ..errors import ConfigError
from ..privacy.audit import Finding, find_identifiers, rare_combinations
from ..privacy.faces import face_risk
from ..shards import content
from ..shards.manifest import Manifest, Sample, load
from ..shards.reader import ShardReader
from . import leaks
from .fingerprint import Fingerprint, fingerprint
from .leaks import Leak

Progress = Callable[[Sequence[Any], str], Iterable[Any]]


@dataclass(frozen=True)
class Described:
    """What is kept of one image after it has been read: the place for all that looks at single images."""

    sample: str
    print: Fingerprint
    face: bool = False


@dataclass(frozen=True)
class Report:
    """The result, equal on all ranks.

    Attributes:
        leaks: between splits, in the order of kinds.
        repeated: samples with the voxels of another one of their own split.
        identifiers: places of known identifiers; None if none were given.
        faces: samples that show a face.
        suspicions: volumes of two splits so alike that they may be of one patient.
        rare: combinations of modality, site and month that fewer than ``least`` patients share, with their number.
    """

    manifest: Manifest
    leaks: tuple[Leak, ...]
    repeated: int
    identifiers: tuple[Finding, ...] | None
    rare: tuple[tuple[tuple[str, ...], int], ...]
    least: int
    faces: tuple[str, ...] = ()
    suspicions: tuple[Leak, ...] = ()

    @property
    def passed(self) -> bool:
        """No leak and no identifier; suspicions, rare combinations and faces are for people to judge."""
        return not self.leaks and not self.identifiers


def audit(
    dataset: str | Path,
    communicator: Communicator,
    known: Sequence[str] | None = None,
    least: int = 5,
    progress: Progress | None = None,
) -> Report:
    """Look through a dataset; the ranks share the work.

    Args:
        known: identifiers to look for in all files.
        least: patients that must share a combination.
        progress: called with this rank's samples and a description; yields them.

    Raises:
        DatasetError: there is no readable manifest, or a sample cannot be read.
    """
    manifest = together(communicator, lambda: load(dataset))

    def describe_all() -> list[Described]:
        with ShardReader(dataset, manifest) as reader:
            mine = communicator.world.part(manifest.samples)
            return [describe(reader, sample) for sample in (mine if progress is None else progress(mine, "looking at images"))]

    described = [item for part in communicator.gather(together(communicator, describe_all)) for item in part]
    prints = {item.sample: item.print for item in described}
    found = leaks.same_patients(manifest.samples)
    exact, repeated = leaks.same_pixels(manifest.samples, {id: item.digest for id, item in prints.items()})

    def compare() -> tuple[list[Leak], leaks.Nearest]:
        near: leaks.Nearest = {}
        same = []
        for one, two, far in leaks.compared(manifest.samples, prints, (communicator.world.rank, communicator.world.size)):
            flat = prints[one.id].flat
            leak = leaks.same_image(one, two, far, flat, frames=manifest.preprocess.projection == "none")
            if leak is not None:
                same.append(leak)
            elif not flat and one.patient != two.patient:
                leaks.note_near(near, one.id, two.id, far)
        return same, near

    parts = communicator.gather(together(communicator, compare))
    like = sorted((leak for part, _ in parts for leak in part), key=lambda leak: (leak.kind != "same image", leak.samples))
    volumes = [sample for sample in manifest.samples if not prints[sample.id].flat and prints[sample.id].hash.size]
    suspicions = leaks.like_anatomy(volumes, leaks.merged(near for _, near in parts))

    def search() -> list[Finding] | None:
        if known is None or not communicator.world.is_root:
            return None
        return find_identifiers(dataset, known, content.texts, content.values)

    identifiers = communicator.broadcast(together(communicator, search))
    rare = rare_combinations(((sample.patient, properties(sample)) for sample in manifest.samples), least)
    return Report(
        manifest, (*found, *exact, *like), repeated, None if identifiers is None else tuple(identifiers), tuple(rare), least,
        tuple(sorted(item.sample for item in described if item.face)), tuple(suspicions),
    )  # fmt: skip


def describe(reader: ShardReader, sample: Sample) -> Described:
    """Read one image and keep what the audit needs of it."""
    image, _ = reader.read(sample, (0, 0, 0), sample.shape[:3])
    affine = np.array(sample.affine) if sample.geometry == "patient" else None
    face = affine is not None and face_risk(image[..., 0], affine).level == "face"
    return Described(sample.id, fingerprint(image, affine), face)


def properties(sample: Sample) -> tuple[str, ...]:
    """What somebody who knows a patient may know of an examination: modality, place, month."""
    return sample.modality, sample.site, sample.date[:7]


def read_known(path: str | Path) -> list[str]:
    """Identifiers of a file, one a line; empty lines do not count.

    Raises:
        ConfigError: it cannot be read as UTF-8 text.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"--known {path}: cannot be read ({reason})") from None
    return [line.strip() for line in lines if line.strip()]
