"""A run on an MLflow server: parameters, where it comes from, and the numbers of each epoch."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import SetupError
from ..files import write_json
from ..texts import read_json

NAME = "mlflow.json"
"""In the run folder: which run of the server it is, so that a resumed run goes on there."""
EXPERIMENT = "hvd_imaging"
_MANNERS = {
    # A server that is gone must not hold the ranks: by itself MLflow tries for minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    # Nothing goes to anybody but the server that was named.
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
}
_BATCH, _LONGEST, _LEAVE_S = 100, 500, 30.0


class MLflow:
    """Sends in a thread of its own, as training does not wait for a server. Does nothing without an address.

    Args:
        uri: of the server; None: nothing is done.
        run_dir: exists; its name becomes the run's.
        parameters: of the configuration, by dotted keys.
        tags: where the run comes from.
        say: called with a warning.

    Raises:
        SetupError: MLflow is not installed, or the server does not take the run: asked at the start, before anything is learned.
    """

    def __init__(
        self, uri: str | None, run_dir: Path, parameters: Mapping[str, Any], tags: Mapping[str, Any], say: Callable[[str], None]
    ) -> None:
        self._client: Any = None
        if uri is None:
            return
        for name, value in _MANNERS.items():
            os.environ.setdefault(name, value)
        try:
            from mlflow import MlflowClient
            from mlflow.entities import Metric, Param, RunTag
        except ImportError:
            raise SetupError("monitor.mlflow: MLflow is not installed: pip install 'hvd_imaging[mlflow]', or leave the key out") from None
        self._metric, self._say = Metric, say
        labels = [RunTag(key, _text(value)) for key, value in tags.items()]
        try:
            client = MlflowClient(tracking_uri=uri)
            self._run = _known(run_dir, uri)
            if self._run is not None:
                client.update_run(self._run, status="RUNNING")
            else:
                found = client.get_experiment_by_name(EXPERIMENT)
                experiment = found.experiment_id if found is not None else client.create_experiment(EXPERIMENT)
                self._run = client.create_run(experiment, run_name=run_dir.name).info.run_id
                for some in _batches([Param(key, _text(value)) for key, value in parameters.items()]):
                    client.log_batch(self._run, params=some)
                write_json(run_dir / NAME, {"uri": uri, "run": self._run})
            for some in _batches(labels):
                client.log_batch(self._run, tags=some)
        except Exception as error:  # of MLflow, of its database or of the network, each with classes of its own
            raise SetupError(f"monitor.mlflow={uri}: does not take the run: {str(error).splitlines()[0][:300] if str(error) else type(error).__name__}") from None
        self._client = client
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def epoch(self, record: Mapping[str, Any]) -> None:
        """Every number of an epoch's record; returns at once."""
        if self._client is None:
            return
        now = int(time.time() * 1000)
        numbers = [
            self._metric(key, float(value), now, record["epoch"])
            for key, value in record.items() if key != "epoch" and isinstance(value, int | float) and math.isfinite(value)
        ]  # fmt: skip
        self._queue.put(lambda: self._client.log_batch(self._run, metrics=numbers))

    def close(self, whole: bool = True) -> None:
        """The end; what is on the way gets half a minute.

        Args:
            whole: False: the run failed or will be resumed.
        """
        if self._client is None:
            return
        self._queue.put(lambda: self._client.set_terminated(self._run, "FINISHED" if whole else "KILLED"))
        self._queue.put(None)
        self._thread.join(_LEAVE_S)

    def _work(self) -> None:
        while (send := self._queue.get()) is not None:
            try:
                send()
            except Exception as error:
                self._say(f"monitor.mlflow: the server does not answer any more ({type(error).__name__}); it gets nothing from now on, the run goes on")
                return


def _known(run_dir: Path, uri: str) -> str | None:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        values = read_json(run_dir / NAME)
        if values.get("uri") == uri and isinstance(values.get("run"), str):
            return values["run"]
    return None


def _text(value: Any) -> str:
    return (value if isinstance(value, str) else json.dumps(value))[:_LONGEST]


def _batches(values: Iterable[Any]) -> Iterable[list[Any]]:
    values = iter(values)
    while some := list(itertools.islice(values, _BATCH)):
        yield some
