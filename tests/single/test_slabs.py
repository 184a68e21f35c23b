"""Slabs of a volume's depth: simulated layers on slabs give what they give unsplit; what cannot be split is refused by name."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_imaging.config import ParallelConfig
from hvd_imaging.errors import ConfigError
from hvd_imaging.parallel.grid import Grid, check_grid, make_grid
from hvd_imaging.parallel.slabs import check_bounds, check_halo, cut, fetches, spread, window


def gathered(values, bounds, plans, rank):
    """What a rank has after the exchange, as the plans say it: pieces of the others' slabs in rank order."""
    slabs = [values[start:stop] for start, stop in itertools.pairwise(bounds)]
    below = [slabs[other][slice(*plans[other].sends[rank])] for other in range(rank)]
    above = [slabs[other][slice(*plans[other].sends[rank])] for other in range(rank + 1, len(plans))]
    plan = plans[rank]
    assert [len(piece) for piece in below + above] == [n for other, n in enumerate(plan.takes) if other != rank]
    assert sum(map(len, below)) == plan.lower and sum(map(len, above)) == plan.upper
    return np.concatenate([np.zeros(plan.pad[0]), *below, slabs[rank][slice(*plan.own)], *above, np.zeros(plan.pad[1])])


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_windows_of_slabs_are_those_of_the_volume(data):
    depth, ranks = data.draw(st.integers(4, 60)), data.draw(st.integers(1, 4))
    kernel, stride, dilation = (data.draw(st.integers(1, n)) for n in (6, 3, 2))
    padding = data.draw(st.sampled_from(["same", "valid"]))
    plan = window(depth, kernel, stride, dilation, padding)
    edges = data.draw(st.lists(st.integers(1, depth - 1), min_size=ranks - 1, max_size=ranks - 1, unique=True))
    bounds = (0, *sorted(edges), depth)
    values = np.arange(1.0, depth + 1)
    total = max((plan.outputs - 1) * stride + plan.reach - depth, 0) if padding == "same" else 0
    padded = np.pad(values, (total // 2, total - total // 2))
    whole = [padded[at * stride : at * stride + plan.reach : dilation] for at in range(plan.outputs)]
    out = plan.bounds(bounds)
    assert out[0] == 0 and out[-1] == plan.outputs and list(out) == sorted(out)
    try:
        check_bounds(out, "x")
    except ConfigError:
        return
    plans = fetches(bounds, [plan.needs(interval) for interval in itertools.pairwise(out)])
    for rank, (first, last) in enumerate(itertools.pairwise(out)):
        own = gathered(values, bounds, plans, rank)
        found = [own[at * stride : at * stride + plan.reach : dilation] for at in range(last - first)]
        np.testing.assert_array_equal(found, whole[first:last])


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_spreads_of_slabs_are_those_of_the_volume(data):
    depth, ranks = data.draw(st.integers(4, 30)), data.draw(st.integers(1, 4))
    kernel, stride = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    up = spread(depth, kernel, stride, data.draw(st.sampled_from(["same", "valid"])))
    edges = data.draw(st.lists(st.integers(1, depth - 1), min_size=ranks - 1, max_size=ranks - 1, unique=True))
    bounds, values = (0, *sorted(edges), depth), np.arange(1.0, depth + 1)

    def spreading(inputs):
        out = np.zeros((len(inputs) - 1) * stride + max(kernel, stride))
        for at, value in enumerate(inputs):
            out[at * stride : at * stride + kernel] += value * np.arange(1, kernel + 1)
        return out

    whole = spreading(values)[up.before : up.before + up.outputs]
    assert len(whole) == up.outputs
    out = up.bounds(bounds)
    plans = fetches(bounds, [up.needs(interval) for interval in itertools.pairwise(out)])
    for rank, (first, last) in enumerate(itertools.pairwise(out)):
        begin = first - (up.needs((first, last))[0] * stride - up.before)
        found = spreading(gathered(values, bounds, plans, rank))[begin : begin + last - first]
        np.testing.assert_array_equal(found, whole[first:last])


@pytest.mark.parametrize(
    ("depth", "parts", "cell", "bounds"),
    [(16, 2, 1, (0, 8, 16)), (28, 2, 4, (0, 12, 28)), (51, 2, 16, (0, 32, 51)), (12, 3, 4, (0, 4, 8, 12)), (9, 1, 4, (0, 9))],
)
def test_volumes_are_cut_in_whole_cells(depth, parts, cell, bounds):
    assert cut(depth, parts, cell) == bounds


def test_what_can_not_be_split_is_refused():
    with pytest.raises(ConfigError, match=r"depth of 8 .* 4 slabs of whole 4 slices.*parallel.spatial=2 or less, a depth of 16"):
        cut(8, 4, 4)
    with pytest.raises(ConfigError, match=r"layer 'pool5' leaves spatial rank 1 no slice of a depth of 2"):
        check_bounds((0, 2, 2), "pool5")
    plan, bounds = window(8, 7), (0, 2, 4, 8)
    with pytest.raises(ConfigError, match=r"layer 'wide': the halo of 3 slices is larger than the neighbour's slab of 2"):
        check_halo(bounds, fetches(bounds, [plan.needs(i) for i in itertools.pairwise(bounds)]), "wide")


def test_the_grid_of_ranks():
    grid = make_grid(ParallelConfig(), 6, 2)
    assert grid == Grid(3, 2) and grid.size == 6
    assert grid.groups() == [[0, 1], [2, 3], [4, 5]]
    assert [grid.place(rank) for rank in range(4)] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert make_grid(ParallelConfig(), 3, 1) == Grid(3, 1)
    with pytest.raises(ConfigError, match=r"parallel.spatial=2: 3 ranks cannot be cut into groups of 2; start 2 or 4 ranks"):
        make_grid(ParallelConfig(), 3, 2)
    with pytest.raises(ConfigError, match=r"parallel.spatial=2: 1 rank cannot .* start 2 ranks"):
        make_grid(ParallelConfig(), 1, 2)
    with pytest.raises(ConfigError, match=r"parallel.data=2 x parallel.spatial=2 makes 4 ranks, found 6"):
        make_grid(ParallelConfig(data=2), 6, 2)
    check_grid(Grid(4, 1), 1, ["x"])
    with pytest.raises(ConfigError, match=r"train.balance=auto.*whole volumes"):
        check_grid(grid, 16, ["train.balance=auto"])
    with pytest.raises(ConfigError, match=r"a depth of 1 .* 2D networks"):
        check_grid(grid, 1, [])
