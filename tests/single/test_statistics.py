"""Metrics against values worked out by hand, and against scikit-learn and SciPy."""

from __future__ import annotations

import json

import numpy as np
import pytest

from hvd_imaging.inference import statistics as s


def box(shape, *ranges):
    mask = np.zeros(shape, bool)
    mask[tuple(slice(*r) for r in ranges)] = True
    return mask


def test_dice_by_hand():
    a = box((4, 4, 4), (0, 2), (0, 2), (0, 2))  # 8 voxels
    b = box((4, 4, 4), (1, 3), (0, 2), (0, 2))  # 8 voxels, 4 shared
    assert s.dice(a, b) == 0.5
    assert s.dice(a, a) == 1
    assert s.dice(a, np.zeros_like(a)) == 0
    assert s.dice(np.zeros_like(a), np.zeros_like(a)) is None


def test_hd95_uses_mm_along_the_right_axis():
    a = box((10, 10, 10), (2, 3), (2, 8), (2, 8))
    b = box((10, 10, 10), (5, 6), (2, 8), (2, 8))  # the same plate three slices on
    assert s.hd95(a, b, (7.0, 1.0, 1.0)) == pytest.approx(21)
    assert s.hd95(a, b, (1.0, 7.0, 7.0)) == pytest.approx(3)
    assert s.hd95(a, a, (7.0, 1.0, 1.0)) == 0
    assert s.hd95(a, np.zeros_like(a), (1, 1, 1)) is None
    assert s.hd95(np.zeros_like(a), np.zeros_like(a), (1, 1, 1)) is None


def test_hd95_leaves_out_the_farthest_twentieth_and_is_symmetric():
    a = box((1, 1, 200), (0, 1), (0, 1), (0, 100))
    b = a.copy()
    b[0, 0, 150] = True  # one stray voxel of 101
    assert s.hd95(a, b, (1, 1, 1)) == s.hd95(b, a, (1, 1, 1)) == 0
    b[0, 0, 151:160] = True  # ten of 110: beyond the 95th percentile
    assert s.hd95(a, b, (1, 1, 1)) > 50


def test_hd95_equals_the_brute_force_distance_between_surfaces():
    generator = np.random.default_rng(0)
    spacing = np.array([2.5, 0.7, 1.1])
    a = generator.random((6, 9, 8)) < 0.1
    b = generator.random((6, 9, 8)) < 0.1

    def surface(mask):  # a voxel with a face neighbour that is not in the mask; scattered voxels are nearly all of it
        padded = np.pad(mask, 1)
        inner = np.ones_like(mask)
        for axis in range(3):
            for step in (-1, 1):
                inner &= np.roll(padded, step, axis)[1:-1, 1:-1, 1:-1]
        return np.argwhere(mask & ~inner) * spacing

    distance = np.linalg.norm(surface(a)[:, None] - surface(b)[None], axis=-1)
    expected = max(np.percentile(distance.min(1), 95), np.percentile(distance.min(0), 95))
    assert s.hd95(a, b, spacing) == pytest.approx(expected)


def test_confusion_matrix_and_rates_by_hand():
    truth = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2, 2])
    found = np.array([0, 0, 1, 1, 0, 2, 2, 2, 1, 2])
    matrix = s.confusion_matrix(truth, found, 4)
    np.testing.assert_array_equal(matrix, [[2, 1, 0, 0], [1, 1, 0, 0], [0, 1, 4, 0], [0, 0, 0, 0]])
    assert s.accuracy(matrix) == pytest.approx(0.7)
    assert s.recall(matrix, 1) == 0.5
    assert s.precision(matrix, 1) == pytest.approx(1 / 3)
    assert s.specificity(matrix, 1) == pytest.approx(6 / 8)
    assert s.recall(matrix, 3) is None and s.precision(matrix, 3) is None
    assert s.specificity(matrix, 3) == 1


def test_rates_equal_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(4)
    truth, found = generator.integers(0, 3, 200), generator.integers(0, 3, 200)
    matrix = s.confusion_matrix(truth, found, 3)
    np.testing.assert_array_equal(matrix, metrics.confusion_matrix(truth, found))
    assert s.accuracy(matrix) == pytest.approx(metrics.accuracy_score(truth, found))
    np.testing.assert_allclose(
        [s.recall(matrix, k) for k in range(3)], metrics.recall_score(truth, found, average=None)
    )
    np.testing.assert_allclose(
        [s.precision(matrix, k) for k in range(3)], metrics.precision_score(truth, found, average=None)
    )


def test_wilson_by_hand_and_at_the_ends():
    # Newcombe 1998: 81 of 263 -> 0.2553 to 0.3662; 0 of 20 -> 0 to 0.1611; 29 of 29 -> 0.8830 to 1
    assert s.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert s.wilson(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)
    assert s.wilson(29, 29) == pytest.approx((0.8830, 1), abs=5e-5)
    assert s.wilson(0, 0) is None
    assert s.proportion(0, 0).value is None


def test_auc_and_roc_equal_scikit_learn_also_with_ties():
    metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(0)
    for digits in (1, 8):
        truth = generator.random(80) < 0.4
        score = np.round(generator.random(80) + 0.3 * truth, digits)
        assert s.auc(truth, score) == pytest.approx(metrics.roc_auc_score(truth, score))
        fpr, tpr, _ = metrics.roc_curve(truth, score, drop_intermediate=False)
        np.testing.assert_allclose(np.stack(s.roc_curve(truth, score)), np.stack([fpr, tpr]))


def test_delong_by_hand():
    # Positives 0.9 0.8 0.4, negatives 0.5 0.3 0.1. Pairs won: 3 + 3 + 2 of 9.
    # Of each positive 1, 1, 2/3 -> variance 1/27; of each negative 2/3, 1, 1 -> 1/27; sum of both / 3.
    truth = np.array([1, 1, 1, 0, 0, 0], bool)
    found = s.auc_delong(truth, np.array([0.9, 0.8, 0.4, 0.5, 0.3, 0.1]))
    deviation = np.sqrt(2 / 27 / 3)
    assert found.value == pytest.approx(8 / 9)
    assert found.interval == pytest.approx((8 / 9 - 1.959964 * deviation, 1))
    assert found.method == "delong"


def test_delong_variance_equals_the_direct_sum_over_pairs():
    generator = np.random.default_rng(7)
    truth = np.array([True] * 15 + [False] * 25)
    score = np.round(generator.normal(size=40) + truth, 1)
    kernel = (score[truth][:, None] > score[~truth]) + 0.5 * (score[truth][:, None] == score[~truth])
    deviation = np.sqrt(kernel.mean(1).var(ddof=1) / 15 + kernel.mean(0).var(ddof=1) / 25)
    found = s.auc_delong(truth, score)
    assert found.value == pytest.approx(kernel.mean())
    half = 1.959963985 * deviation
    assert found.interval == pytest.approx((kernel.mean() - half, min(1, kernel.mean() + half)))


def test_auc_without_a_meaning_or_an_interval_says_so():
    assert s.auc_delong(np.ones(4, bool), np.arange(4.0)).value is None
    perfect = s.auc_delong(np.array([0, 0, 1, 1], bool), np.arange(4.0))
    assert perfect.value == 1 and perfect.interval is None and "separated" in perfect.note
    single = s.auc_delong(np.array([0, 0, 1], bool), np.array([0.0, 2.0, 1.0]))
    assert single.value == 0.5 and single.interval is None


def test_macro_auc_equals_scikit_learn_and_brackets_its_value():
    metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(2)
    truth = generator.integers(0, 3, 60)
    raw = generator.random((60, 3)) + np.eye(3)[truth] * 0.5
    probabilities = raw / raw.sum(1, keepdims=True)
    found = s.auc_macro(truth, probabilities)
    assert found.value == pytest.approx(
        metrics.roc_auc_score(truth, probabilities, multi_class="ovr", average="macro")
    )
    assert found.interval is not None and found.interval[0] < found.value < found.interval[1]
    assert s.auc_macro(truth, probabilities) == found  # seeded
    assert s.auc_macro(np.zeros(5, int), probabilities[:5]).value is None


def test_mean_leaves_missing_values_out_and_counts_the_rest():
    found = s.mean([0.5, None, 0.7, 0.9])
    assert found.value == pytest.approx(0.7) and found.count == 3
    assert found.interval is not None and 0.5 <= found.interval[0] < 0.7 < found.interval[1] <= 0.9
    assert s.mean([0.5, None, 0.7, 0.9]) == found
    assert s.mean([None]).value is None
    assert s.mean([0.4]).interval is None


def test_bootstrap_interval_agrees_with_the_normal_theory_of_a_mean():
    values = np.random.default_rng(0).normal(10, 2, 400)
    interval = s.mean(list(values)).interval
    assert interval is not None
    half = 1.96 * values.std(ddof=1) / 20
    np.testing.assert_allclose(interval, [values.mean() - half, values.mean() + half], atol=0.05)


def test_estimates_become_plain_json():
    text = json.dumps(s.mean([0.5, 1.0]).to_json(), allow_nan=False)
    assert json.loads(text)["count"] == 2
    assert "note" in s.proportion(0, 0).to_json()
