"""`bench ingest`, many small inputs: the whole command, from its start to its end, beside what only reads the same files.

Volumes are NIfTI of the sizes of a hippocampus with a mask each, in the layout of the Medical Segmentation Decathlon; images are
single-frame DICOM, or NIfTI. All are smooth with noise. Time is that of the wall; processor time tells more on a busy machine.
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np

from ..sources.phantom import make_single_images
from .processes import clean_environment, run_at_once
from .report import Figure, Row, ratio

VOLUMES, IMAGES, LARGE = 208, 1000, 50
SIDES = ((24, 47), (40, 59), (31, 43))
"""Least and most voxels along D, H, W of a small volume."""
GOALS = {"many small volumes": 10.0, "many small images": 8.0}
"""Seconds."""


@dataclass(frozen=True)
class Case:
    """What is ingested: the folder below the bench's own, options of `hvd-imaging ingest`, and the library that reads the files."""

    name: str
    folder: str
    patch: tuple[int, int, int]
    peer: str


CASES = (
    Case("many small volumes", "volumes", (40, 56, 40), "nibabel"),
    Case("many small images", "images", (1, 128, 128), "pydicom"),
    Case("many small images, NIfTI", "slices", (1, 128, 128), "nibabel"),
    Case("images of 1000 x 900, patch 1 x 128 x 128", "large", (1, 128, 128), "nibabel"),
    Case("images of 1000 x 900, patch 1 x 1024 x 1024", "large", (1, 1024, 1024), "nibabel"),
)


def measure(folder: Path, quick: bool, say: Callable[[str], None]) -> tuple[list[Row], list[Figure]]:
    """Make the inputs in ``folder`` and time all systems on them; ``quick``: a sixteenth of them, once.

    Raises:
        HvdImagingError: a process failed.
    """
    part, rounds = (16, 1) if quick else (1, 3)
    say("making many small inputs")
    make_volumes(folder / "volumes", VOLUMES // part)
    make_single_images(folder / "images", IMAGES // part, 256)
    make_slices(folder / "slices", IMAGES // part, (256, 256))
    make_slices(folder / "large", LARGE // part, (1000, 900))
    runs: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for turn in range(rounds):
        for case in CASES:
            systems = [system for system in (case.peer, "ours") if system == "ours" or importlib.util.find_spec(system)]
            for system in systems if turn % 2 == 0 else systems[::-1]:
                say(f"round {turn + 1} of {rounds}: {case.name}: {system}")
                runs.setdefault((case.name, system), []).append(_seconds(case, system, folder))
    return rows(runs), [] if quick else figures(runs)


def rows(runs: Mapping[tuple[str, str], Sequence[tuple[float, float]]]) -> list[Row]:
    """Time and processor time of each case and system; pure.

    Args:
        runs: (case, system) -> (seconds, seconds of processor) of each run.
    """
    found = []
    for case in CASES:
        for system in (case.peer, "ours"):
            name = "hvd_imaging, 1 process" if system == "ours" else f"{system}, reading alone"
            measured = runs.get((case.name, system), ())
            for place, metric in enumerate(("time", "processor time")):
                reason = "" if measured else f"not installed: {system}"
                found.append(Row(case.name, name, metric, "s", tuple(round(run[place], 2) for run in measured), reason))
    return found


def figures(runs: Mapping[tuple[str, str], Sequence[tuple[float, float]]]) -> list[Figure]:
    """Times against their goals, and the large patch against the small one; pure."""
    ours = {(row.case, row.metric): row for row in rows(runs) if row.system.startswith("hvd_imaging")}
    result = [Figure(f"{case}, seconds", ours[case, "time"].value, goal, "lower") for case, goal in GOALS.items()]
    small, large = (ours[case.name, "processor time"] for case in CASES[-2:])
    name = "images of 1000 x 900: processor time, patch 1 x 1024 x 1024 / patch 1 x 128 x 128"
    return [*result, Figure(name, ratio(large, small), 1.0, "lower")]


def make_volumes(folder: Path, count: int, seed: int = 0) -> None:
    """Write ``count`` volumes (D, H, W) of `SIDES`, 1 mm, and masks of two classes, with ``dataset.json``."""
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    entries = []
    for index in range(count):
        random = np.random.default_rng([seed, index])
        shape = tuple(int(random.integers(low, high + 1)) for low, high in SIDES)
        radius = np.sqrt(sum(np.linspace(-1.5, 1.5, n).reshape([-1 if a == axis else 1 for a in range(3)]) ** 2 for axis, n in enumerate(shape)))
        mask = np.where(radius < 0.5, 1 + (np.arange(shape[0]) > shape[0] // 2)[:, None, None], 0)
        name = f"case_{index:04d}.nii.gz"
        _save(folder / "imagesTr" / name, _smooth(shape, random))
        _save(folder / "labelsTr" / name, mask.astype(np.uint8))
        entries.append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
    description = {"modality": {"0": "MRI"}, "labels": {"0": "background", "1": "front", "2": "back"}, "training": entries}
    (folder / "dataset.json").write_text(json.dumps(description), encoding="utf-8")


def make_slices(folder: Path, count: int, sides: tuple[int, int], seed: int = 0) -> None:
    """Write ``count`` NIfTI images of one slice."""
    folder.mkdir(parents=True)
    for index in range(count):
        _save(folder / f"image_{index:04d}.nii.gz", _smooth((1, *sides), np.random.default_rng([seed, index])))


def _smooth(shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    """int16: a product of slow waves with noise."""
    waves = [1.5 + np.sin(np.linspace(0, random.uniform(2, 9), n) + random.uniform(0, 6)) for n in shape]
    return np.rint(100 * np.einsum("i,j,k->ijk", *waves) + random.normal(0, 15, shape)).astype(np.int16)


def _save(path: Path, array: np.ndarray) -> None:
    nibabel.save(nibabel.Nifti1Image(array.T, np.eye(4)), path)


def _seconds(case: Case, system: str, folder: Path) -> tuple[float, float]:
    """Seconds, and seconds of processor, of one process."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    source = str(folder / case.folder)
    if system == "ours":
        command = ["hvd_imaging.cli.main", "ingest", source, str(out / "dataset"), "--set", f"shards.patch={list(case.patch)}"]
        command += [] if case.folder == "volumes" else ["--task", "unlabelled"]
    else:
        command = ["hvd_imaging.bench.ingest_worker", system, source, str(out)]
    before, start = _processor(), time.perf_counter()
    run_at_once([[sys.executable, "-m", *command]], clean_environment(os.environ), 600)
    return time.perf_counter() - start, _processor() - before


def _processor() -> float:
    """Seconds of processor of the processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
