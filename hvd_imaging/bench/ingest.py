"""`bench ingest`: from an archive of uncompressed CT to a dataset, beside what only reads the archive; and many small inputs.

The peers do less: pydicom decodes one file after another, SimpleITK sorts and reads a series, dicom2nifti also writes a NIfTI
file. Ours sorts, checks, windows, finds a stored type, compresses, hashes twice, and writes shards. All read the same made series of
unequal lengths from a warm page cache, in processes of their own, in turn; imports are not counted. Rates are bytes of pixels.
`ingest_small` has the small inputs.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from ..sources.phantom import make_large_series
from . import ingest_small
from .processes import clean_environment, run_at_once
from .report import Figure, Row, ratio

PEERS = {"pydicom": "pydicom", "SimpleITK": "SimpleITK", "dicom2nifti": "dicom2nifti"}
SLICES = (120, 60, 160, 80, 140, 40, 100, 60, 120, 80)
SIDE = 512


def measure(quick: bool = False, on_run: Callable[[str], None] | None = None) -> tuple[list[Row], list[Figure]]:
    """Make the archive and time all systems on it.

    Raises:
        HvdImagingError: a process failed.
    """
    rounds, slices = (1, SLICES[:4]) if quick else (5, SLICES)
    say = on_run or (lambda text: None)
    with tempfile.TemporaryDirectory(prefix="hvd_imaging_bench.") as name:
        folder = Path(name)
        say(f"making {len(slices)} series of {SIDE} x {SIDE}")
        size = sum(make_large_series(folder / "archive", i, (count, SIDE, SIDE)) for i, count in enumerate(slices))
        systems = [peer for peer, module in PEERS.items() if importlib.util.find_spec(module)] + ["ours 1", "ours 2"]
        rates: dict[str, list[float]] = {system: [] for system in systems}
        for turn in range(rounds):
            for system in systems if turn % 2 == 0 else systems[::-1]:
                say(f"round {turn + 1} of {rounds}: {system}")
                rates[system].append(round(size / 1e6 / _seconds(system, folder), 1))
        rows = {system: _row(system, tuple(rates[system])) for system in rates}
        shutil.rmtree(folder / "archive")
        small, small_figures = ingest_small.measure(folder, quick, say)
    for peer in PEERS:
        rows.setdefault(peer, Row(_CASE, peer, "pixels", "MB/s", reason=f"not installed: {peer}"))
    return [*rows.values(), *small], [*figures(rows), *small_figures]


_CASE = f"CT, {SIDE} x {SIDE}, uncompressed"


def _row(system: str, runs: tuple[float, ...]) -> Row:
    kind, _, ranks = system.partition(" ")
    name = f"hvd_imaging, {ranks} rank{'s' * (ranks != '1')}" if kind == "ours" else kind
    return Row(_CASE, name, "pixels", "MB/s", runs)


def figures(rows: Mapping[str, Row]) -> list[Figure]:
    """One rank against decoding alone, and two ranks against one; pure."""
    return [
        Figure("one rank / pydicom's pixel arrays alone", ratio(rows["ours 1"], rows["pydicom"]), 0.7, "higher"),
        Figure("two ranks / one rank", ratio(rows["ours 2"], rows["ours 1"]), 1.8, "higher"),
    ]


def _seconds(system: str, folder: Path) -> float:
    kind, _, ranks = system.partition(" ")
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    command = [sys.executable, "-m", "hvd_imaging.bench.ingest_worker", kind, str(folder / "archive"), str(out)]
    environ = clean_environment(os.environ)
    if ranks:
        # One core a rank, also for a rank alone: more ranks then mean more cores.
        command = ["mpirun", "-np", ranks, "--bind-to", "core", "--oversubscribe", *command]
        environ |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMPI_MCA_mpi_yield_when_idle": "1"}
    (text,) = run_at_once([command], environ, 600)
    return float(json.loads(text.splitlines()[-1]))
