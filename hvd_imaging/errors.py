"""The errors that users see.

A message says what went wrong, what was expected, what was found and where (file, key, rank), and the next step.
The command line prints it in one line and leaves with ``exit_code``; a traceback is shown for programming errors only.
Messages never carry patient data: identifiers appear as pseudonyms, files by their path inside the given folder.
"""

from __future__ import annotations

import re
from typing import Any, TypeVar


class HvdImagingError(Exception):
    """Base of all errors that are the user's to mend.

    Attributes:
        exit_code: of the command.
        alike: all ranks raise this very error, so that rank 0 says it for all.
    """

    exit_code = 1
    alike = False

    def __str__(self) -> str:
        return printable(super().__str__())


_LONGEST = 2000
_LOGIN = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)[^\s'\"]*@")


def masked(value: Any) -> Any:
    """A text, or what a configuration holds, without names and passwords in addresses (``redis://:word@host``). Pure."""
    if isinstance(value, str):
        return _LOGIN.sub(r"\1***@", value)
    if isinstance(value, dict):
        return {key: masked(inner) for key, inner in value.items()}
    return [masked(inner) for inner in value] if isinstance(value, list) else value


def printable(text: str) -> str:
    """``text`` for a terminal or a log: what those would obey is escaped, and of a long one the middle is left out. Pure.

    A message quotes what was found, and a file can hold escape sequences, or megabytes.
    """
    text = masked(text)
    text = "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"


class ConfigError(HvdImagingError):
    """A configuration key or a command-line value is unknown, of the wrong type, or contradicts another."""

    exit_code = 2


class SourceError(HvdImagingError):
    """DICOM, NIfTI or label input that cannot be used."""

    exit_code = 3


class DatasetError(HvdImagingError):
    """A shard dataset is missing, damaged, or of another schema."""

    exit_code = 4


class RunError(HvdImagingError):
    """A run directory, checkpoint or model cannot be used as asked."""

    exit_code = 5


class SetupError(HvdImagingError):
    """The machine or the installation lacks something (MPI, a package, a permission)."""

    exit_code = 6


class PeerError(HvdImagingError):
    """This rank stopped because another one failed."""

    exit_code = 7


E = TypeVar("E", bound=HvdImagingError)


def on_all_ranks(error: E) -> E:
    """Mark an error that all ranks raise alike, from what they agree on."""
    error.alike = True
    return error


PARTIAL = 10
"""Exit code of a command that did its work but set some inputs aside (see its quarantine report)."""

NOT_RELEASED = 11
"""Exit code of a compression that did its work, but no format keeps the limits of its recipe."""

TRY_AGAIN = 75
"""Exit code of a training that was asked to leave: it has saved its state, `--resume` goes on (sysexits.h: EX_TEMPFAIL)."""
