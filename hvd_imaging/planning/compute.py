"""Nodes for a wanted training time, from a measured pace and the scaling model: pure."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from .scaling import Job, Link, exchange_seconds, step_seconds

MONTH_H = 365.25 * 24 / 12


@dataclass(frozen=True)
class Load:
    """What is to be computed.

    Attributes:
        job: a step, measured.
        steps: of a training today.
        hours: wanted for one training.
        trainings: a month.
        ranks_per_node: of a node.
        busy: share of the time that machines can be kept busy.
        sample_bytes: read for one sample.
    """

    job: Job
    steps: int
    hours: float
    trainings: float
    ranks_per_node: int = 1
    busy: float = 0.7
    sample_bytes: float = 0.0


@dataclass(frozen=True)
class Machines:
    """The answer.

    Attributes:
        nodes: needed; None if no number of nodes reaches the wanted time.
        hours: of a training on those that one training takes.
        nodes_of_one: that one training takes.
        efficiency: of its ranks.
        node_hours: a month.
        limit: why ``nodes`` is None, or what decided.
        read_bps: from storage while ``nodes`` train, bytes/s.
        exchange_bps: over a node's link, mean, bytes/s.
    """

    nodes: int | None
    hours: float
    nodes_of_one: int
    efficiency: float
    node_hours: float
    limit: str
    read_bps: float
    exchange_bps: float


def training_hours(load: Load, nodes: int, link: Link, inside: Link, growth: float = 1.0) -> float:
    """h of a training on ``nodes``; ``growth``: of the number of samples."""
    ranks = min(nodes * load.ranks_per_node, load.job.samples)
    return load.steps * growth * step_seconds(load.job, ranks, load.ranks_per_node, link, inside) / 3600


def machines(load: Load, link: Link, inside: Link, growth: float = 1.0) -> Machines:
    """The fewest nodes that do a training in the wanted time, and all trainings of a month."""
    most = max(load.job.samples // load.ranks_per_node, 1)
    times = {nodes: training_hours(load, nodes, link, inside, growth) for nodes in range(1, most + 1)}
    one = next((nodes for nodes, hours in times.items() if hours <= load.hours), None)
    taken = one or min(times, key=lambda nodes: (times[nodes], nodes))
    hours = times[taken]
    node_hours = load.trainings * hours * taken
    for_all = math.ceil(node_hours / (MONTH_H * load.busy))
    ranks = min(taken * load.ranks_per_node, load.job.samples)
    step = step_seconds(load.job, ranks, load.ranks_per_node, link, inside)
    exchange = exchange_seconds(load.job, ranks, load.ranks_per_node, link, inside)
    if one is None:
        limit = f"{load.hours:g} h are not reached with a batch of {load.job.samples}: {hours:.1f} h on {taken} nodes is the shortest; a larger batch takes more"
    elif for_all > one:
        limit = f"the number of trainings decides: one takes {one}, all of a month {for_all}"
    else:
        limit = "the wanted time decides"
    return Machines(
        nodes=max(one, for_all) if one is not None else None, hours=hours, nodes_of_one=taken,
        efficiency=times[1] / (taken * hours), node_hours=node_hours, limit=limit,
        read_bps=max(taken, for_all) / taken * load.sample_bytes * load.job.samples / step,
        exchange_bps=2 * load.job.message_bytes * (ranks > load.ranks_per_node) / step if exchange else 0.0,
    )  # fmt: skip


def on_one(load: Load, growth: float = 1.0) -> Machines:
    """The same on a single machine, however long it takes."""
    nothing = Link(0.0, math.inf)
    return machines(replace(load, hours=math.inf), nothing, nothing, growth)
