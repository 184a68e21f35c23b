"""Pseudonyms: the same key and identifier give the same one; without the key nobody can compute or check it.

A plain hash would not do: patient numbers are few enough to try them all.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import hmac
import os
import re
import secrets
import stat
from pathlib import Path

from ..errors import SetupError

BYTES = 32
MOST_DAYS = 3650
"""Dates go back by 1 to this many days."""


def pseudonym(key: bytes, kind: str, raw: str) -> str:
    """16 hex characters for an identifier.

    Args:
        key: from `load_or_make_key`.
        kind: "patient" or "series": equal identifiers of two kinds get different pseudonyms.
        raw: the identifier; leading and trailing blanks do not count (DICOM pads with them).
    """
    message = f"{kind}\0{raw.strip()}".encode(errors="surrogatepass")
    return hmac.new(key, message, hashlib.sha256).hexdigest()[:16]


def shift_days(key: bytes, patient: str) -> int:
    """By how many days all dates of one patient go back, 1 to `MOST_DAYS`: distances in time stay as they are.

    Args:
        patient: the raw PatientID, as for `pseudonym`.
    """
    message = f"days\0{patient.strip()}".encode(errors="surrogatepass")
    number = int.from_bytes(hmac.new(key, message, hashlib.sha256).digest()[:8], "big")
    return 1 + number % MOST_DAYS


def shifted_date(key: bytes, patient: str, date: datetime.date) -> datetime.date:
    """The date moved back by the patient's own number of days, as PS3.15 E.3.6 asks for.

    The first days of the calendar stay at its beginning.
    """
    return datetime.date.fromordinal(max(date.toordinal() - shift_days(key, patient), 1))


def load_or_make_key(path: str | os.PathLike[str]) -> bytes:
    """The 32 bytes of a key file (64 hex characters, mode 600), which is made if it does not exist.

    Under MPI, rank 0 calls this and broadcasts the key.

    Raises:
        SetupError: others may read the file, or it does not hold a key, or it cannot be made.
    """
    path = Path(path)
    if not os.path.lexists(path):
        with contextlib.suppress(FileExistsError):  # another process was faster: read what it made
            _make(path)
    return _load(path)


def _make(path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            with os.fdopen(handle, "w", encoding="ascii") as file:
                file.write(secrets.token_hex(BYTES) + "\n")
                file.flush()
                os.fsync(file.fileno())
            # A link fails if the name is taken: the file appears whole, and never replaces another key.
            os.link(temporary, path)
        finally:
            temporary.unlink()
    except FileExistsError:
        raise
    except OSError as error:
        raise SetupError(f"{path}: the key file cannot be made ({error.strerror}); give another with --key-file") from error


def _load(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            data = file.read(4096)
    except OSError as error:
        raise SetupError(f"{path}: the key file cannot be read ({error.strerror})") from error
    if not stat.S_ISREG(status.st_mode):
        raise SetupError(f"{path}: expected a key file, found something that is no file")
    if status.st_mode & 0o077:
        raise SetupError(
            f"{path}: the key file must be readable by its owner only (mode 600), found mode "
            f"{stat.S_IMODE(status.st_mode):o}; `chmod 600 {path}`, and think about who may have read it"
        )
    text = data.strip()
    if not re.fullmatch(rb"[0-9a-fA-F]{%d}" % (2 * BYTES), text):
        raise SetupError(
            f"{path}: expected a key of {2 * BYTES} hexadecimal characters, found {len(text)} bytes that are none; "
            "give another with --key-file, or remove it to have a new key made (pseudonyms will then differ)"
        )
    return bytes.fromhex(text.decode("ascii"))
