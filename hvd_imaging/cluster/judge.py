"""What is wrong with a request before it is submitted: pure, from what Slurm says of its queues and machines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .request import Request, megabytes, seconds
from .slurm import Node, Partition


@dataclass(frozen=True)
class Finding:
    """``fatal``: it cannot run, so it is not submitted; else a warning."""

    text: str
    fatal: bool = False


@dataclass(frozen=True)
class Need:
    """What a step is known to take.

    Attributes:
        rank_bytes: of memory, None unknown.
        batch: global batch, None where there is none.
        checkpoint_s: s between checkpoints, None unknown.
        gpu: it would use one.
    """

    rank_bytes: float | None = None
    batch: int | None = None
    checkpoint_s: float | None = None
    gpu: bool = True


def judge(step: str, request: Request, need: Need, partitions: Sequence[Partition], nodes: Sequence[Node]) -> list[Finding]:
    """All findings on one job."""
    return [Finding(f"{step}: {finding.text}", finding.fatal) for finding in _all(step, request, need, partitions, nodes)]


def _all(step: str, request: Request, need: Need, partitions: Sequence[Partition], nodes: Sequence[Node]) -> list[Finding]:
    found = list(_time(step, request, need))
    if need.batch is not None and request.ranks > need.batch:
        found.append(Finding(
            f"{request.ranks} ranks share train.batch_size={need.batch}, so some would have nothing to do; expected at most {need.batch} "
            "ranks, or a larger batch", True,
        ))  # fmt: skip
    names = ", ".join(partition.name for partition in partitions) or "none"
    if request.partition is None:
        queue = next((partition for partition in partitions if partition.default), None)
        if queue is None:
            return [*found, Finding(f"no partition given and the cluster has no default; give --partition, one of {names}", True)]
    else:
        # A list means: whichever is first.
        wanted = request.partition.split(",")
        queue = next((partition for partition in partitions if partition.name in wanted), None)
        if queue is None:
            return [*found, Finding(f"partition '{request.partition}' does not exist; there are {names}", True)]
    if not queue.up:
        found.append(Finding(f"partition '{queue.name}' takes no jobs now (down or drained)"))
    if seconds(request.time) > queue.limit_s:
        found.append(Finding(
            f"--time {request.time} is longer than partition '{queue.name}' permits ({clock(queue.limit_s)}); a shorter one is enough, "
            "as the job is queued again with its checkpoint", True,
        ))  # fmt: skip
    return found + _machines(request, need, queue, [node for node in nodes if node.partition == queue.name])


def _time(step: str, request: Request, need: Need) -> list[Finding]:
    if step not in ("train", "compress"):
        return []
    limit = seconds(request.time)
    if limit <= request.signal_seconds + 60:
        return [Finding(
            f"--time {request.time} ends before anything is learned: {request.signal_seconds} s before the limit a checkpoint is asked "
            "for, and Slurm may be 60 s early; give more time, or a smaller --signal-seconds", True,
        )]  # fmt: skip
    if need.checkpoint_s is not None and need.checkpoint_s > limit - request.signal_seconds:
        text = f"a checkpoint takes {clock(need.checkpoint_s)} to come, the job has {clock(limit - request.signal_seconds)}"
        if request.launcher == "horovodrun" or not request.requeue:
            return [Finding(f"{text}: it would never get further; give more --time, or set train.checkpoint_minutes", True)]
        return [Finding(f"{text}: it lives by the one before the limit; a lost node costs a whole start: set train.checkpoint_minutes")]
    return []


def _machines(request: Request, need: Need, queue: Partition, nodes: Sequence[Node]) -> list[Finding]:
    if not nodes:
        return [Finding(f"partition '{queue.name}' has no nodes", True)]
    found = []
    cores = request.ntasks_per_node * (request.cpus_per_task or 1)
    memory = megabytes(request.mem)
    wanted = request.gpus_per_node
    fits = [
        node for node in nodes
        if node.cores >= cores and node.gpus >= wanted and (not memory or node.memory_mb >= memory)
    ]  # fmt: skip
    most = min(len(fits), queue.most_nodes or len(fits))
    if not fits:
        largest = f"the largest node of partition '{queue.name}' has"
        for asked, best, shown, has in (
            (cores, max(node.cores for node in nodes), f"{cores} cores", "{} cores"),
            (wanted, max(node.gpus for node in nodes), f"{wanted} GPU{'s' * (wanted > 1)}", "{} GPUs"),
            (memory or 0, max(node.memory_mb for node in nodes), f"{request.mem} of memory", "{} MiB"),
        ):
            if asked > best:
                text = f"{shown} asked for on each node, {largest} {has.format(best)}; ask for less, or take another partition"
                found.append(Finding(text, True))
        if not found:
            found.append(Finding(f"no node of partition '{queue.name}' has {cores} cores, {wanted} GPUs and {request.mem} at once", True))
        return found
    if request.nodes > most:
        found.append(Finding(
            f"{request.nodes} nodes asked for, at most {most} of partition '{queue.name}' fit; give --nodes {most} or fewer", True
        ))  # fmt: skip
        return found
    usable = [node for node in fits if node.usable]
    free = [node for node in usable if node.state.startswith("idle") or (not request.exclusive and node.idle_cores >= cores)]
    if len(usable) < request.nodes:
        found.append(Finding(f"only {len(usable)} of {len(fits)} fitting nodes are up: the job waits until {request.nodes} are"))
    elif len(free) < request.nodes:
        found.append(Finding(f"{len(free)} of {len(fits)} fitting nodes are free now: the job waits for {request.nodes}"))
    return found + _waste(request, need, fits)


def _waste(request: Request, need: Need, fits: Sequence[Node]) -> list[Finding]:
    found = []
    wanted = request.gpus_per_node
    if wanted and not need.gpu:
        found.append(Finding(f"{wanted} GPU{'s' * (wanted > 1)} on each node would stand idle: this step computes on the CPU"))
    elif wanted > request.ntasks_per_node:
        found.append(Finding(
            f"{wanted} GPUs a node for {request.ntasks_per_node} ranks: {wanted - request.ntasks_per_node} would stand idle; give "
            f"--ntasks-per-node {wanted}"
        ))  # fmt: skip
    elif wanted and request.ntasks_per_node > wanted:
        found.append(Finding(f"{request.ntasks_per_node} ranks share {wanted} GPUs of a node; one rank for each is faster"))
    elif not wanted and need.gpu and all(node.gpus for node in fits):
        found.append(Finding("all nodes of this partition have GPUs, and the job asks for none: give --gres gpu:N, or a CPU partition"))
    if need.rank_bytes is not None:
        total = need.rank_bytes * request.ntasks_per_node / 2**20
        memory = megabytes(request.mem)
        best = max(node.memory_mb for node in fits)
        shown = f"about {need.rank_bytes / 2**30:.1f} GiB a rank, {total / 1024:.1f} GiB a node"
        if total > best:
            found.append(Finding(f"{shown} estimated, the largest node has {best / 1024:.0f} GiB: take fewer ranks, or smaller patches", True))
        elif memory and total > memory:
            found.append(Finding(f"{shown} estimated, --mem {request.mem} is less: the job may be killed for its memory"))
    return found


def clock(value: float) -> str:
    """Seconds for people: "no limit", "90 s", "2 h 30 min"."""
    if value == float("inf"):
        return "no limit"
    if value < 120:
        return f"{value:.0f} s"
    hours, minutes = divmod(round(value / 60), 60)
    return f"{hours} h {minutes} min" if hours and minutes else f"{hours} h" if hours else f"{minutes} min"
