"""One rank of a measured training: the real `Trainer` on a made dataset; rank 0 prints the times of its steps as JSON.

``training_worker CONFIG.yaml RUN_DIR WARMUP``: the steps after WARMUP count.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from .slow_link import DEVICE


def main() -> None:
    """Train by the configuration, and print ``{"steps", "input", "compute", "exchange", "save", "guard", ...}`` (s)."""
    path, run_dir, warmup = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    from .. import bootstrap
    from ..config import RunConfig, load

    config = load(RunConfig, path)
    os.environ.update(bootstrap.horovod_variables(config.parallel.fusion_mb, config.parallel.cycle_ms))
    bootstrap.prepare(config.threads_per_rank)
    bootstrap.load_tensorflow()
    from ..parallel.horovod import Horovod
    from ..training.events import read_events
    from ..training.loop import Trainer
    from ..training.requests import Requests
    from ..training.start import Start

    hvd = Horovod()
    found: dict[str, Any] = {name: [] for name in ("steps", "input", "compute", "exchange", "save", "guard")}
    with Requests() as requests:
        trainer = Trainer(config, run_dir, hvd, False, None, requests, Start())
        marks: list[tuple[float, Any]] = []
        sent: list[int] = []
        take_in, save, guard = trainer.take_in, trainer.save, trainer.check_replicas

        def after_step(outcome: Any, rate: float) -> None:
            take_in(outcome, rate)
            marks.append((time.perf_counter(), outcome))
            sent.append(_sent())

        def timed(name: str, act: Any) -> Any:
            def run(*args: Any) -> None:
                began = time.perf_counter()
                act(*args)
                found[name].append(time.perf_counter() - began)

            return run

        trainer.take_in = after_step  # type: ignore[method-assign]
        trainer.save = timed("save", save)  # type: ignore[method-assign]
        trainer.check_replicas = timed("guard", guard)  # type: ignore[method-assign]
        waits: list[float] = []
        stream = trainer.stream

        def watched() -> Any:
            inner = stream()
            while True:
                began = time.perf_counter()
                try:
                    batch = next(inner)
                except StopIteration:
                    return
                waits.append(time.perf_counter() - began)
                yield batch

        trainer.stream = watched  # type: ignore[method-assign]
        try:
            trainer.run()
        finally:
            trainer.close()
    micro = trainer.cut.micro
    found["steps"] = [b[0] - a[0] for a, b in itertools.pairwise(marks)][max(warmup - 1, 0) :]
    found["compute"] = [outcome.compute_s for _, outcome in marks][warmup:]
    found["exchange"] = [outcome.exchange_s for _, outcome in marks][warmup:]
    found["input"] = [sum(waits[i * micro : (i + 1) * micro]) for i in range(len(marks))][warmup:]
    found["sent"] = [b - a for a, b in itertools.pairwise(sent)][max(warmup - 1, 0) :]
    if trainer.monitor.samples:
        found["sample_cpu"] = [trainer.monitor.cpu_s / trainer.monitor.samples]
    if hvd.world.is_root:
        found["compression"] = [e for e in read_events(run_dir) if e["event"] == "compression"]
        found["balance"] = [e for e in read_events(run_dir) if e["event"] == "balance"]
        print(json.dumps(found))


def _sent() -> int:
    """Bytes that have left this host by the made cable so far; 0 without it."""
    try:
        return int(Path(f"/sys/class/net/{DEVICE}/statistics/tx_bytes").read_text(encoding="ascii"))
    except OSError:
        return 0


if __name__ == "__main__":
    main()
