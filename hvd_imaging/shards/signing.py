"""Ed25519 signatures of a manifest: who holds the public key can tell that a dataset is what its maker signed.

Signed is the canonical JSON of the whole manifest. It holds the SHA-256 of each shard's file and of each sample, so one
signature covers all of the dataset: the manifest is compared at once, the files by `verify`.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import os
import stat
from pathlib import Path
from typing import Any

from ..errors import DatasetError, SetupError
from ..files import write_json
from .manifest import SIGNATURE, Manifest, load

_PURPOSE = b"hvd_imaging manifest\0"


def message(manifest: Manifest) -> bytes:
    """What is signed of a manifest as it was read from its file. Pure."""
    # What the file does not say is left out: a field that is new to the program does not break signatures.
    values = manifest.model_dump(mode="json", by_alias=True, exclude_unset=True)
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return _PURPOSE + text.encode()


def make_key(path: Path) -> Path:
    """Make a key pair: ``path`` (PKCS #8 PEM, mode 600) and ``path`` + ".pub" (PEM), which is returned.

    Raises:
        SetupError: one of the files is there already, or can not be made.
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
        what = "exists already and is never replaced" if isinstance(error, FileExistsError) else f"can not be made ({error.strerror})"
        raise SetupError(f"{path}: the key pair {what}; choose another --key-file") from error
    return other


def sign(dataset: Path, manifest: Manifest, key_file: Path) -> None:
    """Write ``dataset/manifest.sig``.

    Raises:
        SetupError: the key can not be used, or others may read it.
        DatasetError: the manifest lists no hashes of its shards, or the folder can not be written.
    """
    if {sample.shard for sample in manifest.samples} - {shard.name for shard in manifest.shards}:
        raise DatasetError(f"{dataset}: the manifest lists no SHA-256 of its shards, so a signature would not cover them; ingest again")
    signature = _private(key_file).sign(message(manifest))
    value = {"algorithm": "Ed25519", "files_hash": manifest.files_hash(), "signature": base64.b64encode(signature).decode("ascii")}
    try:
        write_json(dataset / SIGNATURE, value)
    except OSError as error:
        raise DatasetError(f"{dataset}: the signature can not be written ({error.strerror}); check the permissions") from error


def check(dataset: Path, manifest: Manifest, public_key: Path) -> None:
    """The signature beside the manifest is of this manifest and by the holder of the key.

    Raises:
        SetupError: the public key can not be read.
        DatasetError: there is no signature, or it is of another manifest or by another key.
    """
    from cryptography.exceptions import InvalidSignature

    key = _public(public_key)
    try:
        signature = base64.b64decode(json.loads((dataset / SIGNATURE).read_text(encoding="utf-8"))["signature"], validate=True)
    except FileNotFoundError:
        raise DatasetError(
            f"{dataset}: is not signed (no {SIGNATURE}), and a signature by {public_key} is expected; "
            f"`hvd-imaging dataset sign {dataset} --key-file KEY` signs it"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, binascii.Error):
        raise DatasetError(f"{dataset / SIGNATURE}: can not be read as a signature; restore it, or sign the dataset again") from None
    try:
        key.verify(signature, message(manifest))
    except InvalidSignature:
        raise DatasetError(
            f"{dataset}: the signature does not fit: the manifest was changed after it was signed, or another key than that of "
            f"{public_key} signed it; get the dataset from its maker again"
        ) from None


def load_signed(dataset: str | Path, public_key: str | None) -> Manifest:
    """`manifest.load`, and its signature checked if a key is given.

    Raises:
        DatasetError: no readable manifest, or not signed by the key.
        SetupError: the public key can not be read.
    """
    manifest = load(dataset)
    if public_key is not None:
        check(Path(dataset), manifest, Path(public_key))
    return manifest


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
        raise SetupError(f"{path}: the key file can not be read ({error.strerror})") from error
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


def _public(path: Path) -> Any:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        data = path.read_bytes()[: 1 << 16]
    except OSError as error:
        raise SetupError(f"{path}: the public key can not be read ({error.strerror})") from error
    try:
        key = load_pem_public_key(data)
    except Exception:  # not PEM, or an algorithm that the library does not know
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise SetupError(f"{path}: expected an Ed25519 public key as PEM, such as KEY.pub of `hvd-imaging dataset sign --new-key`")
    return key
