"""The watchdog's verdict, and the files behind it."""

import json
import time

import pytest

from hvd_imaging.training.heartbeat import Beat, Heartbeat, parse, path_of, read_beats, verdict
from hvd_imaging.world import World

NOW = 1000.0


def beat(rank, event="step", step=7, seq=20, since=NOW - 60, alive=NOW - 0.5):
    return Beat(rank, f"node{rank}", 100 + rank, event, step, seq, since, alive)


@pytest.mark.parametrize(
    "others, expected",
    [
        ([beat(1, "input", seq=19)], "missing: rank 1 on node1: last event 'input' of step 7, since 60 s"),
        ([beat(1, alive=NOW - 50)], "no sign of life for 50 s (stopped, or its host is gone)"),
        ([], "missing: rank 1: no sign of life at all"),
        ([beat(1)], "all 2 are at the same place and alive: the network between them does not pass data"),
        ([beat(1, seq=21)], "all 2 are at the same place"),
    ],
)
def test_the_verdict_names_the_missing_rank_its_host_and_last_event(others, expected):
    text = verdict(beat(0), [beat(0), *others], 2, NOW, 60)
    assert text.startswith("waited 60 s for other ranks in 'step' of step 7; ") and expected in text


def test_all_missing_ranks_are_named_and_only_they():
    text = verdict(beat(2), [beat(0, "input", seq=3), beat(1), beat(2), beat(3, alive=NOW - 99)], 4, NOW, 60)
    assert "rank 0 on node0" in text and "rank 3 on node3" in text and "rank 1" not in text


def test_a_rank_that_waits_too_long_raises_the_alarm_once(tmp_path):
    told = []
    heart = Heartbeat(tmp_path, World(0, 2), 0.02, 0.2, told.append)
    heart.mark("input", 3)
    time.sleep(0.4)
    assert told == []  # slow input is no waiting for others
    heart.mark("step", 3)
    deadline = time.monotonic() + 20
    while not told and time.monotonic() < deadline:
        time.sleep(0.02)
    heart.close()
    assert len(told) == 1 and "rank 1: no sign of life at all" in told[0]


def test_the_file_tells_where_the_rank_is(tmp_path):
    heart = Heartbeat(tmp_path, World(3, 4), 0.02, 0, lambda message: None)
    heart.mark("validate", 12)
    heart.close()
    (found,) = read_beats(tmp_path)
    assert (found.rank, found.event, found.step) == (3, "end", 12)
    assert set(json.loads(path_of(tmp_path, 3).read_text())) == {
        "rank", "host", "pid", "event", "step", "seq", "since", "alive", "saving",
    }  # fmt: skip
    path_of(tmp_path, 1).write_text("{half")
    assert len(read_beats(tmp_path)) == 1


@pytest.mark.parametrize(
    "values", [None, [], 3, {}, {"rank": 1}, {"rank": "x", "alive": 1}, {"rank": 1, "alive": None}, {"rank": 1, "alive": 1, "step": "q"}]
)
def test_a_broken_rank_file_is_none(values):
    assert parse(values) is None


def test_a_rank_that_has_only_started_has_no_step():
    values = {"rank": 1, "host": "h", "pid": 5, "event": "start", "step": 0, "seq": 0, "since": 1.0, "alive": 2.0, "saving": False}
    assert parse(values).reached is None
    assert parse({**values, "event": "step"}).reached == 0
