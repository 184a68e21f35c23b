"""One label a case, from a CSV."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ...errors import SourceError
from ...texts import TextError, read_csv
from ..nifti import plain_name

_CODES = {"patientid": "patient", "seriesinstanceuid": "series"}
MISSING = frozenset(("nan", "<na>", "na", "n/a", "null", "nat"))
"""What programs write for a value that they do not have."""
LONGEST = 64
"""Characters of a class name: as many as a DICOM label (LO) has."""
_NUMBER = re.compile(r"[+-]?\d+(?:[.,](\d*))?(e[+-]?\d+)?", re.IGNORECASE)


@dataclass(frozen=True)
class LabelTable:
    """A CSV of labels.

    Attributes:
        by: what the rows name: "patient" (PatientID or NIfTI case name) or "series" (SeriesInstanceUID).
        classes: sorted class names; a label is an index into them.
        labels: identifier -> class index.
        rows: identifier -> line number in the file, for messages.
        name: of the file.
    """

    by: Literal["patient", "series"]
    classes: tuple[str, ...]
    labels: dict[str, int] = field(repr=False)
    rows: dict[str, int] = field(repr=False)
    name: str = ""


def read_labels_csv(path: Path) -> LabelTable:
    """Read a table with the columns ``PatientID`` or ``SeriesInstanceUID``, and ``label`` (names or whole numbers).

    Raises:
        SourceError: missing file or column, an empty cell, two labels for one case, or labels of which it cannot be told whether
            they are one class (see `unify`). Rows are named by number, never by the identifier in them.
    """
    name = path.name
    try:
        table = read_csv(path)
    except OSError as error:
        raise SourceError(f"{name}: cannot be read ({type(error).__name__})") from error
    except TextError as error:
        raise SourceError(f"{name}: {f'row {error.line}: ' if error.line else ''}{error}") from None
    header = table.header
    columns = [column for column in ("seriesinstanceuid", "patientid") if column in header]
    if not columns or "label" not in header:
        raise SourceError(
            f"{name}: expected a header with PatientID or SeriesInstanceUID, and label; found {len(header)} columns without"
        )
    key, value = header.index(columns[0]), header.index("label")
    entries: list[tuple[int, str, str]] = []
    labels: dict[str, str] = {}
    rows: dict[str, int] = {}
    for number, cells in table.rows:
        if len(cells) <= max(key, value) or not cells[key] or not cells[value]:
            raise SourceError(f"{name}: row {number}: expected an identifier and a label, found an empty or missing cell")
        identifier, label = plain_name(cells[key]), " ".join(plain_name(cells[value]).split())
        if len(label) > LONGEST:
            raise SourceError(f"{name}: row {number}: a label of {len(label)} characters, expected at most {LONGEST}")
        if label.lower() in MISSING:
            raise SourceError(f"{name}: row {number}: the label is '{label}', which stands for no value; give a label or remove the row")
        entries.append((number, identifier, label))
    if not entries:
        raise SourceError(f"{name}: no rows under the header")
    try:
        classes = unify({label for _, _, label in entries})
    except SourceError as error:
        raise SourceError(f"{name}: {error}") from None
    for number, identifier, written in entries:
        label = classes[written]
        if labels.get(identifier, label) != label:
            raise SourceError(f"{name}: row {number}: another label than in row {rows[identifier]} for the same identifier")
        labels.setdefault(identifier, label)
        rows.setdefault(identifier, number)
    return _table(columns[0], labels, rows, name)


def _table(column: str, labels: dict[str, str], rows: dict[str, int], name: str) -> LabelTable:
    classes = sort_classes(set(labels.values()))
    index = {label: number for number, label in enumerate(classes)}
    by: Any = _CODES[column]
    return LabelTable(by, classes, {key: index[label] for key, label in labels.items()}, rows, name)


def unify(labels: Collection[str]) -> dict[str, str]:
    """The class of each label as it is written: numbers as whole ones ("1", "1.0", "01" are "1"), true and false in small letters. Pure.

    Raises:
        SourceError: numbers that are not whole; numbers or names of which it cannot be told whether they are one class.
    """
    numbers = {label: _NUMBER.fullmatch(label) for label in labels}
    if all(numbers.values()):
        odd = sorted(label for label, match in numbers.items() if match and (match[2] or (match[1] or "").strip("0")))
        if odd:
            raise SourceError(
                f"label '{odd[0]}': expected whole numbers or names of classes; a measurement is no class, write the class that it means"
            )
        return {label: str(int(re.split("[.,]", label)[0])) for label in labels}
    truth = {"true", "false"}
    if {label.lower() for label in labels} <= truth:
        return {label: label.lower() for label in labels}
    if all(numbers[label] or label.lower() in truth for label in labels):
        raise SourceError("labels are true or false in some rows and numbers in others; write them in one way")
    alike: dict[str, str] = {}
    for label in sorted(labels):
        match = numbers[label]
        same = f"{float(label.replace(',', '.')):g}" if match else label.casefold()
        if same in alike:
            raise SourceError(
                f"labels '{alike[same]}' and '{label}': it cannot be told whether they are one class; write one class in one way"
            )
        alike[same] = label
    return {label: label for label in labels}


def sort_classes(labels: set[str]) -> tuple[str, ...]:
    """Whole numbers by value, names by alphabet. Pure."""
    if all(re.fullmatch(r"-?\d+", label) for label in labels):
        return tuple(sorted(labels, key=lambda label: (int(label), label)))
    return tuple(sorted(labels))
