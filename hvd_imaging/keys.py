"""Ed25519 keys in PEM files, and signatures of bytes in small JSON files."""

from __future__ import annotations

import base64
import binascii
import contextlib
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import SetupError
from .texts import read_json


def make_key(path: Path) -> Path:
    """Make a key pair: ``path`` (PKCS #8 PEM, mode 600) and ``path`` + ".pub" (PEM), which is returned.

    Raises:
        SetupError: one of the files is there already, or cannot be made.
    """
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
    public = key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
    other = path.with_name(path.name + ".pub")
    made: list[Path] = []
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for place, data, mode in ((path, private, 0o600), (other, public, 0o644)):
            handle = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
            made.append(place)
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        for place in made:  # a pair or nothing
            with contextlib.suppress(OSError):
                place.unlink()
        what = "exists already and is never replaced" if isinstance(error, FileExistsError) else f"cannot be made ({error.strerror})"
        raise SetupError(f"{path}: the key pair {what}; choose another --key-file") from error
    return other


def signature(message: bytes, key_file: Path) -> dict[str, Any]:
    """``{"algorithm": "Ed25519", "signature": base64}`` of a message.

    Raises:
        SetupError: the key cannot be used, or others may read it.
    """
    return {"algorithm": "Ed25519", "signature": base64.b64encode(_private(key_file).sign(message)).decode("ascii")}


def read(path: Path) -> dict[str, Any]:
    """The JSON object of a signature's file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it cannot be read, or is none.
    """
    try:
        values = read_json(path)
        _bytes(values)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError("not a signature") from error
    return values


def _bytes(values: Mapping[str, Any]) -> bytes:
    try:
        return base64.b64decode(values["signature"], validate=True)
    except binascii.Error as error:
        raise ValueError("not base64") from error


def fits(values: Mapping[str, Any], message: bytes, public_key: Path) -> bool:
    """Whether the holder of the key signed this message; ``values`` as :func:`read` gives them.

    Raises:
        SetupError: the public key cannot be read.
    """
    from cryptography.exceptions import InvalidSignature

    try:
        public(public_key).verify(_bytes(values), message)
    except InvalidSignature:
        return False
    return True


def _private(path: Path) -> Any:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        with open(path, "rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            data = file.read(1 << 16)
    except FileNotFoundError:
        raise SetupError(f"{path}: no such key file; --new-key makes one") from None
    except OSError as error:
        raise SetupError(f"{path}: the key file cannot be read ({error.strerror})") from error
    if mode & 0o077:
        raise SetupError(
            f"{path}: the key file must be readable by its owner only (mode 600), found mode {mode:o}; `chmod 600 {path}`, and "
            "think about who may have read it"
        )
    try:
        key = load_pem_private_key(data, password=None)
    except (ValueError, TypeError):  # TypeError: it has a password
        key = None
    except Exception:  # an algorithm that the library does not know
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise SetupError(f"{path}: expected an Ed25519 private key as PEM without a password; --new-key makes one")
    return key


def public(path: Path) -> Any:
    """The key of a PEM file.

    Raises:
        SetupError: it cannot be read, or is no Ed25519 public key.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        data = path.read_bytes()[: 1 << 16]
    except OSError as error:
        raise SetupError(f"{path}: the public key cannot be read ({error.strerror})") from error
    try:
        key = load_pem_public_key(data)
    except Exception:  # not PEM, or an algorithm that the library does not know
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise SetupError(f"{path}: expected an Ed25519 public key as PEM, such as KEY.pub of `hvd-imaging dataset sign --new-key`")
    return key
