"""The epoch plan: every item once, the same global order for any world, resume in the middle."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_imaging.errors import ConfigError
from hvd_imaging.pipeline.plan import (
    EpochPlan,
    balanced_cut,
    busiest,
    check_fits,
    equal_cut,
    generator,
    tiles,
)
from hvd_imaging.world import World

items = st.integers(1, 500)
ranks = st.integers(1, 64)
batches = st.integers(1, 64)
seeds = st.integers(0, 2**31)


def plan(count, batch, seed, epoch=0):
    return EpochPlan("hash", seed, epoch, count, batch)


@given(items, ranks, batches, seeds, st.integers(1, 4))
def test_every_item_exactly_once_and_in_the_same_global_order(count, size, batch, seed, micro):
    epoch, cut = plan(count, batch, seed), equal_cut(size, micro)
    steps = list(epoch.batches())
    assert len(steps) == epoch.steps
    joined = []
    for step in steps:
        parts = [cut.part(step, rank, m) for rank in range(size) for m in range(micro)]
        assert max(map(len, parts)) <= max(cut.rows(batch, rank) for rank in range(size))
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


@given(items, batches, seeds, st.lists(ranks, min_size=1, max_size=4), st.data())
def test_another_world_in_the_middle_of_an_epoch_repeats_and_drops_nothing(count, batch, seed, worlds, data):
    epoch, done, seen = plan(count, batch, seed), 0, []
    for index, size in enumerate(worlds):
        last = index + 1 == len(worlds)
        until = epoch.steps if last else data.draw(st.integers(done, epoch.steps))
        for step in list(epoch.batches(done))[: until - done]:
            seen += [item for rank in range(size) for item in equal_cut(size).part(step, rank)]
        done = until
    assert seen == list(epoch.order())


@given(st.sampled_from([1, 2, 4, 8, 16]), batches, st.data())
def test_the_parts_of_exact_bits_do_not_depend_on_the_world(parts, batch, data):
    length = data.draw(st.integers(0, batch))
    items = np.arange(length)
    expected = [list(p) for p in (equal_cut(1, parts).part(items, 0, m) for m in range(parts))]
    for size in (s for s in (1, 2, 4, 8, 16) if s <= parts):
        cut = equal_cut(size, parts // size)
        found = [list(cut.part(items, rank, m)) for rank in range(size) for m in range(cut.micro)]
        assert found == expected
        assert {cut.rows(batch, rank) for rank in range(size)} == {-(-batch // parts)}


@given(st.lists(st.floats(1e-4, 10), min_size=1, max_size=12), st.integers(0, 60), st.data())
def test_a_balanced_cut_gives_each_rank_work_and_loses_nothing(seconds, more, data):
    batch = len(seconds) + more
    cut = balanced_cut(seconds, batch)
    assert sum(cut.shares) == batch and min(cut.shares) >= 1
    length = data.draw(st.integers(1, batch))
    parts = [cut.part(np.arange(length), rank) for rank in range(len(seconds))]
    assert list(np.concatenate(parts)) == list(range(length))
    assert all(len(part) <= cut.rows(batch, rank) for rank, part in enumerate(parts))
    # Moving any one item from the busiest rank to another does not end the step earlier.
    slowest = max(range(len(seconds)), key=lambda r: cut.shares[r] * seconds[r])
    if cut.shares[slowest] > 1:
        for rank in set(range(len(seconds))) - {slowest}:
            assert (cut.shares[rank] + 1) * seconds[rank] >= busiest(cut, seconds) * (1 - 1e-9)


def test_a_rank_of_half_the_speed_gets_half_the_work():
    assert balanced_cut([1.0, 2.0], 12).shares == (8, 4)
    assert balanced_cut([1.0, 1.0, 1.0], 7).shares == (3, 2, 2)


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
