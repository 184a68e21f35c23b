"""Segmentations of 3D Slicer (.seg.nrrd): segments with names, in layers where they overlap, on the box around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ...errors import SourceError
from ...volume import Volume
from ..dicom import relative
from ..nifti import plain_name
from ..nrrd import Segment
from .layers import Annotation, from_mask, is_background, unite
from .volumes import on_grid


def labels_of(segments: Sequence[Segment], classes: Sequence[str], name: str = "") -> dict[Segment, str]:
    """What each segment is: by its name, if any of the names is a class or nothing else is known, else by its value. Pure.

    Segments are numbered anew in each file; names stay. So names count before values.

    Args:
        classes: of dataset.json, by value; empty if there is none.
        name: of the file, for messages.

    Raises:
        SourceError: neither the names nor the values tell it.
    """
    known = {plain_name(label).casefold(): label for label in classes}
    named = {segment: known.get(plain_name(segment.name).casefold(), segment.name) for segment in segments}
    if not classes or any(plain_name(segment.name).casefold() in known for segment in segments if not is_background(segment.name)):
        return named
    values = [segment.value for segment in segments]
    if len(set(values)) < len(values) or not all(0 < value < len(classes) for value in values):
        raise SourceError(
            f"{name}: {len(segments)} segments with names that are no class of dataset.json, and values that do not tell them apart; "
            f"expected names out of {', '.join(classes[1:])}"
        )
    return {segment: classes[segment.value] for segment in segments}


def read_segments(
    path: Path,
    image: Volume,
    segments: Sequence[Segment],
    classes: Sequence[str],
    root: Path = Path(),
    shown: Mapping[str, str] | None = None,
) -> Annotation:
    """The segments of a file on the grid of ``image``.

    Args:
        segments: as `nrrd.segments` has them.
        classes: see `labels_of`.
        shown: name -> name of the layer; what is not in it stays as it is.

    Raises:
        SourceError: another geometry, or voxels of no segment.
    """
    name = relative(path, root)
    notes: list[str] = []
    labels = labels_of(segments, classes, name)
    volume = on_grid(path, image, root, notes, layers=True)
    array = volume.array if volume.array.ndim == 4 else volume.array[..., np.newaxis]
    if any(segment.layer >= array.shape[3] for segment in segments):
        raise SourceError(f"{name}: segments in layers that the file does not have, {array.shape[3]} are there")
    found: dict[str, list] = {}
    for segment, label in labels.items():
        if label and not is_background(label):
            label = (shown or {}).get(label, label)
            found.setdefault(label, []).append(from_mask(label, array[..., segment.layer] == segment.value))
    for layer in range(array.shape[3]):
        known = {0, *(segment.value for segment in segments if segment.layer == layer)}
        odd = np.setdiff1d(array[..., layer], np.array(sorted(known), np.float32))
        if odd.size:
            raise SourceError(f"{name}: voxels with {odd.size} values that no segment has")
    return Annotation(tuple(unite(layers) for layers in found.values()), tuple(notes))
