"""Looking for identifiers in what is about to be given away: every file, by bytes, in the ways they may be written.

A finding says which identifier by its number in the given list, never the identifier itself.
"""

from __future__ import annotations

import datetime
import gzip
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

LEAST = 4
"""Shorter identifiers stand in any file by chance: they are not looked for."""
_ENCODINGS = ("utf-8", "latin-1", "utf-16-le", "utf-16-be", "shift_jis", "iso2022_jp", "gb18030", "euc_kr")
_PIECE = 1 << 24


@dataclass(frozen=True)
class Finding:
    """One place where an identifier stands.

    Attributes:
        identifier: its number in the list that was given.
        kind: "content", "compressed content" or "name" (of the file or a folder).
        file: the file's number in the sorted list of all files: names may be what was found.
        offset: of the first byte in the file (or in what was decompressed); -1 in names.
    """

    identifier: int
    kind: str
    file: int
    offset: int


def spellings(identifier: str) -> list[str]:
    """The ways in which an identifier may be written: a name in other orders, a date in other formats. Pure."""
    value = identifier.strip()
    found = [value]
    parts = [part for part in re.split(r"[\^,= ]+", value) if part]
    if 2 <= len(parts) <= 5 and not value.isdigit():
        for joint in ("^", " ", "_", ", ", ",", "-"):
            found += [joint.join(parts), joint.join(reversed(parts)), joint.join([*parts[1:], parts[0]])]
    if re.fullmatch(r"(19|20)\d{6}", value):
        try:
            day = datetime.date(int(value[:4]), int(value[4:6]), int(value[6:]))
        except ValueError:
            pass
        else:
            found += [day.strftime(form) for form in ("%Y-%m-%d", "%Y.%m.%d", "%Y/%m/%d", "%d.%m.%Y", "%d/%m/%Y", "%m/%d/%Y", "%d-%m-%Y")]
    return list(dict.fromkeys(found))


def find_identifiers(folder: str | Path, known: Iterable[str]) -> list[Finding]:
    """Search all files below ``folder`` and their names, without regard to case; gzip files also unpacked.

    An identifier inside a longer one that is found is reported as the longer one. What is compressed inside other formats (chunks of HDF5, JPEG) is pixels and is not unpacked.

    Args:
        known: raw identifiers; those shorter than `LEAST` characters are passed over.

    Raises:
        OSError: a file can not be read. Nothing is skipped in silence.
    """
    forms: dict[bytes, int] = {}
    names: dict[str, int] = {}
    for number, identifier in enumerate(known):
        if len(identifier.strip()) < LEAST:
            continue
        for text in spellings(identifier):
            names.setdefault(text.casefold(), number)
            for encoding in _ENCODINGS:
                data = text.encode(encoding, errors="ignore").lower()
                # What an encoding can not write it leaves out: the rest is not the identifier.
                if len(data) >= len(text):
                    forms.setdefault(data, number)
    if not forms:
        return []
    longest = max(map(len, forms))
    pattern = re.compile(b"|".join(re.escape(form) for form in sorted(forms, key=len, reverse=True)))
    findings: list[Finding] = []
    root = Path(folder)
    paths = sorted(path for path in root.rglob("*"))
    for index, path in enumerate(paths):
        own = path.name.casefold()
        findings += [Finding(number, "name", index, -1) for text, number in names.items() if text in own]
        if not path.is_file():
            continue
        for kind, pieces in (("content", _pieces(path)), ("compressed content", _unpacked(path))):
            tail, start = b"", 0
            for piece in pieces:
                data = tail + piece.lower()
                findings += [
                    Finding(forms[match[0]], kind, index, start + match.start())
                    for match in pattern.finditer(data)
                    if match.end() > len(tail)
                ]
                tail = data[-(longest - 1) :] if longest > 1 else b""
                start += len(data) - len(tail)
    return findings


def _pieces(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            yield piece


def _unpacked(path: Path) -> Iterator[bytes]:
    """The content of a gzip file, in pieces."""
    with open(path, "rb") as file:
        if file.read(2) != b"\x1f\x8b":
            return
    try:
        with gzip.open(os.fspath(path), "rb") as file:
            while piece := file.read(_PIECE):
                yield piece
    except (gzip.BadGzipFile, zlib.error, EOFError):
        return


def rare_combinations(rows: Iterable[tuple[str, tuple[str, ...]]], least: int = 5) -> list[tuple[tuple[str, ...], int]]:
    """Combinations of properties that fewer than ``least`` patients share: with them somebody who knows a patient finds him.

    Args:
        rows: of each sample its patient's pseudonym and what may be known from elsewhere (modality, site, month, age, sex).

    Returns:
        The combination and its number of patients, the rarest first. Pure.
    """
    patients: dict[tuple[str, ...], set[str]] = {}
    for patient, combination in rows:
        patients.setdefault(combination, set()).add(patient)
    rare = [(combination, len(found)) for combination, found in patients.items() if len(found) < least]
    return sorted(rare, key=lambda item: (item[1], item[0]))
