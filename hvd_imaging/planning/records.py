"""The volume of images by month: from a table, or from the dates and sizes of an archive's files."""

from __future__ import annotations

import datetime
import itertools
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import texts
from ..errors import ConfigError, SourceError

LEAST = 6
"""Months that a forecast wants; a gap of more than MOST_GAP of them is not filled."""
MOST_GAP = 2
_MONTH = re.compile(r"(\d{4})-(\d{1,2})(?:-(\d{1,2}))?")
_UNITS = {"bytes": 1.0, "kilobytes": 1e3, "megabytes": 1e6, "gigabytes": 1e9, "terabytes": 1e12, "mb": 1e6, "gb": 1e9, "tb": 1e12}


@dataclass(frozen=True)
class Month:
    """What came in a month.

    Attributes:
        index: year * 12 + month - 1.
        bytes: of new images.
        studies: examinations, 0 if unknown.
        filled: nothing was recorded; from the neighbours.
    """

    index: int
    bytes: float
    studies: float = 0.0
    filled: bool = False

    @property
    def name(self) -> str:
        """As 2026-03."""
        return f"{self.index // 12}-{self.index % 12 + 1:02d}"


def read_csv(path: Path) -> list[Month]:
    """A table with a head: ``month`` (2026-03) or ``date`` (2026-03-17), ``gigabytes`` (or bytes, megabytes, terabytes), and ``studies``
    if known. Several rows of a month are added up.

    Raises:
        SourceError: no such columns; a row that cannot be read, with its line.
    """
    try:
        table = texts.read_csv(path)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror})") from error
    except texts.TextError as error:
        where = f", line {error.line}" if error.line else ""
        raise SourceError(f"{path}{where}: cannot be read as a table: {error}") from error
    head = table.header
    when = next((head.index(name) for name in ("month", "date") if name in head), None)
    size = next(((head.index(name), scale) for name, scale in _UNITS.items() if name in head), None)
    if when is None or size is None:
        raise SourceError(
            f"{path}: expected columns month (2026-03) or date, and gigabytes (or bytes, megabytes, terabytes), found {', '.join(head) or 'nothing'}"
        )
    count = head.index("studies") if "studies" in head else None
    found: dict[int, list[float]] = {}
    for number, row in table.rows:
        try:
            index = month_index(row[when])
            volume = float(row[size[0]]) * size[1]
            studies = float(row[count]) if count is not None and row[count] else 0.0
            if not (0 <= volume < 1e18 and 0 <= studies < 1e12):
                raise ValueError
        except (ValueError, IndexError):
            raise SourceError(
                f"{path}, line {number}: expected a month such as 2026-03, and numbers from 0 on; found {', '.join(row)[:80]!r}"
            ) from None
        entry = found.setdefault(index, [0.0, 0.0])
        entry[0], entry[1] = entry[0] + volume, entry[1] + studies
    return [Month(index, found[index][0], found[index][1]) for index in sorted(found)]


def month_index(text: str) -> int:
    """Year * 12 + month - 1 of ``2026-03`` or ``2026-03-17``.

    Raises:
        ValueError: not a month.
    """
    match = _MONTH.fullmatch(text)
    if match is None or not 1 <= int(match[2]) <= 12 or not 1900 <= int(match[1]) <= 2200:
        raise ValueError(text)
    return int(match[1]) * 12 + int(match[2]) - 1


def scan_archive(folder: Path) -> list[Month]:
    """Bytes by month of the files' dates. No file is opened: what a file is, is not asked; examinations are not counted.

    Raises:
        SourceError: no such folder, or nothing in it.
    """
    if not folder.is_dir():
        raise SourceError(f"{folder}: no such folder")
    found: dict[int, float] = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                status = os.stat(os.path.join(parent, name))
            except OSError:
                continue
            when = datetime.datetime.fromtimestamp(status.st_mtime, datetime.timezone.utc)
            index = when.year * 12 + when.month - 1
            found[index] = found.get(index, 0.0) + status.st_size
    if not found:
        raise SourceError(f"{folder}: no files")
    return [Month(index, found[index]) for index in sorted(found)]


def complete(months: Sequence[Month], where: str) -> tuple[list[Month], list[str]]:
    """Months without gaps, and what was done about gaps, in sentences. Short gaps take the line between their neighbours. Pure.

    Raises:
        ConfigError: too few months; a gap too long to be filled.
    """
    if len(months) < LEAST:
        names = ", ".join(month.name for month in months) or "none"
        raise ConfigError(f"{where}: a forecast wants {LEAST} months at least (a year is better), found {len(months)} ({names})")
    found: list[Month] = [months[0]]
    notes = []
    for before, after in itertools.pairwise(months):
        gap = after.index - before.index - 1
        if gap > MOST_GAP:
            raise ConfigError(
                f"{where}: nothing between {before.name} and {after.name} ({gap} months); expected gaps of {MOST_GAP} at most. Add the months, "
                "with 0 if nothing came, or leave out what was before"
            )
        if gap:
            notes.append(f"{_names(before, gap)} missing: taken from the line between {before.name} and {after.name}")
        for step in range(1, gap + 1):
            share = step / (gap + 1)
            found.append(Month(
                before.index + step, before.bytes + share * (after.bytes - before.bytes),
                before.studies + share * (after.studies - before.studies), True,
            ))  # fmt: skip
        found.append(after)
    return found, notes


def without_the_running_month(months: Sequence[Month], today: datetime.date) -> list[Month]:
    """A month that has not ended is no month; pure."""
    return [month for month in months if month.index < today.year * 12 + today.month - 1]


def _names(before: Month, gap: int) -> str:
    return ", ".join(Month(before.index + step, 0).name for step in range(1, gap + 1))


def total(months: Iterable[Month]) -> float:
    """Bytes of all."""
    return sum(month.bytes for month in months)
