"""Structures as annotations tell them: one boolean box each, put together to a label map. Pure.

A structure fills a small part of its image: a box around it takes a fraction of the memory of a mask of the image's size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

BACKGROUND = "background"
Box = tuple[slice, slice, slice]


@dataclass(frozen=True)
class Layer:
    """One structure on the grid of its image.

    Attributes:
        label: its name.
        start: (d, h, w) of the box's first voxel.
        inside: bool ``(D, H, W)`` of the box; of size 0 if the structure is empty.
    """

    label: str
    start: tuple[int, int, int] = (0, 0, 0)
    inside: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 0), bool), repr=False)

    @property
    def box(self) -> Box:
        """Where the box lies in the image."""
        a, b, c = (slice(first, first + size) for first, size in zip(self.start, self.inside.shape, strict=True))
        return a, b, c

    @property
    def voxels(self) -> int:
        """Number of voxels inside."""
        return int(np.count_nonzero(self.inside))


@dataclass(frozen=True)
class Annotation:
    """What one file says of one image.

    Attributes:
        layers: each label once.
        notes: what the reader left out or doubted.
        annotator: raw name of who made it, "" if unknown: for memory only, never written.
    """

    layers: tuple[Layer, ...]
    notes: tuple[str, ...] = ()
    annotator: str = field(default="", repr=False)


def is_background(label: str) -> bool:
    """True for the name that stands for "nothing"."""
    return label.lower() == BACKGROUND


def seg_classes(labels: Iterable[str]) -> tuple[str, ...]:
    """Classes of an archive from the labels of all its segments and regions; index 0 is the background."""
    return (BACKGROUND, *sorted({label for label in labels if label and not is_background(label)}))


def from_planes(label: str, planes: Sequence[tuple[int, int, int, np.ndarray]]) -> Layer:
    """A layer from parts of slices: (d, h, w) of the first pixel, and bool ``(H, W)``; parts of one slice are united."""
    planes = [plane for plane in planes if plane[3].any()]
    if not planes:
        return Layer(label)
    low = np.array([plane[:3] for plane in planes])
    high = np.array([(d + 1, h + part.shape[0], w + part.shape[1]) for d, h, w, part in planes])
    start, end = low.min(axis=0), high.max(axis=0)
    inside = np.zeros(end - start, bool)
    for d, h, w, part in planes:
        d, h, w = d - start[0], h - start[1], w - start[2]
        inside[d, h : h + part.shape[0], w : w + part.shape[1]] |= part
    return Layer(label, (int(start[0]), int(start[1]), int(start[2])), inside)


def from_mask(label: str, mask: np.ndarray) -> Layer:
    """A layer from a bool mask ``(D, H, W)`` of the whole image."""
    box = []
    for axis in range(3):
        found = np.flatnonzero(mask.any(axis=tuple(other for other in range(3) if other != axis)))
        if not found.size:
            return Layer(label)
        box.append(slice(int(found[0]), int(found[-1]) + 1))
    return Layer(label, (box[0].start, box[1].start, box[2].start), mask[tuple(box)].copy())


def crop(plane: np.ndarray) -> tuple[int, int, np.ndarray]:
    """(h, w, part): the smallest part of a bool plane ``(H, W)`` that holds all that is set; a part of size 0 if nothing is."""
    rows = np.flatnonzero(plane.any(axis=1))
    if not rows.size:
        return 0, 0, plane[:0, :0]
    columns = np.flatnonzero(plane[rows[0] : rows[-1] + 1].any(axis=0))
    return int(rows[0]), int(columns[0]), plane[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].copy()


def common_box(layers: Sequence[Layer]) -> Box:
    """The smallest box that holds all layers; of size 0 if all are empty."""
    boxes = [layer.box for layer in layers if layer.inside.size]
    if not boxes:
        return slice(0, 0), slice(0, 0), slice(0, 0)
    a, b, c = (slice(min(box[axis].start for box in boxes), max(box[axis].stop for box in boxes)) for axis in range(3))
    return a, b, c


def in_box(layer: Layer, box: Box) -> np.ndarray:
    """The layer as bool of the box's size; the box holds it whole."""
    result = np.zeros([part.stop - part.start for part in box], bool)
    if layer.inside.size:
        result[tuple(slice(p.start - b.start, p.stop - b.start) for p, b in zip(layer.box, box, strict=True))] = layer.inside
    return result


def unite(layers: Sequence[Layer]) -> Layer:
    """All voxels of any of the layers, under the label of the first."""
    if len(layers) == 1:
        return layers[0]
    box = common_box(layers)
    inside = np.zeros([part.stop - part.start for part in box], bool)
    for layer in layers:
        inside |= in_box(layer, box)
    return Layer(layers[0].label, (box[0].start, box[1].start, box[2].start), inside)


def overlap(a: Layer, b: Layer) -> int:
    """Number of voxels inside of both."""
    shared = [
        slice(max(p.start, q.start), min(p.stop, q.stop)) for p, q in zip(a.box, b.box, strict=True)
    ]
    if any(part.stop <= part.start for part in shared):
        return 0
    one, two = (
        layer.inside[tuple(slice(p.start - s, p.stop - s) for p, s in zip(shared, layer.start, strict=True))] for layer in (a, b)
    )
    return int(np.count_nonzero(one & two))


def paint(layers: Iterable[Layer], index: Mapping[str, int], shape: tuple[int, int, int]) -> tuple[np.ndarray, int]:
    """The label map uint8 ``(D, H, W)``, and how many voxels more than one structure claims.

    Where structures overlap the smaller one lies on top: a nodule in its lung, an organ in the body.

    Args:
        index: label -> value; the background's label is never painted.
    """
    mask = np.zeros(shape, np.uint8)
    contested = 0
    for layer in sorted(layers, key=lambda layer: (-layer.voxels, layer.label)):
        if layer.inside.size:
            part = mask[layer.box]
            contested += int(np.count_nonzero(part[layer.inside]))
            part[layer.inside] = index[layer.label]
    return mask, contested
