"""Who computes: a value that is passed to whatever needs it, never looked up."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

# (rank, size, local rank, local size) as Horovod's launcher, Open MPI, MPICH/Intel MPI and Slurm tell them.
_LAUNCHERS = (
    ("HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    # Only inside `srun`: a plain `sbatch` script has SLURM_PROCID=0 and SLURM_NTASKS, but is one process.
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
)


@dataclass(frozen=True)
class World:
    """Rank and world size, on this node and in all.

    Attributes:
        rank: 0 <= rank < size.
        size: number of processes that train together.
        local_rank: rank among the processes of this node.
        local_size: processes on this node.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank {self.rank} is outside a world of {self.size}")

    @property
    def is_root(self) -> bool:
        """True on the rank that prints, plots and writes shared files."""
        return self.rank == 0

    def part(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's contiguous part of ``items``; the parts of all ranks are ``items`` in order."""
        start, stop = bounds(len(items), self.size, self.rank)
        return items[start:stop]


def host_name(environ: Mapping[str, str] | None = None) -> str:
    """This machine, by the name that its scheduler knows it by."""
    environ = os.environ if environ is None else environ
    return environ.get("SLURMD_NODENAME") or socket.gethostname()


def bounds(count: int, size: int, rank: int) -> tuple[int, int]:
    """[start, stop) of part ``rank`` when ``count`` items are cut into ``size`` parts that differ by one at most."""
    return count * rank // size, count * (rank + 1) // size


def world_from_environment(environ: Mapping[str, str] | None = None) -> World:
    """The world as the launcher's variables tell it, before any MPI library is loaded; a single process without."""
    environ = os.environ if environ is None else environ
    for rank, size, local_rank, local_size in _LAUNCHERS:
        if rank in environ and size in environ:
            n = int(environ[size])
            locals_ = environ.get(local_size, str(n)).split("(")[0].split(",")[0]
            return World(int(environ[rank]), n, int(environ.get(local_rank, environ[rank])), int(locals_))
    return World()
