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
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path, PurePosixPath

from . import vocabulary

LEAST = 2
"""Names shorter than this stay in messages: a single letter names nobody, and replacing it garbles every word."""


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
        self.words: Collection[str] = ()
        """Names that the dataset shows anyway, as those of its classes."""

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

    def label(self, name: str, forbidden: Collection[str] = ()) -> str:
        """The name of a structure as `vocabulary.label` shows it; what it stands for is known like that of a file."""
        shown = vocabulary.label(self._key, name, forbidden)
        if shown != name:
            self.known[shown] = name
        return shown

    def text(
        self, message: str, paths: Iterable[str | os.PathLike[str]], folders: Iterable[str | os.PathLike[str]] = ()
    ) -> str:
        """The message without the names of these files, of these folders and those above, UIDs and dates.

        Replaced, wherever they stand: the whole path, the path below the root, the name, the name without one or all of its
        endings and without the number of a channel, each folder above the file up to the root, and the root's own place. Of
        these, words of our own messages (`vocabulary.MESSAGES`), small numbers and `words` say nothing about a patient, and
        stand in most messages for themselves: they are replaced only where they are a whole path before the first colon.
        """
        found: dict[str, str] = {}
        above: dict[str, None] = {}
        begin = ""
        for path in paths:
            relative = self.relative(path)
            reference = self.reference(relative)
            whole = [str(self._root / relative), os.path.abspath(self._root / relative), relative, os.fspath(path)]
            for mention in (*whole, *_names(relative.rpartition("/")[2])):
                found.setdefault(mention, reference)
            if self._is_ordinary(relative) and relative not in vocabulary.FILES and message.startswith(f"{relative}: "):
                begin, message = reference, message[len(relative) :]
            above |= dict.fromkeys(map(str, PurePosixPath(relative).parents))
        for path in folders:
            relative = self.relative(path)
            above |= dict.fromkeys([relative, *map(str, PurePosixPath(relative).parents)])
        for folder in above:
            if folder not in (".", "/"):
                for mention in (str(self._root / folder), os.path.abspath(self._root / folder), folder, folder.rpartition("/")[2]):
                    found.setdefault(mention, self._refer("folder", folder))
        for place in (os.path.abspath(self._root), str(self._root)):
            found.setdefault(place, "SRC")
        # Messages may carry a name as repr() writes it.
        found.update({repr(mention)[1:-1]: reference for mention, reference in list(found.items())})
        mentions = sorted((m for m in found if m in message and not self._is_ordinary(m)), key=len, reverse=True)
        # The longest first, in one pass: a reference is never searched again.
        pattern = "|".join([*map(_bounded, mentions), *_PATTERNS.values()])

        def instead(match: re.Match[str]) -> str:
            return found[match[0]] if match[0] in found else next(what for what in _PATTERNS if match[what])

        return begin + re.sub(pattern, instead, message)

    def text_of_archive(self, message: str) -> str:
        """`text` for a message that may name any file below the root. It looks through the folder: for what ends a command."""
        paths, around = [], []
        for folder, folders, names in os.walk(self._root):
            paths += [Path(folder) / name for name in names if any(short in message or repr(short)[1:-1] in message for short in _names(name))]
            around += [Path(folder) / name for name in folders if name in message or repr(name)[1:-1] in message]
        return self.text(message, paths, around)

    def _is_ordinary(self, mention: str) -> bool:
        return (
            len(mention) < LEAST
            or mention in ("..", "/", "SRC")
            or mention in vocabulary.MESSAGES
            or mention in vocabulary.FILES
            or mention in self.words
            or re.fullmatch(r"\d{1,3}(\.\d{1,3})?", mention) is not None
        )

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


_PATTERNS = {
    # Those that the standard itself gives out (PS3.6 Annex A) name syntaxes and classes.
    "UID": r"(?P<UID>(?<![\w.])(?!1\.2\.840\.10008\.)(?:\d+(?:\.\d+){5,}|2\.25\.\d{6,})(?![\w]))",
    "DATE": r"(?P<DATE>(?<!\d)(?:19|20)\d\d(?P<dash>-?)(?:0[1-9]|1[0-2])(?P=dash)(?:0[1-9]|[12]\d|3[01])(?:\d{2,6})?(?!\d))",
}


def _names(name: str) -> list[str]:
    """What a message may call a file: its name, and the name without endings, and without nnU-Net's number of a channel."""
    dots = [at for at, letter in enumerate(name) if letter == "." and at]
    shorter = [name[:at] for at in reversed(dots)]
    return list(dict.fromkeys([name, *shorter, *(re.sub(r"_\d{4}$", "", short) for short in (name, *shorter))]))


def _bounded(mention: str) -> str:
    """A pattern of the mention, not as a part of a longer word."""
    before, after = ("(?<![A-Za-z0-9])" if mention[0].isalnum() else ""), ("(?![A-Za-z0-9])" if mention[-1].isalnum() else "")
    return f"{before}{re.escape(mention)}{after}"
