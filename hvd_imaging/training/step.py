"""One training step: gradients of this rank's micro-batches, their sum over all ranks, the update.

With the gradients travel the step's totals (loss, counts, wishes to stop or to save, ranks that are not finite), so that all
ranks know and decide the same after every step, without a further collective call.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from ..config import TrainConfig
from ..models.blocks import draws
from ..models.losses import sample_losses
from ..parallel.columns import Columns
from ..parallel.exchange import Sum, pair_sum, tree_sum
from ..parallel.spatial import SlabModel

keras = tf.keras


@dataclass(frozen=True)
class Outcome:
    """What all ranks know after a step; equal on all but for the times.

    Attributes:
        sums: float64 (loss, correct, examples) over the global batch.
        stop: a rank was asked to leave.
        save: a rank asks for a checkpoint.
        sick: ranks whose loss or gradients were not finite.
        norms: float32 ``(V,)``, half the squared norm of each variable's summed gradient.
        applied: False if the update was left out because something was not finite.
        compute_s: this rank's time for its gradients (and the update, in one graph).
        exchange_s: this rank's time from there to the sums: transfer, and waiting for slower ranks (and the update, with
            micro-batches or reproducible training).
    """

    sums: np.ndarray
    stop: bool
    save: bool
    sick: tuple[int, ...]
    norms: np.ndarray
    applied: bool
    compute_s: float
    exchange_s: float


class Step:
    """The compiled step of one model.

    Args:
        model: in training form.
        optimizer: built for ``model.trainable_variables``.
        weights_of_class: float32 ``(K,)``.
        config: of the training.
        exchange: sums over the ranks.
        micro: micro-batches of this rank in a step.
        training: whether layers are called in training form.
        columns: which variables exist in parts.
    """

    def __init__(
        self, model: Any, optimizer: Any, weights_of_class: tf.Tensor, config: TrainConfig, exchange: Sum, micro: int = 1,
        training: bool = True, columns: Columns | None = None,
    ) -> None:  # fmt: skip
        self.micro, self.exchange = micro, exchange
        self.variables = model.trainable_variables
        own = [columns is not None and columns.of(v) is not None for v in self.variables]
        scaled = isinstance(optimizer, keras.mixed_precision.LossScaleOptimizer)
        gradients_of = _gradients(model, optimizer if scaled else None, weights_of_class, config.loss, training)
        # One graph leaves TensorFlow the most freedom. With micro-batches each has to be its own run of one and the same
        # graph: that bounds the memory, and makes a part's gradient equal to the bit on whichever rank it is computed.
        self._in_one = micro == 1 and not config.reproducible
        update = _update(self.variables, own, optimizer, scaled, config.clip_norm, exchange, self._in_one)
        self._ranks = exchange.hvd.world.size
        self._gradients = tf.function(gradients_of, reduce_retracing=True)
        self._update = tf.function(update)
        self._whole = tf.function(
            lambda batch, count, *rest: update(*gradients_of(*batch, count), *rest), reduce_retracing=True
        )
        self._add = tf.function(lambda a, b: [pair_sum(x, y) for x, y in zip(a, b, strict=True)])

    def run(
        self, batches: Iterator[Any], count: int, rate: float, stop: bool = False, save: bool = False, flush: bool = False
    ) -> Outcome:
        """Take this rank's micro-batches of one step from ``batches``, and update the model.

        Args:
            batches: ``(image, label, weight, draw)``, see `pipeline/dataset.py`.
            count: true size of the global batch.
            rate: learning rate.
            stop, save: this rank's wishes.
            flush: a checkpoint follows, see :meth:`hvd_imaging.parallel.exchange.Sum.sum`.
        """
        rest = tf.constant(rate, tf.float32), tf.constant([float(stop), float(save)], tf.float64), tf.constant(flush)
        count = tf.constant(count, tf.float32)
        began = time.perf_counter()
        if self._in_one:
            totals, norms, applied, seconds = self._whole(next(batches), count, *rest)
            totals, exchange_s = totals.numpy(), float(seconds)
        else:
            gradients, sums = self._tree(batches, count)
            sums.numpy()  # wait: TensorFlow may still be computing
            computed = time.perf_counter()
            totals, norms, applied, _ = self._update(gradients, sums, *rest)
            totals, exchange_s = totals.numpy(), time.perf_counter() - computed
        return Outcome(
            sums=np.array([totals[0], *np.round(totals[1:3])]),
            stop=bool(totals[3] > 0),
            save=bool(totals[4] > 0),
            sick=tuple(int(rank) for rank in np.flatnonzero(totals[5 : 5 + self._ranks])),
            norms=norms.numpy(),
            applied=bool(applied),
            compute_s=time.perf_counter() - began - exchange_s,
            exchange_s=exchange_s,
        )

    def _tree(self, batches: Iterator[Any], count: tf.Tensor) -> tuple[list[tf.Tensor], tf.Tensor]:
        """Sum over the micro-batches in the order of :func:`tree_sum`, holding log2(micro) + 1 sets of gradients at most."""
        open_: list[tuple[int, list[tf.Tensor]]] = []
        for _ in range(self.micro):
            gradients, sums = self._gradients(*next(batches), count)
            level, found = 0, [*gradients, sums]
            while open_ and open_[-1][0] == level:
                level, found = level + 1, self._add(open_.pop()[1], found)
            open_.append((level, found))
        whole = tree_sum([found for _, found in open_], self._add)
        return whole[:-1], whole[-1]


def _gradients(
    model: Any, scaler: Any, weights_of_class: tf.Tensor, kind: str, training: bool = True
) -> Callable[..., Any]:
    """``(image, label, weight, draw, count) -> (gradients, float64 (loss sum, correct, examples))`` of one micro-batch.

    ``weight`` is 0 for rows that only fill up the batch; ``count`` is the true size of the global batch.
    """
    variables = model.trainable_variables
    classifies = len(model.outputs[0].shape) == 2
    kind = "ce" if classifies else kind
    # Ranks that share a volume compute the same loss: each counts its share of it.
    parts, ranks = (model.parts(), model.group.size) if isinstance(model, SlabModel) else (None, 1)

    def gradients(image, label, weight, draw, count):
        # On the way back, too: what is computed again there has to drop what it dropped.
        with draws(draw):
            with tf.GradientTape() as tape:
                outputs = model(image, training=training)
                # Rows of weight 0 are cut out, not multiplied away: 0 x infinity is not 0.
                losses = tf.where(weight > 0, sample_losses(kind, label, outputs, weights_of_class, parts), 0.0)
                loss = tf.reduce_sum(losses) / (count * ranks)
                loss = scaler.get_scaled_loss(loss) if scaler else loss
            found = [tf.convert_to_tensor(g) for g in tape.gradient(loss, variables, unconnected_gradients="zero")]
        correct = 0.0
        if classifies:
            correct = tf.reduce_sum(tf.cast(tf.equal(tf.argmax(outputs, -1, tf.int32), label), tf.float32) * weight)
        return found, tf.cast(tf.stack([tf.reduce_sum(losses), correct, tf.reduce_sum(weight)]), tf.float64) / ranks

    return gradients


def time_gradients(model: Any, optimizer: Any, weights_of_class: tf.Tensor, kind: str, batch: Any) -> float:
    """Seconds of the gradients of one micro-batch, without exchange and update; compiles a graph for it."""
    scaled = isinstance(optimizer, keras.mixed_precision.LossScaleOptimizer)
    run = tf.function(_gradients(model, optimizer if scaled else None, weights_of_class, kind))
    times = []
    for _ in range(3):
        began = time.perf_counter()
        run(*batch, tf.constant(1.0))[1].numpy()
        times.append(time.perf_counter() - began)
    return min(times)


def _update(
    variables: Any, own: Sequence[bool], optimizer: Any, scaled: bool, clip_norm: float, exchange: Sum, timed: bool
) -> Callable[..., Any]:
    """``(gradients, sums, rate, wishes, flush) -> (totals, norms, applied, seconds of the exchange)``.

    Gradients of a rank's ``own`` variables are complete: what all ranks need of them is their part of the norm.
    """
    world = exchange.hvd.world
    inner = optimizer.inner_optimizer if scaled else optimizer
    # TensorFlow refuses to look at the clock where its operations have to be deterministic.
    clock = tf.timestamp if timed else lambda: tf.constant(0.0, tf.float64)

    def update(gradients, sums, rate, wishes, flush):
        with tf.control_dependencies(gradients):
            began = clock()
        fine = tf.math.is_finite(sums[0])
        if not scaled and world.size > 1:
            # A loss scale makes infinite gradients on purpose, and deals with them itself.
            fine &= tf.reduce_all(tf.math.is_finite(tf.stack([tf.nn.l2_loss(g) for g in gradients])))
        sick = tf.one_hot(world.rank, world.size, dtype=tf.float64) * tf.cast(~fine, tf.float64)
        parts = [tf.cast(tf.nn.l2_loss(g), tf.float64)[None] for g, mine in zip(gradients, own, strict=True) if mine]
        totals = exchange.totals(tf.concat([tf.where(fine, sums, 0.0), wishes, sick, *parts], 0))
        usable = tf.equal(tf.reduce_sum(totals[5 : 5 + world.size]), 0)
        summed = iter(exchange.sum([g for g, mine in zip(gradients, own, strict=True) if not mine], usable, flush))
        gradients = [g if mine else next(summed) for g, mine in zip(gradients, own, strict=True)]
        with tf.control_dependencies([totals, *gradients]):
            seconds = clock() - began
        if scaled:
            gradients = optimizer.get_unscaled_gradients(gradients)
        whole = (tf.cast(totals[5 + world.size + at], tf.float32) for at in range(len(parts)))
        norms = tf.stack([next(whole) if mine else tf.nn.l2_loss(g) for g, mine in zip(gradients, own, strict=True)])
        norm = tf.sqrt(2.0 * tf.reduce_sum(norms))
        applied = usable if scaled else usable & tf.math.is_finite(norm)

        def apply():
            chosen = gradients
            if clip_norm:
                chosen, _ = tf.clip_by_global_norm(chosen, clip_norm, norm)
            inner.learning_rate.assign(rate)
            optimizer.apply_gradients(zip(chosen, variables, strict=True))
            return True

        tf.cond(applied, apply, lambda: False)
        return totals, norms, applied, seconds

    return update
