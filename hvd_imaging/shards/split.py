"""Who is for training, validation and test. Pure: a function of the patients and the settings, not of order or ranks.

A patient is never divided: all samples follow the patient, and where `by` is "site" all patients of a site go together.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config import SplitConfig
from ..errors import ConfigError
from .manifest import Manifest, Sample

Assignment = dict[str, str]


@dataclass(frozen=True)
class Patient:
    """What a split may look at.

    Attributes:
        id: pseudonym.
        classes: labels of the samples, or classes above 0 in their masks.
        sites: pseudonyms of the institutions.
        last: newest study, any text that sorts by time, "" if unknown. Never a dataset's own dates: they are shifted.
    """

    id: str
    classes: frozenset[int] = frozenset()
    sites: frozenset[str] = frozenset()
    last: str = ""


def patients_of(samples: Iterable[Sample], dates: Mapping[str, str] | None = None) -> list[Patient]:
    """The patients of a dataset in the order of their pseudonyms; ``dates`` gives the newest study of each."""
    classes: dict[str, set[int]] = {}
    sites: dict[str, set[str]] = {}
    for sample in samples:
        found = classes.setdefault(sample.patient, set())
        if sample.label is not None:
            found.add(sample.label)
        found.update(index for index, count in enumerate(sample.class_voxels or ()) if index and count)
        sites.setdefault(sample.patient, set()).update({sample.site} - {""})
    last = dates or {}
    return [Patient(id, frozenset(classes[id]), frozenset(sites[id]), last.get(id, "")) for id in sorted(classes)]


def assign(
    patients: Sequence[Patient],
    config: SplitConfig,
    frozen: Collection[str] = (),
    before: Mapping[str, str] | None = None,
) -> Assignment:
    """Split of each patient.

    val and test get ``round(share * patients)``, and at least one patient each where the share is not 0 and three patients
    exist; with `stratify` each stratum gives its part, rounded. By site, the shares are kept as well as whole sites allow.

    Args:
        frozen: pseudonyms that are test. If one of them is there, nobody else becomes test, but by site their whole sites.
        before: earlier splits, which stay: patients who are not in it share what is left of validation's part.

    Raises:
        ConfigError: dates are asked for and not known.
    """
    known = {patient.id: patient for patient in patients}
    if config.by == "date" and not any(patient.last for patient in known.values()):
        raise ConfigError(
            "split.by=date: no study dates are known here; a dataset holds dates that are shifted by patient, so their order "
            "means nothing: split by date at ingest, from images that carry StudyDate"
        )
    result = {id: "test" for id in known if id in frozen}
    has_frozen = bool(result)
    if before is not None:
        result |= {id: before[id] for id in known if id not in result and before.get(id) in ("train", "val")}
    units = _units([known[id] for id in sorted(known) if id not in result], config)
    if config.by == "site":
        units, tied = _follow(units, result, known)
        result |= tied
    test = 0 if has_frozen or before is not None else _wanted(config.test, len(known))
    chosen, units = _take(units, test, config)
    result |= dict.fromkeys(chosen, "test")
    if config.folds:
        for number, unit in _deal(units, config.folds, config):
            result |= dict.fromkeys((patient.id for patient in unit), "val" if number == config.fold else "train")
        return result
    room = sum(map(len, units))
    already = sum(split == "val" for split in result.values())
    val = min(max(_wanted(config.val, len(known)) - already, 0), room)
    chosen, units = _take(units, val, config)
    result |= dict.fromkeys(chosen, "val")
    result |= {patient.id: "train" for unit in units for patient in unit}
    return result


def known_among(frozen: Collection[str], samples: Iterable[Sample]) -> Collection[str]:
    """``frozen``, of which at least one is a patient here: pseudonyms of another key would leave the test split to chance.

    Raises:
        ConfigError: none is.
    """
    if frozen and not set(frozen) & {sample.patient for sample in samples}:
        raise ConfigError(
            f"split.frozen: none of its {len(frozen)} pseudonyms is a patient of this dataset: they belong to another key; take "
            "them from manifest.json of a version of this dataset"
        )
    return frozen


def refuse_mixed_rules(before: SplitConfig, now: SplitConfig) -> None:
    """Test patients who stay must have been chosen by site, if sites are to stay whole.

    Raises:
        ConfigError: they were not.
    """
    if now.by == "site" and before.by != "site":
        raise ConfigError(
            f"split.by=site: the test patients of this dataset were chosen by {before.by}, from all sites; "
            "`hvd-imaging dataset split --by site --test SHARE` chooses test sites anew"
        )


def resplit(manifest: Manifest, config: SplitConfig, frozen: Collection[str] = ()) -> Manifest:
    """The manifest with other splits. Pure.

    Raises:
        ConfigError: by date, which only ingest can do.
    """
    splits = assign(patients_of(manifest.samples), config, frozen)
    samples = tuple(sample.model_copy(update={"split": splits[sample.patient]}) for sample in manifest.samples)
    return manifest.model_copy(update={"split": config.model_copy(update={"frozen": None}), "samples": samples})


def read_frozen(path: str | Path) -> frozenset[str]:
    """Pseudonyms of a file, one a line; what follows a # is left out.

    Raises:
        ConfigError: it cannot be read, or a line is no pseudonym (the line's number is told, not the line).
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"split.frozen: {path}: cannot be read ({reason})") from None
    found = set()
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if text and (len(text) > 64 or not all(c in "0123456789abcdef" for c in text)):
            raise ConfigError(
                f"split.frozen: {path}, line {number}: expected a patient's pseudonym (hexadecimal, as in manifest.json), found "
                "something else, which is not shown"
            )
        if text:
            found.add(text)
    return frozenset(found)


Unit = tuple[Patient, ...]
"""Patients who cannot be parted."""


def _wanted(share: float, count: int) -> int:
    return max(round(share * count), 1 if share > 0 and count >= 3 else 0)


def _rank(config: SplitConfig, name: str) -> str:
    return hashlib.sha256(f"{config.seed}:{name}".encode()).hexdigest()


def _units(patients: Sequence[Patient], config: SplitConfig) -> list[Unit]:
    """In the order in which they are taken: test first, then validation."""
    if config.by == "date":
        # The newest are tested; who has no date is taken for old, and learned from.
        return [(p,) for p in sorted(patients, key=lambda p: (p.last, _rank(config, p.id)), reverse=True)]
    if config.by == "patient":
        return [(p,) for p in sorted(patients, key=lambda p: _rank(config, p.id))]
    # Patients with a site in common, also by way of others, are one unit. Who has none is a unit alone.
    root: dict[str, str] = {}

    def find(name: str) -> str:
        while root.setdefault(name, name) != name:
            root[name] = name = root[root[name]]
        return name

    for patient in patients:
        for site in sorted(patient.sites):
            root[find(f"site {site}")] = find(f"patient {patient.id}")
    members: dict[str, list[Patient]] = {}
    for patient in patients:
        members.setdefault(find(f"patient {patient.id}"), []).append(patient)
    units = [tuple(sorted(unit, key=lambda p: p.id)) for unit in members.values()]
    return sorted(units, key=lambda unit: _rank(config, min((s for p in unit for s in p.sites), default=unit[0].id)))


def _follow(units: list[Unit], result: Assignment, known: Mapping[str, Patient]) -> tuple[list[Unit], Assignment]:
    """By site: patients go where their site is already, first of all to test."""
    where: dict[str, str] = {}
    for id in sorted(result, key=lambda id: (result[id] != "test", id)):
        for site in known[id].sites:
            where.setdefault(site, result[id])
    tied: Assignment = {}
    free = []
    for unit in units:
        found = sorted({where[site] for patient in unit for site in patient.sites if site in where})
        if found:
            split = "test" if "test" in found else found[0]
            tied |= dict.fromkeys((patient.id for patient in unit), split)
        else:
            free.append(unit)
    return free, tied


def _strata(units: Sequence[Unit], config: SplitConfig) -> list[list[Unit]]:
    """The units by the rarest class that they have, the rarest first; one stratum without `stratify`."""
    if not config.stratify:
        return [list(units)]
    count = Counter(index for unit in units for patient in unit for index in patient.classes)
    strata: dict[int, list[Unit]] = {}
    for unit in units:
        classes = {index for patient in unit for index in patient.classes}
        strata.setdefault(min(classes, key=lambda index: (count[index], index), default=-1), []).append(unit)
    return [strata[index] for index in sorted(strata, key=lambda index: (len(strata[index]), index))]


def _take(units: list[Unit], patients: int, config: SplitConfig) -> tuple[list[str], list[Unit]]:
    """Pseudonyms of as many patients as wanted, and the units that are left, in their order."""
    if patients <= 0:
        return [], units
    chosen: set[Unit] = set()
    if config.by == "site":
        filled = 0
        for unit in units:
            # The last one left stays for training.
            if len(chosen) < len(units) - 1 and abs(filled + len(unit) - patients) < abs(filled - patients):
                chosen.add(unit)
                filled += len(unit)
    else:
        strata = _strata(units, config)
        total = sum(map(len, strata))
        exact = [patients * len(stratum) / total for stratum in strata]
        take = [int(part) for part in exact]
        # The largest remainders get what rounding left over; of equal ones the rarer class.
        for index in sorted(range(len(strata)), key=lambda i: (take[i] - exact[i], i))[: patients - sum(take)]:
            take[index] += 1
        for stratum, number in zip(strata, take, strict=True):
            chosen.update(stratum[:number])
    return [patient.id for unit in chosen for patient in unit], [unit for unit in units if unit not in chosen]


def _deal(units: list[Unit], folds: int, config: SplitConfig) -> list[tuple[int, Unit]]:
    """Fold of each unit: one after the other, stratum by stratum; sites, which differ in size, to the smallest fold."""
    if config.by == "site":
        size = [0] * folds
        dealt = []
        for unit in sorted(units, key=len, reverse=True):
            number = min(range(folds), key=lambda n: size[n])
            size[number] += len(unit)
            dealt.append((number, unit))
        return dealt
    line = [unit for stratum in _strata(units, config) for unit in stratum]
    return [(number % folds, unit) for number, unit in enumerate(line)]
