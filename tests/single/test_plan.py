"""The epoch plan: every item once, the same global order for any world, resume in the middle."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_imaging.errors import ConfigError
from hvd_imaging.pipeline.plan import EpochPlan, check_fits, generator, part_size, rank_part, tiles
from hvd_imaging.world import World

items = st.integers(1, 500)
ranks = st.integers(1, 64)
batches = st.integers(1, 64)
seeds = st.integers(0, 2**31)


def plan(count, batch, seed, epoch=0):
    return EpochPlan("hash", seed, epoch, count, batch)


@given(items, ranks, batches, seeds)
def test_every_item_exactly_once_and_in_the_same_global_order(count, size, batch, seed):
    epoch = plan(count, batch, seed)
    steps = list(epoch.batches())
    assert len(steps) == epoch.steps
    joined = []
    for step in steps:
        parts = [rank_part(step, World(rank, size)) for rank in range(size)]
        assert max(map(len, parts)) <= part_size(batch, World(0, size))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        joined += list(np.concatenate(parts))
    assert joined == list(epoch.order())
    assert sorted(joined) == list(range(count))


@given(items, batches, seeds, st.data())
def test_resume_in_the_middle_repeats_and_drops_nothing(count, batch, seed, data):
    epoch = plan(count, batch, seed)
    stop = data.draw(st.integers(0, epoch.steps))
    before, after = list(epoch.batches())[:stop], list(epoch.batches(stop))
    np.testing.assert_array_equal(np.concatenate([*before, *after]), epoch.order())


def test_order_depends_on_each_part_of_the_key():
    orders = [
        tuple(EpochPlan(h, s, e, 50, 5).order())
        for h, s, e in (("a", 0, 0), ("b", 0, 0), ("a", 1, 0), ("a", 0, 1))
    ]
    assert len(set(orders)) == 4
    assert tuple(EpochPlan("a", 0, 0, 50, 7).order()) == orders[0]


def test_generator_is_fixed_for_ever():
    # A change here would silently change every user's training: the numbers are part of the contract.
    assert list(generator("a", 1).permutation(8)) == list(generator("a", 1).permutation(8))
    assert list(EpochPlan("x", 0, 0, 8, 2).order()) == FIXED_ORDER


FIXED_ORDER = [1, 5, 7, 0, 6, 2, 3, 4]


@pytest.mark.parametrize(
    ("samples", "batch", "size", "words"),
    [
        (0, 4, 1, "no samples"),
        (3, 8, 4, "at most 3 ranks"),
        (10, 2, 3, "train.batch_size"),
    ],
)
def test_worlds_that_do_not_fit_are_refused(samples, batch, size, words):
    with pytest.raises(ConfigError, match=words):
        check_fits(samples, batch, World(0, size), "train")


@given(st.tuples(*[st.integers(1, 40)] * 3), st.tuples(*[st.integers(1, 20)] * 3))
def test_tiles_own_each_voxel_once_and_stay_inside(shape, patch):
    seen = np.zeros(shape, int)
    for tile in tiles(shape, patch):
        seen[tuple(slice(*own) for own in tile.own)] += 1
        for start, (first, stop), side, wanted in zip(tile.start, tile.own, shape, patch, strict=True):
            assert start <= first < stop <= start + wanted
            assert (start >= 0 and start + wanted <= side) or side < wanted
    assert (seen == 1).all()
