"""Few values for the weights of a layer, found by k-means and kept while the network is trained on.

After every update each weight becomes the mean of its cluster's: with plain gradient descent that is the same as giving a
shared value the mean gradient of its weights (Han et al., 2016). Zeros are a cluster of their own and stay zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def assign(weights: np.ndarray, clusters: int, rounds: int = 20) -> np.ndarray:
    """int32 cluster of every weight, of ``weights``' shape: 0 for zeros, 1 .. clusters for others.

    Lloyd's algorithm on sorted values, from evenly spaced centres (linear, which Han et al. found best).
    """
    flat = weights.ravel().astype(np.float64)
    values = np.sort(flat[flat != 0])
    found = np.zeros(flat.shape, np.int32)
    if not values.size:
        return found.reshape(weights.shape)
    room = clusters - int((flat == 0).any())
    different = np.unique(values)
    centres = different if different.size <= room else np.linspace(values[0], values[-1], max(1, room))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    for _ in range(rounds):
        edges = np.concatenate([[0], np.searchsorted(values, (centres[1:] + centres[:-1]) / 2), [values.size]])
        counts = np.diff(edges)
        means = np.divide(np.diff(sums[edges]), counts, out=centres.copy(), where=counts > 0)
        if np.array_equal(means, centres):
            break
        centres = means
    nearest = np.searchsorted((centres[1:] + centres[:-1]) / 2, flat, side="left") + 1
    found[flat != 0] = nearest[flat != 0]
    return found.reshape(weights.shape)


class Clusters:
    """Keeps the weights of the chosen kernels on shared values."""

    def __init__(self, kernels: Mapping[str, Any], clusters: int) -> None:
        self.kernels = kernels
        self.members = {name: assign(variable.numpy(), clusters) for name, variable in kernels.items()}
        self.after_update(0, 0)

    def begin(self) -> None:
        """Nothing: who shares a value was decided by the weights of the start, and a resumed run has the same."""

    def after_update(self, step: int, last: int) -> None:
        """Every weight becomes the mean of its cluster; members of cluster 0 are zero."""
        for name, variable in self.kernels.items():
            member = self.members[name].ravel()
            count = np.bincount(member)
            total = np.bincount(member, variable.numpy().ravel().astype(np.float64))
            centre = np.divide(total, count, out=np.zeros_like(total), where=count > 0).astype(np.float32)
            centre[0] = 0
            variable.assign(centre[member].reshape(variable.shape))

    def settled(self, step: int, last: int) -> bool:
        """Always: the values are shared from the beginning."""
        return True
