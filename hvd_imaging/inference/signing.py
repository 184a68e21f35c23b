"""Ed25519 signatures of models: who holds the public key can tell that a run or an export is what its maker signed.

Signed is a list of files with their SHA-256: of an export its ``export.json``, which lists all others; of a run those that its answers depend
on. ``model.sig`` holds list and signature.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from .. import keys
from ..errors import RunError
from ..files import sha256_of_file, write_json
from ..models import architecture
from ..models.spec import NAME as SPEC_NAME
from ..shards.manifest import NAME as MANIFEST
from ..training.layout import BEST, CONFIG, RECORD
from . import exported

NAME = "model.sig"
_PURPOSE = b"hvd_imaging model\0"
_RUN = (CONFIG, SPEC_NAME, BEST, architecture.NAME, RECORD, MANIFEST)


def message(files: Mapping[str, str]) -> bytes:
    """What is signed: names and SHA-256. Pure."""
    return _PURPOSE + json.dumps({"files": dict(files)}, sort_keys=True, separators=(",", ":")).encode()


def sign(model: Path, key_file: Path) -> dict[str, str]:
    """Write ``model/model.sig``.

    Returns:
        the files that were signed, with their SHA-256.

    Raises:
        RunError: not a run or an export, an export whose files are not as they were written, or the folder cannot be written.
        SetupError: the key cannot be used, or others may read it.
    """
    files = _files(model)
    value = {**keys.signature(message(files), key_file), "files": files}
    try:
        write_json(model / NAME, value)
    except OSError as error:
        raise RunError(f"{model}: the signature cannot be written ({error.strerror}); check the permissions") from error
    return files


def check(model: Path, public_key: Path) -> None:
    """A run or an export is signed by the holder of the key, and its files are those that were signed.

    Raises:
        SetupError: the public key cannot be read.
        RunError: there is no signature, it is by another key, or a file was changed, added or lost.
    """
    keys.public(public_key)
    if not model.is_dir():
        raise RunError(f"{model}: --public-key wants the folder of a run or an export, found {'a file' if model.exists() else 'nothing'}")
    try:
        values = keys.read(model / NAME)
        listed = {str(name): str(digest) for name, digest in values["files"].items()}
    except FileNotFoundError:
        raise RunError(
            f"{model}: is not signed (no {NAME}), and a signature by {public_key} is expected; `hvd-imaging sign {model} --key-file KEY` signs it"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RunError(f"{model / NAME}: cannot be read as a signature; restore it, or sign the model again") from None
    if not keys.fits(values, message(listed), public_key):
        raise RunError(f"{model}: another key than that of {public_key} signed it, or {NAME} was changed; get the model from its maker again")
    found = _files(model)
    changed = sorted(name for name in found.keys() | listed.keys() if found.get(name) != listed.get(name))
    if changed:
        raise RunError(f"{model / changed[0][:100]}: is not as it was signed; get the model from its maker again")


def _files(model: Path) -> dict[str, str]:
    """The files that stand for all of a model, with their SHA-256."""
    if (model / CONFIG).is_file():
        return {name: sha256_of_file(model / name) for name in _RUN if (model / name).is_file()}
    if (model / exported.NAME).is_file():
        exported.check(model)
        return {exported.NAME: sha256_of_file(model / exported.NAME)}
    raise RunError(f"{model}: neither a run folder ({CONFIG}) nor an export ({exported.NAME})")
