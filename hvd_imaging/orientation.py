"""Axes of a voxel grid against those of the patient: which way they point, and how two orders of the same voxels differ. Pure.

The order that all volumes are brought to is that of an axial DICOM series of a patient on the back: D to the head (S), H to the
back (P), W to the left (L), each along the grid's nearest axis. It is the one that ITK calls "LPS" of (W, H, D).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

Triple = tuple[int, int, int]

_TARGETS = (2, 1, 0)
"""D, H, W look for the patient's S, P, L: components 2, 1, 0 of LPS+ mm."""


@dataclass(frozen=True)
class Turn:
    """Another order and sense of the three axes; voxels stay what they are.

    Attributes:
        order: axis ``i`` of the result is axis ``order[i]`` of the source.
        flips: whether axis ``i`` of the result runs the other way.
    """

    order: Triple = (0, 1, 2)
    flips: tuple[bool, bool, bool] = (False, False, False)

    @property
    def is_identity(self) -> bool:
        """Nothing changes."""
        return self == Turn()

    def array(self, array: np.ndarray) -> np.ndarray:
        """``(D, H, W)`` or ``(D, H, W, C)`` turned; a view."""
        turned = array.transpose(*self.order, *range(3, array.ndim))
        return turned[tuple(slice(None, None, -1 if flip else None) for flip in self.flips)]

    def affine(self, affine: np.ndarray, shape: Triple) -> np.ndarray:
        """The ``(4, 4)`` affine of the turned grid of a source grid of ``shape``: each voxel stays where it lies."""
        turned = affine.astype(np.float64)
        for axis, (source, flip) in enumerate(zip(self.order, self.flips, strict=True)):
            turned[:3, axis] = -affine[:3, source] if flip else affine[:3, source]
            if flip:
                turned[:3, 3] += affine[:3, source] * (shape[source] - 1)
        return turned


def to_patient(affine: np.ndarray, shape: Triple) -> Turn:
    """The turn that brings a grid's axes nearest to the patient's: D to S, H to P, W to L.

    An image of one slice keeps that axis as D, and its other two come in the order S, P, L: a coronal slice has H to S and W to L.
    The result depends on where the voxels lie only, not on the order that they came in: every order of one grid is turned onto
    the same one, also where two axes are equally near (a rotation by 45 degrees).

    Args:
        affine: ``(4, 4)``, voxel (d, h, w, 1) to LPS+ mm.
        shape: (D, H, W).
    """
    lines = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)

    def pointed(order: Triple) -> np.ndarray:
        """(3, 3): direction of each axis of the result, in the sense nearest to its target."""
        chosen = lines[:, order].T
        along = chosen[range(3), _TARGETS]
        return chosen * np.where(along < 0, -1.0, 1.0)[:, None]

    def nearness(order: Triple) -> tuple[float, ...]:
        directions = np.round(pointed(order), 6) + 0.0
        return (float(np.round(directions[range(3), _TARGETS].sum(), 5)), *directions.ravel())

    order: Triple = max(itertools.permutations(range(3)), key=nearness)  # type: ignore[arg-type, assignment]
    flips = [bool(lines[target, axis] < 0) for axis, target in zip(order, _TARGETS, strict=True)]
    if shape.count(1) == 1:
        slice_ = order.index(shape.index(1))
        places = [slice_, *(place for place in range(3) if place != slice_)]
        order, flips = (order[places[0]], order[places[1]], order[places[2]]), [flips[place] for place in places]
    return Turn(order, (flips[0], flips[1], flips[2]))


def placed(affine: np.ndarray, shape: Triple, other: np.ndarray, tolerance: float) -> tuple[Turn, Triple] | None:
    """Where a grid lies among the voxels of another one, which go on without end.

    Args:
        affine, shape: of the grid.
        other: affine of the other one.
        tolerance: mm that voxels may lie apart.

    Returns:
        the turn that gives the grid the other's order and sense of the axes, and the other's index of its first voxel then; None if
        its voxels are not the other's.
    """
    axes = np.round(np.linalg.solve(other, affine)[:3, :3])
    if not (np.abs(axes).sum(axis=0) == 1).all() or not (np.abs(axes).sum(axis=1) == 1).all():
        return None
    d, h, w = (int(axis) for axis in np.abs(axes).argmax(axis=1))
    turn = Turn((d, h, w), tuple(bool(sense < 0) for sense in axes.sum(axis=1)))  # type: ignore[arg-type]
    turned = turn.affine(affine, shape)
    first = np.round(np.linalg.solve(other, turned)[:3, 3])
    if not (np.abs(first) < 1e6).all():
        return None
    there = other.astype(np.float64)
    there[:3, 3] += other[:3, :3] @ first
    corners = np.array([[*corner, 1.0] for corner in itertools.product(*((0, shape[axis] - 1) for axis in turn.order))])
    if np.abs(corners @ (turned - there).T).max() > tolerance:
        return None
    return turn, (int(first[0]), int(first[1]), int(first[2]))
