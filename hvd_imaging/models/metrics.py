"""Metrics as sums and counts that ranks can add up; the quotient is taken once, at the end."""

from __future__ import annotations

import numpy as np
import tensorflow as tf


def overlap_counts(labels, logits):
    """Voxels of each class in truth, prediction and both: int64 ``(N, K, 3)`` from ``(N, D, H, W)`` and ``(..., K)``."""
    classes = logits.shape[-1]
    predicted = tf.one_hot(tf.argmax(logits, -1), classes, dtype=tf.float32)
    truth = tf.one_hot(labels, classes, dtype=tf.float32)
    # int64: a float32 sum stops counting at 16.7 million voxels, so each sample is summed by rows first.
    rows = [tf.reduce_sum(part, 3) for part in (truth, predicted, truth * predicted)]
    return tf.stack([tf.reduce_sum(tf.cast(part, tf.int64), [1, 2]) for part in rows], -1)


def dice_of_counts(counts: np.ndarray) -> np.ndarray:
    """Dice from ``(..., 3)`` counts (truth, prediction, both); NaN where the class is in neither."""
    total = (counts[..., 0] + counts[..., 1]).astype(np.float64)
    return np.where(total > 0, 2.0 * counts[..., 2] / np.where(total > 0, total, 1), np.nan)
