"""Run folders with all that a training, its monitor and an evaluation leave, made at once."""

from __future__ import annotations

import json
from pathlib import Path

from datasets import make_dataset
from runs import make_run

from hvd_imaging.training.events import EventLog


def make_reported(folder: Path) -> Path:
    """Two runs of one dataset, on 1 and on 2 ranks, with all that a training leaves."""
    make_dataset(folder / "data", samples=3)
    for name, ranks in (("alone", 1), ("two <b>ranks", 2)):
        run = make_run(folder / name, folder / "data")
        (run / "events.jsonl").unlink()
        log, hosts = EventLog(run), [f"n{rank}" for rank in range(ranks)]
        about = {"world_size": ranks, "steps_per_epoch": 5, "last_step": 20, "hosts": hosts, "job_id": "17" if ranks > 1 else None}
        log.write("start", step=0, **about)
        for epoch in range(4):
            log.write("ranks", epoch=epoch, step=5 * epoch + 5, hosts=hosts, input_seconds=[0.1] * ranks, compute_seconds=[4.0] * ranks,
                      exchange_seconds=[0.5] * ranks)  # fmt: skip
            if epoch == 2:
                log.write("straggler", epoch=2, step=15, rank=ranks - 1, host=hosts[-1], ratio=1.5)
                log.write("resume", step=15, restart_count=1, **about)
            log.write("epoch", epoch=epoch, step=5 * epoch + 5, world_size=ranks, examples=20, loss=1 / (epoch + 1), val_loss=1.2, val_dice=0.2 * epoch, learning_rate=1e-3, seconds=5.0,
                      samples_per_second=4.0 * ranks * 0.9 ** (ranks - 1), input_seconds=0.1, compute_seconds=4.0, exchange_seconds=0.5, best=True)  # fmt: skip
            log.write("checkpoint", step=5 * epoch + 5)
        log.write("end", step=20, weights_sha256="ab" * 32, stopped_early=False)
        (run / "ranks").mkdir()
        for rank in range(ranks):
            lines = [
                {"time": f"2026-11-24T01:0{minute}:00+00:00", "seconds": 60, "rank": rank, "host": f"n{rank}", "cpu": 0.9, "rss_bytes": 2**30, "host_cpu": 0.5,
                 "host_memory": 0.1, "watts": 120.0, "watts_from": "estimate", "net_in_bps": 1e6, "net_out_bps": 0, "disk_read_bps": 0, "disk_write_bps": 0, "gpu": []}
                for minute in range(3)
            ]  # fmt: skip
            (run / f"ranks/monitor-{rank:05d}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        report = {"mean": {"dice": {"value": 0.7, "interval": [0.6, 0.8], "count": 3, "per_class": {"ball": {"value": 0.7, "interval": None, "count": 3}}}},
                  "cases": [{}, {}, {}], "confidence": {"level": 0.95}}  # fmt: skip
        (run / "evaluation-test.json").write_text(json.dumps(report))
    return folder
