"""Which cases are of one patient, where their names alone do not say it: a table, a rule, and a proposal of a rule."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from ..errors import SourceError
from ..texts import LARGEST_CSV, TextError, parse_csv, read, read_json
from .catalog import Case, Catalog
from .dicom import SeriesFiles
from .nifti import DESCRIPTION, stem

TABLE = "cases.csv"
_LAYOUT = ("imagesTr", "imagesTs")

_MOST_VISITS = 10
"""Names that share a stem are visits of a patient if half of the stems have so many names at most."""
_LEAST_STEMS = 3
_SEPARATORS = "-_./ "


def assign(catalog: Catalog, rule: str | None, root: Path) -> Catalog:
    """The catalog with its cases' patients.

    Of a case its name counts: of NIfTI and NRRD that of its file (with the folders around it, where there is no imagesTr), of DICOM
    its PatientID. A table (``cases.csv``, or ``patients`` in dataset.json) goes before the rule; who is in neither stays as he is.

    Args:
        rule: regular expression, searched for in the name; its first group, or all that it matches, is the patient.
        root: the archive.

    Raises:
        SourceError: a damaged table, one that names no case, or a rule that fits none.
    """
    names = [case.name for case in catalog.cases]
    table, notes = read_table(root, catalog.cases)
    table = {name: table[key] for name in names for key in (name, name.rpartition("/")[2]) if key in table} if table else {}
    fits = None if rule is None else re.compile(rule)
    told: dict[str, str] = {}
    for name in names:
        match = fits.search(name) if fits is not None and name else None
        found = table.get(name) or (next(filter(None, match.groups()), "") if match and match.re.groups else match[0] if match else "")
        if found:
            told[name] = found
    if rule is not None and names and not told:
        raise SourceError(
            f"split.patient: '{rule}' fits none of {len(names)} {_what(catalog.cases)}, which look like '{shape(names[0])}'; expected a regular "
            r"expression whose first group is the patient, such as '(sub-\d+)'"
        )
    cases = tuple(_of(case, told.get(case.name)) for case in catalog.cases)
    if told and (left := sum(name not in told for name in names)):
        notes.append(f"{left} of {len(names)} cases fit neither {TABLE} nor split.patient: they stay patients of their own")
    if not told and any(case.kind == "nifti" for case in cases):
        notes += [found.text() for found in [propose(names)] if found is not None]
    return replace(catalog, cases=cases, notes=(*catalog.notes, *notes))


def _of(case: Case, patient: str | None) -> Case:
    if patient is None:
        return case
    issuer = case.image.issuer if isinstance(case.image, SeriesFiles) else ""
    return replace(case, patient_id=f"{patient} of issuer {issuer}" if issuer else patient)


def _what(cases: Sequence[Case]) -> str:
    return "PatientIDs" if any(case.kind == "dicom" for case in cases) else "case names"


def shape(name: str) -> str:
    """A name without what it says: a for letters, 9 for digits. Pure."""
    return re.sub(r"[^\W\d_]", "a", re.sub(r"\d", "9", name))


def read_table(root: Path, cases: Sequence[Case]) -> tuple[dict[str, str], list[str]]:
    """Case name -> patient of ``cases.csv`` and dataset.json, in the archive or beside ``imagesTr``; and notes.

    Raises:
        SourceError: it is damaged, contradicts itself, or names no case. Rows are told by number.
    """
    layouts = {path.parent.parent for case in cases for path in case.image.files[:1] if path.parent.name in _LAYOUT}
    table: dict[str, str] = {}
    notes: list[str] = []
    for folder in sorted({root, *layouts}):
        if (folder / DESCRIPTION).is_file() and folder in layouts:
            table |= of_description(_json(folder / DESCRIPTION))
        if (folder / TABLE).is_file():
            try:
                text = read(folder / TABLE, LARGEST_CSV)
            except (OSError, TextError) as error:
                raise SourceError(f"{TABLE}: cannot be read ({error if isinstance(error, TextError) else type(error).__name__})") from None
            found = of_csv(text)
            if found is None:
                notes.append(f"{TABLE} has no columns case and patient: it is not used")
            table |= found or {}
    if table:
        known = {key for case in cases for key in (case.name, case.name.rpartition("/")[2])}
        unknown = len(table.keys() - known)
        if cases and unknown == len(table):
            raise SourceError(
                f"{TABLE} or {DESCRIPTION}: none of {len(table)} patients is of a case of this archive; expected {_what(cases)} such as "
                f"'{shape(cases[0].name)}' (files without suffix and channel)"
            )
        if unknown:
            notes.append(f"{unknown} rows of {TABLE} or {DESCRIPTION} are of no case of this dataset")
    return table, notes


def _json(path: Path) -> Any:
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise SourceError(f"{DESCRIPTION}: cannot be read as JSON ({error if isinstance(error, TextError) else type(error).__name__})") from None


def of_csv(text: str) -> dict[str, str] | None:
    """Case -> patient of a table with these two columns; None if it has others. Pure.

    Raises:
        SourceError: an empty cell, or two patients for one case.
    """
    try:
        found = parse_csv(text)
    except TextError as error:
        raise SourceError(f"{TABLE}: row {error.line}: {error}") from None
    if "case" not in found.header or "patient" not in found.header:
        return None
    key, value = found.header.index("case"), found.header.index("patient")
    table: dict[str, str] = {}
    for row, cells in found.rows:
        if len(cells) <= max(key, value) or not cells[key] or not cells[value]:
            raise SourceError(f"{TABLE}: row {row}: expected a case and a patient, found an empty or missing cell")
        name, patient = cells[key], cells[value]
        if table.setdefault(name, patient) != patient:
            raise SourceError(f"{TABLE}: row {row}: another patient than before for the same case")
    return table


def of_description(description: Any) -> dict[str, str]:
    """Case -> patient of dataset.json: ``"patients": {case: patient}``, or ``patient`` in the entries of ``training``. Pure.

    Raises:
        SourceError: patients that are no words or numbers.
    """
    if not isinstance(description, dict):
        return {}
    found: dict[str, Any] = {}
    training = description.get("training")
    for entry in training if isinstance(training, list) else ():
        if isinstance(entry, dict) and "patient" in entry and isinstance(entry.get("image"), str):
            found[stem(Path(entry["image"]))] = entry["patient"]
    patients = description.get("patients")
    if isinstance(patients, dict):
        found |= patients
    if any(isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip() for value in found.values()):
        raise SourceError(f'{DESCRIPTION}: patients: expected {{"CASE": "PATIENT"}} with a name or number for each case')
    return {str(case): str(value).strip() for case, value in found.items()}


@dataclass(frozen=True)
class Proposal:
    """A rule that may tell which names are of one patient.

    Attributes:
        rule: for ``--patient``.
        sizes: number of names of each stem.
    """

    rule: str
    sizes: tuple[int, ...]

    def text(self) -> str:
        """As a note says it."""
        low, high = min(self.sizes), max(self.sizes)
        each = f"{low}" if low == high else f"{low} to {high}"
        return (
            f"{sum(self.sizes)} cases, but their names group into {len(self.sizes)} stems of {each}: if these are visits of one patient, say "
            f"--patient '{self.rule}'; else patients may stand in several splits"
        )


def propose(names: Iterable[str]) -> Proposal | None:
    """A rule by which names share stems as visits of one patient do; None if nothing speaks for it. Pure.

    Consecutive numbers (``case_001``, ``case_002``) are no visits; numbers that begin anew with each stem are.
    """
    ordered = sorted(set(names))
    if not ordered:
        return None
    for find in (_by_words, _by_last_words, _by_numbers):
        found = find(ordered)
        if found is not None:
            stems, general = found
            sizes = Counter(stems.values())
            if len(sizes) < len(ordered):
                rule = _pattern(stems) or general
                if rule and _groups(rule, ordered) == _members(stems):
                    return Proposal(rule, tuple(sizes[each] for each in sorted(sizes)))
    return None


Found = tuple[dict[str, str], str]
"""Name -> stem, and a rule that gives it."""

_SUBJECT = rf"(?:^|[{_SEPARATORS}])(sub-[A-Za-z0-9]+)(?=[{_SEPARATORS}]|$)"
_VISIT = (
    rf"(?i)^(.*?[^{_SEPARATORS}])[{_SEPARATORS}]+(?:(?:ses|session|visit|tp|timepoint|followup|fu|baseline|bl|month|week|day|year|pre|post|left|right)"
    rf"[-_]?\d*|[vtmwdy]\d+|(?:19|20)\d\d[-_.]?(?:0[1-9]|1[0-2])[-_.]?(?:0[1-9]|[12]\d|3[01]))(?:[{_SEPARATORS}].*)?$"
)


def _by_words(names: Sequence[str]) -> Found | None:
    """Names that say subject, visit or date."""
    for rule in (_SUBJECT, _VISIT):
        matches = {name: match for name in names if (match := re.search(rule, name))}
        # Who has one examination may be called by the stem alone.
        stems = {name: matches[name][1] if name in matches else name for name in names}
        if 2 * len(matches) >= len(names) and _plausible(stems):
            return stems, rule if len(matches) == len(names) else ""
    return None


def _by_last_words(names: Sequence[str]) -> Found | None:
    """``P001_1, P001_2``: a last word, or two, that repeat from stem to stem."""
    words = {name: re.findall(rf"[{_SEPARATORS}]*[^{_SEPARATORS}]+", name) for name in names}
    same = 0
    while len({tuple(parts[len(parts) - same - 1 :]) for parts in words.values() if len(parts) > same + 1}) == 1 and all(
        len(parts) > same + 1 for parts in words.values()
    ):
        same += 1  # a last word that all have says nothing
    for count in (same + 1, same + 2):
        if any(len(parts) <= count for parts in words.values()):
            return None
        stems = {name: "".join(parts[:-count]) for name, parts in words.items()}
        rest = {tuple(parts[-count:]) for parts in words.values()}
        if 2 * len(rest) <= len(names) and _plausible(stems):
            return stems, rf"^(.+?)(?:[{_SEPARATORS}]+[^{_SEPARATORS}]+){{{count}}}$"
    return None


def _by_numbers(names: Sequence[str]) -> Found | None:
    """``0800, 0801, 0802, 0900``: last digits that begin anew with 0 or 1, without gaps, and never come near the next stem."""
    for count in (3, 2, 1):
        matches = {name: re.fullmatch(rf"(.*\d)(\d{{{count}}})", name) for name in names}
        if not all(matches.values()):
            continue
        stems = {name: match[1] for name, match in matches.items() if match}
        numbers: dict[str, set[int]] = {}
        for match in filter(None, matches.values()):
            numbers.setdefault(match[1], set()).add(int(match[2]))
        first = min(map(min, numbers.values()))
        runs = all(found == set(range(first, first + len(found))) for found in numbers.values())
        largest = max(map(len, numbers.values()))
        several = sum(len(found) > 1 for found in numbers.values())
        if first <= 1 and runs and largest <= 6 and 2 * several >= len(numbers) >= _LEAST_STEMS and _plausible(stems):
            return stems, rf"^(.+)\d{{{count}}}$"
    return None


def _plausible(stems: Mapping[str, str]) -> bool:
    """Some stems have several names, none is a whole collection, and they are numbered or many."""
    sizes = Counter(stems.values())
    several = sum(size > 1 for size in sizes.values())
    numbered = all(re.search(r"\d", each) for each in sizes)
    return (
        len(sizes) >= (2 if numbered else _LEAST_STEMS)
        and several > 0
        and median(sizes.values()) <= _MOST_VISITS
        and (numbered or 10 * several >= len(sizes))
    )


def _pattern(stems: Mapping[str, str]) -> str:
    """A short rule by the look of the stems; "" if they look different, or only one kind of rule would tell letters of them."""
    found = sorted(set(stems.values()))
    for write in (_each_digit, _any_digits):
        looks = {write(each) for each in found}
        if len(looks) == 1:
            rule = f"({looks.pop()})"
            if _groups(rule, stems) == _members(stems):
                return rule
    return ""


def _each_digit(text: str) -> str:
    return _digits(text, lambda run: r"\d" * len(run) if len(run) < 4 else rf"\d{{{len(run)}}}")


def _any_digits(text: str) -> str:
    return _digits(text, lambda run: r"\d+")


def _digits(text: str, write: Callable[[str], str]) -> str:
    return "".join(write(part) if part.isdigit() else re.escape(part).replace(r"\-", "-").replace(r"\ ", " ") for part in re.findall(r"[0-9]+|[^0-9]+", text))


def _groups(rule: str, names: Iterable[str]) -> set[frozenset[str]]:
    found: dict[str, set[str]] = {}
    for name in names:
        match = re.search(rule, name)
        found.setdefault(match[1] if match else name, set()).add(name)
    return set(map(frozenset, found.values()))


def _members(stems: Mapping[str, str]) -> set[frozenset[str]]:
    found: dict[str, set[str]] = {}
    for name, each in stems.items():
        found.setdefault(each, set()).add(name)
    return set(map(frozenset, found.values()))
