"""Ed25519 signatures of a manifest: who holds the public key can tell that a dataset is what its maker signed.

Signed is the canonical JSON of the whole manifest. It holds the SHA-256 of each shard's file and of each sample, so one
signature covers all of the dataset: the manifest is compared at once, the files by `verify`.
"""

from __future__ import annotations

import json
from pathlib import Path

from .. import keys
from ..errors import DatasetError
from ..files import write_json
from .manifest import SIGNATURE, Manifest, load

_PURPOSE = b"hvd_imaging manifest\0"


def message(manifest: Manifest) -> bytes:
    """What is signed of a manifest as it was read from its file. Pure."""
    # What the file does not say is left out: a field that is new to the program does not break signatures.
    values = manifest.model_dump(mode="json", by_alias=True, exclude_unset=True)
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return _PURPOSE + text.encode()


def sign(dataset: Path, manifest: Manifest, key_file: Path) -> None:
    """Write ``dataset/manifest.sig``.

    Raises:
        SetupError: the key cannot be used, or others may read it.
        DatasetError: the manifest lists no hashes of its shards, or the folder cannot be written.
    """
    if {sample.shard for sample in manifest.samples} - {shard.name for shard in manifest.shards}:
        raise DatasetError(f"{dataset}: the manifest lists no SHA-256 of its shards, so a signature would not cover them; ingest again")
    value = {"files_hash": manifest.files_hash(), **keys.signature(message(manifest), key_file)}
    try:
        write_json(dataset / SIGNATURE, value)
    except OSError as error:
        raise DatasetError(f"{dataset}: the signature cannot be written ({error.strerror}); check the permissions") from error


def check(dataset: Path, manifest: Manifest, public_key: Path) -> None:
    """The signature beside the manifest is of this manifest and by the holder of the key.

    Raises:
        SetupError: the public key cannot be read.
        DatasetError: there is no signature, or it is of another manifest or by another key.
    """
    keys.public(public_key)
    try:
        signature = keys.read(dataset / SIGNATURE)
    except FileNotFoundError:
        raise DatasetError(
            f"{dataset}: is not signed (no {SIGNATURE}), and a signature by {public_key} is expected; "
            f"`hvd-imaging dataset sign {dataset} --key-file KEY` signs it"
        ) from None
    except ValueError:
        raise DatasetError(f"{dataset / SIGNATURE}: cannot be read as a signature; restore it, or sign the dataset again") from None
    if not keys.fits(signature, message(manifest), public_key):
        raise DatasetError(
            f"{dataset}: the signature does not fit: the manifest was changed after it was signed, or another key than that of "
            f"{public_key} signed it; get the dataset from its maker again"
        )


def load_signed(dataset: str | Path, public_key: str | None) -> Manifest:
    """`manifest.load`, and its signature checked if a key is given.

    Raises:
        DatasetError: no readable manifest, or not signed by the key.
        SetupError: the public key cannot be read.
    """
    manifest = load(dataset)
    if public_key is not None:
        check(Path(dataset), manifest, Path(public_key))
    return manifest
