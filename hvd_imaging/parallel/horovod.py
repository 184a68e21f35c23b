"""The only door to Horovod: sums, broadcasts and gathers over all ranks.

Everything is a sum, never an average: callers divide by true global counts (docs/distributed.md).
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import ConfigError, SetupError, on_all_ranks
from ..world import World, bounds, world_from_environment
from .grid import Grid


class Horovod:
    """Collective calls of training and evaluation; also a :class:`hvd_imaging.communicator.Communicator`.

    In a world of one every call returns its own value.

    Args:
        grid: which ranks share volumes; `group` is this rank's group of them.

    Raises:
        SetupError: Horovod is missing, was built without what the launcher needs, or sees another world size.
        ConfigError: on all ranks, if they do not agree on the grid.
    """

    def __init__(self, grid: Grid | None = None) -> None:
        expected = world_from_environment()
        self.world = expected
        self.grid, self.group = grid or Grid(expected.size), Group()
        spatial = self.grid.spatial
        if expected.size == 1:
            return  # nothing to talk to: no MPI, no Horovod is loaded
        by_gloo = os.environ.get("HOROVOD_CONTROLLER", "").lower() == "gloo"
        if not by_gloo:
            # Before hvd.init(): where both are used, MPI must be initialized by mpi4py or it is finalized twice.
            _import_mpi(expected)
            _check_agreed(spatial)
        try:
            import horovod.tensorflow as hvd
        except ImportError as error:
            raise SetupError(
                f"Horovod cannot be imported ({str(error).splitlines()[0]}); build it with scripts/setup_env.sh"
            ) from error
        check_build(expected, by_gloo, hvd.mpi_built(), hvd.gloo_built())
        before = set(os.listdir("/proc/self/task"))
        # Registered alike on all ranks; what all ranks do together needs no set of its own.
        sets = [hvd.ProcessSet(ranks) for ranks in self.grid.groups()] if 1 < spatial < expected.size else []
        hvd.init(process_sets=sets)
        _step_back(set(os.listdir("/proc/self/task")) - before)
        self._hvd = hvd
        self.world = World(hvd.rank(), hvd.size(), hvd.local_rank(), hvd.local_size())
        if self.world.size != expected.size:
            raise SetupError(
                f"the launcher started {expected.size} ranks, but Horovod sees {self.world.size}: Horovod was built for "
                "another MPI than this mpirun; `hvd-imaging doctor` shows both"
            )
        if spatial > 1:
            data, index = self.grid.place(self.world.rank)
            self.group = Group(hvd, sets[data] if sets else hvd.global_process_set, spatial, index)
        self._take_gpu()

    @property
    def data_world(self) -> World:
        """This rank's place among the spatial groups: which part of a global batch is its group's."""
        return World(self.grid.place(self.world.rank)[0], self.grid.data)

    def _take_gpu(self) -> None:
        """Give each local rank a GPU of its own; without this all ranks of a node would share the first one."""
        import tensorflow as tf

        gpus = tf.config.list_physical_devices("GPU")
        if gpus:
            tf.config.set_visible_devices(gpus[self.world.local_rank % len(gpus)], "GPU")

    @property
    def has_mpi(self) -> bool:
        """True if the ranks talk through MPI (not through Gloo); True in a world of one."""
        return self.world.size == 1 or os.environ.get("HOROVOD_CONTROLLER", "").lower() != "gloo"

    def sum_tensors(self, tensors: list[Any], name: str, groups: int = 1) -> list[Any]:
        """Sum of each tensor over all ranks, in a graph.

        The tensors of a group travel together when all are there: what is fused with what, and so the order of the
        additions, cannot depend on timing.
        """
        if self.world.size == 1:
            return tensors
        summed = []
        for index in range(groups):
            start, stop = bounds(len(tensors), groups, index)
            if start < stop:
                summed += self._hvd.grouped_allreduce(tensors[start:stop], op=self._hvd.Sum, name=f"{name}.{index}")
        return summed

    def adasum_tensors(self, tensors: list[Any], name: str) -> list[Any]:
        """Adasum (Maleki et al., 2021) of each tensor over all ranks, in a graph."""
        return [self._hvd.allreduce(t, op=self._hvd.Adasum, name=f"{name}.{i}") for i, t in enumerate(tensors)]

    def gather_tensor(self, tensor: Any, name: str) -> Any:
        """The tensors of all ranks one after another along the first axis, in a graph."""
        return tensor if self.world.size == 1 else self._hvd.allgather(tensor, name=name)

    def exchange_tensor(self, tensor: Any, name: str) -> Any:
        """Cut ``tensor`` (N x k, ...) in one piece for each of the N ranks; the pieces meant for this one, in rank order."""
        return tensor if self.world.size == 1 else self._hvd.alltoall(tensor, name=name)

    def exchange_pieces(self, flat: Any, sizes: Sequence[Any], name: str) -> Any:
        """Send ``sizes[r]`` values of a vector to each rank ``r``; the values meant for this one, in rank order."""
        if self.world.size == 1:
            return flat
        import tensorflow as tf

        return self._hvd.alltoall(flat, splits=tf.cast(tf.stack(sizes), tf.int32), name=name)[0]

    def gather_array(self, array: np.ndarray, name: str) -> np.ndarray:
        """The arrays of all ranks one after another along the first axis, on the host."""
        return array if self.world.size == 1 else np.asarray(self._hvd.allgather(array, name=name))

    def broadcast_array(self, array: np.ndarray, name: str) -> np.ndarray:
        """Rank 0's array, on every rank; the others give one of the same shape."""
        return array if self.world.size == 1 else np.asarray(self._hvd.broadcast(array, root_rank=0, name=name))

    def sum_array(self, values: np.ndarray, name: str) -> np.ndarray:
        """Sum of a float64 or int64 array over all ranks, on the host."""
        if self.world.size == 1:
            return values
        return np.array(self._hvd.allreduce(values, op=self._hvd.Sum, name=name))

    def broadcast_variables(self, variables: list[Any]) -> None:
        """Rank 0's values of TensorFlow variables, on every rank."""
        if self.world.size > 1:
            self._hvd.broadcast_variables(variables, root_rank=0)

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks in rank order, on every rank. A value is anything that JSON can hold."""
        if self.world.size == 1:
            return [value]
        data = np.frombuffer(json.dumps(value).encode(), np.uint8)
        sizes = np.asarray(self._hvd.allgather(np.array([data.size], np.int64), name="gather.sizes"))
        joined = np.asarray(self._hvd.allgather(data, name="gather.bytes"))
        ends = np.cumsum(sizes)
        return [
            json.loads(joined[end - size : end].tobytes())  # noqa: TID251 - from a process of ours
            for end, size in zip(ends, sizes, strict=True)
        ]

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        return self.gather(value if self.world.is_root else None)[0]

    def barrier(self) -> None:
        """Return when all ranks have come here."""
        self.gather(None)

    def abort(self, code: int) -> None:
        """End all ranks with this exit code: through MPI where it runs, else the launcher sees this rank end."""
        sys.stdout.flush()
        sys.stderr.flush()
        mpi = sys.modules.get("mpi4py.MPI")
        if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
            mpi.COMM_WORLD.Abort(code)
        os._exit(code)


def _step_back(threads: set[str]) -> None:
    """Let Horovod's own threads compute only where the step leaves time.

    They wait by polling inside MPI. At equal priority the scheduler gives them up to half of a core that the step needs;
    when they are really needed, the step waits for them and the core is free.
    """
    for thread in threads:
        # Gone already, or the machine does not allow it: then it is as it was.
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, int(thread), 19)


class Group:
    """The ranks that share a volume, and their collective calls, in a graph. A group of one has nobody to call.

    Attributes:
        size: ranks in it.
        index: of this rank, in order of depth.
    """

    def __init__(self, hvd: Any = None, process_set: Any = None, size: int = 1, index: int = 0) -> None:
        self._hvd, self._set, self.size, self.index = hvd, process_set, size, index

    def exchange(self, rows: Any, split: Sequence[int], name: str) -> Any:
        """Send ``split[r]`` rows of the first axis to each rank ``r``; the rows meant for this one, in rank order."""
        if self.size == 1:
            return rows
        return self._hvd.alltoall(rows, splits=list(split), name=name, ignore_name_scope=True, process_set=self._set)[0]

    def gather(self, tensor: Any, name: str) -> Any:
        """The tensors of all ranks ``(size, ...)``."""
        if self.size == 1:
            return tensor[None]
        gathered = self._hvd.allgather(tensor[None], name=name, ignore_name_scope=True, process_set=self._set)
        gathered.set_shape([self.size, *tensor.shape])
        return gathered

    def sum(self, tensor: Any, name: str) -> Any:
        """Sum over the ranks. Has no gradient of its own: see :func:`hvd_imaging.parallel.halo.total`."""
        if self.size == 1:
            return tensor
        return self._hvd.allreduce(tensor, op=self._hvd.Sum, name=name, ignore_name_scope=True, process_set=self._set)


def _check_agreed(spatial: int) -> None:
    # By MPI itself: Horovod has to be told of its process sets when it starts, and hangs where they differ.
    from mpi4py import MPI

    found = MPI.COMM_WORLD.allgather(spatial)
    if len(set(found)) > 1:
        odd = next(rank for rank, value in enumerate(found) if value != found[0])
        raise on_all_ranks(ConfigError(
            f"parallel.spatial: rank 0 has {found[0]}, rank {odd} has {found[odd]}; all ranks must form the same process sets: start them with "
            "one configuration"
        ))  # fmt: skip


def lowest(world: World, value: float) -> float:
    """The least of all ranks' values, before Horovod is started.

    Raises:
        ConfigError: the ranks talk through Gloo, which starts with Horovod.
    """
    if world.size == 1:
        return value
    if os.environ.get("HOROVOD_CONTROLLER", "").lower() == "gloo":
        raise on_all_ranks(ConfigError("parallel.spatial=auto: under horovodrun --gloo set parallel.memory_gb, or parallel.spatial to a number"))
    _import_mpi(world)
    from mpi4py import MPI

    return MPI.COMM_WORLD.allreduce(value, op=MPI.MIN)


def is_peer_failure(error: BaseException) -> bool:
    """True if a collective call failed because another rank has gone, which has told its own reason."""
    text = str(error)
    return "Horovod has been shut down" in text or "HorovodInternalError" in text or "HorovodAllreduce" in text


def check_build(expected: World, by_gloo: bool, mpi_built: bool, gloo_built: bool) -> None:
    """Refuse a Horovod that cannot talk the way the ranks were launched: it would train ``size`` separate models.

    Raises:
        SetupError: with the mend.
    """
    if expected.size == 1:
        return
    wanted, built, flag = (
        ("Gloo (horovodrun --gloo)", gloo_built, "HOROVOD_WITH_GLOO") if by_gloo else ("MPI", mpi_built, "HOROVOD_WITH_MPI")
    )
    if not built:
        raise on_all_ranks(SetupError(
            f"{expected.size} ranks were started by {wanted}, but this Horovod was built without it; "
            f"build it again: {flag}=1 scripts/setup_env.sh --force"
        ))  # fmt: skip


def _import_mpi(expected: World) -> None:
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise SetupError(
            f"{expected.size} ranks were started under MPI, but mpi4py cannot be imported "
            f"({str(error).splitlines()[0]}); scripts/setup_env.sh installs one that fits"
        ) from error
    if MPI.COMM_WORLD.Get_size() != expected.size:
        raise SetupError(
            f"the launcher started {expected.size} ranks, but MPI sees {MPI.COMM_WORLD.Get_size()}: mpirun belongs to "
            "another MPI than mpi4py and Horovod; `hvd-imaging doctor` shows both"
        )
