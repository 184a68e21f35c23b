"""Segmentations of 3D Slicer and other masks that cover a part of their image: names, layers, and the place of the box."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_labels_nrrd import save
from test_sources_catalog import HEIGHTS
from test_sources_dicom import SECRET, make_slice, write

from hvd_imaging.config import LabelsConfig
from hvd_imaging.errors import SourceError
from hvd_imaging.privacy.redact import Redactor
from hvd_imaging.sources import catalog
from hvd_imaging.sources.labels.volumes import whole
from hvd_imaging.sources.nifti import write_nifti
from hvd_imaging.sources.nrrd import segments
from hvd_imaging.volume import Volume

SHAPE = (4, 4, 6)
AFFINE = np.array([[0, 0, 0.5, -10], [0, 0.8, 0, -20], [2.5, 0, 0, 0], [0, 0, 0, 1.0]])
LUNG = np.zeros(SHAPE, np.uint8)
LUNG[1:3, 1:4, 2:6] = 1
NODULE = np.zeros(SHAPE, np.uint8)
NODULE[2, 2, 3:5] = 1
BOX = slice(1, 3), slice(1, 4), slice(2, 6)


def slicer(path: Path, layers, names, start=(1, 1, 2), old=False) -> Path:
    """A .seg.nrrd as 3D Slicer writes it: ``layers`` (D, H, W) of the box; ``names``: name -> (layer, value)."""
    shape = layers[0].shape
    origin = (AFFINE @ [*start, 1])[:3]
    fields = {"type": "uchar", "space_origin": f"({','.join(f'{x:g}' for x in origin)})"}
    directions = "(0.5,0,0) (0,0.8,0) (0,0,2.5)"
    if len(layers) > 1:
        fields.update(
            dimension="4", sizes=f"{len(layers)} {shape[2]} {shape[1]} {shape[0]}", space_directions=f"none {directions}",
            kinds="list domain domain domain",
        )  # fmt: skip
        data = np.stack(layers, -1)
    else:
        fields.update(sizes=f"{shape[2]} {shape[1]} {shape[0]}", space_directions=directions)
        data = layers[0]
    save(path, np.ascontiguousarray(data).tobytes(), **fields)
    pairs = {"Segmentation_ReferenceImageExtentOffset": " ".join(map(str, start[::-1])), "Segmentation_MasterRepresentation": "Binary labelmap"}
    for number, (name, (layer, value)) in enumerate(names.items()):
        pairs |= {f"Segment{number}_ID": f"Segment_{number + 1}", f"Segment{number}_Name": name}
        if not old:
            pairs |= {f"Segment{number}_Layer": layer, f"Segment{number}_LabelValue": value}
    head, _, voxels = path.read_bytes().partition(b"\n\n")
    path.write_bytes(head + "".join(f"\n{key}:={value}" for key, value in pairs.items()).encode() + b"\n\n" + voxels)
    return path


def image(root: Path, name="a") -> None:
    (root / "imagesTr").mkdir(parents=True, exist_ok=True)
    write_nifti(root / "imagesTr" / f"{name}.nii.gz", Volume(np.arange(96, dtype=np.float32).reshape(SHAPE), AFFINE))


def layout(root: Path, labels=None) -> Path:
    image(root)
    (root / "dataset.json").write_text(json.dumps({"labels": labels or {"background": 0, "lung": 1, "nodule": 2}}))
    return root


def mask_of(root: Path, index=0):
    found = catalog.choose(catalog.scan(root), LabelsConfig())
    volume, mask = catalog.load_case(found.cases[index], found)
    return found, volume, mask


EXPECTED = np.where(NODULE, 2, LUNG)
TWO = {"lung": (0, 1), "nodule": (1, 1)}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_layers_overlap_and_the_smaller_lies_on_top(tmp_path, old, whole):
    box, start = (slice(None), (0, 0, 0)) if whole else (BOX, (1, 1, 2))
    slicer(layout(tmp_path) / "labelsTr" / "a.seg.nrrd", [LUNG[box], NODULE[box]], TWO, start, old)
    _, volume, mask = mask_of(tmp_path)
    np.testing.assert_array_equal(mask, EXPECTED)
    assert "2 voxels belong to more than one structure; the smaller structure has them" in volume.notes
    part = "the mask covers 2 x 3 x 4 of 4 x 4 x 6 voxels; the rest is background"
    assert (part in volume.notes) is not whole


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        ({"nodule": (0, 1), "lung": (0, 2)}, None),  # numbered anew: names count
        ({"Nodule": (0, 1), "LUNG ": (0, 2)}, None),
        ({"Segment_1": (0, 1), "Segment_2": (0, 2)}, {"background": 0, "nodule": 1, "lung": 2}),  # no class: values count
    ],
)
def test_names_count_before_values(tmp_path, names, labels):
    one = np.where(NODULE, 1, 2 * LUNG).astype(np.uint8)[BOX]
    slicer(layout(tmp_path, labels) / "labelsTr" / "a.seg.nrrd", [one], names)
    found, _, mask = mask_of(tmp_path)
    np.testing.assert_array_equal(mask == found.classes.index("nodule"), NODULE > 0)
    np.testing.assert_array_equal(mask == found.classes.index("lung"), (LUNG > NODULE))


def test_segments_that_are_no_class(tmp_path):
    root = layout(tmp_path)
    slicer(root / "labelsTr" / "a.seg.nrrd", [LUNG[BOX], NODULE[BOX]], {"lung": (0, 1), "help": (1, 1)})
    _, volume, mask = mask_of(root)
    np.testing.assert_array_equal(mask, LUNG)
    assert "1 structures that are no class of this dataset were left out" in volume.notes
    slicer(root / "labelsTr" / "a.seg.nrrd", [LUNG[BOX], NODULE[BOX]], {SECRET: (0, 1), "help": (1, 1)})
    with pytest.raises(SourceError, match="names that are no class of dataset.json, and values that do not tell them apart") as caught:
        mask_of(root)
    assert SECRET not in str(caught.value)
    slicer(root / "labelsTr" / "a.seg.nrrd", [3 * LUNG[BOX]], {"lung": (0, 1)})
    with pytest.raises(SourceError, match="voxels with 1 values that no segment has"):
        mask_of(root)
    slicer(root / "labelsTr" / "a.seg.nrrd", [LUNG[BOX]], {"lung": (3, 1)})
    with pytest.raises(SourceError, match="layers that the file does not have"):
        mask_of(root)


@pytest.mark.parametrize("described", [False, True])
def test_beside_dicom_names_need_no_description(tmp_path, described):
    write(tmp_path / "case1", [make_slice(z) for z in HEIGHTS])
    slicer(tmp_path / "labels" / "case1.seg.nrrd", [LUNG[BOX], NODULE[BOX]], {"lung": (0, 1), f"tumour {SECRET}": (1, 1)})
    if described:
        (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "lung": 1}}))
    redactor = Redactor(b"k" * 32, tmp_path)
    found = catalog.choose(catalog.scan(tmp_path), LabelsConfig(), redactor.label)
    assert len(found.classes) == 3 and found.classes[2] == "lung" and found.classes[1].startswith("label-")
    assert redactor.known[found.classes[1]] == f"tumour {SECRET}"
    np.testing.assert_array_equal(catalog.load_case(found.cases[0], found)[1], np.where(NODULE, 1, 2 * LUNG))
    assert SECRET not in repr(found)


def test_beside_dicom_values_have_the_meaning_of_the_description(tmp_path):
    write(tmp_path / "case1", [make_slice(z) for z in HEIGHTS])
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "x": 1, "nodule": 2, "lung": 3}}))
    one = np.where(NODULE, 2, 3 * LUNG).astype(np.uint8)[BOX]
    slicer(tmp_path / "labels" / "case1.seg.nrrd", [one], {"Segment_1": (0, 2), "Segment_2": (0, 3)})
    found, _, mask = mask_of(tmp_path)
    assert found.classes == ("background", "lung", "nodule", "x")
    np.testing.assert_array_equal(mask, np.where(NODULE, 2, LUNG))


def test_headers_without_segments(tmp_path):
    assert segments(save(tmp_path / "a.nrrd")) == segments(tmp_path / "none.nrrd") == segments(tmp_path / "b.nii.gz") == ()
    (tmp_path / "c.seg.nrrd").write_bytes(b"NRRD0005\nSegment0_Name:=x\nSegment0_Layer:=first\n\n")
    assert segments(tmp_path / "c.seg.nrrd") == ()


def test_cropped_nifti_is_padded_and_told(tmp_path):
    affine = AFFINE.copy()
    affine[:3, 3] = (AFFINE @ [1, 1, 2, 1])[:3]
    (layout(tmp_path) / "labelsTr").mkdir()
    write_nifti(tmp_path / "labelsTr" / "a.nii.gz", Volume(LUNG[BOX], affine))
    _, volume, mask = mask_of(tmp_path)
    np.testing.assert_array_equal(mask, LUNG)
    assert "the mask covers 2 x 3 x 4 of 4 x 4 x 6 voxels; the rest is background" in volume.notes


@settings(max_examples=120, deadline=None)
@given(
    start=st.tuples(*[st.integers(-4, 6)] * 3),
    size=st.one_of(st.tuples(*[st.integers(1, 7)] * 3), st.just(SHAPE)),
    order=st.permutations(range(3)),
    back=st.tuples(*[st.booleans()] * 3),
    seed=st.integers(0, 99),
    channels=st.sampled_from([None, 2]),
)
def test_padding_keeps_every_mark_in_its_place(start, size, order, back, seed, channels):
    """Boxes of the image's voxels, their axes in any order and sense, on an image that lies anyhow."""
    random = np.random.default_rng(seed)
    affine = np.eye(4)
    affine[:3, :3] = np.linalg.qr(random.normal(size=(3, 3)))[0] * random.uniform(0.3, 3, 3)
    affine[:3, 3] = random.normal(size=3) * 100
    image = Volume(np.zeros(SHAPE, np.float32), affine)
    if size == SHAPE:
        start = (0, 0, 0)
    marks = (random.random(size + ((channels,) if channels else ())) < 0.2).astype(np.uint8)
    places = {tuple(np.array(place[:3]) + start) for place in np.argwhere(marks).tolist()}
    own = affine.copy()
    own[:3, 3] = (affine @ [*start, 1])[:3]
    # The same voxels in another order: first turned round, then exchanged.
    turned = marks
    for axis in np.flatnonzero(back):
        own[:, 3] += own[:, axis] * (size[axis] - 1)
        own[:, axis] *= -1
        turned = np.flip(turned, axis)
    own = own[:, [*order, 3]]
    own[:3, 3] += random.uniform(-1, 1, 3) * 0.01 * min(image.spacing)
    mask = Volume(turned.transpose(*order, *range(3, turned.ndim)), own)
    found = whole(mask, image)
    inside = all(0 <= p < n for place in places for p, n in zip(place, SHAPE, strict=True))
    overlaps = all(s < n and s + k > 0 for s, k, n in zip(start, size, SHAPE, strict=True))
    if inside and overlaps:
        assert found.shape == SHAPE
        np.testing.assert_allclose(found.affine, affine, atol=0.02 * min(image.spacing))
        assert {tuple(place[:3]) for place in np.argwhere(found.array).tolist()} == places
        assert found.array.sum() == marks.sum() and found.array.dtype == np.uint8
    else:
        assert found is None
    # Half a voxel aside, or of another spacing: not these voxels.
    aside = own.copy()
    aside[:3, 3] += affine[:3, 0] * 0.5
    for wrong in (aside, own * [2, 2, 2, 1]):
        other = Volume(mask.array, wrong)
        if max(size) > 1 or wrong is aside:
            assert whole(other, image) is None
