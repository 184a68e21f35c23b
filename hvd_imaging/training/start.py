"""What a training begins from. Fine-tuning of a compressed network is training from another start, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import models
from ..models.spec import ModelSpec


class Start:
    """A fresh network of the configuration.

    Attributes:
        training: whether layers are called in training form.
        shared: whether its dense layers may be shared out over the ranks (parallel.dense).
        judged: whether the network is good already, so that an epoch has to be better than it to be the best.
    """

    training = True
    shared = True
    judged = False

    def network(self, spec: ModelSpec) -> Any:
        """The network, with the weights to begin from; the same on all ranks."""
        return models.build(spec)

    def record(self, directory: Path, model: Any) -> None:
        """Write what is needed to build the network again from the run directory (rank 0 only)."""

    def begin(self, model: Any) -> None:
        """Called once, when the weights are those that training goes on from (after a resume: the checkpoint's)."""

    def after_update(self, model: Any, step: int, last: int) -> None:
        """Put the weights back on what they have to keep, after ``step`` of ``last`` updates; the same on all ranks."""

    def settled(self, step: int, last: int) -> bool:
        """False as long as the network is not yet what it is to become, so that it cannot be the best one."""
        return True
