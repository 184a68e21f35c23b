"""Samples of a run: ``ranks/monitor-00000.jsonl``, one file a rank, one JSON object a line, only ever appended to."""

from __future__ import annotations

import datetime
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..texts import parse_json

FOLDER = "ranks"
_NUMBERS = (
    "seconds", "cpu", "rss_bytes", "disk_read_bps", "disk_write_bps", "host_cpu", "host_memory", "net_in_bps", "net_out_bps",
    "rdma_in_bps", "rdma_out_bps", "watts",
)  # fmt: skip
LINES = 8640
"""After so many (a day at 10 s) the pause between two samples doubles: a run of a month leaves some MB a rank."""


def path_of(run_dir: Path, rank: int) -> Path:
    """The file of one rank."""
    return run_dir / FOLDER / f"monitor-{rank:05d}.jsonl"


def pause(seconds: float, lines: int) -> float:
    """s to the next sample after ``lines`` of them. Pure."""
    return seconds * 2 ** (lines // LINES)


def read(run_dir: str | Path) -> list[dict[str, Any]]:
    """All whole samples of all ranks, in the order of time; half lines of killed processes are left out."""
    found = []
    for path in sorted((Path(run_dir) / FOLDER).glob("monitor-*.jsonl")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                sample = parse_json(line)
            except ValueError:
                continue
            if _is_sample(sample):
                found.append(sample)
    return sorted(found, key=lambda sample: sample["time"])


def _is_sample(sample: Any) -> bool:
    if not (isinstance(sample, dict) and isinstance(sample.get("rank"), int)):
        return False
    try:
        when = datetime.datetime.fromisoformat(sample["time"])
    except (KeyError, TypeError, ValueError):
        return False
    gpus = sample.get("gpu") or []
    if not isinstance(gpus, list) or not all(isinstance(gpu, dict) and isinstance(gpu.get("util"), int | float) for gpu in gpus):
        return False
    values = [sample[key] for key in _NUMBERS if sample.get(key) is not None]
    return when.tzinfo is not None and all(isinstance(value, int | float) and math.isfinite(value) for value in values)


@dataclass(frozen=True)
class RankUse:
    """Means and peaks of one rank.

    Attributes:
        cpu: cores that it kept busy.
        peak_bytes: resident memory.
        disk_read_bytes, disk_write_bytes: in all.
        gpu: busy share of its host's GPUs, None without any.
    """

    rank: int
    host: str
    samples: int
    cpu: float
    peak_bytes: int
    disk_read_bytes: float
    disk_write_bytes: float
    gpu: float | None


@dataclass(frozen=True)
class HostUse:
    """Means of one host.

    Attributes:
        cpu, memory: busy shares, 0..1.
        net_bytes: received and sent by its cards.
        rdma_bytes: by InfiniBand and RoCE adapters, None without any.
        watt_hours: energy while the run was on.
        known: how the power is known: rapl, nvml, estimate.
        seconds: that were watched.
    """

    host: str
    cpu: float
    memory: float
    net_bytes: float
    rdma_bytes: float | None
    watt_hours: float
    known: str
    seconds: float


@dataclass(frozen=True)
class Use:
    """What a run took."""

    ranks: tuple[RankUse, ...]
    hosts: tuple[HostUse, ...]

    @property
    def watt_hours(self) -> float:
        """Of all hosts."""
        return sum(host.watt_hours for host in self.hosts)


def summary(samples: Iterable[Mapping[str, Any]]) -> Use:
    """Means, peaks and sums over a run. Each sample speaks for the time since the one before of its file; pure."""
    by_rank: dict[int, list[tuple[Mapping[str, Any], float]]] = {}
    last: dict[int, datetime.datetime] = {}
    for sample in samples:
        rank, when = sample["rank"], datetime.datetime.fromisoformat(sample["time"])
        # Between two starts of a run nothing was taken: `seconds` is of the sampler's own clock.
        gap = (when - last[rank]).total_seconds() if rank in last else 0.0
        span = min(gap, float(sample["seconds"])) if sample.get("seconds") and gap else float(sample.get("seconds") or gap)
        last[rank] = when
        by_rank.setdefault(rank, []).append((sample, span))
    ranks: list[RankUse] = []
    hosts: dict[str, list[tuple[Mapping[str, Any], float]]] = {}
    for rank, rows in sorted(by_rank.items()):
        gpu = [card["util"] for sample, _ in rows for card in sample.get("gpu") or ()]
        ranks.append(RankUse(
            rank, str(rows[-1][0].get("host", "")), len(rows), _mean(rows, "cpu"), max(int(sample.get("rss_bytes") or 0) for sample, _ in rows),
            _total(rows, "disk_read_bps"), _total(rows, "disk_write_bps"), statistics.mean(gpu) if gpu else None,
        ))  # fmt: skip
        for sample, span in rows:
            if sample.get("watts") is not None:
                hosts.setdefault(str(sample.get("host", "")), []).append((sample, span))
    return Use(
        tuple(ranks),
        tuple(
            HostUse(
                host, _mean(rows, "host_cpu"), _mean(rows, "host_memory"), _total(rows, "net_in_bps") + _total(rows, "net_out_bps"),
                _total(rows, "rdma_in_bps") + _total(rows, "rdma_out_bps") if any(sample.get("rdma_in_bps") is not None for sample, _ in rows) else None,
                _total(rows, "watts") / 3600, str(rows[-1][0].get("watts_from", "")), sum(span for _, span in rows),
            )
            for host, rows in sorted(hosts.items())
        ),
    )  # fmt: skip


def _mean(rows: Sequence[tuple[Mapping[str, Any], float]], key: str) -> float:
    known = [(float(sample[key]), span) for sample, span in rows if sample.get(key) is not None]
    total = sum(span for _, span in known)
    if not total:
        return statistics.mean(value for value, _ in known) if known else 0.0
    return sum(value * span for value, span in known) / total


def _total(rows: Sequence[tuple[Mapping[str, Any], float]], key: str) -> float:
    return sum(float(sample[key]) * span for sample, span in rows if sample.get(key) is not None)
