"""Exchanges of gradients in a world of one or with stand-in ranks, and the choice between them."""

from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from hvd_imaging.config import RunConfig, check
from hvd_imaging.errors import ConfigError
from hvd_imaging.parallel.choose import choose
from hvd_imaging.parallel.exchange import (
    Adasum,
    FixedTree,
    Half,
    PowerSgd,
    Sum,
    check_exchange,
    make_exchange,
    matrix_shape,
    pair_sum,
    tree_sum,
)
from hvd_imaging.world import World

SHAPES = [(3, 3, 16, 32), (32,), (200, 100)]
TRUE, FALSE = tf.constant(True), tf.constant(False)


class Twins:
    """A world of two whose other rank has the same gradients."""

    world, has_mpi = World(0, 2), True

    def sum_tensors(self, tensors, name, groups=1):
        return [t + t for t in tensors]


def config(**sections):
    values = {"data": {"dataset": "d"}, "model": {"name": "unet3d"}} | sections
    return check(RunConfig, values, "test")


def gradients(seed, scale=1e-3):
    random = np.random.default_rng(seed)
    return [tf.constant(random.normal(0, scale, shape), tf.float32) for shape in SHAPES]


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1.0, 1e4])
def test_half_precision_follows_the_size_of_the_gradients(scale):
    half = Half(Twins())
    for seed in range(4):
        given = gradients(seed, scale)
        found = half.sum(given, TRUE, FALSE)
    for g, f in zip(given, found, strict=True):
        np.testing.assert_allclose(f, 2 * g, rtol=1e-3, atol=2e-3 * scale)


def test_an_overflow_in_half_precision_is_sent_again():
    half = Half(Twins())
    half.sum(gradients(0, 1e-6), TRUE, FALSE)
    given = gradients(1, 1e3)  # a billion times as large as the scale expects
    for g, f in zip(given, half.sum(given, TRUE, FALSE), strict=True):
        np.testing.assert_array_equal(f, 2 * g)
    assert 0 < float(half.scale) < 1e3


def test_powersgd_is_late_but_loses_nothing():
    exchange = PowerSgd(Twins(), SHAPES, rank=2)
    sent, received = [0, 0, 0], [0, 0, 0]
    for seed in range(8):
        given = gradients(seed)
        found = exchange.sum(given, TRUE, tf.constant(seed == 7))
        sent = [a + 2 * g.numpy() for a, g in zip(sent, given, strict=True)]
        received = [a + f.numpy() for a, f in zip(received, found, strict=True)]
        if seed < 7:
            assert np.linalg.matrix_rank(found[2].numpy(), tol=1e-5) <= 2
            np.testing.assert_allclose(found[1], 2 * given[1])  # a bias travels whole
    for a, b in zip(sent, received, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert all(not e.numpy().any() for e in exchange.errors.values())


def test_powersgd_keeps_nothing_of_a_bad_step():
    exchange = PowerSgd(Twins(), SHAPES, rank=2)
    exchange.sum(gradients(0), TRUE, FALSE)
    before = [v.numpy() for v in [*exchange.errors.values(), *exchange.variables]]
    bad = [g * np.nan for g in gradients(1)]
    exchange.sum(bad, FALSE, FALSE)
    for a, b in zip(before, [*exchange.errors.values(), *exchange.variables], strict=True):
        np.testing.assert_array_equal(a, b)


@given(st.integers(1, 40))
def test_a_tree_sum_adds_everything_once(count):
    assert tree_sum(list(range(count)), lambda a, b: a + b) == sum(range(count))


def test_the_tree_has_one_order_also_after_the_graph_optimizer():
    values = [tf.constant(v, tf.float32) for v in ([1e8], [1.0], [-1e8], [1.0])]
    eager = tree_sum(values, lambda a, b: np.float32(a) + np.float32(b))
    assert float(tf.function(lambda: tree_sum(values, pair_sum))()[0]) == float(eager[0]) == 0.0


@pytest.mark.parametrize(
    "shape, expected", [((32,), None), ((3, 3, 1, 8), None), ((3, 3, 16, 32), (144, 32)), ((4096, 2), None)]
)
def test_small_gradients_travel_whole(shape, expected):
    assert matrix_shape(shape, 4) == expected


@pytest.mark.parametrize(
    "size, sections, kind",
    [
        (1, {"parallel": {"compression": "fp16"}}, Sum),
        (2, {}, Sum),
        (2, {"parallel": {"compression": "fp16"}}, Half),
        (2, {"parallel": {"compression": "powersgd"}}, PowerSgd),
        (4, {"parallel": {"reduction": "adasum"}}, Adasum),
        (4, {"train": {"reproducible": "exact"}}, FixedTree),
    ],
)
def test_the_configuration_chooses(size, sections, kind):
    hvd = SimpleNamespace(world=World(0, size), has_mpi=True)
    assert type(make_exchange(config(**sections), hvd, SHAPES)) is kind


@pytest.mark.parametrize(
    "size, mpi, sections, message",
    [
        (3, True, {"train": {"reproducible": "exact"}}, "3 ranks cannot share 4 parts"),
        (8, True, {"train": {"reproducible": "exact"}}, "8 ranks cannot share 4 parts"),
        (3, True, {"parallel": {"reduction": "adasum"}}, "takes 2, 4, 8, ... ranks, found 3"),
        (2, False, {"parallel": {"reduction": "adasum"}}, "needs MPI, found Gloo"),
    ],
)
def test_what_can_not_be_done_is_said(size, mpi, sections, message):
    hvd = SimpleNamespace(world=World(0, size), has_mpi=mpi)
    with pytest.raises(ConfigError, match=message):
        check_exchange(config(**sections), hvd)


@pytest.mark.parametrize(
    "times, compute, expected",
    [
        ({"none": 0.02, "fp16": 0.03, "powersgd": 0.01}, 1.0, "none"),  # nothing to gain
        ({"none": 2.0, "fp16": 1.0, "powersgd": 0.9}, 0.5, "fp16"),  # powersgd gains less than a tenth more
        ({"none": 2.0, "fp16": 1.0, "powersgd": 0.1}, 0.2, "powersgd"),
        ({"fp16": 1.0}, 0.0, "fp16"),
    ],
)
def test_auto_takes_the_least_loss_that_is_nearly_fastest(times, compute, expected):
    chosen, reason = choose(times, compute)
    assert chosen == expected
    assert all(name in reason for name in times)


@pytest.mark.parametrize(
    "sections, message",
    [
        ({"model": {"name": "unet3d", "norm": "batch"}}, "model.norm: batch norm depends.*'group' or 'instance'"),
        ({"train": {"reproducible": "exact", "accumulate": 2}}, "train.accumulate"),
        ({"train": {"reproducible": "exact", "exact_parts": 6}}, "expected a power of two, found 6"),
        ({"train": {"reproducible": "exact"}, "parallel": {"compression": "fp16"}}, "takes compression=none"),
        ({"train": {"reproducible": True, "balance": "auto"}}, "use balance=equal"),
        ({"parallel": {"reduction": "adasum", "compression": "fp16"}}, "reduction=adasum takes none"),
        ({"parallel": {"dense": "sharded", "spatial": 2}}, "dense=sharded does not go together with parallel.spatial=2"),
        ({"parallel": {"dense": "sharded"}, "train": {"mixed_precision": "float16", "balance": "auto"}},
         "does not go together with train.balance=auto, train.mixed_precision=float16"),
    ],
)
def test_contradictions_are_refused(sections, message):
    with pytest.raises(ConfigError, match=message):
        config(**sections)
