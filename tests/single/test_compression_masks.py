"""Zeros and shared values: how many, which, and that they stay."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from hvd_imaging.compression.clusters import Clusters, assign
from hvd_imaging.compression.masks import Masks, fragile_layers, m_of_n, smallest, sparsity_at, spread

LAST = 200


def weights(shape=(3, 3, 3, 8, 6), seed=0):
    return tf.Variable(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def shake(variable, seed):
    """An update that touches every weight, as momentum does."""
    variable.assign_add(0.1 * np.random.default_rng(seed).normal(size=variable.shape).astype(np.float32))


def test_the_schedule_rises_to_its_end_and_stays():
    course = [sparsity_at(step, LAST, 0.8) for step in range(LAST + 1)]
    assert course[0] == 0 and course[LAST // 2] == course[LAST] == 0.8
    assert all(a <= b for a, b in pairwise(course))
    assert course[LAST // 4] == pytest.approx(0.8 * (1 - 0.5**3))


@given(st.floats(0, 1), st.integers(1, 60))
def test_the_smallest_go(share, size):
    values = np.random.default_rng(size).normal(size=size)
    keep = smallest(values, share)
    assert keep.sum() == size - round(size * share)
    if 0 < keep.sum() < size:
        assert np.abs(values[keep]).min() >= np.abs(values[~keep]).max()


@given(
    st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 10_000), min_size=1),
    st.sets(st.sampled_from("abcdef")),
    st.floats(0.05, 0.9),
)
def test_fragile_layers_are_spared_and_the_sum_holds(sizes, fragile, sparsity):
    shares = spread(sizes, sorted(fragile), sparsity)
    assert all(0 <= share <= 0.98 for share in shares.values())
    found = sum(sizes[n] * shares[n] for n in sizes) / sum(sizes.values())
    assert found == pytest.approx(sparsity, abs=1e-6)
    strong = [shares[n] for n in sizes if n not in fragile]
    weak = [shares[n] for n in sizes if n in fragile]
    if strong and weak and max(strong) < 0.98:
        assert max(weak) == pytest.approx(max(strong) / 2)


@pytest.mark.parametrize("shape", [(3, 3, 3, 8, 6), (3, 3, 10, 4), (7, 5), (2, 3)])
def test_m_of_n_neighbours_are_zero(shape):
    values = np.random.default_rng(0).normal(size=shape)
    keep = m_of_n(values, 2, 4)
    whole = shape[-2] // 4 * 4
    assert keep[..., whole:, :].all()
    groups = keep[..., :whole, :].reshape(*shape[:-2], -1, 4, shape[-1])
    assert (groups.sum(-2) == 2).all()


def test_zeros_grow_and_stay_while_training_goes_on():
    kernel = weights()
    masks = Masks({"a": kernel}, {"a": 0.8})
    zero = np.zeros(kernel.shape, bool)
    for step in range(1, LAST + 1):
        shake(kernel, step)
        masks.after_update(step, LAST)
        now = kernel.numpy() == 0
        assert not (zero & ~now).any(), "a weight came back"
        assert masks.settled(step, LAST) == (step >= LAST // 2)
        if masks.settled(step, LAST):
            assert now.mean() == pytest.approx(0.8, abs=1e-3)
        zero = now


@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_a_resumed_run_keeps_the_same_zeros(pattern):
    whole, first = weights(), weights()
    held = Masks({"a": whole}, {"a": 0.7}, pattern)
    for step in range(1, LAST + 1):
        shake(whole, step)
        held.after_update(step, LAST)
    before = Masks({"a": first}, {"a": 0.7}, pattern)
    for step in range(1, 71):
        shake(first, step)
        before.after_update(step, LAST)
    again = weights()  # a new process: made for the weights of the start, then given the checkpoint's
    after = Masks({"a": again}, {"a": 0.7}, pattern)
    again.assign(first)
    after.begin()
    for step in range(71, LAST + 1):
        shake(again, step)
        after.after_update(step, LAST)
    np.testing.assert_array_equal(again.numpy(), whole.numpy())
    if pattern:
        assert ((again.numpy() != 0).reshape(3, 3, 3, 2, 4, 6).sum(-2) <= 2).all()


def test_the_pattern_of_a_transposed_convolution_lies_along_its_input():
    kernel = weights((2, 2, 2, 6, 8))  # (kd, kh, kw, out, in)
    masks = Masks({"a": kernel}, {}, (2, 4), {"a": (0, 1, 2, 4, 3)})
    masks.after_update(LAST // 2, LAST)
    assert ((kernel.numpy() != 0).reshape(2, 2, 2, 6, 2, 4).sum(-1) == 2).all()


def test_fragile_layers_are_found_and_left_as_they_were():
    kernels = {"strong": weights(seed=1), "weak": weights(seed=2)}
    before = {name: v.numpy() for name, v in kernels.items()}
    loss = lambda: 1.0 + float((kernels["weak"].numpy() == 0).mean())  # noqa: E731
    assert fragile_layers(kernels, {"strong": 0.5, "weak": 0.5}, loss, 0.02) == ["weak"]
    for name, variable in kernels.items():
        np.testing.assert_array_equal(variable.numpy(), before[name])


def test_clusters_share_values_and_keep_zeros():
    kernel = weights()
    kernel.assign(kernel * (np.random.default_rng(1).random(kernel.shape) < 0.5))
    zero = kernel.numpy() == 0
    held = Clusters({"a": kernel}, 16)
    for step in range(1, 20):
        shake(kernel, step)
        held.after_update(step, 20)
        assert len(np.unique(kernel.numpy())) <= 16
        np.testing.assert_array_equal(kernel.numpy()[zero], 0)


@given(st.integers(2, 40), st.integers(1, 400))
def test_clusters_are_no_more_than_asked_for_and_near(clusters, size):
    values = np.random.default_rng(size).normal(size=size).astype(np.float32)
    member = assign(values, clusters)
    assert member.min() >= 1 and len(np.unique(member)) <= clusters
    # Clusters are better than rounding to evenly spaced values, and exact where there are enough of them.
    centre = np.array([values[member == k].mean() if (member == k).any() else np.inf for k in range(member.max() + 1)])
    even = np.linspace(values.min(), values.max(), clusters)
    rounded = np.abs(values[:, None] - even).min(1)
    error = np.mean((values - centre[member]) ** 2)
    assert error <= np.mean(rounded**2) + 1e-9
    assert size > clusters or error <= 1e-12


def test_nothing_but_zeros_has_no_clusters():
    assert not assign(np.zeros((3, 4)), 8).any()
