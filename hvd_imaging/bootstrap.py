"""The process environment, set before TensorFlow is imported: Keras 2, oneDNN, and threads that fit the cores.

TensorFlow reads these variables once, on import, so every command that uses it calls :func:`prepare` first.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, MutableMapping
from dataclasses import dataclass

from .world import World, bounds, world_from_environment

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc


def keep_freed_memory() -> None:
    """Let freed memory serve the next array: getting pages from the system again costs more than filling them.

    For stages that make large arrays one after another; the process keeps the most that it needed at once.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


@dataclass(frozen=True)
class Threads:
    """What one rank computes with.

    Attributes:
        cores: the logical cores this rank should run on.
        compute: threads inside one operation (Eigen, oneDNN, BLAS).
    """

    cores: tuple[int, ...]
    compute: int


def plan_threads(allowed: Iterable[int], node_cores: int, world: World, wanted: int = 0) -> Threads:
    """Cores and threads of one rank: no two ranks of a node get the same core while there are cores for all.

    Args:
        allowed: cores the launcher lets this process run on.
        node_cores: cores of the node.
        world: ``local_rank`` and ``local_size`` count.
        wanted: a number of threads given by the user; 0 follows the cores.

    A launcher that binds (Open MPI's default) leaves each rank a set of its own, which is kept. One that does not
    (horovodrun, ``--bind-to none``) leaves all cores to all ranks: then each takes its own equal part.
    """
    cores = tuple(sorted(allowed))
    shared = world.local_size > 1 and len(cores) * world.local_size > node_cores
    if shared and len(cores) >= world.local_size:
        start, stop = bounds(len(cores), world.local_size, world.local_rank)
        cores = cores[start:stop]
    elif shared:
        return Threads(cores, wanted or 1)
    return Threads(cores, wanted or max(1, len(cores)))


def variables(threads: Threads) -> dict[str, str]:
    """Environment variables for these threads; pure."""
    count = str(threads.compute)
    return {
        "TF_USE_LEGACY_KERAS": "1",  # tensorflow-model-optimization and the saved formats need Keras 2
        # Without AVX-512 TensorFlow leaves oneDNN off, and 3D convolutions cost five times as much.
        "TF_ENABLE_ONEDNN_OPTS": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "TF_NUM_INTRAOP_THREADS": count,
        "TF_NUM_INTEROP_THREADS": "1",
        "OMP_NUM_THREADS": count,
        "OPENBLAS_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        # Horovod's thread waits inside MPI beside the computing threads. Polling without a pause, it takes half a core
        # from them: two ranks were as slow as one.
        "OMPI_MCA_mpi_yield_when_idle": "1",
        # Each rank would otherwise claim the whole GPU memory.
        "TF_FORCE_GPU_ALLOW_GROWTH": "true",
    }


def horovod_variables(fusion_mb: float, cycle_ms: float) -> dict[str, str]:
    """Environment variables of Horovod's own settings; pure."""
    return {
        "HOROVOD_FUSION_THRESHOLD": str(int(fusion_mb * 2**20)),
        "HOROVOD_CYCLE_TIME": f"{cycle_ms:g}",
        # What travels together is settled by the groups, not by what happens to be ready.
        "HOROVOD_DISABLE_GROUP_FUSION": "1",
        # Our watchdog names the rank, its host and its last event (training/heartbeat.py).
        "HOROVOD_STALL_CHECK_DISABLE": "1",
    }


def prepare(
    threads_per_rank: int = 0, environ: MutableMapping[str, str] | None = None, world: World | None = None
) -> Threads:
    """Set the environment and the process's cores. What the user has exported already wins.

    Raises:
        RuntimeError: TensorFlow was imported before, so that nothing of this would take effect.
    """
    environ = os.environ if environ is None else environ
    if "tensorflow" in sys.modules and environ.get("TF_USE_LEGACY_KERAS") != "1":
        raise RuntimeError("bootstrap.prepare() must run before TensorFlow is imported")
    world = world_from_environment(environ) if world is None else world
    allowed = os.sched_getaffinity(0)
    threads = plan_threads(allowed, os.cpu_count() or 1, world, threads_per_rank)
    for name, value in variables(threads).items():
        environ.setdefault(name, value)
    if set(threads.cores) != allowed:
        os.sched_setaffinity(0, threads.cores)
    _quiet()
    return threads


@contextlib.contextmanager
def native_notes_aside() -> Iterator[None]:
    """Hold back what C++ code prints to stderr past every log level; all of it is shown if the block fails."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as aside:
        real = os.dup(2)
        os.dup2(aside.fileno(), 2)
        try:
            yield
        except BaseException:
            aside.seek(0)
            os.write(real, aside.read())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(real, 2)
            os.close(real)


def load_tensorflow() -> None:
    """Import TensorFlow after :func:`prepare`, without the notices that its CPU wheel prints on every start."""
    with native_notes_aside():
        import tensorflow  # noqa: F401


def _quiet() -> None:
    """Hide deprecation notices of the pinned libraries that a user can do nothing about."""
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"(tensorflow|tf_keras|horovod|google)\b")
    warnings.filterwarnings("ignore", message=r".*(np\.object|distutils Version).*")
