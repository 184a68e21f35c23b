"""What people and schedulers ask of a running training: SIGTERM and SIGUSR1 mean 'checkpoint, then leave'."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Requests:
    """Collects this rank's wishes; the ranks add them up in every step (training/step.py) and so act together.

    Args:
        minutes: between checkpoints by the clock, 0: none.
    """

    def __init__(self, minutes: float = 0.0) -> None:
        self.stop = False
        self._minutes = minutes
        self._saved = time.monotonic()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Requests:
        # Python takes signals in the main thread only; elsewhere (in a notebook, a test) there is nobody to ask.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._take) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def save(self) -> bool:
        """True if a checkpoint is due by the clock."""
        return bool(self._minutes) and time.monotonic() - self._saved >= 60 * self._minutes

    def saved(self) -> None:
        """A checkpoint was made now."""
        self._saved = time.monotonic()

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.stop = True
