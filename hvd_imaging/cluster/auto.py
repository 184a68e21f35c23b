"""`submit --auto`: how many nodes, by when Slurm would start the job and how long it would take on them."""

from __future__ import annotations

import datetime
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..config import RunConfig
from ..errors import ConfigError
from ..planning.memory import parameters
from ..planning.pace import measured_pace
from ..planning.scaling import step_seconds
from ..shards import manifest as manifests
from . import slurm
from .judge import clock
from .render import Wish, scripts
from .request import Request, seconds
from .status import recent_events

LEAST_EFFICIENCY = 0.5
"""More nodes than that are left to others."""


@dataclass(frozen=True)
class Candidate:
    """A number of nodes.

    Attributes:
        wait_s: until Slurm would start it.
        run_s: of computing.
        efficiency: of its ranks, against one node.
    """

    nodes: int
    wait_s: float
    run_s: float
    efficiency: float

    @property
    def end_s(self) -> float:
        """From now."""
        return self.wait_s + self.run_s


def choose(candidates: Sequence[Candidate]) -> Candidate:
    """The one that ends first, with fewer nodes where two end within 5 %; wasteful ones are left out. Pure."""
    fair = [candidate for candidate in candidates if candidate.efficiency >= LEAST_EFFICIENCY] or list(candidates)
    first = min(candidate.end_s for candidate in fair)
    return min((candidate for candidate in fair if candidate.end_s <= 1.05 * first), key=lambda candidate: candidate.nodes)


def numbers(most: int) -> list[int]:
    """Nodes to be tried: powers of two, and the most."""
    return sorted({*(1 << exponent for exponent in range(most.bit_length()) if 1 << exponent <= most), most})


def choose_nodes(
    steps: Sequence[str], requests: Mapping[str, Request], wish: Wish, config: RunConfig, measured: Path, folders: Iterable[Path]
) -> tuple[dict[str, Request], list[str]]:
    """The requests with the number of nodes that ends the training first, and what was weighed, in lines.

    Raises:
        ConfigError: nothing was measured, or no number of nodes can run.
    """
    if "train" not in steps:
        raise ConfigError("--auto: chooses nodes for a training; leave it out for other steps")
    folders, request = list(folders), requests["train"]
    manifest = manifests.load(config.data.dataset)
    weights = 4 * parameters(config, manifest.channels, max(len(manifest.classes), 1))
    pace = measured_pace(recent_events(measured), config.train.batch_size, weights)
    if pace is None:
        raise ConfigError(
            f"--auto: no finished epoch in {measured} to learn the pace from; give --measured RUN_DIR of a run with this configuration, "
            "or submit one epoch first (--set train.epochs=1)"
        )
    samples = sum(sample.split == config.data.train_split for sample in manifest.samples)
    draws = config.data.patches_per_volume if manifest.task == "segmentation" else 1
    total = config.train.max_steps or config.train.epochs * -(-samples * draws // config.train.batch_size)
    found, lines = [], []
    for nodes in numbers(request.nodes):
        tried = request.model_copy(update={"nodes": nodes})
        if tried.ranks > config.train.batch_size:
            lines.append(f"auto: {nodes} nodes have {tried.ranks} ranks, more than train.batch_size={config.train.batch_size}")
            continue
        step = step_seconds(pace.job, tried.ranks, tried.ntasks_per_node, pace.link, pace.link)
        alone = step_seconds(pace.job, tried.ntasks_per_node, tried.ntasks_per_node, pace.link, pace.link)
        wait = _wait(steps, {**requests, "train": tried}, wish, folders)
        if wait is None:
            lines.append(f"auto: {nodes} nodes: Slurm would never start it")
            continue
        found.append(Candidate(nodes, wait, total * step, alone / (nodes * step)))
        lines.append(
            f"auto: {nodes} node{'s' * (nodes > 1)}: starts in {clock(wait)}, computes {clock(total * step)}, "
            f"efficiency {found[-1].efficiency:.2f}"
        )
    if not found:
        raise ConfigError("--auto: no number of nodes can run; " + "; ".join(line.removeprefix("auto: ") for line in lines))
    best = choose(found)
    if pace.guessed:
        lines.append(f"auto: {measured} had one rank, so a network of 1 Gbit/s is assumed; a run on two nodes would measure it")
    if best.run_s > seconds(request.time) and request.requeue:
        lines.append(f"auto: longer than --time {request.time}: it will be queued again about {best.run_s / seconds(request.time):.0f} times")
    lines.append(f"auto: takes {best.nodes} node{'s' * (best.nodes > 1)}")
    return {**requests, "train": request.model_copy(update={"nodes": best.nodes})}, lines


def _wait(steps: Sequence[str], requests: Mapping[str, Request], wish: Wish, folders: Sequence[Path]) -> float | None:
    (script,) = scripts(["train"], replace(wish, array=None), requests, folders)
    with tempfile.TemporaryDirectory(prefix="hvd_imaging_auto.") as folder:
        path = Path(folder) / "train.sbatch"
        path.write_text(script.text, encoding="utf-8")
        start = slurm.expected_start(path)
    if start is None:
        return None
    return max((datetime.datetime.fromisoformat(start) - datetime.datetime.now()).total_seconds(), 0.0)
