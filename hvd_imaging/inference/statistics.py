"""How good a prediction is, and how sure that figure is. NumPy and SciPy only.

A figure that does not exist (Dice of a class that neither truth nor prediction holds) is ``None``, never 0 or 1: it is
left out of means, and the number of cases that a mean rests on is given beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from scipy import ndimage

Interval = tuple[float, float]

LEVEL = 0.95
DRAWS = 2000


@dataclass(frozen=True)
class Estimate:
    """A figure with its confidence interval.

    Attributes:
        value: None if it does not exist for these cases.
        interval: (low, high), None if there is nothing to compute it from.
        count: cases that it rests on.
        method: of the interval: "wilson", "delong" or "bootstrap".
        note: why a value or interval is missing, "" otherwise.
    """

    value: float | None
    interval: Interval | None
    count: int
    method: str
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values for a report."""
        return {
            "value": self.value,
            "interval": None if self.interval is None else list(self.interval),
            "count": self.count,
            "method": self.method,
            **({"note": self.note} if self.note else {}),
        }


# --- segmentation: one class as boolean masks (D, H, W) -----------------------------------------------------------


def dice(truth: np.ndarray, prediction: np.ndarray) -> float | None:
    """2 |A and B| / (|A| + |B|) of two boolean masks of any one shape; None if both are empty."""
    total = int(np.count_nonzero(truth)) + int(np.count_nonzero(prediction))
    return None if total == 0 else 2 * int(np.count_nonzero(truth & prediction)) / total


def hd95(truth: np.ndarray, prediction: np.ndarray, spacing: Sequence[float]) -> float | None:
    """95th percentile Hausdorff distance in mm of two boolean masks (D, H, W) with ``spacing`` in mm (D, H, W).

    For each surface voxel (one with a face neighbour outside of its mask) the distance to the other mask's nearest
    surface voxel is taken; of the 95th percentiles of both directions the larger one is returned.

    Returns:
        None if either mask is empty: no distance exists. The caller counts these cases, it does not hide them.
    """
    box = _bounding_box(truth | prediction)
    if box is None or not truth.any() or not prediction.any():
        return None
    # All surface voxels lie inside of the union's box, so the distance maps need not be larger.
    a, b = _surface(truth[box]), _surface(prediction[box])
    to_b = ndimage.distance_transform_edt(~b, sampling=tuple(spacing))[a]
    to_a = ndimage.distance_transform_edt(~a, sampling=tuple(spacing))[b]
    return float(max(np.percentile(to_b, 95), np.percentile(to_a, 95)))


def _bounding_box(mask: np.ndarray) -> tuple[slice, ...] | None:
    found = []
    for axis in range(mask.ndim):
        along = np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        if along.size == 0:
            return None
        found.append(slice(int(along[0]), int(along[-1]) + 1))
    return tuple(found)


def _surface(mask: np.ndarray) -> np.ndarray:
    return mask & ~ndimage.binary_erosion(mask, ndimage.generate_binary_structure(mask.ndim, 1))


# --- classes as integers ------------------------------------------------------------------------------------------


def confusion_matrix(truth: np.ndarray, prediction: np.ndarray, classes: int) -> np.ndarray:
    """``(K, K)`` int64 counts, row: truth, column: prediction; both inputs hold class indices, any one shape."""
    pairs = truth.astype(np.int64).ravel() * classes + prediction.astype(np.int64).ravel()
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def accuracy(matrix: np.ndarray) -> float | None:
    """Share of the diagonal."""
    return _ratio(np.trace(matrix), matrix.sum())


def recall(matrix: np.ndarray, index: int) -> float | None:
    """Sensitivity of one class: found among those that are there; None if none is there."""
    return _ratio(matrix[index, index], matrix[index].sum())


def precision(matrix: np.ndarray, index: int) -> float | None:
    """Positive predictive value of one class: right among those called so; None if none was called so."""
    return _ratio(matrix[index, index], matrix[:, index].sum())


def specificity(matrix: np.ndarray, index: int) -> float | None:
    """Share of the others that were not called this class; None if there are no others."""
    negative, true_negative = _negatives(matrix, index)
    return _ratio(true_negative, negative)


def _negatives(matrix: np.ndarray, index: int) -> tuple[int, int]:
    negative = int(matrix.sum() - matrix[index].sum())
    return negative, negative - int(matrix[:, index].sum() - matrix[index, index])


def _ratio(part: Any, whole: Any) -> float | None:
    return float(part) / float(whole) if whole else None


# --- confidence ---------------------------------------------------------------------------------------------------


def wilson(successes: int, count: int, level: float = LEVEL) -> Interval | None:
    """Wilson score interval of a proportion; None without trials."""
    if count == 0:
        return None
    z = _quantile(level)
    share = successes / count
    scale = 1 + z * z / count
    middle = (share + z * z / (2 * count)) / scale
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / scale
    # At 0 and 1 the bound is exact; rounding must not push it past the value.
    return (0.0 if successes == 0 else middle - half), (1.0 if successes == count else middle + half)


def proportion(successes: int, count: int) -> Estimate:
    """A share of independent cases with its Wilson interval."""
    return Estimate(
        _ratio(successes, count), wilson(successes, count), count, "wilson", "" if count else "no such cases"
    )


def bootstrap(
    statistic: Callable[[np.ndarray], float | None],
    count: int,
    seed: int = 0,
    draws: int = DRAWS,
    level: float = LEVEL,
) -> Interval | None:
    """Percentile interval of ``statistic(indices of a resample)`` over cases drawn with replacement.

    A resample without a value (None) is left out; the interval is None if fewer than half of them have one, or with
    fewer than two cases.
    """
    if count < 2:
        return None
    generator = np.random.default_rng(seed)
    found = [
        value for _ in range(draws) if (value := statistic(generator.integers(0, count, count))) is not None
    ]
    if len(found) < draws / 2:
        return None
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mean(values: Sequence[float | None], seed: int = 0) -> Estimate:
    """Mean over the cases that have a value, with a bootstrap interval over cases."""
    known = np.array([value for value in values if value is not None], np.float64)
    if known.size == 0:
        return Estimate(None, None, 0, "bootstrap", "no case has this value")
    interval = bootstrap(lambda index: float(known[index].mean()), known.size, seed)
    note = "" if interval is not None else "one case: no interval"
    return Estimate(float(known.mean()), interval, int(known.size), "bootstrap", note)


# --- area under the ROC curve -------------------------------------------------------------------------------------


def roc_curve(truth: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(false positive rate, true positive rate) from (0, 0) to (1, 1), one point for each distinct score.

    ``truth`` (N,) boolean with both values present, ``score`` (N,) higher for positive.
    """
    order = np.argsort(-score, kind="stable")
    positive = truth[order].astype(bool)
    last = np.append(np.flatnonzero(np.diff(score[order])), positive.size - 1)
    hits, alarms = np.cumsum(positive)[last], np.cumsum(~positive)[last]
    return np.append(0.0, alarms / alarms[-1]), np.append(0.0, hits / hits[-1])


def auc(truth: np.ndarray, score: np.ndarray) -> float | None:
    """Chance that a positive scores above a negative (ties count half); None unless both are there."""
    truth = np.asarray(truth, bool)
    positives = int(truth.sum())
    negatives = truth.size - positives
    if positives == 0 or negatives == 0:
        return None
    ranks = _midranks(np.asarray(score, np.float64))
    return float((ranks[truth].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def auc_delong(truth: np.ndarray, score: np.ndarray, level: float = LEVEL) -> Estimate:
    """AUC with DeLong's interval (DeLong 1988, by midranks as Sun and Xu 2014), cut to [0, 1].

    At an AUC of exactly 0 or 1 DeLong's variance is 0: an interval without width would claim certainty that a few
    cases do not give, so none is returned. Likewise with fewer than two cases of either class.
    """
    truth = np.asarray(truth, bool)
    score = np.asarray(score, np.float64)
    value = auc(truth, score)
    count = int(truth.size)
    if value is None:
        return Estimate(None, None, count, "delong", "the cases are all of one class")
    positive, negative = score[truth], score[~truth]
    m, n = positive.size, negative.size
    if m < 2 or n < 2:
        return Estimate(value, None, count, "delong", "fewer than two cases of a class: no interval")
    if value in (0.0, 1.0):
        return Estimate(value, None, count, "delong", "perfectly separated: DeLong's variance is 0, no interval")
    together = _midranks(np.concatenate([positive, negative]))
    v_positive = (together[:m] - _midranks(positive)) / n
    v_negative = 1 - (together[m:] - _midranks(negative)) / m
    deviation = math.sqrt(v_positive.var(ddof=1) / m + v_negative.var(ddof=1) / n)
    half = _quantile(level) * deviation
    return Estimate(value, (max(0.0, value - half), min(1.0, value + half)), count, "delong")


def auc_macro(truth: np.ndarray, probabilities: np.ndarray, seed: int = 0) -> Estimate:
    """AUC of a classifier: ``truth`` (N,) class indices, ``probabilities`` (N, K).

    Two classes: class 1 against class 0 with DeLong's interval. More: the mean of each class against the rest (of
    those that have cases on both sides) with a bootstrap interval.
    """
    classes = probabilities.shape[1]
    if classes == 2:
        return auc_delong(truth == 1, probabilities[:, 1])

    def macro(index: np.ndarray) -> float | None:
        found = [auc(truth[index] == k, probabilities[index, k]) for k in range(classes)]
        known = [value for value in found if value is not None]
        return sum(known) / len(known) if known else None

    value = macro(np.arange(truth.size))
    if value is None:
        return Estimate(None, None, int(truth.size), "bootstrap", "the cases are all of one class")
    if value == 1.0:
        return Estimate(value, None, int(truth.size), "bootstrap", "perfectly separated: no interval")
    return Estimate(value, bootstrap(macro, int(truth.size), seed), int(truth.size), "bootstrap")


def _midranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def _quantile(level: float) -> float:
    return NormalDist().inv_cdf((1 + level) / 2)
