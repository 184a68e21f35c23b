"""`bench step`: one training step of a small 3D U-Net, ours against a hand-written Keras loop and TensorFlow as it comes.

Every system runs in processes of its own on one core, the systems in turn, so that a noisy moment hits all alike.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import HvdImagingError
from .report import Figure, Row, ratio

CASE = "3D U-Net, 48^3, batch 2, 1 core"
AVX2 = CASE + ", as without AVX-512"


@dataclass(frozen=True)
class System:
    """What one process measures.

    Attributes:
        name: for people.
        case: rows are compared inside one case.
        loop: "ours" or "keras" (step_worker.py).
        environ: set before the process starts.
        steps: timed steps, (quick, full).
    """

    name: str
    case: str
    loop: str
    environ: dict[str, str]
    steps: tuple[int, int]


# TensorFlow turns oneDNN on by itself where it finds AVX-512 only. So a machine without is what these two settings make
# of any: TensorFlow's default there (off), and oneDNN's kernels held to AVX2.
SYSTEMS = {
    "ours": System("hvd_imaging", CASE, "ours", {}, (6, 10)),
    "keras": System("Keras loop, oneDNN on", CASE, "keras", {"TF_ENABLE_ONEDNN_OPTS": "1"}, (6, 10)),
    "ours_avx2": System("hvd_imaging", AVX2, "ours", {"ONEDNN_MAX_CPU_ISA": "AVX2"}, (3, 6)),
    "plain_avx2": System("Keras loop, TensorFlow as it comes", AVX2, "keras", {"TF_ENABLE_ONEDNN_OPTS": "0"}, (2, 3)),
}


def measure(quick: bool = False, on_run: Callable[[str], None] | None = None) -> tuple[list[Row], list[Figure]]:
    """Time the steps.

    Args:
        quick: fewer runs and steps (under a minute).
        on_run: told before each process.

    Raises:
        HvdImagingError: a process failed.
    """
    rounds = 1 if quick else 3
    times: dict[str, list[float]] = {key: [] for key in SYSTEMS}
    for turn in range(rounds):
        # The order turns round, so that no system always runs in another's wake.
        for key in list(SYSTEMS) if turn % 2 == 0 else list(reversed(SYSTEMS)):
            system = SYSTEMS[key]
            if on_run:
                on_run(f"round {turn + 1} of {rounds}: {system.name} ({system.case})")
            times[key] += run(system, system.steps[0 if quick else 1])
    rows = {
        key: Row(system.case, system.name, "step time", "ms", tuple(round(1e3 * t, 2) for t in times[key]))
        for key, system in SYSTEMS.items()
    }
    return list(rows.values()), figures(rows)


def figures(rows: Mapping[str, Row]) -> list[Figure]:
    """Our step against both peers; pure."""
    return [
        Figure("step time / hand-written Keras loop, oneDNN on", ratio(rows["ours"], rows["keras"]), 1.05, "lower"),
        Figure(
            "step time / TensorFlow as it comes without AVX-512",
            ratio(rows["ours_avx2"], rows["plain_avx2"]),
            0.25,
            "lower",
        ),
    ]


def run(system: System, steps: int) -> Sequence[float]:
    """Seconds of each step in a fresh process."""
    dropped = ("TF_", "OMP_", "OMPI_", "ONEDNN_")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(dropped)} | system.environ
    command = [sys.executable, "-m", "hvd_imaging.bench.step_worker", system.loop, str(steps)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or "no message").splitlines()[-1]
        raise HvdImagingError(f"bench step: {system.name} failed: {reason}")
    return json.loads(done.stdout.splitlines()[-1])
