"""The replica guard: all ranks must hold the same weights, and must have trained on the same items.

A rank that has drifted (a broken memory module, a node with another library, a dataset that differs) would be averaged into
the model for ever. So ranks compare hashes, and the first difference ends the run with its place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..communicator import Communicator
from ..errors import RunError, on_all_ranks


class ItemTrace:
    """A running hash of the items of all global batches so far."""

    def __init__(self) -> None:
        self.value = ""

    def add(self, epoch: int, step: int, items: np.ndarray) -> None:
        """Take in one global batch (item numbers in order)."""
        text = f"{self.value} {epoch} {step}".encode()
        self.value = hashlib.sha256(text + np.ascontiguousarray(items, np.int64).tobytes()).hexdigest()[:16]


def digests(arrays: Sequence[np.ndarray]) -> list[str]:
    """Short SHA-256 of each array's bytes."""
    return [hashlib.sha256(np.ascontiguousarray(a).reshape(-1).view(np.uint8).data).hexdigest()[:16] for a in arrays]


def check_replicas(communicator: Communicator, names: Sequence[str], values: Sequence[str], when: str) -> None:
    """Compare ``values`` (one digest for each name) over all ranks; a collective call.

    Raises:
        RunError: on all ranks alike, naming the rank and the first name whose value differs.
    """
    if communicator.world.size == 1:
        return
    whole = hashlib.sha256("".join(values).encode()).hexdigest()
    if len(set(communicator.gather(whole))) == 1:
        return
    message = difference(names, communicator.gather(list(values)))
    raise on_all_ranks(RunError(f"{when}: {message}"))


def difference(names: Sequence[str], values: Sequence[Sequence[Any]]) -> str:
    """What differs between the ranks: the odd ranks out, and the first name; pure.

    Args:
        names: of what was hashed.
        values: of each rank.
    """
    groups: dict[tuple[Any, ...], list[int]] = {}
    for rank, found in enumerate(values):
        groups.setdefault(tuple(found), []).append(rank)
    # The largest group is taken for right; between equals the one of the lowest rank.
    right = max(groups, key=lambda key: (len(groups[key]), -groups[key][0]))
    odd = sorted(rank for key, ranks in groups.items() if key != right for rank in ranks)
    rank = odd[0]
    where = [name for name, ours, theirs in zip(names, right, values[rank], strict=False) if ours != theirs]
    if len(right) != len(values[rank]) or not where:
        where = ["the number of variables"]
    others = f" and {len(where) - 1} more" if len(where) > 1 else ""
    unsure = " (which of the two is right cannot be told)" if len(values) == 2 else ""
    return (
        f"rank{'s' * (len(odd) > 1)} {', '.join(map(str, odd))} of {len(values)} differ{'s' * (len(odd) == 1)} from the others "
        f"in {where[0]}{others}{unsure}; the last checkpoint is still whole: check that host's memory and packages "
        "(hvd-imaging doctor), then go on with --resume"
    )
