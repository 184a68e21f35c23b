"""Several annotations of one image as one: whose opinions they are, and what they agree on."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import numpy as np

from ...config import LabelsConfig
from ...errors import SetupError
from .layers import Annotation, Layer, common_box, in_box, overlap, paint, unite


def opinions(label: str, annotations: Sequence[Annotation]) -> list[tuple[str, Layer]]:
    """(annotator, structure) for each opinion on a label, in the order of the annotations. Pure.

    Files of one annotator are parts of one opinion. Files without a name are parts of one opinion while they have no voxel
    in common: several lesions, each in a file of its own, are not several opinions of one lesion.
    A file that does not name the label has no opinion; one that names it and marks nothing has.
    """
    found: list[tuple[str, list[Layer]]] = []
    for annotation in annotations:
        for layer in annotation.layers:
            if layer.label != label:
                continue
            for annotator, parts in found:
                if annotator == annotation.annotator and (annotator or not any(overlap(part, layer) for part in parts)):
                    parts.append(layer)
                    break
            else:
                found.append((annotation.annotator, [layer]))
    return [(annotator, unite(parts)) for annotator, parts in found]


def agree(layers: Sequence[Layer], method: str) -> Layer:
    """One structure from several opinions on it. Pure.

    Args:
        method: of `LabelsConfig.consensus`. "majority": voxels that more than half of them mark; of two: what both mark.

    Raises:
        SetupError: "staple" without SimpleITK.
    """
    if len(layers) == 1 or method == "first":
        return layers[0]
    if method == "union":
        return unite(layers)
    box = common_box(layers)
    stack = [in_box(layer, box) for layer in layers]
    if method == "staple" and stack[0].size and any((each != stack[0]).any() for each in stack[1:]):
        inside = _staple(stack)
    else:
        inside = np.sum(stack, axis=0, dtype=np.uint16) * 2 > len(stack)
    return Layer(layers[0].label, (box[0].start, box[1].start, box[2].start), inside)


def combine(
    annotations: Sequence[Annotation], classes: Sequence[str], shape: tuple[int, int, int], config: LabelsConfig
) -> tuple[np.ndarray, tuple[str, ...]]:
    """The label map uint8 ``(D, H, W)`` of all annotations of an image, and what is to be said about it.

    Labels that are no class are left out.

    Raises:
        SetupError: see `agree`.
    """
    notes: dict[str, None] = dict.fromkeys(note for annotation in annotations for note in annotation.notes)
    layers, disputed = [], 0
    for label in classes[1:]:
        found = opinions(label, annotations)
        if found:
            layers.append(agree([layer for _, layer in found], config.consensus))
            if len(found) > 1:
                disputed += 1
                notes[f"'{label}': {len(found)} annotators; their consensus ({config.consensus}) is used"] = None
    mask, contested = paint(layers, {label: value for value, label in enumerate(classes)}, shape)
    if contested:
        notes[f"{contested} voxels belong to more than one structure; the smaller structure has them"] = None
    left = {layer.label for annotation in annotations for layer in annotation.layers} - set(classes)
    if left:
        notes[f"{len(left)} structures that are no class of this dataset were left out"] = None
    return mask, tuple(notes)


def dice(a: Layer, b: Layer) -> float | None:
    """Twice the common voxels by the sum of both; None if both are empty. Pure."""
    total = a.voxels + b.voxels
    return 2 * overlap(a, b) / total if total else None


def check_method(method: str) -> None:
    """What the method needs is installed.

    Raises:
        SetupError: it is not.
    """
    if method == "staple" and importlib.util.find_spec("SimpleITK") is None:
        raise SetupError("labels.consensus=staple needs SimpleITK: `pip install hvd_imaging[dicom]`, or take majority")


def _staple(stack: Sequence[np.ndarray]) -> np.ndarray:
    """STAPLE (Warfield et al. 2004) in the box around all opinions: voxels of probability one half or more."""
    check_method("staple")
    import SimpleITK

    # A margin, so that there is background to learn from.
    images = [SimpleITK.GetImageFromArray(np.pad(each, 1).astype(np.uint8)) for each in stack]
    probability = SimpleITK.GetArrayFromImage(SimpleITK.STAPLE(images, 1.0))
    return (probability >= 0.5)[1:-1, 1:-1, 1:-1]
