"""One process of `measure`: opens one model, times its calls, and prints the figures as JSON.

``python -m hvd_imaging.compression.measure_worker PATH THREADS RUNS``
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

WARM_UP = 2


def peak_bytes() -> int:
    """The largest memory that this process had at once (resident, shared libraries included).

    Of this program's own image: getrusage's ru_maxrss begins with the memory of the process that started it (Linux keeps
    it over exec), so a small program that a large one starts would be reported as large.
    """
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(path: str, threads: int, runs: int) -> dict[str, Any]:
    """Times of ``runs`` calls on one seeded patch of the model's own size, after a warm-up.

    Returns:
        ``kind``, ``load_ms`` (open and first answer), ``times_ms`` of each call, ``peak_bytes``.

    Raises:
        HvdImagingError: the model cannot be opened.
    """
    import numpy as np

    from ..inference.predictors import open_predictor

    began = time.perf_counter()
    # Who measures has opened the model before.
    predict = open_predictor(path, trusted=True)
    spec = predict.spec
    patch = np.random.default_rng(0).random((1, *spec.patch, spec.channels), np.float32)
    predict(patch)
    load_ms = (time.perf_counter() - began) * 1e3
    for _ in range(WARM_UP):
        predict(patch)
    times = []
    for _ in range(runs):
        before = time.perf_counter()
        predict(patch)
        times.append((time.perf_counter() - before) * 1e3)
    return {"kind": predict.kind, "load_ms": load_ms, "times_ms": times, "peak_bytes": peak_bytes()}


def main() -> None:
    """Print figures, or the reason why there are none, as the last line of stdout."""
    path, threads, runs = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    # So many cores as threads: a library that counts cores for itself cannot take more.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    from .. import bootstrap
    from ..errors import HvdImagingError

    bootstrap.prepare(threads)
    try:
        answer = measure(path, threads, runs)
    except HvdImagingError as error:
        answer = {"reason": str(error)}
    except (ImportError, MemoryError, OSError, RuntimeError, ValueError) as error:
        lines = str(error).splitlines() or [""]
        answer = {"reason": f"{type(error).__name__}: {lines[0][:300]}"}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
