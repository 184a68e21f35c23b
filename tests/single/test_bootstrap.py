"""Threads and cores: two ranks never fight for one core."""

import os
import subprocess
import sys

import pytest

from hvd_imaging.bootstrap import plan_threads, prepare, variables
from hvd_imaging.world import World


def locals_of(size):
    return [World(rank, size, rank, size) for rank in range(size)]


@pytest.mark.parametrize(("cores", "size"), [(2, 2), (8, 2), (8, 3), (64, 4), (5, 5)])
def test_unbound_ranks_take_disjoint_cores_and_all_of_them(cores, size):
    plans = [plan_threads(range(cores), cores, world) for world in locals_of(size)]
    taken = [core for plan in plans for core in plan.cores]
    assert sorted(taken) == list(range(cores))
    assert all(plan.compute == len(plan.cores) for plan in plans)


def test_a_rank_that_the_launcher_bound_keeps_its_cores():
    plan = plan_threads([4, 5], 8, World(1, 2, 1, 2))
    assert plan.cores == (4, 5) and plan.compute == 2


def test_more_ranks_than_cores_get_one_thread_each():
    for world in locals_of(4):
        assert plan_threads([0, 1], 2, world).compute == 1


def test_one_process_takes_what_it_was_given():
    assert plan_threads([1, 3], 8, World()).compute == 2
    assert plan_threads(range(8), 8, World(), wanted=3).compute == 3


def test_the_environment_turns_onednn_on_and_the_users_choice_wins():
    assert variables(plan_threads([0], 1, World()))["TF_ENABLE_ONEDNN_OPTS"] == "1"
    assert variables(plan_threads([0], 1, World()))["OMPI_MCA_mpi_yield_when_idle"] == "1"
    environ = {"TF_ENABLE_ONEDNN_OPTS": "0", "TF_USE_LEGACY_KERAS": "1"}
    before = os.sched_getaffinity(0)
    prepare(environ=environ, world=World())
    assert environ["TF_ENABLE_ONEDNN_OPTS"] == "0" and environ["TF_USE_LEGACY_KERAS"] == "1"
    assert os.sched_getaffinity(0) == before


def test_tensorflow_starts_silently():
    code = "from hvd_imaging import bootstrap; bootstrap.prepare(); bootstrap.load_tensorflow(); import tensorflow as tf; print(tf.keras.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stderr == ""
    assert "tf_keras" in done.stdout
