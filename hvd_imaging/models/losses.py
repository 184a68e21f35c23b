"""Losses as one value a sample ``(N,)``; the training step sums and divides by the true global batch (never a mean)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf


@dataclass(frozen=True)
class Part:
    """Which part of a volume a loss is given, where ranks share volumes.

    Attributes:
        share: of the volume's voxels.
        sum: ``(tensor, name) -> tensor``, over all parts of the volume; differentiable.
    """

    share: float
    sum: Callable[[Any, str], Any]


WHOLE = Part(1.0, lambda tensor, name: tensor)


def kind_for(task: str, kind: str) -> str:
    """The loss that a network of this task learns by: classification has no Dice."""
    return "ce" if task == "classification" else kind


def title(kind: str, weighted: bool) -> str:
    """What people call the loss ``kind``."""
    name = {"ce": "cross-entropy", "dice": "soft Dice loss", "dice_ce": "soft Dice loss + cross-entropy"}[kind]
    return name + " (classes weighted)" * (weighted and kind != "dice")


def cross_entropy(labels, logits, class_weights, part: Part = WHOLE):
    """Weighted cross-entropy, averaged over a sample's voxels.

    Args:
        labels: int32 ``(N, ...)``.
        logits: float32 ``(N, ..., K)``.
        class_weights: float32 ``(K,)``.
        part: of the volume.

    Returns:
        float32 ``(N,)`` of the whole volume. A voxel's loss is multiplied by the weight of its true class.
    """
    loss = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits) * tf.gather(class_weights, labels)
    mean = tf.reduce_mean(tf.reshape(loss, [tf.shape(loss)[0], -1]), 1)
    return mean if part is WHOLE else part.sum(mean * part.share, "cross_entropy")


def soft_dice(labels, logits, smooth: float = 1.0, part: Part = WHOLE):
    """1 - soft Dice (Milletari et al., 2016), averaged over the foreground classes of each sample.

    Args:
        labels: int32 ``(N, D, H, W)``.
        logits: float32 ``(N, D, H, W, K)``.
        smooth: keeps a class that is absent from both at a loss of 0.
        part: of the volume.

    Returns:
        float32 ``(N,)`` of the whole volume.
    """
    classes = logits.shape[-1]
    probability = tf.nn.softmax(logits)[..., 1:]
    truth = tf.one_hot(labels, classes, dtype=logits.dtype)[..., 1:]
    voxels = list(range(1, len(logits.shape) - 1))
    overlap = tf.reduce_sum(probability * truth, voxels)
    total = tf.reduce_sum(probability, voxels) + tf.reduce_sum(truth, voxels)
    if part is not WHOLE:
        overlap, total = tf.unstack(part.sum(tf.stack([overlap, total]), "dice"))
    return tf.reduce_mean(1.0 - (2.0 * overlap + smooth) / (total + smooth), -1)


def sample_losses(kind: str, labels, outputs, class_weights, parts: Sequence[Part] | None = None):
    """The configured loss of each sample ``(N,)``, over all outputs of a deeply supervised net.

    Coarser outputs are compared with labels taken at every second voxel; their weights are 1, 1/2, 1/4, ... normalized.

    Args:
        kind: ``ce``, ``dice`` or ``dice_ce``.
        labels, outputs, class_weights: see `cross_entropy`; outputs may be a list, the finest first.
        parts: of the volume, one for each output; default: all of it.
    """
    outputs = outputs if isinstance(outputs, list | tuple) else [outputs]
    parts = parts or [WHOLE] * len(outputs)
    total, weights = 0.0, [0.5**level for level in range(len(outputs))]
    for level, (weight, logits, part) in enumerate(zip(weights, outputs, parts, strict=True)):
        target = labels[:, :: 2**level, :: 2**level, :: 2**level] if level else labels
        loss = 0.0
        if kind in ("ce", "dice_ce"):
            loss += cross_entropy(target, logits, class_weights, part)
        if kind in ("dice", "dice_ce"):
            loss += soft_dice(target, logits, part=part)
        total += weight / sum(weights) * loss
    return total
