"""One label a case, from a CSV."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ...errors import SourceError

_CODES = {"patientid": "patient", "seriesinstanceuid": "series"}


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
        SourceError: missing file or column, an empty cell, or two labels for one case. Rows are named by number, never by
            the identifier in them.
    """
    name = path.name
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{name}: can not be read as UTF-8 text ({type(error).__name__})") from error
    lines = text.splitlines()
    first = lines[0] if lines else ""
    delimiter = max(",;\t", key=first.count)
    header = [cell.strip().strip('"').lower() for cell in first.split(delimiter)]
    columns = [column for column in ("seriesinstanceuid", "patientid") if column in header]
    if not columns or "label" not in header:
        raise SourceError(
            f"{name}: expected a header with PatientID or SeriesInstanceUID, and label; found {len(header)} columns without"
        )
    key, value = header.index(columns[0]), header.index("label")
    labels: dict[str, str] = {}
    rows: dict[str, int] = {}
    reader = csv.reader(io.StringIO(text), delimiter=delimiter)
    next(reader)
    for cells in reader:
        number = reader.line_num
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) <= max(key, value) or not cells[key].strip() or not cells[value].strip():
            raise SourceError(f"{name}: row {number}: expected an identifier and a label, found an empty or missing cell")
        identifier, label = cells[key].strip(), cells[value].strip()
        if labels.get(identifier, label) != label:
            raise SourceError(f"{name}: row {number}: another label than in row {rows[identifier]} for the same identifier")
        labels.setdefault(identifier, label)
        rows.setdefault(identifier, number)
    if not labels:
        raise SourceError(f"{name}: no rows under the header")
    classes = sort_classes(set(labels.values()))
    index = {label: number for number, label in enumerate(classes)}
    by: Any = _CODES[columns[0]]
    return LabelTable(by, classes, {key: index[label] for key, label in labels.items()}, rows, name)


def sort_classes(labels: set[str]) -> tuple[str, ...]:
    """Whole numbers by value, names by alphabet. Pure."""
    if all(label.isdecimal() for label in labels):
        return tuple(sorted(labels, key=lambda label: (int(label), label)))
    return tuple(sorted(labels))
