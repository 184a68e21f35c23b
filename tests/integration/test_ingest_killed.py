"""A killed ingest, started again: nothing that was finished is read again, and the dataset is the same."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hvd_imaging.privacy.pseudonym import load_or_make_key
from hvd_imaging.privacy.redact import Redactor
from hvd_imaging.sources.phantom import make_large_series

SERIES = 24


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("killed") / "archive"
    for index in range(SERIES):
        make_large_series(root, index, (12 + index % 3, 192, 192))
    return root


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "hvd_imaging.cli.main", "ingest", *map(str, args), "--set", "shards.shard_mb=4"]


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_a_killed_ingest_goes_on(archive, tmp_path):
    straight = subprocess.run(
        command(archive, tmp_path / "straight", "--key-file", tmp_path / "key"), capture_output=True, text=True, timeout=120, check=False
    )
    assert straight.returncode == 0, straight.stderr
    staging = tmp_path / ".data.building" / "staging"
    process = subprocess.Popen(
        command(archive, tmp_path / "data", "--key-file", tmp_path / "key"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while len(list(staging.glob("*.case"))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL, "it was not killed in the middle"
    assert not (tmp_path / "data").exists()

    # What stands ready cannot be read any more, and nothing tells so but its content: it must not be needed.
    redactor = Redactor(load_or_make_key(tmp_path / "key"), archive)
    cases = [path.read_bytes() for path in staging.glob("*.case")]
    ready = {json.loads(case[8 : 8 + int.from_bytes(case[:8], "little")])["path"] for case in cases}
    spoiled = 0
    for first in sorted(archive.glob("*/0000.dcm")):
        if redactor.reference(first) in ready:
            for path in first.parent.iterdir():
                status = path.stat()
                with open(path, "r+b") as file:
                    file.seek(status.st_size // 2)
                    file.write(os.urandom(1000))
                os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
            spoiled += 1
    assert 3 <= spoiled == len(ready)
    again = subprocess.run(
        command(archive, tmp_path / "data", "--key-file", tmp_path / "key"), capture_output=True, text=True, timeout=120, check=False
    )
    assert again.returncode == 0, again.stderr
    assert hashes(tmp_path / "data") == hashes(tmp_path / "straight")
    assert not (tmp_path / ".data.building").exists()
