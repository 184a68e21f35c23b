"""Collective calls of the stages that run without TensorFlow (ingest, verify). The only mpi4py import outside `parallel`.

Training talks through Horovod instead (`parallel/horovod.py`).
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

from . import errors
from .errors import HvdImagingError, SetupError
from .world import World, world_from_environment

T = TypeVar("T")


Taken = Callable[[int], None]
"""Told on rank 0 how many pieces of work all ranks together have taken."""


class Communicator(Protocol):
    """What a stage may ask of the other ranks. Values are plain data of this package; every rank makes the same calls."""

    world: World

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks in rank order, on every rank."""

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""

    def barrier(self) -> None:
        """Return when all ranks have come here."""

    def abort(self, code: int) -> None:
        """End all ranks with this exit code."""


class Sharing(Communicator, Protocol):
    """A communicator that also shares work."""

    def share(self, count: int, taken: Taken | None = None) -> AbstractContextManager[Iterator[int]]:
        """The numbers below ``count`` in order, each to one rank only: whoever is free takes the next one."""


class Alone:
    """A world of one."""

    world = World()

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def broadcast(self, value: Any) -> Any:
        return value

    def barrier(self) -> None:
        pass

    @contextlib.contextmanager
    def share(self, count: int, taken: Taken | None = None) -> Iterator[Iterator[int]]:
        yield _counted(count, taken)

    def abort(self, code: int) -> None:
        sys.exit(code)


class Mpi:
    """All ranks of ``mpirun``."""

    def __init__(self) -> None:
        from mpi4py import MPI

        self._comm = MPI.COMM_WORLD
        environment = world_from_environment()
        self.world = World(
            self._comm.Get_rank(), self._comm.Get_size(), environment.local_rank, environment.local_size
        )

    def gather(self, value: Any) -> list[Any]:
        return self._comm.allgather(value)

    def broadcast(self, value: Any) -> Any:
        return self._comm.bcast(value, root=0)

    def barrier(self) -> None:
        self._comm.Barrier()

    @contextlib.contextmanager
    def share(self, count: int, taken: Taken | None = None) -> Iterator[Iterator[int]]:
        from mpi4py import MPI

        world = self.world
        if MPI.Query_thread() < MPI.THREAD_MULTIPLE:  # nobody can answer while rank 0 works: fixed parts
            yield iter(range(world.rank, count, world.size))
            return
        line = self._comm.Dup()  # messages of its own
        try:
            if world.is_root:
                desk = _Desk(line, count, taken)
                try:
                    yield iter(desk.take, None)
                finally:
                    desk.close()
            else:
                try:
                    yield iter(lambda: line.sendrecv(True, dest=0, source=0), None)
                finally:
                    line.send(False, dest=0)
        finally:
            line.Free()

    def abort(self, code: int) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self._comm.Abort(code)


def _counted(count: int, taken: Taken | None) -> Iterator[int]:
    for number in range(count):
        if taken is not None:
            taken(number + 1)
        yield number


class _Desk:
    """Gives out the numbers on rank 0: to the others by a thread, which answers while this rank works itself.

    The thread looks for messages now and then: a blocking receive would take a core, as MPI polls.
    """

    PAUSE_S = 0.001

    def __init__(self, line: Any, count: int, taken: Taken | None) -> None:
        self._line, self._lock, self._numbers = line, threading.Lock(), _counted(count, taken)
        self._thread = threading.Thread(target=self._answer, name="work sharing", daemon=True)
        self._thread.start()

    def take(self) -> int | None:
        with self._lock:
            return next(self._numbers, None)

    def _answer(self) -> None:
        from mpi4py import MPI

        status, busy = MPI.Status(), self._line.Get_size() - 1
        while busy:
            if not self._line.Iprobe(source=MPI.ANY_SOURCE, status=status):
                time.sleep(self.PAUSE_S)
                continue
            rank = status.Get_source()
            if self._line.recv(source=rank):
                self._line.send(self.take(), dest=rank)
            else:
                busy -= 1

    def close(self) -> None:
        """Return when all ranks have said that they are through."""
        self._thread.join()


def connect() -> Sharing:
    """The communicator of this process: MPI where a launcher started several ranks, else a world of one.

    Raises:
        SetupError: several ranks were started, but mpi4py is missing or sees another world size.
    """
    expected = world_from_environment()
    if expected.size == 1:
        return Alone()
    try:
        communicator = Mpi()
    except ImportError as error:
        raise SetupError(
            f"{expected.size} ranks were started, but mpi4py cannot be imported ({error}); "
            "install the extra 'train' with scripts/setup_env.sh, or run one process"
        ) from error
    if communicator.world.size != expected.size:
        raise SetupError(
            f"the launcher started {expected.size} ranks, but MPI sees {communicator.world.size}: mpi4py belongs to "
            "another MPI than mpirun; `hvd-imaging doctor` shows both"
        )
    return communicator


def together(communicator: Communicator, act: Callable[[], T]) -> T:
    """Run ``act`` on this rank; if it fails on any rank, all ranks raise the first rank's message.

    Without this, the other ranks would wait in their next collective call for ever.

    Raises:
        HvdImagingError: in a world of several, of the lowest failing rank, with its class and rank.
    """
    if communicator.world.size == 1:
        return act()
    result: T | None = None
    failure: tuple[str, str] | None = None
    try:
        result = act()
    except HvdImagingError as error:
        failure = (type(error).__name__, str(error))
    except Exception:
        failure = ("HvdImagingError", traceback.format_exc())
    failures = communicator.gather(failure)
    for rank, found in enumerate(failures):
        if found is not None:
            name, message = found
            kind: type[HvdImagingError] = getattr(errors, name, HvdImagingError)
            raise kind(f"rank {rank}: {message}")
    return result  # type: ignore[return-value]


def root_works(communicator: Communicator, act: Callable[[], T]) -> T | None:
    """Run ``act`` on rank 0 alone, for as long as it takes; the others wait without the stall watch of collectives ending them.

    Returns:
        its result on rank 0, None on the others.

    Raises:
        HvdImagingError: on all ranks alike, as `together` does.
    """
    if communicator.world.size == 1:
        return act()
    result: list[T] = []
    if not communicator.world.is_root:
        while not communicator.broadcast(None):
            time.sleep(_BEAT_S)
        return together(communicator, lambda: None)
    over = threading.Event()

    def beat() -> None:
        while not communicator.broadcast(over.is_set()):
            over.wait(_BEAT_S)

    thread = threading.Thread(target=beat, name="beat", daemon=True)
    thread.start()

    def work() -> None:
        try:
            result.append(act())
        finally:
            over.set()
            thread.join()

    together(communicator, work)
    return result[0]


_BEAT_S = 0.5
"""Pause between two calls of ranks that wait for rank 0."""
