"""The thread of a rank that watches it: a sample now and then into the run folder, and to Prometheus where that is wanted."""

from __future__ import annotations

import contextlib
import datetime
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

from ..config import MonitorConfig
from ..world import World
from .power import Power
from .prometheus import Exporter, parse_target
from .record import path_of, pause
from .sampler import Sampler


class Monitor:
    """Begins at once, ends with :meth:`close`; what it cannot do it leaves out, as a training must not end for it.

    Args:
        run_dir: an existing run folder.
        world: this rank.
        host: its name.
        config: nothing is done with ``seconds=0``.
        step: the global step, asked at each sample.
        say: called with a warning.

    Attributes:
        samples: taken so far, and
        cpu_s: CPU seconds that they took.
    """

    def __init__(
        self, run_dir: Path, world: World, host: str, config: MonitorConfig, step: Callable[[], int], say: Callable[[str], None]
    ) -> None:
        self._path, self._config, self._step = path_of(run_dir, world.rank), config, step
        self._stop, self._exporter, self.cpu_s, self.samples = threading.Event(), None, 0.0, 0
        self._thread: threading.Thread | None = None
        if not config.seconds:
            return
        if config.prometheus:
            try:
                self._exporter = Exporter(parse_target(config.prometheus), run_dir.name, world.rank, world.local_rank)
            except OSError as error:
                say(f"monitor.prometheus={config.prometheus}: {error.strerror or error}; the run goes on without it")
        self._since = time.monotonic()
        try:
            self._sampler = Sampler(world, host, Power(config.idle_watts, config.busy_watts))
            self._path.parent.mkdir(exist_ok=True)
            self._lines = _continue(self._path)
        except Exception as error:
            say(f"monitor: this machine cannot be watched ({type(error).__name__}: {error}); the run goes on without samples")
            self._withdraw()
            return
        self._thread = threading.Thread(target=self._work, name="monitor", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """A last sample, so that a short run has one, and the end."""
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join()
        self._take()
        self._withdraw()

    def _withdraw(self) -> None:
        if self._exporter is not None:
            with contextlib.suppress(OSError):
                self._exporter.close()

    def _work(self) -> None:
        while not self._stop.wait(pause(self._config.seconds, self._lines + self.samples)):
            self._take()

    def _take(self) -> None:
        began = time.thread_time()
        now, self._since, before = time.monotonic(), time.monotonic(), self._since
        try:
            values = self._sampler.sample()
        except Exception:
            return
        stamp = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
        values = {"time": stamp, "seconds": round(now - before, 3), "step": self._step(), **values}
        with contextlib.suppress(OSError):  # a full disk is the checkpoint's to report
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
            if self._exporter is not None:
                self._exporter.publish({**values, "unix": round(time.time(), 3)})
        self.samples += 1
        self.cpu_s += time.thread_time() - began


def _continue(path: Path) -> int:
    """Lines of earlier starts in a file; half a line of a killed one is closed."""
    if not path.exists():
        return 0
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        with open(path, "ab") as file:
            file.write(b"\n")
    return data.count(b"\n")
