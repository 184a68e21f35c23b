"""Exchange of slices between the ranks that share a volume, forward, and of their gradients, back."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from .horovod import Group
from .slabs import Fetch, Interval


class Halo:
    """The slices that one layer needs beside its own slab ``(N, d, H, W, C)``.

    A rank that only sends, or only takes, lets one slice of its own make the round. TensorFlow would else cut a call whose result nobody
    reads out of the graph (control dependencies and all), or compute a call that sends nothing while it still optimizes the graph:
    in both cases the ranks wait for each other for ever.

    Args:
        plans: of all ranks of the group, see :func:`hvd_imaging.parallel.slabs.fetches`.
        group: the ranks.
        name: of the layer; the same on all ranks.
    """

    def __init__(self, plans: Sequence[Fetch], group: Group, name: str) -> None:
        self.plan, self.group, self.name = plans[group.index], group, name
        # A call in which nobody sends is no call: all ranks know that alike.
        self.idle = not any(sum(plan.takes) for plan in plans)

    def take(self, x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """The slices below this rank's slab, the slab, the slices above; those may have a depth of 0. For the gradient see `give`."""
        if self.idle:
            return x[:, :0], x, x[:, :0]
        below, x, above = self._exchange([x[:, start:stop] for start, stop in self.plan.sends], x, self.plan.takes, "take")
        return below, x, above

    def give(self, lower: tf.Tensor, own: tf.Tensor, upper: tf.Tensor, depth: int) -> tf.Tensor:
        """The gradient of this rank's slab of ``depth`` slices, from those of the slices it had: the adjoint of `take`."""
        plan, index = self.plan, self.group.index
        if self.idle:
            return add_parts([(plan.own, own)], depth)
        after = plan.takes[index + 1 :]
        sent = [*(tf.split(lower, plan.takes[:index], 1) if index else []), own[:, :0], *(tf.split(upper, after, 1) if after else [])]
        below, own, above = self._exchange(sent, own, plan.split, "give")
        parts = [(plan.own, own)]
        for returned, sends in ((below, plan.sends[:index]), (above, plan.sends[index + 1 :])):
            pieces = tf.split(returned, [stop - start for start, stop in sends], 1) if sends else []
            parts += [(interval, piece) for interval, piece in zip(sends, pieces, strict=True) if piece.shape[1]]
        return add_parts(parts, depth)

    def _exchange(
        self, sent: list[tf.Tensor], own: tf.Tensor, takes: Sequence[int], what: str
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Send a piece to each rank; (what the ranks before sent, ``own`` as it was, what those behind sent)."""
        index = self.group.index
        rounds = int(not sum(takes) or not any(piece.shape[1] for piece in sent))
        if rounds:
            sent = [*sent[:index], own[:, :1], *sent[index + 1 :]]
        split = [int(piece.shape[1]) for piece in sent]
        pieces = [piece for piece in sent if piece.shape[1]]
        # Horovod cuts along the first axis, which is the batch's here.
        rows = _swapped(tf.concat(pieces, 1) if len(pieces) > 1 else pieces[0])
        taken = self.group.exchange(rows, split, f"halo.{self.name}.{what}")
        taken.set_shape([sum(takes) + rounds, own.shape[0], *own.shape[2:]])
        below, again, above = tf.split(_swapped(taken), [sum(takes[:index]), rounds, sum(takes[index + 1 :])], 1)
        return below, tf.concat([again, own[:, 1:]], 1) if rounds else own, above


def _swapped(x: tf.Tensor) -> tf.Tensor:
    """The first two axes exchanged."""
    if 1 in x.shape[:2]:
        # The same without moving anything; and TensorFlow's optimizer mistakes such a transposition for none at all.
        return tf.reshape(x, [x.shape[1] or tf.shape(x)[1], x.shape[0] or tf.shape(x)[0], *x.shape[2:]])
    return tf.transpose(x, [1, 0, 2, 3, 4])


def total(x: tf.Tensor, group: Group, name: str) -> tf.Tensor:
    """Sum of a tensor over the group; equal on all its ranks."""

    @tf.custom_gradient
    def run(x):
        # The objective is the sum of what each rank computes from the total: so are its gradients.
        return group.sum(x, f"{name}.sum"), lambda dy: group.sum(dy, f"{name}.back")

    return x if group.size == 1 else run(x)


def largest(x: tf.Tensor, group: Group, name: str) -> tf.Tensor:
    """Element-wise maximum over the group; equal on all its ranks."""

    @tf.custom_gradient
    def run(x):
        every = group.gather(x, f"{name}.gather")
        found = tf.reduce_max(every, 0)
        holders = tf.reduce_sum(tf.cast(tf.equal(every, found), x.dtype), 0)

        def back(dy):
            # Ranks with the same maximum share its gradient, as equal elements do inside TensorFlow's own maximum.
            return tf.where(tf.equal(x, found), group.sum(dy, f"{name}.back") / holders, tf.zeros_like(x))

        return found, back

    return x if group.size == 1 else run(x)


def add_parts(parts: Sequence[tuple[Interval, Any]], depth: int) -> tf.Tensor:
    """Sum of pieces ``(N, stop - start, H, W, C)`` at their places in a slab of ``depth`` slices; 0 where there is none.

    Slices that only one piece covers are not added to anything: most of a slab is copied once.
    """
    edges = sorted({0, depth, *(edge for interval, _ in parts for edge in interval)})
    rows = []
    for start, stop in itertools.pairwise(edges):
        found = [piece[:, start - first : stop - first] for (first, last), piece in parts if first <= start and stop <= last]
        if not found:
            like = parts[0][1]
            found = [tf.zeros([tf.shape(like)[0], stop - start, *like.shape[2:]], like.dtype)]
        rows.append(tf.add_n(found) if len(found) > 1 else found[0])
    return tf.concat(rows, 1) if len(rows) > 1 else rows[0]
