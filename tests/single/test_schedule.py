"""Learning rates by the table."""

import math

import pytest

from hvd_imaging.config import TrainConfig
from hvd_imaging.training.schedule import base_rate, rate


@pytest.mark.parametrize(("rule", "expected"), [("none", 0.1), ("linear", 0.4), ("sqrt", 0.2)])
def test_scaling_with_the_batch(rule, expected):
    config = TrainConfig(learning_rate=0.1, batch_size=16, base_batch_size=4, scale_learning_rate=rule)
    assert base_rate(config) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        ("constant", 0, 0.25), ("constant", 3, 1.0), ("constant", 19, 1.0),
        ("cosine", 3, 1.0), ("cosine", 4, 1.0), ("cosine", 12, 0.5), ("cosine", 20, 0.0),
        ("poly", 12, 0.5**0.9),
    ],
)  # fmt: skip
def test_warm_up_and_course(schedule, step, expected):
    config = TrainConfig(epochs=5, learning_rate=1, warmup_epochs=1, schedule=schedule)
    assert rate(step, 4, config) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "poly"])
def test_every_step_learns(schedule):
    config = TrainConfig(epochs=3, schedule=schedule, warmup_epochs=10)
    rates = [rate(step, 7, config) for step in range(21)]
    assert all(math.isfinite(r) and r > 0 for r in rates)
