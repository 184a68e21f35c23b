"""Only the newest start of a run may write."""

import json

import pytest

from hvd_imaging.errors import RunError
from hvd_imaging.training.owner import NAME, Owner


def test_the_newest_start_may_write_and_an_older_one_stops(tmp_path):
    first = Owner(tmp_path, {})
    first.check()
    second = Owner(tmp_path, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"})
    second.check()
    with pytest.raises(RunError, match=r"another start on \S+ \(process \d+, job 7\) has taken over this run; this one stops"):
        first.check()


def test_a_start_on_a_node_that_was_given_up_does_not_take_over(tmp_path):
    Owner(tmp_path, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"})
    with pytest.raises(RunError, match="belongs to start 3 of job 7 on .*; this is start 2, on a node that was given up"):
        Owner(tmp_path, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"})
    Owner(tmp_path, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"}).check()  # a restart inside the job
    Owner(tmp_path, {"SLURM_JOB_ID": "8"}).check()  # another job, later


def test_a_mark_that_can_not_be_read_stops_nothing(tmp_path):
    owner = Owner(tmp_path, {})
    for content in (b"", b"{", b"[1]", json.dumps({}).encode()):
        (tmp_path / NAME).write_bytes(content)
        owner.check()
        Owner(tmp_path, {})
        owner = Owner(tmp_path, {})
    (tmp_path / NAME).unlink()
    owner.check()
