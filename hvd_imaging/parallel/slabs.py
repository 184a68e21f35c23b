"""How the depth of a volume is cut into slabs, and which slices every rank needs of its neighbours. Pure.

A tensor's *bounds* ``(b0, ..., bS)`` say that rank ``r`` of a spatial group of S holds slices ``[b[r], b[r + 1])`` of its depth. Each
layer makes bounds of bounds, so uneven slabs, strides and odd depths need no case of their own.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import ConfigError

Bounds = tuple[int, ...]
Interval = tuple[int, int]


@dataclass(frozen=True)
class Window:
    """A layer that computes each output slice from a window of input slices: convolution, pooling.

    Attributes:
        reach: input slices of a window, dilation included.
        stride: input slices from one window to the next.
        before: slices of padding in front of the volume.
        outputs: slices that it puts out.
    """

    reach: int
    stride: int
    before: int
    outputs: int

    def bounds(self, inputs: Bounds) -> Bounds:
        """Of the output: a slice lies where its window's anchor does, so that strides keep slabs together."""
        inner = [min(-(-edge // self.stride), self.outputs) for edge in inputs[:-1]]
        return (*inner, self.outputs)

    def needs(self, outputs: Interval) -> Interval:
        """Input slices of some output slices; what lies outside the volume is padding."""
        start, stop = outputs
        return start * self.stride - self.before, (stop - 1) * self.stride - self.before + self.reach


def window(depth: int, kernel: int, stride: int = 1, dilation: int = 1, padding: str = "same") -> Window:
    """The window of a Keras layer with these options, padded as TensorFlow does."""
    reach = (kernel - 1) * dilation + 1
    if padding == "valid":
        return Window(reach, stride, 0, max(0, (depth - reach) // stride + 1))
    outputs = -(-depth // stride)
    return Window(reach, stride, max((outputs - 1) * stride + reach - depth, 0) // 2, outputs)


@dataclass(frozen=True)
class Spread:
    """A layer that adds each input slice to several output slices: transposed convolution.

    Attributes:
        kernel, stride: of the layer.
        before: output slices that are cut off in front.
        outputs: slices that it puts out.
        inputs: slices that it is given.
    """

    kernel: int
    stride: int
    before: int
    outputs: int
    inputs: int

    def bounds(self, inputs: Bounds) -> Bounds:
        """Of the output."""
        return (*(min(edge * self.stride, self.outputs) for edge in inputs[:-1]), self.outputs)

    def needs(self, outputs: Interval) -> Interval:
        """Input slices that reach into some output slices."""
        start, stop = outputs
        first = -((self.kernel - 1 - start - self.before) // self.stride)  # ceil((start + before - kernel + 1) / stride)
        return max(first, 0), min((stop - 1 + self.before) // self.stride + 1, self.inputs)


def spread(depth: int, kernel: int, stride: int, padding: str = "same") -> Spread:
    """The spread of a Keras layer with these options."""
    over = max(kernel - stride, 0)
    if padding == "valid":
        return Spread(kernel, stride, 0, depth * stride + over, depth)
    return Spread(kernel, stride, over // 2, depth * stride, depth)


@dataclass(frozen=True)
class Fetch:
    """What one rank gives and takes so that it has an interval of slices.

    Attributes:
        own: its own slices that it keeps, counted from its slab's first.
        sends: (first, last + 1) for each rank of the group, counted alike; empty: (0, 0).
        takes: slices from each rank of the group, in rank order, which is the order of depth.
        lower: slices of `takes` that lie in front of its own; the others lie behind.
        pad: slices of padding in front and behind, outside the volume.
    """

    own: Interval
    sends: tuple[Interval, ...]
    takes: tuple[int, ...]
    lower: int
    pad: Interval

    @property
    def upper(self) -> int:
        """Slices of `takes` behind its own."""
        return sum(self.takes) - self.lower

    @property
    def depth(self) -> int:
        """Slices of the interval, without padding."""
        return self.lower + self.own[1] - self.own[0] + self.upper

    @property
    def split(self) -> tuple[int, ...]:
        """Slices that go to each rank."""
        return tuple(stop - start for start, stop in self.sends)


def fetches(bounds: Bounds, needs: Sequence[Interval]) -> list[Fetch]:
    """The plan of every rank of a group.

    Args:
        bounds: who holds what.
        needs: what each rank is to have; may reach beyond the volume.
    """
    ranks, depth = range(len(needs)), bounds[-1]
    inside = [(max(start, 0), min(stop, depth)) for start, stop in needs]

    def common(rank: int, of: int) -> Interval:
        start, stop = max(bounds[rank], inside[of][0]), min(bounds[rank + 1], inside[of][1])
        return (start, stop) if start < stop else (0, 0)

    plans = []
    for rank in ranks:
        at = bounds[rank]
        own = common(rank, rank)
        sends = [common(rank, to) if to != rank else (0, 0) for to in ranks]
        takes = [common(of, rank) if of != rank else (0, 0) for of in ranks]
        plans.append(Fetch(
            own=(own[0] - at, own[1] - at) if own[0] < own[1] else (0, 0),
            sends=tuple((start - at, stop - at) if start < stop else (0, 0) for start, stop in sends),
            takes=tuple(stop - start for start, stop in takes),
            lower=sum(stop - start for start, stop in takes[:rank]),
            pad=(max(-needs[rank][0], 0), max(needs[rank][1] - depth, 0)),
        ))  # fmt: skip
    return plans


def cut(depth: int, parts: int, cell: int = 1) -> Bounds:
    """Bounds of a volume: whole cells, as equal as they can be.

    Args:
        depth: slices.
        parts: ranks of a spatial group.
        cell: slices that stay together: what the network's strides make one of.

    Raises:
        ConfigError: fewer cells than parts.
    """
    cells = -(-depth // cell)
    if cells < parts:
        raise ConfigError(
            f"parallel.spatial={parts}: a depth of {depth} (data.patch) cannot be split into {parts} slabs of whole {cell} slices, "
            f"which this network's strides keep together; take parallel.spatial={max(1, cells)} or less, a depth of {parts * cell} or "
            "more, or a network with fewer levels"
        )
    return (*(cells * part // parts * cell for part in range(parts)), depth)


def check_bounds(bounds: Bounds, where: str) -> None:
    """Refuse a rank without slices.

    Raises:
        ConfigError: naming the layer.
    """
    for rank, (start, stop) in enumerate(itertools.pairwise(bounds)):
        if start >= stop:
            raise ConfigError(
                f"parallel.spatial={len(bounds) - 1}: layer '{where}' leaves spatial rank {rank} no slice of a depth of {bounds[-1]}; "
                "take a larger depth in data.patch, fewer spatial ranks, or a network with fewer levels"
            )


def check_halo(bounds: Bounds, plans: Sequence[Fetch], where: str) -> None:
    """Refuse a halo that reaches beyond the neighbours: then a rank computes less of its own than it is sent.

    Raises:
        ConfigError: naming the layer.
    """
    for rank, plan in enumerate(plans):
        for other, slices in enumerate(plan.takes):
            if slices and abs(other - rank) > 1:
                near = rank - 1 if other < rank else rank + 1
                held = bounds[near + 1] - bounds[near]
                raise ConfigError(
                    f"parallel.spatial={len(plans)}: layer '{where}': the halo of {plan.lower if other < rank else plan.upper} slices "
                    f"is larger than the neighbour's slab of {held}; take fewer spatial ranks, a larger depth in data.patch, or a "
                    "smaller kernel or dilation"
                )
