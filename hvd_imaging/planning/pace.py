"""What an earlier run measured: time of a sample, and the network between its ranks. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .scaling import Job, Link

LATENCY_S = 50e-6
"""Of a small message between nodes, where nothing else is known."""
GUESSED = Link(LATENCY_S, 117e6)
"""1 Gbit/s, without the headers of TCP."""


@dataclass(frozen=True)
class Pace:
    """Of a run.

    Attributes:
        job: a step with the batch that was asked for.
        link: between its ranks.
        guessed: the link is not measured: it had one rank.
        ranks: that it had.
    """

    job: Job
    link: Link
    guessed: bool
    ranks: int


def measured_pace(events: Sequence[Mapping[str, Any]], batch: int, message_bytes: float) -> Pace | None:
    """The pace of a run's last epoch; None without one."""
    epochs = [event for event in events if event.get("event") == "epoch" and event.get("examples") and event.get("compute_seconds")]
    steps = [event["steps_per_epoch"] for event in events if event.get("steps_per_epoch")]
    if not epochs or not steps:
        return None
    last, ranks = epochs[-1], int(epochs[-1].get("world_size", 1))
    job = Job(sample_s=last["compute_seconds"] * ranks / last["examples"], samples=batch, message_bytes=message_bytes)
    exchange = last["exchange_seconds"] / steps[-1]
    rounds = 2 * (ranks - 1)
    if ranks == 1 or exchange <= rounds * LATENCY_S:
        return Pace(job, GUESSED, True, ranks)
    return Pace(job, Link(LATENCY_S, rounds / ranks * message_bytes / (exchange - rounds * LATENCY_S)), False, ranks)
