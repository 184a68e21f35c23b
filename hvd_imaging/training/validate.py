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


def make_validation_step(model: Any, task: str, loss: str, class_weights: tf.Tensor) -> Callable[..., tuple[tf.Tensor, tf.Tensor]]:
    """``(image, label, weight, draw)`` -> float64 ``(N, S)`` sums of the loss (see `loss_of_sums`) and counts of each row.

    Rows of counts are ``(K, 3)`` overlaps for segmentation, where label -1 marks voxels that do not count, and ``(1,)``
    correct or not for classification.

    Args:
        model: gives logits.
        task: segmentation or classification.
        loss: as `models.losses.sample_losses` takes it.
        class_weights: float32 ``(K,)``.
    """

    @tf.function
    def step(image, label, weight, draw):
        logits = tf.cast(model(image, training=False), tf.float32)
        counted = tf.maximum(label, 0)
        inside = tf.cast(label >= 0, tf.float32) * tf.reshape(weight, [-1, *[1] * (len(label.shape) - 1)])
        entropy = tf.nn.sparse_softmax_cross_entropy_with_logits(counted, logits) * tf.gather(class_weights, counted)
        rows = [tf.reshape(tf.cast(part, tf.float64), [tf.shape(label)[0], -1]) for part in (entropy * inside, inside)]
        sums = tf.stack([tf.reduce_sum(part, 1) for part in rows], 1)
        if task == "segmentation":
            if loss != "ce":
                probability = tf.nn.softmax(logits)[..., 1:] * inside[..., None]
                truth = tf.one_hot(counted, logits.shape[-1], dtype=tf.float32)[..., 1:] * inside[..., None]
                sums = tf.concat([sums, _over_voxels(probability * truth), _over_voxels(probability + truth)], 1)
            # What does not count becomes predicted background, and background is not scored.
            background = tf.one_hot(tf.zeros_like(label), logits.shape[-1])
            return sums, overlap_counts(label, tf.where((label >= 0)[..., None], logits, background))
        correct = tf.equal(tf.argmax(logits, -1, tf.int32), label)
        return sums, tf.cast(correct, tf.int64)[:, None]

    return step


def _over_voxels(values: tf.Tensor) -> tf.Tensor:
    """float64 ``(N, K)`` from ``(N, D, H, W, K)``: rows in float32, which is enough for them, all else in float64."""
    return tf.reduce_sum(tf.cast(tf.reduce_sum(values, 3), tf.float64), [1, 2])


def loss_of_sums(sums: np.ndarray, loss: str, smooth: float = 1.0) -> float:
    """The loss of `models.losses.sample_losses`, mean over whole cases, from sums over the voxels of each. Pure.

    Args:
        sums: float64 ``(cases, 2)``: cross-entropy times class weight, voxels; with Dice ``(cases, 2 + 2 (K - 1))``: then of
            each foreground class the overlap of probability and truth, and the two together.
        loss: ``ce``, ``dice`` or ``dice_ce``.
        smooth: as in `models.losses.soft_dice`.
    """
    found = np.zeros(len(sums))
    if loss != "dice":
        found += sums[:, 0] / np.maximum(sums[:, 1], 1)
    if loss != "ce":
        overlap, total = np.split(sums[:, 2:], 2, axis=1)
        found += np.mean(1 - (2 * overlap + smooth) / (total + smooth), axis=1)
    return float(found.mean())


def validate(
    data: ValidationData,
    step: Callable[..., Any],
    hvd: Horovod,
    spec: ModelSpec,
    loss: str,
    on_batch: Callable[[str], None] = lambda event: None,
) -> dict[str, float]:
    """Metrics over the whole validation split, equal on all ranks.

    Each row's sums have a place of their own until all are added in the split's order: who computed it makes no difference.

    Args:
        loss: the training's; that of ``step``.

    Returns:
        ``val_loss``: the training's loss, of the finest output, mean over whole cases; and ``val_dice`` (mean over cases and
        foreground classes present) with one ``val_dice_<class>`` each, or ``val_accuracy``.
    """
    classes = len(spec.classes)
    width = classes * 3 if spec.task == "segmentation" else 1
    soft = 2 * (classes - 1) if spec.task == "segmentation" and loss != "ce" else 0
    sums, counts = np.zeros((len(data.items), 2 + soft)), np.zeros((len(data.samples), width), np.int64)
    for items, batch in data.batches(hvd.data_world):
        on_batch("validate")
        found, per_row = step(*batch)
        if spec.task == "classification" and hvd.group.index:
            continue  # the first rank of those that share the volume has the same answer, and counts it
        sums[items] = found.numpy()[: len(items)]
        samples = [data.items[item][0] for item in items]
        np.add.at(counts, samples, per_row.numpy()[: len(items)].reshape(len(items), width))
    on_batch("validation sums")
    sums, counts = hvd.sum_array(sums, "validation.sums"), hvd.sum_array(counts, "validation.counts")
    of_case = np.zeros((len(data.samples), sums.shape[1]))
    np.add.at(of_case, [index for index, _ in data.items], sums)
    result = {"val_loss": loss_of_sums(of_case, loss)}
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
