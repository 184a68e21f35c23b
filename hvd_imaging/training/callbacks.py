"""What happens beside the steps: decisions on the best model, and reports for people."""

from __future__ import annotations

import contextlib
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from ..errors import SetupError

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


class MLflow:
    """Parameters of the run and numbers of each epoch for an MLflow server; does nothing without an address.

    Raises:
        SetupError: MLflow is not installed, or the server does not take the run: asked for at the start, before anything is learned.
    """

    def __init__(self, uri: str | None, name: str, parameters: dict[str, Any]) -> None:
        self._client: Any = None
        if uri is None:
            return
        try:
            from mlflow import MlflowClient
        except ImportError:
            raise SetupError("monitor.mlflow: MLflow is not installed: pip install 'hvd_imaging[mlflow]', or leave the key out") from None
        try:
            self._client = MlflowClient(tracking_uri=uri)
            found = self._client.get_experiment_by_name("hvd_imaging")
            experiment = found.experiment_id if found is not None else self._client.create_experiment("hvd_imaging")
            self._run = self._client.create_run(experiment, run_name=name).info.run_id
            for key, value in parameters.items():
                self._client.log_param(self._run, key, str(value)[:500])
        except Exception as error:
            raise SetupError(f"monitor.mlflow={uri}: does not take the run ({str(error).splitlines()[0][:200]})") from None

    def epoch(self, record: dict[str, Any]) -> None:
        """Every number of an epoch's record; a server that has gone does not end the training."""
        if self._client is None:
            return
        with contextlib.suppress(Exception):
            for name, value in record.items():
                if name != "epoch" and isinstance(value, int | float):
                    self._client.log_metric(self._run, name, float(value), step=record["epoch"])

    def close(self) -> None:
        """The run has ended."""
        if self._client is not None:
            with contextlib.suppress(Exception):
                self._client.set_terminated(self._run)
