"""Where a run stands, and how a process gets there: from a checkpoint on rank 0 to the same state on all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import RunError
from ..parallel.columns import Columns
from . import checkpoint
from .callbacks import Best, Reporter
from .nonfinite import Backoff


@dataclass
class Position:
    """Everything besides the arrays that a checkpoint holds; equal on all ranks.

    Attributes:
        epoch: the current one.
        step: the next step inside it.
        total: steps done in all.
        best: best validation so far.
        sums: (loss, correct, examples) of the current epoch so far, over all ranks.
        seconds: spent in the current epoch so far.
        backoff: what steps that were not finite have led to.
    """

    epoch: int = 0
    step: int = 0
    total: int = 0
    best: Best = field(default_factory=Best)
    sums: np.ndarray = field(default_factory=lambda: np.zeros(3))
    seconds: float = 0.0
    backoff: Backoff = field(default_factory=Backoff)

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "total": self.total,
            "best": self.best.to_json(),
            "sums": self.sums.tolist(),
            "seconds": self.seconds,
            "backoff": asdict(self.backoff),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Position:
        """The inverse of :meth:`to_json`."""
        return cls(
            values["epoch"], values["step"], values["total"], Best.from_json(values["best"]), np.array(values["sums"]),
            values["seconds"], Backoff(**values.get("backoff", {})),
        )  # fmt: skip


def newest(directory: Path, report: Reporter) -> checkpoint.State | None:
    """The newest whole checkpoint; None at the beginning of a run.

    Raises:
        RunError: there are checkpoints, but none is whole.
    """
    state, problems = checkpoint.load_newest(directory)
    for problem in problems:
        report.message(f"skipped: {problem}")
    if state is None and problems:
        raise RunError(f"{directory}: no checkpoint is whole; the newest: {problems[0]}")
    return state


def restore(
    state: checkpoint.State, directory: Path, model: Any, optimizer: Any, exchange: Sequence[Any], columns: Columns, report: Reporter
) -> None:
    """Put a checkpoint's arrays, which are whole, into rank 0's variables.

    Raises:
        RunError: it was made by another network or optimizer.
    """
    for variables, arrays, what in ((model.weights, state.weights, "weight"), (list(optimizer.variables), state.optimizer, "optimizer")):
        checkpoint.restore(variables, columns.cut(variables, arrays, str(directory)), what, str(directory))
    shapes = [tuple(v.shape) for v in exchange]
    if shapes == [a.shape for a in state.exchange]:
        checkpoint.restore(exchange, state.exchange, "exchange", str(directory))
    else:
        report.message("parallel.compression is another one than before: its state begins anew")


def snapshot(model: Any, optimizer: Any, exchange: Sequence[Any], columns: Columns, meta: Mapping[str, Any]) -> checkpoint.State:
    """Copies of all variables, whole, which later steps do not change; a collective call where ranks hold parts."""
    return checkpoint.State(
        columns.whole(model.weights),
        columns.whole(list(optimizer.variables)),
        meta,
        [v.numpy() for v in exchange],
    )
