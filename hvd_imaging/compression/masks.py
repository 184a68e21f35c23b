"""Zeros in weights: which, when, and how they stay zeros while a network is trained on.

A mask needs no memory of its own: a weight that is zero stays zero. So a resumed run goes on to the bit, and every rank
comes to the same masks from the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

FREQUENCY = 20
"""Updates between two rises of the sparsity."""
RAMP = 0.5
"""Share of the updates after which the sparsity is reached; the rest is for recovery."""


def sparsity_at(step: int, last: int, final: float) -> float:
    """Share of zeros after ``step`` of ``last`` updates: a cubic rise (Zhu and Gupta, 2018, equation 1)."""
    ramp = max(1, int(last * RAMP))
    return final * (1 - (1 - min(step / ramp, 1.0)) ** 3)


def smallest(weights: np.ndarray, share: float) -> np.ndarray:
    """Bool mask of ``weights``' shape: False for the ``share`` of smallest magnitude, ties by position."""
    count = round(weights.size * share)
    keep = np.ones(weights.size, bool)
    keep[np.argsort(np.abs(weights).ravel(), kind="stable")[:count]] = False
    return keep.reshape(weights.shape)


def m_of_n(weights: np.ndarray, m: int, n: int) -> np.ndarray:
    """Bool mask with m zeros in every n neighbouring input channels of a kernel ``(..., in, out)`` (Mishra et al., 2021).

    Channels that fill no whole group of n are kept.
    """
    keep = np.ones(weights.shape, bool)
    groups = weights.shape[-2] // n
    if groups == 0:
        return keep
    head = np.abs(weights[..., : groups * n, :]).reshape(*weights.shape[:-2], groups, n, weights.shape[-1])
    order = np.argsort(head, -2, kind="stable")
    inner = np.ones(head.shape, bool)
    np.put_along_axis(inner, order[..., :m, :], False, -2)
    keep[..., : groups * n, :] = inner.reshape(*weights.shape[:-2], groups * n, weights.shape[-1])
    return keep


def spread(sizes: Mapping[str, int], fragile: Sequence[str], sparsity: float, most: float = 0.98) -> dict[str, float]:
    """Sparsity of each layer, so that ``sparsity`` of all weights are zero and fragile layers have half as much as others.

    A layer never loses more than ``most``; what this leaves over goes to the others as far as they can take it.
    """
    total = sparsity * sum(sizes.values())
    demand = {name: 0.5 if name in fragile else 1.0 for name in sizes}
    low, high = 0.0, 2.0 / min(demand.values(), default=1.0)
    for _ in range(60):  # a bisection: the sum rises with the factor
        factor = (low + high) / 2
        found = sum(size * min(most, factor * demand[name]) for name, size in sizes.items())
        low, high = (factor, high) if found < total else (low, factor)
    return {name: min(most, high * demand[name]) for name in sizes}


class Zeros:
    """Keeps the zeros of the chosen kernels.

    Args:
        kernels: the variables, keyed by layer name.
    """

    def __init__(self, kernels: Mapping[str, Any]) -> None:
        self.kernels = kernels
        self.begin()

    def begin(self) -> None:
        """What is zero now stays zero."""
        self.held = {name: variable.numpy() != 0 for name, variable in self.kernels.items()}
        self._put = {name: _tensor(mask) for name, mask in self.held.items()}

    def after_update(self, step: int, last: int) -> None:
        """Zero what has to be zero after ``step`` updates."""
        for name, variable in self.kernels.items():
            variable.assign(variable * self._put[name])

    def settled(self, step: int, last: int) -> bool:
        """Always: nothing is still to come."""
        return True


class Masks(Zeros):
    """Keeps the zeros of the chosen kernels, and makes more of them by the schedule.

    Args:
        kernels: the variables, keyed by layer name.
        final: sparsity of each at the end; or
        pattern: (m, n) instead.
        axes: layer -> axes that bring a kernel to ``(..., in, out)`` (transposed convolutions hold it the other way).
    """

    def __init__(
        self, kernels: Mapping[str, Any], final: Mapping[str, float], pattern: tuple[int, int] | None = None,
        axes: Mapping[str, Sequence[int]] | None = None,
    ) -> None:  # fmt: skip
        self.final, self.pattern, self.axes = final, pattern, axes or {}
        super().__init__(kernels)

    def after_update(self, step: int, last: int) -> None:
        """Zero what has to be zero after ``step`` updates."""
        ramp = max(1, int(last * RAMP))
        if step <= ramp and (step % FREQUENCY == 0 or step == ramp):
            for name, variable in self.kernels.items():
                self.held[name] = self._mask(name, variable.numpy() * self.held[name], step, last)
                self._put[name] = _tensor(self.held[name])
        super().after_update(step, last)

    def settled(self, step: int, last: int) -> bool:
        """True once the final sparsity is reached."""
        return step >= max(1, int(last * RAMP))

    def _mask(self, name: str, weights: np.ndarray, step: int, last: int) -> np.ndarray:
        if self.pattern is None:
            return smallest(weights, sparsity_at(step, last, self.final[name]))
        if step < max(1, int(last * RAMP)):
            # Rising as the schedule does, within the pattern that it will end in.
            whole = self._pattern(name, weights)
            some = smallest(weights, sparsity_at(step, last, self.pattern[0] / self.pattern[1]))
            return whole | some
        return self._pattern(name, weights)

    def _pattern(self, name: str, weights: np.ndarray) -> np.ndarray:
        assert self.pattern is not None
        axes = self.axes.get(name)
        if axes is None:
            return m_of_n(weights, *self.pattern)
        return m_of_n(weights.transpose(axes), *self.pattern).transpose(np.argsort(axes))


def _tensor(mask: np.ndarray) -> Any:
    """float32, on the device: multiplied with after every update."""
    import tensorflow as tf

    return tf.constant(mask, tf.float32)


def fragile_layers(
    kernels: Mapping[str, Any], final: Mapping[str, float], loss: Callable[[], float], tolerance: float
) -> list[str]:
    """Layers that alone, pruned as planned, raise ``loss()`` by more than ``tolerance`` of it; weights end as they were.

    ``loss`` must give the same value on all ranks (summed over them).
    """
    before, found = loss(), []
    for name, variable in kernels.items():
        weights = variable.numpy()
        variable.assign(weights * smallest(weights, final[name]))
        after = loss()
        variable.assign(weights)
        if not after <= before + tolerance * abs(before):
            found.append(name)
    return found
