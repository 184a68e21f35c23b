"""What follows a loss or gradient that is not finite."""

import math

import numpy as np
import pytest

from hvd_imaging.training.nonfinite import MOST_IN_A_ROW, RECOVERY, Backoff, describe


def test_stop_ends_at_once():
    assert Backoff().after_nonfinite("stop") is None


@pytest.mark.parametrize("policy", ["skip", "back_off"])
def test_a_long_row_ends_the_run(policy):
    state = Backoff()
    for _ in range(MOST_IN_A_ROW - 1):
        state = state.after_nonfinite(policy)
    assert state.after_nonfinite(policy) is None


def test_skip_keeps_the_rate_and_a_fine_step_begins_the_row_anew():
    state = Backoff().after_nonfinite("skip").after_nonfinite("skip")
    assert (state.scale, state.in_a_row) == (1.0, 2)
    assert state.after_fine() == Backoff()


def test_back_off_halves_and_recovers():
    state = Backoff().after_nonfinite("back_off").after_nonfinite("back_off")
    assert state.scale == 0.25
    for _ in range(RECOVERY):
        state = state.after_fine()
    assert state.scale == 0.5
    for _ in range(RECOVERY):
        state = state.after_fine()
    assert state == Backoff()


@pytest.mark.parametrize(
    "loss, sick, norms, expected",
    [
        (1.0, (2,), [1, 1], "not finite: rank 2: loss or gradients"),
        (math.nan, (), [1, 1], "not finite: the loss is nan"),
        (1.0, (0, 3), [1, math.inf], "not finite: ranks 0, 3: loss or gradients; gradient of head"),
        (1.0, (), [math.nan, math.inf], "not finite: gradient of conv and 1 more"),
        (1.0, (), [3e38, 3e38], "not finite: the sum of the gradients"),
    ],
)
def test_the_message_names_rank_and_variable(loss, sick, norms, expected):
    assert describe(loss, sick, np.array(norms, np.float32), ["conv", "head"]) == expected
