"""The replica guard: same values pass, a difference names the rank and the place."""

import numpy as np
import pytest

from hvd_imaging.errors import RunError
from hvd_imaging.training.guard import ItemTrace, check_replicas, difference, digests
from hvd_imaging.world import World


class Ranks:
    """A communicator whose other ranks answer with what they were given."""

    def __init__(self, answers):
        self.world, self.answers = World(0, len(answers[0])), list(answers)

    def gather(self, value):
        return self.answers.pop(0)


def test_equal_ranks_pass_with_one_exchange():
    ranks = Ranks([["same", "same"]])
    check_replicas(ranks, ["kernel"], ["aa"], "step 100")
    assert ranks.answers == []


def test_a_difference_names_rank_variable_and_moment():
    ranks = Ranks([["x", "x", "y"], [["a", "b", "c"], ["a", "b", "c"], ["a", "Q", "R"]]])
    with pytest.raises(RunError, match=r"^step 100: rank 2 of 3 differs from the others in conv/bias and 1 more;"):
        check_replicas(ranks, ["conv/kernel", "conv/bias", "head"], ["a", "b", "c"], "step 100")


@pytest.mark.parametrize(
    "values, expected",
    [
        ([["a"], ["b"]], "rank 1 of 2 differs from the others in kernel (which of the two is right cannot be told)"),
        ([["b"], ["a"], ["a"]], "rank 0 of 3 differs from the others in kernel;"),
        ([["a"], ["b"], ["c"], ["a"]], "ranks 1, 2 of 4 differ from the others in kernel;"),
        ([["a"], ["a", "b"], ["a"]], "rank 1 of 3 differs from the others in the number of variables;"),
    ],
)
def test_the_majority_is_taken_for_right(values, expected):
    assert expected in difference(["kernel"], values)


def test_digests_see_one_bit_and_the_sign_of_zero():
    a = np.zeros(4, np.float32)
    b = a.copy()
    b[2] = -0.0
    assert digests([a]) == digests([a.copy()]) != digests([b])
    assert digests([np.float32(1.0), np.arange(6).reshape(2, 3).T])[0] == digests([np.ones((), np.float32)])[0]


def test_the_trace_depends_on_every_batch_and_their_order():
    def trace(*batches):
        it = ItemTrace()
        for step, items in enumerate(batches):
            it.add(0, step, np.array(items))
        return it.value

    assert trace([1, 2], [3]) == trace([1, 2], [3])
    assert len({trace([1, 2], [3]), trace([2, 1], [3]), trace([1, 2]), trace([1, 2], [4]), trace()}) == 5
