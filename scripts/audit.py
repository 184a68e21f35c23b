"""Asks the advisory database which packages of the lock have known holes, with pip-audit in an environment of its own.

    python scripts/audit.py

Exit code 0: none, or only those that scripts/audit-exceptions.txt names; 1: others, which are listed; 3: the database cannot be asked.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
UNREACHABLE = 3


def exceptions(text: str) -> dict[str, str]:
    """ID -> why it is no danger here, of a file with ``ID package: reason`` in each line; pure.

    Raises:
        SystemExit: a line without a reason.
    """
    found = {}
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.startswith("#"):
            match = re.fullmatch(r"(\S+) ([\w.-]+): (.{20,})", line.strip())
            if match is None:
                raise SystemExit(f"audit-exceptions.txt, line {number}: expected 'ID package: reason'")
            found[match[1]] = match[3]
    return found


def judge(report: dict[str, Any], known: Iterable[str]) -> tuple[list[str], list[str], bool]:
    """(holes that nobody has named, exceptions that nothing has any more, whether anything was asked); pure."""
    known = set(known)
    packages = report.get("dependencies", [])
    asked = [package for package in packages if "skip_reason" not in package]
    new, seen = [], set()
    for package in asked:
        for hole in package.get("vulns", []):
            ids = {hole["id"], *hole.get("aliases", [])}
            seen |= ids & known
            if not ids & known:
                fixed = f", fixed in {', '.join(hole['fix_versions'])}" if hole.get("fix_versions") else ""
                new.append(f"{package['name']} {package['version']}: {hole['id']}{fixed}")
    return new, sorted(known - seen), len(asked) > len(packages) // 2


def main() -> int:
    names = exceptions((HERE / "audit-exceptions.txt").read_text(encoding="utf-8"))
    code = 0
    with tempfile.TemporaryDirectory() as folder:
        venv.create(f"{folder}/venv", with_pip=True)
        python = f"{folder}/venv/bin/python"
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "pip-audit"], check=True, stderr=subprocess.DEVNULL)
        for lock in sorted((HERE / "locks").glob("*.txt")):
            done = subprocess.run(
                [python, "-m", "pip_audit", "-r", str(lock), "--no-deps", "--disable-pip", "--progress-spinner", "off", "-f", "json"],
                capture_output=True, text=True,
            )  # fmt: skip
            try:
                new, stale, asked = judge(json.loads(done.stdout), names)
            except ValueError:
                new, stale, asked = [], [], False
            if not asked:
                print(f"{lock.name}: the advisory database cannot be asked from here")
                return UNREACHABLE
            for line in new:
                print(f"{lock.name}: {line}")
            for name in stale:
                print(f"{lock.name}: the exception {name} is not needed any more")
            code = code or int(bool(new))
    return code


if __name__ == "__main__":
    sys.exit(main())
