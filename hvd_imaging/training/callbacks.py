"""What happens beside the steps: decisions on the best model, and reports for people."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

MONITORS = {"segmentation": ("val_dice", 1.0), "classification": ("val_loss", -1.0)}
"""Task -> (metric that finds the best model, its sign: +1 if higher is better)."""


@dataclass
class Best:
    """The best validation so far, and how many have passed since.

    Attributes:
        score: signed so that higher is better.
        epoch: of the best.
        waited: validations without a gain.
    """

    score: float = -math.inf
    epoch: int = -1
    waited: int = 0

    def update(self, score: float, epoch: int) -> bool:
        """Take in a validation; True if it is the best. A NaN never is."""
        if score > self.score:
            self.score, self.epoch, self.waited = score, epoch, 0
            return True
        self.waited += 1
        return False

    def to_json(self) -> dict[str, Any]:
        """JSON has no infinity: None stands for no validation yet."""
        return {**asdict(self), "score": None if math.isinf(self.score) else self.score}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Best:
        """The inverse of :meth:`to_json`."""
        score = values["score"]
        return cls(-math.inf if score is None else score, values["epoch"], values["waited"])


class Reporter(Protocol):
    """Shows a run to people; the command line has one, tests and libraries may pass their own."""

    def message(self, text: str) -> None:
        """One line."""

    def step(self, epoch: int, step: int, steps: int, loss: float, rate: float) -> None:
        """After every step (of this rank's loss)."""

    def epoch(self, record: dict[str, Any]) -> None:
        """After every epoch, with metrics over all ranks."""


class Silent:
    """Reports nothing."""

    def message(self, text: str) -> None: ...

    def step(self, epoch: int, step: int, steps: int, loss: float, rate: float) -> None: ...

    def epoch(self, record: dict[str, Any]) -> None: ...


class TensorBoard:
    """Scalars of each epoch for TensorBoard; does nothing when not active."""

    def __init__(self, run_dir: Path, active: bool) -> None:
        self._writer = None
        if active:
            import tensorflow as tf

            self._writer = tf.summary.create_file_writer(str(run_dir / "tensorboard"))

    def epoch(self, record: dict[str, Any]) -> None:
        """Write every number of an epoch's record."""
        if self._writer is None:
            return
        import tensorflow as tf

        with self._writer.as_default(step=record["epoch"]):
            for name, value in record.items():
                if name != "epoch" and isinstance(value, int | float):
                    tf.summary.scalar(name, value)
        self._writer.flush()

    def close(self) -> None:
        """What was written is on disk."""
        if self._writer is not None:
            self._writer.close()
