"""The world as a value: parts of a list, and what launchers tell."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_imaging.world import World, bounds, world_from_environment


@given(st.integers(0, 500), st.integers(1, 64))
def test_parts_cover_everything_once_and_differ_by_one_at_most(count, size):
    edges = [bounds(count, size, rank) for rank in range(size)]
    assert edges[0][0] == 0 and edges[-1][1] == count
    assert all(before[1] == after[0] for before, after in pairwise(edges))
    lengths = [stop - start for start, stop in edges]
    assert max(lengths) - min(lengths) <= 1


@given(st.lists(st.integers(), max_size=50), st.integers(1, 9))
def test_the_parts_of_all_ranks_are_the_list(items, size):
    assert [item for rank in range(size) for item in World(rank, size).part(items)] == items


@pytest.mark.parametrize("rank, size", [(-1, 2), (2, 2), (0, 0)])
def test_a_rank_outside_of_its_world_is_refused(rank, size):
    with pytest.raises(ValueError, match="outside"):
        World(rank, size)


OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip


@pytest.mark.parametrize(
    "environ, expected",
    [
        ({}, World()),
        (OPEN_MPI, World(3, 4, 1, 2)),
        # horovodrun starts its ranks through mpirun or by itself: its own variables come first.
        (OPEN_MPI | {"HOROVOD_RANK": "1", "HOROVOD_SIZE": "2"}, World(1, 2, 1, 2)),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, World(1, 2, 1, 2)),
        # a plain batch script is one process, whatever the allocation
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, World()),
        (
            {
                "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1",
                "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
            },
            World(5, 8, 1, 4),
        ),
    ],
)  # fmt: skip
def test_the_launchers_variables(environ, expected):
    assert world_from_environment(environ) == expected


def test_only_rank_0_is_root():
    assert [World(rank, 3).is_root for rank in range(3)] == [True, False, False]
