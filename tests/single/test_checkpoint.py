"""Checkpoints: whole or not there."""

import numpy as np
import pytest

from hvd_imaging.errors import RunError
from hvd_imaging.training import checkpoint
from hvd_imaging.training.callbacks import Best
from hvd_imaging.training.events import EventLog, epoch_records, read_events


def state(value=1.0):
    return checkpoint.State([np.full((2, 3), value, np.float32)], [np.int64(7), np.ones(4)], {"epoch": 2})


def test_round_trip(tmp_path):
    sha = checkpoint.save(tmp_path / "a.npz", state())
    back = checkpoint.load(tmp_path / "a.npz")
    np.testing.assert_array_equal(back.weights[0], state().weights[0])
    assert back.optimizer[0] == 7 and back.meta["epoch"] == 2 and back.meta["sha256"] == sha


def test_every_single_flipped_byte_is_found(tmp_path):
    path = tmp_path / "a.npz"
    checkpoint.save(path, state())
    whole = path.read_bytes()
    for at in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[at] ^= 0xFF
        path.write_bytes(damaged)
        try:
            back = checkpoint.load(path)
        except RunError:
            continue
        # Bytes that no reader looks at (times in the zip's headers) may differ; the content may not.
        np.testing.assert_array_equal(back.weights[0], state().weights[0])
        assert dict(back.meta)["epoch"] == 2


def test_a_damaged_newest_falls_back_to_the_one_before(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(checkpoint.path_of(tmp_path, step), state(step))
    checkpoint.path_of(tmp_path, 3).write_bytes(b"half a file")
    found, problems = checkpoint.load_newest(tmp_path)
    assert found is not None and found.weights[0][0, 0] == 2
    assert len(problems) == 1 and "step-00000003" in problems[0]


def test_rotation_keeps_the_newest_and_sweeps_parts(tmp_path):
    for step in range(5):
        checkpoint.save(checkpoint.path_of(tmp_path, step), state())
    part = tmp_path / checkpoint.FOLDER / ".step-00000009.npz.abc.part.npz"
    part.write_bytes(b"")
    checkpoint.rotate(tmp_path, 2)
    assert [p.name for p in checkpoint.newest_first(tmp_path)] == ["step-00000004.npz", "step-00000003.npz"]
    assert not part.exists()


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    checkpoint.save(path, state(1))

    def full(*_args, **_kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError):
        checkpoint.save(path, state(2))
    assert checkpoint.load(path).weights[0][0, 0] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


def test_best_counts_what_it_waits_and_ignores_nan():
    best = Best()
    assert best.update(0.5, 0) and not best.update(0.5, 1) and not best.update(float("nan"), 2)
    assert best.waited == 2 and best.update(0.6, 3) and best.waited == 0
    assert Best.from_json(best.to_json()) == best and Best.from_json(Best().to_json()) == Best()


def test_events_survive_half_a_line(tmp_path):
    EventLog(tmp_path).write("epoch", epoch=0, loss=2.0)
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write('{"event": "epo')
    log = EventLog(tmp_path)
    log.write("epoch", epoch=0, loss=1.0)
    log.write("epoch", epoch=1, loss=0.5)
    assert [event["loss"] for event in read_events(tmp_path)] == [2.0, 1.0, 0.5]
    assert [record["loss"] for record in epoch_records(tmp_path)] == [1.0, 0.5]
    EventLog(tmp_path, active=False).write("epoch", epoch=2)
    assert len(read_events(tmp_path)) == 3


def test_the_writer_keeps_order_and_tells_of_a_failure_at_the_next_call(tmp_path):
    writer, told = checkpoint.Writer(), []
    for step in range(3):
        state = checkpoint.State([np.full(4, step, np.float32)], [], {"total": step})
        writer.submit(checkpoint.path_of(tmp_path, step), state, told.append)
    writer.wait()
    assert not writer.busy and len(told) == 3
    assert [checkpoint.load(path).meta["total"] for path in checkpoint.newest_first(tmp_path)] == [2, 1, 0]
    (tmp_path / "file").write_text("x")
    writer.submit(tmp_path / "file" / "step.npz", checkpoint.State([], [], {}))
    with pytest.raises(RunError, match="cannot be written.*--resume"):
        writer.wait()
    writer.wait()  # told once


def test_the_state_of_the_exchange_is_kept_and_hashed(tmp_path):
    state = checkpoint.State([np.zeros(2)], [np.ones(3)], {}, [np.arange(4.0)])
    sha = checkpoint.save(tmp_path / "a.npz", state)
    assert list(checkpoint.load(tmp_path / "a.npz").exchange[0]) == [0, 1, 2, 3]
    assert sha != checkpoint.save(tmp_path / "b.npz", checkpoint.State([np.zeros(2)], [np.ones(3)], {}))
