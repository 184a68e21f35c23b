"""File names of an archive as references: names of files and folders are often names of patients.

A report says `file-3f9a...`; what it stands for is in a private list beside the key, which only its owner can read.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from . import vocabulary

LEAST = 2
"""Folder names shorter than this stay in messages: a single letter names nobody, and replacing it garbles every word."""


class Redactor:
    """References for paths below one folder.

    Args:
        key: the pseudonym key; without it nobody can test whether a reference stands for a path.
        root: the archive's folder. A path's reference depends on its place below ``root`` only.
        shown: what the user calls the archive, where that is not its folder.
    """

    def __init__(self, key: bytes, root: str | os.PathLike[str], shown: str = "") -> None:
        self._key = key
        self._root = Path(root)
        self.shown = shown or str(root)
        self.known: dict[str, str] = {}
        """Every reference given so far -> path relative to the root; what `save` writes."""

    def relative(self, path: str | os.PathLike[str]) -> str:
        """The path relative to the root, with slashes; relative paths are taken as they are."""
        path = Path(path)
        if path.is_absolute() or path.is_relative_to(self._root):
            path = Path(os.path.relpath(path, self._root))
        return path.as_posix()

    def reference(self, path: str | os.PathLike[str]) -> str:
        """``file-<10 hex>`` for a file of the archive, equal for equal paths below the root."""
        return self._refer("file", self.relative(path))

    def folder(self, path: str | os.PathLike[str]) -> str:
        """``folder-<10 hex>``; the root itself is ``.``."""
        relative = self.relative(path)
        return "." if relative == "." else self._refer("folder", relative)

    def label(self, name: str) -> str:
        """The name of a structure as `vocabulary.label` shows it; what it stands for is known like that of a file."""
        shown = vocabulary.label(self._key, name)
        if shown != name:
            self.known[shown] = name
        return shown

    def text(self, message: str, paths: Iterable[str | os.PathLike[str]]) -> str:
        """The message with every mention of these files replaced by their references.

        Replaced are the whole path, the path below the root, the name, the name without its endings, each folder
        above the file up to the root, and the root's own place.
        """
        found: dict[str, str] = {}
        for path in paths:
            relative = self.relative(path)
            reference = self.reference(relative)
            whole = [str(self._root / relative), os.path.abspath(self._root / relative), relative, os.fspath(path)]
            name = relative.rpartition("/")[2]
            for mention in (*whole, name, name.partition(".")[0]):
                found.setdefault(mention, reference)
            parts = relative.split("/")[:-1]
            for depth in range(len(parts), 0, -1):
                folder = "/".join(parts[:depth])
                for mention in (str(self._root / folder), os.path.abspath(self._root / folder), folder, parts[depth - 1]):
                    found.setdefault(mention, self._refer("folder", folder))
        for place in (os.path.abspath(self._root), str(self._root)):
            found.setdefault(place, "SRC")
        # Messages may carry a name as repr() writes it.
        found.update({repr(mention)[1:-1]: reference for mention, reference in list(found.items())})
        mentions = [m for m in found if len(m) >= LEAST and m not in ("..", "/") and not _is_small_number(m)]
        if not mentions:
            return message
        # The longest first, in one pass: a reference is never searched again.
        pattern = "|".join(re.escape(m) for m in sorted(mentions, key=len, reverse=True))
        return re.sub(rf"(?<![A-Za-z0-9])(?:{pattern})(?![A-Za-z0-9])", lambda match: found[match[0]], message)

    def add(self, known: Mapping[str, str]) -> None:
        """Take over the ``known`` of another rank's redactor."""
        self.known.update(known)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``known`` as JSON, atomically and readable by its owner only. Keep it beside the key, never in a dataset."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)  # mode 600
        try:
            # Names of files are bytes; those that are no UTF-8 are written with escapes.
            with os.fdopen(handle, "w", encoding="ascii") as file:
                json.dump(dict(sorted(self.known.items())), file, indent=1)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    def _refer(self, kind: str, relative: str) -> str:
        code = hmac.new(self._key, b"path\0" + os.fsencode(relative), hashlib.sha256).hexdigest()[:10]
        self.known[f"{kind}-{code}"] = relative
        return f"{kind}-{code}"


def _is_small_number(text: str) -> bool:
    """Counts and sizes in messages look like the folders 1, 2, 30 that many archives have."""
    return text.isdigit() and len(text) < 4
