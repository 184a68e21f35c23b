"""What is installed: the lock is whole, each file of it has a hash, and a part of it is all that the extras need."""

from __future__ import annotations

import configparser
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"


def script(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


locked, audit = script("locked"), script("audit")
LOCKS = sorted((SCRIPTS / "locks").glob("*.txt"))


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.stem)
def test_every_package_is_pinned_with_hashes(lock):
    table = locked.blocks(lock.read_text())
    assert len(table) > 150
    for name, (lines, _) in table.items():
        assert re.match(r"[\w.-]+==\S+", lines), name
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", lines) and "://" not in lines, name
    assert "://" not in re.sub(r"#.*", "", lock.read_text())


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.stem)
def test_the_lock_is_the_one_of_the_constraints(lock):
    found = {name: lines.split("==")[1].split()[0] for name, (lines, _) in locked.blocks(lock.read_text()).items()}
    for line in (SCRIPTS / "constraints.txt").read_text().splitlines():
        if "==" in line and not line.startswith("#"):
            name, version = line.split("==")
            assert found.get(locked.plain(name), version) == version, f"{line}: run scripts/lock.sh"


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.stem)
def test_each_extra_is_whole(lock):
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    table, setup = locked.blocks(lock.read_text()), (ROOT / "setup.cfg").read_text()
    base = locked.closure(table, locked.roots(setup, []))
    assert {"numpy", "pydicom", "pydantic-core", "urllib3"} <= base and "tensorflow" not in base
    for extra in parser["options.extras_require"]:
        assert base <= locked.closure(table, locked.roots(setup, [extra]))
    assert "tensorflow" in locked.closure(table, locked.roots(setup, ["train"]))


def test_what_is_installed_here_is_what_the_lock_says():
    lock = SCRIPTS / "locks" / f"python{sys.version_info[0]}.{sys.version_info[1]}.txt"
    table = locked.blocks(lock.read_text())
    from importlib.metadata import distributions

    wrong = []
    for found in distributions():
        name = locked.plain(found.metadata["Name"])
        if name in table and name not in ("pip", "setuptools", "wheel") and not table[name][0].startswith(f"{name}=="):
            continue
        if name in table and f"=={found.version}" not in table[name][0].split()[0]:
            wrong.append(f"{name} {found.version}")
    assert wrong == [], "run scripts/setup_env.sh"


def test_parts_of_a_lock():
    lock = "a==1 \\\n    --hash=sha256:00\n    # via\n    #   -r x.in\n    #   hvd-imaging (setup.cfg)\n    #   b\nb_c==2 \\\n    --hash=sha256:01\n    # via a\nd==3 \\\n    --hash=sha256:02\n    # via b-c\n"
    table = locked.blocks(lock)
    assert table["b-c"] == ("b_c==2 \\\n    --hash=sha256:01", {"a"})
    assert locked.closure(table, {"a"}) == {"a", "b-c", "d"} and locked.closure(table, {"d"}) == {"d"}
    with pytest.raises(SystemExit, match=r"does not hold e: run scripts/lock\.sh"):
        locked.closure(table, {"e"})
    with pytest.raises(SystemExit, match="no 'other' in setup.cfg"):
        locked.roots((ROOT / "setup.cfg").read_text(), ["other"])


def test_pip_refuses_a_file_of_another_hash(tmp_path):
    wheel = tmp_path / "thing-1-py3-none-any.whl"
    import zipfile

    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("thing.py", "")
        file.writestr("thing-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: thing\nVersion: 1\n")
        file.writestr("thing-1.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr("thing-1.dist-info/RECORD", "")
    (tmp_path / "lock.txt").write_text("thing==1 \\\n    --hash=sha256:" + "0" * 64 + "\n")
    words = ["install", "--require-hashes", "--no-deps", "--only-binary", ":all:", "--no-index", "--find-links", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *words, "--target", str(tmp_path / "out"), "-r", str(tmp_path / "lock.txt")], capture_output=True, text=True
    )
    assert done.returncode != 0 and "HASHES" in done.stderr and not (tmp_path / "out").exists()


def test_the_judgement_of_an_audit():
    report = {"dependencies": [
        {"name": "a", "version": "1", "vulns": [{"id": "PYSEC-1", "aliases": ["CVE-2026-1"], "fix_versions": ["2"]}]},
        {"name": "b", "version": "1", "vulns": [{"id": "PYSEC-2", "aliases": [], "fix_versions": []}]},
    ]}  # fmt: skip
    assert audit.judge(report, []) == (["a 1: PYSEC-1, fixed in 2", "b 1: PYSEC-2"], [], True)
    assert audit.judge(report, ["CVE-2026-1", "CVE-0"]) == (["b 1: PYSEC-2"], ["CVE-0"], True)
    assert not audit.judge({"dependencies": [{"name": "a", "skip_reason": "not found"}]}, [])[2]
    assert audit.exceptions("# x\nCVE-1 a: not reached, as we never open such files\n") == {"CVE-1": "not reached, as we never open such files"}
    with pytest.raises(SystemExit, match="line 1"):
        audit.exceptions("CVE-1 a\n")


@pytest.mark.long
def test_no_package_has_a_hole_that_nobody_named():
    done = subprocess.run([sys.executable, SCRIPTS / "audit.py"], capture_output=True, text=True, timeout=900)
    if done.returncode == audit.UNREACHABLE:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout


@pytest.mark.long
def test_the_bill_of_materials_names_the_lock(tmp_path):
    import json

    subprocess.run([SCRIPTS / "sbom.sh", tmp_path / "sbom.json"], check=True, timeout=900)
    found = json.loads((tmp_path / "sbom.json").read_text())
    assert found["bomFormat"] == "CycloneDX"
    names = {(locked.plain(part["name"]), part["version"]) for part in found["components"]}
    assert ("tensorflow", "2.18.1") in names and len(names) > 150
