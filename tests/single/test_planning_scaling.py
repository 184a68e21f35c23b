"""The scaling model against numbers worked out by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_imaging.errors import ConfigError
from hvd_imaging.planning.scaling import (
    Job,
    Link,
    allreduce_seconds,
    efficiency,
    exchange_seconds,
    fit_link,
    step_seconds,
)

ETHERNET, SHARED = Link(100e-6, 100e6), Link(10e-6, 2e9)


def test_by_hand():
    # Ring of 4: 6 messages of 10 MB / 4 at 100 MB/s and 0.1 ms. Tree: 4 messages of 10 MB.
    assert allreduce_seconds(10e6, 4, ETHERNET, "ring") == pytest.approx(6 * (100e-6 + 0.025))
    assert allreduce_seconds(10e6, 4, ETHERNET, "tree") == pytest.approx(4 * (100e-6 + 0.1))
    # 100 bytes on 16 ranks: 30 latencies in a ring, 8 in a tree.
    assert allreduce_seconds(100, 16, ETHERNET, "auto") == pytest.approx(8 * (100e-6 + 1e-6))
    assert allreduce_seconds(10e6, 1, ETHERNET) == allreduce_seconds(0, 4, ETHERNET) == 0
    job = Job(sample_s=0.1, samples=8, message_bytes=10e6, fixed_s=0.05)
    # 4 ranks on 2 nodes: 2 samples each; 10 MB inside (2 x 5 MB at 2 GB/s), then between the nodes (2 x 5 MB at 100 MB/s).
    inside, between = 2 * (10e-6 + 5e6 / 2e9), 2 * (100e-6 + 5e6 / 100e6)
    assert step_seconds(job, 4, 2, ETHERNET, SHARED) == pytest.approx(0.05 + 0.2 + inside + between)
    # 3 ranks: the busiest has 3 of 8 samples.
    assert step_seconds(job, 3, 3, ETHERNET, SHARED) == pytest.approx(0.05 + 0.3 + 4 * (10e-6 + 10e6 / 3 / 2e9))
    assert efficiency(job, 4, 2, ETHERNET, SHARED) == pytest.approx(0.85 / 4 / (0.25 + inside + between))
    # Two groups travel as often as latency says; half of it hides behind the computation.
    two = Job(0.1, 8, 10e6, messages=2, overlap=0.5)
    assert exchange_seconds(two, 2, 1, ETHERNET, SHARED) == pytest.approx(2 * 2 * (100e-6 + 2.5e6 / 100e6))
    assert step_seconds(two, 2, 1, ETHERNET, SHARED) == pytest.approx(0.4 + 0.5 * 4 * (100e-6 + 0.025))


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_link_is_found_again(ranks):
    points = [(count, allreduce_seconds(count, ranks, ETHERNET, "ring")) for count in (1e3, 1e5, 1e6, 5e7)]
    found = fit_link(points, ranks)
    assert found.latency_s == pytest.approx(100e-6, rel=1e-6) and found.bytes_per_s == pytest.approx(100e6, rel=1e-6)
    with pytest.raises(ConfigError, match="at least two sizes"):
        fit_link(points[:1])


@given(st.integers(1, 64), st.integers(1, 8), st.floats(1e-4, 1), st.floats(0, 1e9))
def test_no_rank_is_worth_more_than_one(ranks, per_node, sample, count):
    job = Job(sample, 64, count)
    assert 0 < efficiency(job, ranks, per_node, ETHERNET, SHARED) <= 1 + 1e-9


@pytest.mark.parametrize("ranks", [0, 9])
def test_ranks_that_can_not_be(ranks):
    with pytest.raises(ConfigError, match="expected at (least|most)"):
        step_seconds(Job(0.1, 8, 1), ranks, 1, ETHERNET, SHARED)
