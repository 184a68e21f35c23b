"""How the ranks' gradients become one sum: plainly, in half precision, by low rank, by Adasum, or in one fixed order.

An exchange is used inside the graph of a training step. What it keeps between steps and is equal on all ranks is in
``variables``: checkpoints store it. The first four are for speed on a network; :class:`FixedTree` is for exact bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from ..config import RunConfig
from ..errors import ConfigError
from .horovod import Horovod

LOSSLESS = "none"


class Sum:
    """The sum in the gradients' own precision."""

    variables: Sequence[tf.Variable] = ()

    def __init__(self, hvd: Horovod, groups: int = 1) -> None:
        self.hvd, self.groups = hvd, groups

    def totals(self, values: tf.Tensor) -> tf.Tensor:
        """Sum of a small float64 vector over all ranks."""
        return self.hvd.sum_tensors([values], "totals")[0]

    def sum(self, gradients: list[tf.Tensor], usable: tf.Tensor, flush: tf.Tensor) -> list[tf.Tensor]:
        """Sum of each gradient over all ranks.

        Args:
            gradients: of this rank.
            usable: bool, equal on all ranks; False if a rank's gradients are not finite, so that nothing is kept of them.
            flush: bool, equal on all ranks; True if nothing may be held back for later steps (a checkpoint follows).
        """
        return self.hvd.sum_tensors(gradients, "gradients", self.groups)


class Half(Sum):
    """float16 on the wire, scaled so that the largest sum of the step before is 2^12: 16-fold below the overflow.

    Half the bytes for a rounding error of 2^-11 of each value. A sum that overflows all the same is taken again in
    float32 by all ranks.
    """

    def __init__(self, hvd: Horovod, groups: int = 1) -> None:
        super().__init__(hvd, groups)
        self.scale = tf.Variable(1024.0, trainable=False, name="exchange_scale")
        self.variables = [self.scale]

    def sum(self, gradients, usable, flush):
        packed = [tf.cast(g * self.scale, tf.float16) for g in gradients]
        packed = self.hvd.sum_tensors(packed, "gradients.half", self.groups)
        largest = tf.reduce_max(tf.stack([tf.cast(tf.reduce_max(tf.abs(p)), tf.float32) for p in packed]))
        # NaN of an unusable gradient is not an overflow: sending it again would not mend it.
        overflow = tf.logical_and(usable, tf.logical_not(tf.math.is_finite(largest)))
        summed = tf.cond(
            overflow,
            lambda: self.hvd.sum_tensors(gradients, "gradients.again"),
            lambda: [tf.cast(p, tf.float32) / self.scale for p in packed],
        )
        top = tf.reduce_max(tf.stack([tf.reduce_max(tf.abs(s)) for s in summed]))
        fits = tf.math.is_finite(top) & (top > 0)
        # A power of two: scaling itself then rounds nothing.
        exponent = 12.0 - tf.math.ceil(tf.math.log(tf.where(fits, top, 1.0)) / math.log(2.0))
        # All zero: the gradients may be too small for the present scale.
        scale = tf.where(tf.equal(top, 0.0), self.scale * 1024.0, self.scale)
        scale = tf.where(fits, 2.0 ** tf.clip_by_value(exponent, -40.0, 60.0), scale)
        self.scale.assign(tf.clip_by_value(scale, 2.0**-40, 2.0**60))
        return summed


class PowerSgd(Sum):
    """PowerSGD (Vogels et al., 2019): a gradient matrix travels as two thin factors of ``rank`` columns.

    What they miss stays on each rank as its error and is added to its next gradient, so that nothing is lost, only late.
    Small tensors travel whole. In a flush step all travels whole, with the errors: afterwards none is left, and a
    checkpoint needs no state of single ranks.
    """

    def __init__(self, hvd: Horovod, shapes: Sequence[tuple[int, ...]], rank: int, groups: int = 1) -> None:
        super().__init__(hvd, groups)
        self.matrices = {}
        self.errors, self.factors = {}, {}
        for index, shape in enumerate(shapes):
            matrix = matrix_shape(shape, rank)
            if matrix is None:
                continue
            self.matrices[index] = matrix
            self.errors[index] = tf.Variable(tf.zeros(matrix), trainable=False, name=f"exchange_error_{index}")
            start = tf.random.stateless_normal((matrix[1], min(rank, *matrix)), (index, 0))
            self.factors[index] = tf.Variable(start, trainable=False, name=f"exchange_factor_{index}")
        self.variables = list(self.factors.values())

    def sum(self, gradients, usable, flush):
        matrices = {i: tf.reshape(gradients[i], shape) + self.errors[i] for i, shape in self.matrices.items()}
        whole = [i for i in range(len(gradients)) if i not in matrices]

        def thin():
            left = {i: m @ self.factors[i] for i, m in matrices.items()}
            sent = self.hvd.sum_tensors([gradients[i] for i in whole] + list(left.values()), "gradients.left", self.groups)
            plain = dict(zip(whole, sent[: len(whole)], strict=True))
            left = {i: tf.linalg.qr(p)[0] for i, p in zip(matrices, sent[len(whole) :], strict=True)}
            own = {i: tf.matmul(m, left[i], transpose_a=True) for i, m in matrices.items()}
            right = self.hvd.sum_tensors(list(own.values()), "gradients.right", self.groups)
            right = dict(zip(matrices, right, strict=True))
            found = {i: tf.matmul(left[i], right[i], transpose_b=True) for i in matrices}
            errors = [m - tf.matmul(left[i], own[i], transpose_b=True) for i, m in matrices.items()]
            summed = [plain[i] if i in plain else tf.reshape(found[i], gradients[i].shape) for i in range(len(gradients))]
            return summed, errors, list(right.values())

        def flushed():
            full = [tf.reshape(matrices[i], g.shape) if i in matrices else g for i, g in enumerate(gradients)]
            errors = [tf.zeros_like(m) for m in matrices.values()]
            return self.hvd.sum_tensors(full, "gradients.whole", self.groups), errors, [self.factors[i] + 0.0 for i in matrices]

        summed, errors, factors = tf.cond(flush, flushed, thin)
        for index, error, factor in zip(matrices, errors, factors, strict=True):
            self.errors[index].assign(tf.where(usable, error, self.errors[index]))
            self.factors[index].assign(tf.where(usable, factor, self.factors[index]))
        return summed


class Adasum(Sum):
    """Adasum (Maleki et al., 2021): parallel gradients are averaged, orthogonal ones added.

    It combines the ranks' own mean gradients, so here the number of ranks does change what is learned.
    """

    def sum(self, gradients, usable, flush):
        size = self.hvd.world.size
        # Each rank's gradient is its share of the global mean; times the world size it is its own mean.
        return self.hvd.adasum_tensors([g * float(size) for g in gradients], "gradients.adasum")


class FixedTree(Sum):
    """Sums in one binary tree over the parts of the global batch, whatever the number of ranks: the same bits on 1, 2, 4.

    The lower levels of the tree are added inside a rank (training/step.py); this class adds the upper ones. Every rank gets
    one piece of all ranks' vectors, adds them in tree order, and passes the sum on to all: twice the bytes of the
    gradients on the wire, as in a ring. Horovod only moves data here, it adds nothing.
    """

    def totals(self, values):
        size = self.hvd.world.size
        return tree_sum(tf.unstack(tf.reshape(self.hvd.gather_tensor(values, "totals"), [size, -1]), num=size), pair_sum)

    def sum(self, gradients, usable, flush):
        size = self.hvd.world.size
        if size == 1:
            return gradients
        lengths = [g.shape.num_elements() for g in gradients]
        flat = tf.concat([tf.reshape(g, [-1]) for g in gradients], 0)
        flat = tf.pad(flat, [[0, -sum(lengths) % size]])
        pieces = tf.unstack(tf.reshape(self.hvd.exchange_tensor(flat, "gradients.pieces"), [size, -1]), num=size)
        flat = self.hvd.gather_tensor(tree_sum(pieces, pair_sum), "gradients.sums")
        parts = tf.split(flat[: sum(lengths)], lengths)
        return [tf.reshape(part, g.shape) for part, g in zip(parts, gradients, strict=True)]


def pair_sum(a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
    """``a + b`` that TensorFlow's graph optimizer cannot merge with its neighbours: it adds a + b + c + d in one row."""
    return tf.reduce_sum(tf.stack([a, b]), 0)


def tree_sum(values: Sequence[Any], add: Callable[[Any, Any], Any]) -> Any:
    """Sum of neighbours, then of neighbouring sums, and so on: ((0 + 1) + (2 + 3)) + ..."""
    values = list(values)
    while len(values) > 1:
        pairs = [add(values[i], values[i + 1]) for i in range(0, len(values) - 1, 2)]
        values = pairs + values[len(values) - len(values) % 2 :]
    return values[0]


def matrix_shape(shape: tuple[int, ...], rank: int) -> tuple[int, int] | None:
    """(rows, columns) under which a gradient is worth two thin factors; None if it is to travel whole."""
    if len(shape) < 2:
        return None
    rows, columns = math.prod(shape[:-1]), shape[-1]
    return (rows, columns) if rows * columns >= 4 * rank * (rows + columns) else None


def check_exchange(config: RunConfig, hvd: Horovod) -> None:
    """Refuse an exchange that cannot be done with this number of ranks or launcher.

    Raises:
        ConfigError: with the mend.
    """
    size, parts = hvd.world.size, config.train.exact_parts
    if config.train.reproducible == "exact" and parts % size:
        raise ConfigError(
            f"train.reproducible=exact: {size} ranks cannot share {parts} parts of a batch equally; start 1, 2, 4, ... "
            f"up to {parts} ranks (powers of two), or set train.exact_parts"
        )
    if config.parallel.reduction == "adasum" and size > 1:
        if size & (size - 1):
            raise ConfigError(f"parallel.reduction=adasum: takes 2, 4, 8, ... ranks, found {size}")
        if not hvd.has_mpi:
            raise ConfigError("parallel.reduction=adasum: needs MPI, found Gloo; start with mpirun, or take reduction=sum")


def make_exchange(config: RunConfig, hvd: Horovod, shapes: Sequence[tuple[int, ...]], compression: str | None = None) -> Sum:
    """The exchange that a checked configuration asks for; a plain sum in a world of one.

    Args:
        config: of the run.
        hvd: the connected ranks.
        shapes: of the gradients.
        compression: overrides ``parallel.compression`` (what ``auto`` has become).
    """
    parallel = config.parallel
    compression = compression or parallel.compression
    if config.train.reproducible == "exact":
        return FixedTree(hvd)
    if hvd.world.size == 1:
        return Sum(hvd)
    if parallel.reduction == "adasum":
        return Adasum(hvd)
    if compression == "fp16":
        return Half(hvd, parallel.groups)
    if compression == "powersgd":
        return PowerSgd(hvd, shapes, parallel.powersgd_rank, parallel.groups)
    return Sum(hvd, parallel.groups)
