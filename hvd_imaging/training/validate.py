"""Validation inside training: metrics over the whole split, the same bits for any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from ..models.metrics import dice_of_counts, overlap_counts
from ..models.spec import ModelSpec
from ..parallel.horovod import Horovod
from ..pipeline.dataset import ValidationData


def make_validation_step(model: Any, task: str) -> Callable[..., tuple[tf.Tensor, tf.Tensor]]:
    """``(image, label, weight, draw)`` -> float64 ``(N, 2)`` (cross-entropy sum, its terms) and counts of each row.

    Rows of counts are ``(K, 3)`` overlaps for segmentation, where label -1 marks voxels that do not count, and ``(1,)``
    correct or not for classification.
    """

    @tf.function
    def step(image, label, weight, draw):
        logits = model(image, training=False)
        inside = tf.cast(label >= 0, tf.float32)
        loss = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.maximum(label, 0), logits)
        terms = inside * tf.reshape(weight, [-1, *[1] * (len(label.shape) - 1)])
        rows = [tf.reshape(tf.cast(part, tf.float64), [tf.shape(label)[0], -1]) for part in (loss * terms, terms)]
        sums = tf.stack([tf.reduce_sum(part, 1) for part in rows], 1)
        if task == "segmentation":
            # What does not count becomes predicted background, and background is not scored.
            background = tf.one_hot(tf.zeros_like(label), logits.shape[-1])
            return sums, overlap_counts(label, tf.where(inside[..., None] > 0, logits, background))
        correct = tf.equal(tf.argmax(logits, -1, tf.int32), label)
        return sums, tf.cast(correct, tf.int64)[:, None]

    return step


def validate(
    data: ValidationData,
    step: Callable[..., Any],
    hvd: Horovod,
    spec: ModelSpec,
    on_batch: Callable[[str], None] = lambda event: None,
) -> dict[str, float]:
    """Metrics over the whole validation split, equal on all ranks.

    Each row's loss has a place of its own until all are added in the split's order: who computed it makes no difference.

    Returns:
        ``val_loss`` (cross-entropy), and ``val_dice`` (mean over cases and foreground classes present) with one
        ``val_dice_<class>`` each, or ``val_accuracy``.
    """
    classes = len(spec.classes)
    width = classes * 3 if spec.task == "segmentation" else 1
    sums, counts = np.zeros((len(data.items), 2)), np.zeros((len(data.samples), width), np.int64)
    for items, batch in data.batches(hvd.data_world):
        on_batch("validate")
        found, per_row = step(*batch)
        if spec.task == "classification" and hvd.group.index:
            continue  # the first rank of those that share the volume has the same answer, and counts it
        sums[items] = found.numpy()[: len(items)]
        samples = [data.items[item][0] for item in items]
        np.add.at(counts, samples, per_row.numpy()[: len(items)].reshape(len(items), width))
    on_batch("validation sums")
    sums, counts = hvd.sum_array(sums, "validation.sums").sum(0), hvd.sum_array(counts, "validation.counts")
    result = {"val_loss": float(sums[0] / max(sums[1], 1))}
    if spec.task == "classification":
        return result | {"val_accuracy": float(counts.sum() / len(data.samples))}
    dice = dice_of_counts(counts.reshape(-1, classes, 3))[:, 1:]
    result["val_dice"] = mean_or_zero(dice)
    return result | {
        f"val_dice_{name}": mean_or_zero(dice[:, index]) for index, name in enumerate(spec.classes[1:])
    }


def mean_or_zero(values: np.ndarray) -> float:
    """Mean of what is not NaN; 0 if nothing is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else 0.0
