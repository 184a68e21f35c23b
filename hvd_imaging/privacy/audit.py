"""Looking for identifiers in what is about to be given away: every file, by bytes, in the ways they may be written.

A finding says which identifier by its number in the given list, never the identifier itself.
"""

from __future__ import annotations

import datetime
import html
import itertools
import json
import re
import unicodedata
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .unpack import PIECE, unpacked

Unpack = Callable[[Path], Iterable[bytes]]

LEAST = 4
"""Shorter identifiers stand in any file by chance: they are not looked for."""
_ENCODINGS = ("utf-8", "latin-1", "utf-16-le", "utf-16-be", "shift_jis", "iso2022_jp", "gb18030", "euc_kr")
LEAST_IN_NUMBERS = 8
"""Bytes of an identifier that is looked for in unpacked numbers: 1 GB of voxels holds some shorter ones by chance."""
_START = 3


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


def find_identifiers(
    folder: str | Path,
    known: Iterable[str],
    texts: Unpack = lambda path: (),
    values: Unpack = lambda path: (),
) -> list[Finding]:
    """Search all files below ``folder`` and their names, without regard to case; what gzip, ZIP, PNG and DICOM pack, unpacked too.

    An identifier inside a longer one that is found is reported as the longer one. Compressed images (JPEG) are pixels and are
    not unpacked.

    Args:
        known: raw identifiers; those shorter than `LEAST` characters are passed over.
        texts, values: what other kinds of files pack as text and as numbers: a path to pieces. In numbers only identifiers
            of `LEAST_IN_NUMBERS` bytes are looked for: shorter ones stand there by chance.

    Raises:
        OSError: a file cannot be read. Nothing is skipped in silence.
    """
    forms: dict[bytes, int] = {}
    names: dict[str, int] = {}
    for number, identifier in enumerate(known):
        if len(identifier.strip()) < LEAST:
            continue
        for text in spellings(identifier):
            names.setdefault(unicodedata.normalize("NFC", text).casefold(), number)
            for data in _encoded(text):
                forms.setdefault(data, number)
    if not forms:
        return []
    search, search_numbers = _Search(forms), _Search({form: n for form, n in forms.items() if len(form) >= LEAST_IN_NUMBERS})
    findings: list[Finding] = []
    for index, path in enumerate(sorted(Path(folder).rglob("*"))):
        own = unicodedata.normalize("NFC", path.name).casefold()
        findings += [Finding(number, "name", index, -1) for text, number in names.items() if text in own]
        if path.is_file():
            findings += [Finding(number, "content", index, place) for place, number in search.stream(_pieces(path))]
            for how, pieces in ((search, unpacked(path)), (search, texts(path)), (search_numbers, values(path))):
                findings += [Finding(number, "compressed content", index, place) for place, number in how.stream(pieces)]
    return findings


def _encoded(text: str) -> Iterator[bytes]:
    """The bytes of a text as files may hold them, ASCII letters in lower case."""
    cases = (text, text.lower(), text.upper())
    for form in {way for one in cases for way in (unicodedata.normalize("NFC", one), unicodedata.normalize("NFD", one))}:
        for encoding in _ENCODINGS:
            data = form.encode(encoding, errors="ignore").lower()
            # What an encoding cannot write it leaves out: the rest is not the identifier.
            if len(data) >= len(form):
                yield data
        yield json.dumps(form)[1:-1].lower().encode()
        yield html.escape(form).lower().encode("ascii", "xmlcharrefreplace")
        yield urllib.parse.quote(form, errors="replace").lower().encode()


class _Search:
    """Finds many words in bytes: a table of all beginnings of three bytes says where to look closely."""

    def __init__(self, forms: Mapping[bytes, int]) -> None:
        self._forms = forms
        self._lengths: dict[bytes, list[int]] = {}
        for form in sorted(forms, key=len, reverse=True):
            self._lengths.setdefault(form[:_START], []).append(len(form))
        self._begins = np.zeros(1 << (8 * _START), bool)
        for start in self._lengths:
            self._begins[int.from_bytes(start, "big")] = True
        self._longest = max(map(len, forms), default=0)

    def stream(self, pieces: Iterable[bytes]) -> Iterator[tuple[int, int]]:
        """(offset, number) of each word in pieces that follow on each other; the longest one at a place."""
        if not self._forms:
            return
        tail, start, free = b"", 0, 0
        for piece in itertools.chain(pieces, (None,)):
            data = tail if piece is None else tail + piece.lower()
            # What begins behind this may go on in the next piece.
            decided = len(data) if piece is None else max(len(data) - self._longest + 1, 0)
            for place in self._places(data, decided):
                if start + place < free:
                    continue
                for length in self._lengths[data[place : place + _START]]:
                    number = self._forms.get(data[place : place + length])
                    if number is not None:
                        yield start + place, number
                        free = start + place + length
                        break
            tail, start = data[decided:], start + decided

    def _places(self, data: bytes, end: int) -> list[int]:
        if len(data) < _START:
            return []
        values = np.frombuffer(data, np.uint8)[: end + _START - 1]
        key = np.zeros(max(len(values) - _START + 1, 0), np.uint32)
        for place in range(_START):
            key = (key << np.uint32(8)) | values[place : place + len(key)].astype(np.uint32)
        found: list[int] = np.flatnonzero(self._begins[key]).tolist()
        return found


def _pieces(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            yield piece


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
