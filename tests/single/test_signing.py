"""Ed25519 signatures of datasets, by the commands and where training begins."""

from __future__ import annotations

import json
import os
import shutil
import stat

import pytest
from datasets import make_dataset
from test_cli_dataset import run

from hvd_imaging import errors, keys
from hvd_imaging.cli.dataset import command as dataset_command
from hvd_imaging.shards import manifest as manifests
from hvd_imaging.shards import signing


@pytest.fixture
def signed(tmp_path):
    make_dataset(tmp_path / "data", samples=4)
    result = run(dataset_command, "sign", tmp_path / "data", "--key-file", tmp_path / "keys" / "maker.pem", "--new-key")
    assert result.exit_code == 0 and "maker.pem.pub" in result.output
    return tmp_path / "data", tmp_path / "keys" / "maker.pem.pub"


def change(dataset, edit, name="manifest.json"):
    values = json.loads((dataset / name).read_text())
    edit(values)
    (dataset / name).write_text(json.dumps(values))


def test_a_signed_dataset_is_accepted(signed):
    dataset, public = signed
    assert stat.S_IMODE(public.with_suffix("").stat().st_mode) == 0o600
    assert signing.load_signed(dataset, str(public)) == manifests.load(dataset)
    result = run(dataset_command, "verify", dataset, "--public-key", public)
    assert result.exit_code == 0 and "signed by this key" in result.output
    # Other spaces and another order of keys are the same manifest.
    values = json.loads((dataset / "manifest.json").read_text())
    (dataset / "manifest.json").write_text(json.dumps(dict(reversed(values.items()))))
    signing.load_signed(dataset, str(public))
    assert b"PRIVATE" not in b"".join(path.read_bytes() for path in dataset.iterdir())


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m["samples"][0].update(split="val" if m["samples"][0]["split"] != "val" else "train"),
        lambda m: m["shards"][0].update(sha256="0" * 64),
        lambda m: m["samples"][0].update(sha256="0" * 64),
        lambda m: m["samples"].pop(),
        lambda m: m.update(version={"action": "ingest"}),
        lambda m: m["preprocess"].update(window=[-1, 1]),
    ],
)
def test_a_changed_manifest_is_refused(signed, edit):
    dataset, public = signed
    change(dataset, edit)
    with pytest.raises(errors.DatasetError, match="does not fit"):
        signing.load_signed(dataset, str(public))
    signing.load_signed(dataset, None)  # who does not ask does not hear
    assert run(dataset_command, "verify", dataset, "--public-key", public).exception.exit_code == 4


def test_a_changed_shard_is_found_by_verify(signed):
    dataset, public = signed
    shard = next(dataset.glob("*.h5"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    signing.load_signed(dataset, str(public))
    assert run(dataset_command, "verify", dataset, "--public-key", public).exit_code == 4


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda path: path.unlink(), "not signed"),
        (lambda path: path.write_text("{}"), "cannot be read"),
        (lambda path: path.write_text('{"signature": 3}'), "cannot be read"),
        (lambda path: path.write_text('{"signature": "?"}'), "cannot be read"),
        (lambda path: path.write_text('{"signature": ""}'), "does not fit"),
        (lambda path: path.write_bytes(b"\xff"), "cannot be read"),
    ],
)
def test_a_bad_signature_is_refused(signed, harm, words):
    dataset, public = signed
    harm(dataset / manifests.SIGNATURE)
    with pytest.raises(errors.DatasetError, match=words):
        signing.load_signed(dataset, str(public))


def test_another_key_is_refused(signed, tmp_path):
    dataset, public = signed
    other = keys.make_key(tmp_path / "other.pem")
    with pytest.raises(errors.DatasetError, match="another key"):
        signing.load_signed(dataset, str(other))
    assert run(dataset_command, "sign", dataset, "--key-file", tmp_path / "other.pem").exit_code == 0
    signing.load_signed(dataset, str(other))
    with pytest.raises(errors.DatasetError):
        signing.load_signed(dataset, str(public))


@pytest.mark.parametrize("text", ["", "no PEM", "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", None])
def test_unusable_keys(signed, tmp_path, text):
    dataset, _ = signed
    path = tmp_path / "key"
    if text is not None:
        path.write_text(text)
        path.chmod(0o600)
    for act in (lambda: signing.load_signed(dataset, str(path)), lambda: signing.sign(dataset, manifests.load(dataset), path)):
        with pytest.raises(errors.SetupError, match="key"):
            act()


def test_keys_are_guarded(signed, tmp_path):
    dataset, public = signed
    private = public.with_suffix("")
    before = private.read_bytes()
    result = run(dataset_command, "sign", dataset, "--key-file", private, "--new-key")
    assert isinstance(result.exception, errors.SetupError) and private.read_bytes() == before
    private.chmod(0o644)
    with pytest.raises(errors.SetupError, match="mode 600"):
        signing.sign(dataset, manifests.load(dataset), private)
    result = run(dataset_command, "sign", dataset, "--key-file", dataset / "maker.pem", "--new-key")
    assert isinstance(result.exception, errors.DatasetError) and not (dataset / "maker.pem").exists()
    os.symlink(tmp_path / "elsewhere", tmp_path / "link")
    with pytest.raises(errors.SetupError):
        keys.make_key(tmp_path / "link")
    assert not (tmp_path / "elsewhere").exists()


def test_a_new_version_has_to_be_signed_anew_and_a_checkout_has_not(signed, tmp_path):
    dataset, public = signed
    assert run(dataset_command, "split", dataset, "--out", tmp_path / "two", "--seed", 5).exit_code == 0
    with pytest.raises(errors.DatasetError, match="not signed"):
        signing.load_signed(tmp_path / "two", str(public))
    hash = manifests.load(dataset).files_hash()
    shutil.copytree(dataset, tmp_path / "copy")
    assert run(dataset_command, "checkout", tmp_path / "two", hash[:12], tmp_path / "three").exit_code == 0
    assert signing.load_signed(tmp_path / "three", str(public)).files_hash() == hash
