"""Checkpoints: one file with weights, optimizer and position; written atomically, hashed, rotated.

A file is an uncompressed ``.npz`` (no pickle inside): arrays ``weight.0000``, ``optimizer.0000``, ``exchange.0000``, ... and
``meta``, a JSON text with the position in the epoch plan and the SHA-256 of all arrays.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import npz
from ..errors import RunError
from ..files import atomic_path
from ..texts import parse_json

FOLDER = "checkpoints"
_NAME = re.compile(r"step-(\d{8})\.npz")


@dataclass(frozen=True)
class State:
    """What a file holds.

    Attributes:
        weights: of the model, in ``model.weights`` order.
        optimizer: of the optimizer, in ``optimizer.variables`` order; empty in a file of weights alone.
        meta: JSON values: epoch, step, best score, seed, dataset hash, ...
        exchange: what the exchange of gradients keeps between steps (parallel/exchange.py).
    """

    weights: Sequence[np.ndarray]
    optimizer: Sequence[np.ndarray]
    meta: Mapping[str, Any]
    exchange: Sequence[np.ndarray] = ()


def digest(arrays: Sequence[np.ndarray]) -> str:
    """Hex SHA-256 over dtype, shape and bytes of all arrays in order."""
    sha = hashlib.sha256()
    for array in arrays:
        sha.update(f"{array.dtype.str}{array.shape}".encode())
        sha.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return sha.hexdigest()


def save(path: Path, state: State) -> str:
    """Write ``state`` atomically; returns the SHA-256 of its arrays."""
    named = {
        f"{kind}.{i:04d}": array
        for kind, arrays in (("weight", state.weights), ("optimizer", state.optimizer), ("exchange", state.exchange))
        for i, array in enumerate(arrays)
    }
    sha = digest(list(named.values()))
    meta = json.dumps({**state.meta, "sha256": sha}).encode()
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, meta=np.frombuffer(meta, np.uint8), **named)
    return sha


def load(path: Path) -> State:
    """Read and check a file.

    Raises:
        RunError: missing, damaged, or with arrays that do not have the recorded hash.
    """
    try:
        arrays = npz.read(path)
        meta = parse_json(arrays.pop("meta").tobytes())
        names = sorted(arrays)
        recorded = meta["sha256"]
    except FileNotFoundError as error:
        raise RunError(f"{path}: no such checkpoint; has the training run written one?") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path}: damaged checkpoint ({error}); delete it to use the one before") from error
    weights, optimizer, exchange = (
        [arrays[name] for name in names if name.startswith(kind)] for kind in ("weight.", "optimizer.", "exchange.")
    )
    found = digest([*weights, *optimizer, *exchange])
    if found != recorded:
        raise RunError(f"{path}: damaged checkpoint: SHA-256 {found[:12]}, expected {str(recorded)[:12]}")
    return State(weights, optimizer, meta, exchange)


class Writer:
    """Writes files in a thread beside the training steps, one at a time and in order.

    Failures come out of the next call. The arrays given must be copies that nobody changes.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    @property
    def busy(self) -> bool:
        """True while a file is being written."""
        return self._thread is not None and self._thread.is_alive()

    def submit(self, path: Path, state: State, then: Callable[[str], None] = lambda sha: None) -> None:
        """Begin to write ``state`` once the file before is done; ``then(sha256)`` runs in the thread when it is on disk."""
        self.wait()

        def work() -> None:
            try:
                then(save(path, state))
            except BaseException as error:
                self._failure = error

        # Not a daemon: a process that ends in order ends after its last checkpoint.
        self._thread = threading.Thread(target=work, name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Return when all is on disk.

        Raises:
            RunError: a file could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if isinstance(failure, OSError):
            raise RunError(
                f"{failure.filename or 'checkpoint'}: cannot be written ({failure.strerror}); free space or choose another "
                "--run-dir, then go on with --resume"
            ) from failure
        if failure is not None:
            raise failure


def path_of(run_dir: Path, step: int) -> Path:
    """File of the checkpoint after global step ``step``."""
    return run_dir / FOLDER / f"step-{step:08d}.npz"


def newest_first(run_dir: Path) -> list[Path]:
    """All checkpoints of a run."""
    folder = run_dir / FOLDER
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, reverse=True)


def load_newest(run_dir: Path) -> tuple[State | None, list[str]]:
    """The newest whole checkpoint (None without any) and what was wrong with newer ones."""
    problems: list[str] = []
    for path in newest_first(run_dir):
        try:
            return load(path), problems
        except RunError as error:
            problems.append(str(error))
    return None, problems


def rotate(run_dir: Path, keep: int) -> None:
    """Delete all but the newest ``keep``, and parts that a killed process left."""
    for path in newest_first(run_dir)[keep:]:
        path.unlink(missing_ok=True)
    for path in (run_dir / FOLDER).glob(".step-*.part*"):
        path.unlink(missing_ok=True)


def restore(variables: Sequence[Any], arrays: Sequence[np.ndarray], what: str, where: str) -> None:
    """Assign arrays to TensorFlow variables after checking count and shapes.

    Raises:
        RunError: the file belongs to another network or optimizer.
    """
    if len(variables) != len(arrays):
        raise RunError(f"{where}: {len(arrays)} {what} arrays, expected {len(variables)}: made by another configuration")
    for variable, array in zip(variables, arrays, strict=True):
        if tuple(variable.shape) != array.shape:
            raise RunError(f"{where}: {what} {variable.name} is {array.shape}, expected {tuple(variable.shape)}")
        variable.assign(array)
