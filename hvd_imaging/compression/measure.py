"""How large, how fast and how hungry a model is, as a user's own process would find it.

Every figure of time and memory comes from a fresh process that holds one model (`measure_worker`), and the models take
turns: what the machine does beside is spread over all of them. Call it on one rank while the others are idle or gone:
ranks that wait in MPI take time from what is measured.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .. import processor
from ..inference.exported import GOLDEN
from ..inference.predictors import RUN_CONFIG, RUN_WEIGHTS

REPEATS, RUNS = 3, 10
TIMEOUT_S = 600.0

# What a launcher or a user's shell sets would measure something else.
_DROPPED = ("TF_", "OMP_", "OMPI_", "PMIX_", "PMI_", "SLURM_", "HOROVOD_", "ONEDNN_", "OPENBLAS_", "MKL_", "KMP_")
# Written beside a model for people and checks; it runs without them.
_BESIDE = (".json", ".md", ".html", ".txt", ".sha256")

Progress = Callable[[int, int], None]


def measure_models(
    folders: Mapping[str, str | Path],
    threads: Mapping[str, int] | None = None,
    repeats: int = REPEATS,
    runs: int = RUNS,
    timeout: float = TIMEOUT_S,
    progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """Measure models side by side.

    Args:
        folders: name -> run folder or export folder, whatever `inference.predictors.open_predictor` opens. The caller has opened each:
            it is trusted.
        threads: key of the figure -> threads; None: {"one": 1, "all": cores of this process}.
        repeats: fresh processes for each model and number of threads.
        runs: timed calls in each of them, after a warm-up.
        timeout: seconds for one process.
        progress: called with (processes done, in all).

    Returns:
        name -> ``bytes``, ``gzip_bytes`` (see `sizes`), ``latency_ms`` {"one", "all"}: median over all timed calls,
        ``spread_ms`` {"one", "all"}: [quartile, quartile], ``load_ms``: median time to open it and answer the first time,
        ``peak_bytes``: largest memory of any of its processes, ``runs``: timed calls of each latency, ``threads``: as
        used, ``instruction_sets``: of the processor, ``kind``: of the predictor, and ``reason``: why figures are missing, "" otherwise. A model that fails is
        such a row; nothing is raised for it.
    """
    threads = dict(threads) if threads is not None else {"one": 1, "all": len(os.sched_getaffinity(0))}
    found: dict[str, list[tuple[str, dict[str, Any]]]] = {name: [] for name in folders}
    reasons: dict[str, str] = {}
    total, done = repeats * len(threads) * len(folders), 0
    for _ in range(repeats):
        for key, count in threads.items():
            for name, folder in folders.items():
                if name not in reasons:  # what has failed once is not waited for again
                    answer = run_worker(folder, count, runs, timeout)
                    if "reason" in answer:
                        reasons[name] = f"{answer['reason']} ({count} thread{'s' * (count != 1)})"
                    else:
                        found[name].append((key, answer))
                done += 1
                if progress is not None:
                    progress(done, total)
    return {
        name: {**sizes(folder), **summarize(found[name], threads), "reason": reasons.get(name, "")}
        for name, folder in folders.items()
    }


def summarize(answers: list[tuple[str, dict[str, Any]]], threads: Mapping[str, int]) -> dict[str, Any]:
    """One model's figures from what its processes have printed: (key of the number of threads, answer) each; pure."""
    times = {key: [t for found, answer in answers if found == key for t in answer["times_ms"]] for key in threads}
    return {
        "latency_ms": {key: statistics.median(values) if values else None for key, values in times.items()},
        "spread_ms": {
            key: statistics.quantiles(values, n=4, method="inclusive")[::2] if len(values) > 1 else None
            for key, values in times.items()
        },
        "runs": {key: len(values) for key, values in times.items()},
        "threads": dict(threads),
        "instruction_sets": list(processor.instruction_sets()),
        "load_ms": statistics.median(answer["load_ms"] for _, answer in answers) if answers else None,
        "peak_bytes": max((answer["peak_bytes"] for _, answer in answers), default=None),
        "kind": answers[0][1]["kind"] if answers else None,
    }


def run_worker(folder: str | Path, threads: int, runs: int, timeout: float = TIMEOUT_S) -> dict[str, Any]:
    """One fresh process: what it printed, or {"reason": why there are no figures}."""
    command = [
        sys.executable, "-m", "hvd_imaging.compression.measure_worker", str(folder), str(threads), str(runs),
    ]  # fmt: skip
    try:
        process = subprocess.run(
            command, env=clean_environment(os.environ), stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=timeout,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"reason": f"no answer within {timeout:g} s"}
    if process.returncode < 0:
        return {"reason": f"its process was ended by signal {-process.returncode}; too little memory ends one by signal 9"}
    try:
        answer = json.loads((process.stdout.strip().splitlines() or [""])[-1])  # noqa: TID251 - from a process of ours
        return {"reason": str(answer["reason"])} if "reason" in answer else answer
    except (ValueError, TypeError):
        last = (process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        return {"reason": f"its process failed: {last[:300]}"}


def clean_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """``environ`` without settings of TensorFlow, its libraries and launchers, which the worker sets itself; pure."""
    kept = {name: value for name, value in environ.items() if not name.startswith(_DROPPED)}
    # The worker must be this very package, wherever it lies and whatever the current folder is.
    here = str(Path(__file__).resolve().parents[2])
    kept["PYTHONPATH"] = os.pathsep.join([here, *filter(None, [environ.get("PYTHONPATH")])])
    return kept


# --- sizes ----------------------------------------------------------------------------------------------------------


def model_files(folder: str | Path) -> list[Path]:
    """What is needed to run the model, sorted: of a run folder the best weights, of an export all but the files that
    describe it (metadata, check sums, parity, golden patches, card)."""
    path = Path(folder)
    if (path / RUN_CONFIG).is_file():
        return [path / RUN_WEIGHTS]
    tops = [item for item in path.iterdir() if item.is_dir() or (item.suffix not in _BESIDE and item.name != GOLDEN)]
    return sorted(item for top in tops for item in ([top] if top.is_file() else top.rglob("*")) if item.is_file())


def sizes(folder: str | Path) -> dict[str, int | None]:
    """``bytes`` of `model_files`, and ``gzip_bytes``: each compressed by itself at level 9; None if none can be read."""
    try:
        files = model_files(folder)
        if not files:
            return {"bytes": None, "gzip_bytes": None}
        return {"bytes": sum(f.stat().st_size for f in files), "gzip_bytes": sum(map(gzip_size, files))}
    except OSError:
        return {"bytes": None, "gzip_bytes": None}


def gzip_size(path: str | Path) -> int:
    """Bytes of ``gzip -9 --no-name``: neither name nor time are stored, so the same content has the same size."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    return sum(len(packer.compress(piece)) for piece in _pieces(path)) + len(packer.flush())


def _pieces(path: str | Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            yield piece
