"""Which models may run code of their own: those that this user made on this machine, and those opened with ``--trust``.

What a user's own commands write is remembered by its SHA-256, as empty files in a folder that only the user can write. So nobody has to
say of a model of one's own that it is to be trusted, wherever it is moved; and a foreign one is not in the folder.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from .errors import RunError
from .files import sha256_of_file, write_bytes


def state_folder(environ: Mapping[str, str] | None = None) -> Path:
    """``$HVD_IMAGING_STATE/made``, by default ``hvd_imaging`` below ``$XDG_STATE_HOME`` or ``~/.local/state``. Pure."""
    environ = os.environ if environ is None else environ
    base = environ.get("XDG_STATE_HOME") or str(Path(environ.get("HOME") or os.path.expanduser("~")) / ".local" / "state")
    return Path(environ.get("HVD_IMAGING_STATE") or Path(base) / "hvd_imaging") / "made"


def remember(path: Path) -> None:
    """This file, as it is now, was written by the user's own command. Where nothing can be remembered, ``--trust`` will be asked for."""
    folder = state_folder()
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_bytes(folder / sha256_of_file(path), b"")


def made_here(path: Path) -> bool:
    """Whether a file is, byte by byte, one that this user's commands wrote on this machine."""
    folder = state_folder()
    try:
        found = os.stat(folder)
        # Others could have put a hash there.
        if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o022:
            return False
        return (folder / sha256_of_file(path)).is_file()
    except OSError:
        return False


def refusal(where: object, what: str, instead: str = "") -> RunError:
    """The error for a model that is code.

    Args:
        where: the model.
        what: what in it is code: a sentence without its end.
        instead: what needs no trust, if there is something.
    """
    return RunError(
        f"{where}: {what}, and it was not made by you on this machine; it could read, change and send all that you can: open it with --trust "
        f"if you trust who made it{f', or {instead}' if instead else ''}"
    )
