"""How long a training step takes on N ranks, from what one rank and the network were measured to do. Pure.

The alpha-beta model (Thakur et al., 2005, "Optimization of collective communication operations in MPICH"): a message of n bytes takes
``latency + n / bytes_per_s``. The step of data parallelism is the slowest rank's computation, then the sum of the gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..errors import ConfigError

Algorithm = Literal["ring", "tree", "auto"]


@dataclass(frozen=True)
class Link:
    """What passes between two ranks.

    Attributes:
        latency_s: of an empty message (alpha), s.
        bytes_per_s: of a large one (1 / beta).
    """

    latency_s: float
    bytes_per_s: float

    def seconds(self, count: float) -> float:
        """s for one message of ``count`` bytes."""
        return self.latency_s + count / self.bytes_per_s


@dataclass(frozen=True)
class Job:
    """One step of a training.

    Attributes:
        sample_s: computation of one sample on one rank, s.
        fixed_s: of a step that no other rank shortens: update of the weights, start of the graph, s.
        samples: global batch.
        message_bytes: gradients, bytes.
        messages: groups that they travel in.
        overlap: share of the exchange that hides behind the computation, 0..1.
    """

    sample_s: float
    samples: int
    message_bytes: float
    fixed_s: float = 0.0
    messages: int = 1
    overlap: float = 0.0


def allreduce_seconds(count: float, ranks: int, link: Link, algorithm: Algorithm = "auto") -> float:
    """s to sum ``count`` bytes over ``ranks``.

    Ring: 2 (p - 1) messages of n / p bytes each. Tree: 2 log2 p messages of n bytes, fewer but larger ones. ``auto``: the faster one,
    as MPI libraries choose by the size.
    """
    if ranks < 2 or count <= 0:
        return 0.0
    ring = 2 * (ranks - 1) * link.seconds(count / ranks)
    tree = 2 * math.ceil(math.log2(ranks)) * link.seconds(count)
    return {"ring": ring, "tree": tree, "auto": min(ring, tree)}[algorithm]


def compute_seconds(job: Job, ranks: int, slowdown: float = 1.0) -> float:
    """s of the busiest rank's computation: samples cannot be halved."""
    return job.fixed_s + math.ceil(job.samples / ranks) * job.sample_s * slowdown


def exchange_seconds(
    job: Job, ranks: int, ranks_per_node: int, link: Link, inside: Link, algorithm: Algorithm = "auto"
) -> float:
    """s of the gradients' sum: inside each node first, then between the nodes, where ranks of several nodes share their link.

    Args:
        link: between nodes. inside: between ranks of a node.
    """
    nodes = math.ceil(ranks / ranks_per_node)
    part = job.message_bytes / job.messages
    within = allreduce_seconds(part, min(ranks, ranks_per_node), inside, algorithm)
    between = allreduce_seconds(part, nodes, link, algorithm)
    return job.messages * (within + between)


def step_seconds(
    job: Job, ranks: int, ranks_per_node: int, link: Link, inside: Link, algorithm: Algorithm = "auto", slowdown: float = 1.0
) -> float:
    """s of a step on ``ranks``.

    Args:
        slowdown: of computation when all ranks of a node are busy (shared memory bandwidth, cores), 1: none.

    Raises:
        ConfigError: no rank, or more than samples.
    """
    if ranks < 1 or ranks_per_node < 1:
        raise ConfigError(f"{ranks} ranks, {ranks_per_node} on each node: expected at least 1 of each")
    if ranks > job.samples:
        raise ConfigError(f"{ranks} ranks for a global batch of {job.samples}: expected at most {job.samples} ranks")
    exchange = exchange_seconds(job, ranks, ranks_per_node, link, inside, algorithm)
    return compute_seconds(job, ranks, slowdown) + (1 - job.overlap) * exchange


def efficiency(job: Job, ranks: int, ranks_per_node: int, link: Link, inside: Link) -> float:
    """Speed on ``ranks`` over ``ranks`` times the speed of one, 0..1."""
    one = step_seconds(job, 1, ranks_per_node, link, inside)
    return one / (ranks * step_seconds(job, ranks, ranks_per_node, link, inside))


def fit_link(points: Sequence[tuple[float, float]], ranks: int = 2) -> Link:
    """Latency and rate from measured ring allreduces (bytes, s) by least squares of the relative error.

    Raises:
        ConfigError: fewer than two sizes.
    """
    if len({count for count, _ in points}) < 2:
        raise ConfigError("a link is fitted to allreduces of at least two sizes")
    # seconds = a + b * bytes, weighted by 1 / seconds so that small messages count as much as large ones.
    weights = [1 / seconds**2 for _, seconds in points]
    total = sum(weights)
    mean_n = sum(w * n for w, (n, _) in zip(weights, points, strict=True)) / total
    mean_s = sum(w * s for w, (_, s) in zip(weights, points, strict=True)) / total
    spread = sum(w * (n - mean_n) ** 2 for w, (n, _) in zip(weights, points, strict=True))
    slope = sum(w * (n - mean_n) * (s - mean_s) for w, (n, s) in zip(weights, points, strict=True)) / spread
    slope = max(slope, 1e-15)
    start = max(mean_s - slope * mean_n, 0.0)
    rounds = 2 * (ranks - 1)
    return Link(start / rounds, rounds / ranks / slope)
