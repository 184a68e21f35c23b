"""Writing leaves the old file or the new one, never half of one."""

import errno
import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hvd_imaging import files
from hvd_imaging.errors import SetupError
from hvd_imaging.files import atomic_folder, check_writable


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


# What killed commands leave, and what cannot be written


def left_over(folder, name, age=3600.0):
    left = folder / name
    left.mkdir()
    (left / "half").write_text("x")
    os.utime(left, (time.time() - age,) * 2)
    return left


def test_the_next_command_removes_what_a_killed_one_left(tmp_path):
    mine = [left_over(tmp_path, ".out.abc.part"), left_over(tmp_path, ".out.def.part")]
    others = [left_over(tmp_path, ".other.abc.part"), left_over(tmp_path, "out.abc.part"), left_over(tmp_path, ".out.fresh.part", age=5)]
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".out.link.part").symlink_to(tmp_path / "elsewhere")
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("whole")
    assert not any(path.exists() for path in mine) and all(path.exists() for path in others)
    assert (tmp_path / "elsewhere").is_dir() and (tmp_path / "out/a").read_text() == "whole"


def test_a_killed_process_really_leaves_one_and_a_running_one_keeps_its_own(tmp_path):
    program = (
        "import sys, time; from hvd_imaging.files import atomic_folder\n"
        f"with atomic_folder({str(tmp_path / 'out')!r}) as folder: print(folder, flush=True); time.sleep(600)"
    )
    running, killed = (subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(2))
    try:
        kept, left = (Path(each.stdout.readline().strip()) for each in (running, killed))
        killed.kill()
        killed.wait(30)
        assert kept.is_dir() and left.is_dir()
        for path in (kept, left):
            os.utime(path, (time.time() - 3600,) * 2)
        with atomic_folder(tmp_path / "out"):
            pass
        assert kept.is_dir() and not left.exists()
    finally:
        for each in (running, killed):
            each.kill()
            each.wait(30)
            each.stdout.close()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_what_cannot_be_written_is_told_before_the_work(tmp_path, monkeypatch, code):
    check_writable(tmp_path / "new" / "out.nii.gz")
    assert list((tmp_path / "new").iterdir()) == []

    def fails(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(SetupError, match=f"out.csv: cannot be written \\({os.strerror(code)}\\); check space and permissions of .*, or choose another place"):
        check_writable(tmp_path / "out.csv")
    assert list(tmp_path.iterdir()) == [tmp_path / "new"]


def test_a_file_in_the_way_of_a_folder_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match="cannot be written"):
        check_writable(tmp_path / "file" / "out.csv")
