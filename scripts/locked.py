"""Prints a part of a lock file: what some extras of setup.cfg need, with the hashes, for ``pip install --require-hashes``.

    python scripts/locked.py --extras train,dicom                 the packages, and all that they need
    python scripts/locked.py --extras train --without horovod     without these
    python scripts/locked.py --only horovod mpi4py                these alone

Only Python's own library is used: it runs before anything is installed.
"""

from __future__ import annotations

import argparse
import configparser
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent


def plain(name: str) -> str:
    """A package's name in the form in which names are compared (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def blocks(lock: str) -> dict[str, tuple[str, set[str]]]:
    """Package -> (its lines with hashes, who asks for it); pure."""
    found: dict[str, tuple[str, set[str]]] = {}
    for text in re.split(r"\n(?=[A-Za-z0-9])", lock.strip()):
        name = re.match(r"[A-Za-z0-9._-]+", text)
        if name is None:
            continue
        wanted = {plain(via) for via in re.findall(r"^    #(?: via)? +([A-Za-z0-9._-]+)(?:\[.*\])?$", text, re.MULTILINE)}
        lines = "\n".join(line for line in text.splitlines() if not line.startswith("    #"))
        found[plain(name[0])] = (lines, wanted)
    return found


def roots(setup: str, extras: list[str]) -> set[str]:
    """Packages that the package itself and these extras name; pure.

    Raises:
        SystemExit: an extra that is not there.
    """
    parser = configparser.ConfigParser()
    parser.read_string(setup)
    known = parser["options.extras_require"]
    unknown = [extra for extra in extras if extra not in known]
    if unknown:
        raise SystemExit(f"extras: no '{unknown[0]}' in setup.cfg; there are {', '.join(known)}")
    texts = [parser["options"]["install_requires"], *(known[extra] for extra in extras)]
    lines = [line.strip() for text in texts for line in text.splitlines()]
    return {plain(re.split(r"[<>=!~;\[ ]", line)[0]) for line in lines if line and not line.startswith("#")}


def closure(table: dict[str, tuple[str, set[str]]], wanted: set[str]) -> set[str]:
    """``wanted`` and all that they need; pure.

    Raises:
        SystemExit: the lock does not hold one of them.
    """
    missing = sorted(wanted - table.keys())
    if missing:
        raise SystemExit(f"the lock does not hold {missing[0]}: run scripts/lock.sh")
    found = set(wanted)
    while True:
        more = {name for name, (_, via) in table.items() if via & found} - found
        if not more:
            return found
        found |= more


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extras", default=None, help="of setup.cfg, with commas between")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="these packages alone")
    parser.add_argument("--without", nargs="*", default=[], metavar="NAME", help="not these packages")
    parser.add_argument("--lock", type=Path, default=HERE / "locks" / f"python{sys.version_info[0]}.{sys.version_info[1]}.txt")
    given = parser.parse_args()
    table = blocks(given.lock.read_text(encoding="utf-8"))
    if given.extras is None:
        names = {plain(name) for name in given.only}
        closure(table, names)
    else:
        extras = [extra.strip() for extra in given.extras.split(",") if extra.strip()]
        names = closure(table, roots((HERE.parent / "setup.cfg").read_text(encoding="utf-8"), extras))
    for name in sorted(names - {plain(name) for name in given.without}):
        print(table[name][0])


if __name__ == "__main__":
    main()
