"""Failing together, without MPI: threads play the ranks. The real thing is tests/parallel."""

import threading
import time

import pytest

from hvd_imaging.communicator import Alone, connect, root_works, together
from hvd_imaging.errors import DatasetError, HvdImagingError, SetupError
from hvd_imaging.world import World


class Threads:
    """Communicator of one rank; all share ``board``."""

    def __init__(self, rank, size, board, meeting):
        self.world, self._board, self._meeting = World(rank, size), board, meeting

    def gather(self, value):
        self._board[self.world.rank] = value
        self._meeting.wait(10)
        values = list(self._board)
        self._meeting.wait(10)
        return values

    def broadcast(self, value):
        return self.gather(value)[0]

    def barrier(self):
        self.gather(None)

    def abort(self, code):
        raise AssertionError(code)


def play(size, act, how=together):
    """What ``how`` gives or raises on each rank when rank r does ``act(r)``."""
    board, meeting, results = [None] * size, threading.Barrier(size), [None] * size

    def rank_main(rank):
        try:
            results[rank] = how(Threads(rank, size, board, meeting), lambda: act(rank))
        except HvdImagingError as error:
            results[rank] = error

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    return results


def test_each_rank_keeps_its_own_result():
    assert play(3, lambda rank: rank * 10) == [0, 10, 20]


def test_one_failure_is_raised_everywhere_with_its_class_and_rank():
    def act(rank):
        if rank == 1:
            raise DatasetError("shard-00000.h5: damaged")

    for error in play(3, act):
        assert type(error) is DatasetError and str(error) == "rank 1: shard-00000.h5: damaged"


def test_the_lowest_failing_rank_speaks():
    def act(rank):
        if rank:
            raise DatasetError(f"reason {rank}")

    assert {str(error) for error in play(3, act)} == {"rank 1: reason 1"}


def test_a_fault_of_the_program_brings_its_traceback():
    def act(rank):
        return 1 // rank

    for error in play(2, act):
        assert type(error) is HvdImagingError and "rank 0: " in str(error) and "ZeroDivisionError" in str(error)


def test_alone_errors_pass_as_they_are():
    def act():
        raise DatasetError("as it is")

    with pytest.raises(DatasetError, match="^as it is$"):
        together(Alone(), act)
    assert Alone().gather(3) == [3] and Alone().broadcast("x") == "x"
    with pytest.raises(SystemExit) as caught:
        Alone().abort(4)
    assert caught.value.code == 4


def test_without_a_launcher_nobody_is_asked(monkeypatch):
    for name in ("HOROVOD_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    assert isinstance(connect(), Alone)


def test_ranks_without_mpi4py_are_told_what_to_install(monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setitem(__import__("sys").modules, "mpi4py", None)
    with pytest.raises(SetupError, match=r"2 ranks were started, but mpi4py cannot be imported.*setup_env\.sh"):
        connect()


def test_rank_0_works_while_the_others_wait():
    def act(rank):
        assert rank == 0
        time.sleep(0.8)  # longer than the pause between two looks
        return "done"

    assert play(3, act, root_works) == ["done", None, None]
    assert play(1, act, root_works) == ["done"]


def test_what_fails_on_rank_0_is_raised_everywhere():
    def act(rank):
        raise DatasetError("no shards")

    for error in play(3, act, root_works):
        assert isinstance(error, DatasetError) and "rank 0: no shards" in str(error)
