"""Writing leaves the old file or the new one, never half of one."""

import json
import os
import stat

import pytest

from hvd_imaging import files


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(RuntimeError), files.atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["x.json"]


def test_the_file_appears_when_the_block_ends(tmp_path):
    path = tmp_path / "deep" / "x.npz"
    with files.atomic_path(path) as temporary:
        temporary.write_bytes(b"new")
        assert temporary.suffix == ".npz" and temporary.parent == path.parent
        assert not path.exists()
    assert path.read_bytes() == b"new"


def test_permissions_follow_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        files.write_text(tmp_path / "x", "x")
        with files.atomic_folder(tmp_path / "y"):
            pass
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "y").stat().st_mode) == 0o750


def test_numbers_that_json_does_not_know_are_refused(tmp_path):
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "x.json", {"a": float("nan")})
    assert os.listdir(tmp_path) == []


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), files.atomic_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("a")
        raise RuntimeError
    assert os.listdir(tmp_path) == []
    with files.atomic_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("a")
    assert os.listdir(tmp_path / "out") == ["a"]


def test_a_filled_folder_is_replaced_on_request_only(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    with pytest.raises(OSError), files.atomic_folder(out) as folder:
        (folder / "new").touch()
    assert os.listdir(out) == ["old"]
    with files.atomic_folder(out, replace=True) as folder:
        (folder / "new").touch()
    assert os.listdir(out) == ["new"] and os.listdir(tmp_path) == ["out"]


def test_the_hash_of_a_file(tmp_path):
    files.write_bytes(tmp_path / "x", b"abc")
    assert files.sha256_of_file(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
