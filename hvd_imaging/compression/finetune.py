"""Training on with a changed network: `training.loop.train` from another start, distributed and resumable like any training."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from ..config import RunConfig, TrainConfig
from ..models import architecture
from ..models.spec import ModelSpec
from ..parallel.horovod import Horovod
from ..training import checkpoint
from ..training.callbacks import Reporter
from ..training.loop import Summary, train
from ..training.run import BEST
from ..training.start import Start
from .recipe import Tuned

RATE = 0.1
"""Of the run's learning rate, where the recipe gives none."""


class Hold(Protocol):
    """What the weights have to keep; see `Masks` and `Clusters`."""

    def begin(self) -> None: ...

    def after_update(self, step: int, last: int) -> None: ...

    def settled(self, step: int, last: int) -> bool: ...


class Changed(Start):
    """A start from a network at hand.

    Args:
        model: with its weights; trained in place.
        hold: what its weights have to keep.
        keep: whether its layers are written into the run directory.
        training: False calls its layers as in use (networks with quantizers, whose ranges are fixed).
    """

    judged, shared = True, False

    def __init__(self, model: Any, hold: Hold | None = None, keep: bool = True, training: bool = True) -> None:
        self.model, self.hold, self.keep, self.training = model, hold, keep, training

    def network(self, spec: ModelSpec) -> Any:
        return self.model

    def record(self, directory: Path, model: Any) -> None:
        if self.keep:
            architecture.save(model, directory)

    def begin(self, model: Any) -> None:
        if self.hold is not None:
            self.hold.begin()

    def after_update(self, model: Any, step: int, last: int) -> None:
        if self.hold is not None:
            self.hold.after_update(step, last)

    def settled(self, step: int, last: int) -> bool:
        return self.hold is None or self.hold.settled(step, last)


def settings(config: RunConfig, step: Tuned) -> RunConfig:
    """The run's configuration for training on: fewer epochs, a lower rate that falls to zero."""
    own = {
        "epochs": step.epochs,
        "learning_rate": step.learning_rate or config.train.learning_rate * RATE,
        "schedule": "cosine",
        # Adam knows nothing of the gradients yet: its first steps would be as long as all others, and undo what was learned.
        "warmup_epochs": min(1.0, step.epochs / 4),
        "max_steps": None,
        "early_stop": 0,
        "validate_every": 1,
        "mixed_precision": "none",
    }
    tuned = TrainConfig.model_validate(config.train.model_dump() | own)
    return config.model_copy(update={"train": tuned, "output": config.output.model_copy(update={"tensorboard": False})})


def finetune(
    model: Any, config: RunConfig, folder: Path, hvd: Horovod, report: Reporter | None, hold: Hold | None = None,
    keep: bool = True, training: bool = True,
) -> Summary:  # fmt: skip
    """Train ``model`` on in ``folder`` and leave its best weights in it.

    Goes on where an earlier try in ``folder`` has ended.

    Returns:
        of the training; where ``left`` is set (SIGTERM, SIGUSR1), ``model`` is not done.
    """
    summary = train(config, folder, hvd, resume=True, report=report, start=Changed(model, hold, keep, training))
    if not summary.left:
        state = checkpoint.load(folder / BEST)
        checkpoint.restore(model.weights, state.weights, "weight", str(folder / BEST))
    return summary
