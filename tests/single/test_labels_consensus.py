"""Several annotators of one image: whose opinions they are, what they agree on, and that nobody is named."""

from __future__ import annotations

import importlib.util

import numpy as np
import pydicom
import pytest
from contours import trace, write_structure_set
from test_sources_catalog import HEIGHTS, block, write_seg
from test_sources_dicom import SERIES, make_slice, write

from hvd_imaging.config import LabelsConfig, load
from hvd_imaging.errors import ConfigError, SetupError
from hvd_imaging.sources import catalog
from hvd_imaging.sources.labels.consensus import agree, combine, opinions
from hvd_imaging.sources.labels.layers import (
    Annotation,
    Layer,
    common_box,
    from_mask,
    in_box,
    overlap,
    paint,
    unite,
)

SHAPE = (6, 20, 20)


def ball(centre, radius, label="a") -> Layer:
    index = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1)
    return from_mask(label, np.linalg.norm(index - np.array(centre), axis=-1) < radius)


def whole(layer: Layer) -> np.ndarray:
    mask = np.zeros(SHAPE, bool)
    mask[layer.box] = layer.inside
    return mask


ONE, TWO, THREE = ball((2, 9, 9), 4), ball((3, 10, 10), 4), ball((3, 12, 9), 4)


def test_boxes_hold_what_masks_hold():
    for layer in (ONE, TWO, Layer("a")):
        assert np.array_equal(whole(from_mask("a", whole(layer))), whole(layer))
    assert np.array_equal(whole(unite([ONE, Layer("a"), THREE])), whole(ONE) | whole(THREE))
    assert overlap(ONE, THREE) == np.count_nonzero(whole(ONE) & whole(THREE))
    assert overlap(ONE, Layer("a")) == 0 and not in_box(Layer("a"), common_box([ONE])).any()
    mask, contested = paint([ball((2, 9, 9), 2, "b"), ONE], {"a": 1, "b": 2}, SHAPE)
    assert (mask == 2).sum() == contested == ball((2, 9, 9), 2).voxels


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("first", whole(ONE)),
        ("union", whole(ONE) | whole(TWO) | whole(THREE)),
        ("majority", whole(ONE).astype(int) + whole(TWO) + whole(THREE) >= 2),
    ],
)
def test_consensus_of_three(method, expected):
    assert np.array_equal(whole(agree([ONE, TWO, THREE], method)), expected)


def test_majority_of_two_is_what_both_marked_and_of_an_empty_one_nothing():
    assert np.array_equal(whole(agree([ONE, TWO], "majority")), whole(ONE) & whole(TWO))
    assert agree([ONE, Layer("a")], "majority").voxels == 0
    assert agree([Layer("a"), Layer("a")], "staple").voxels == 0


def test_staple_believes_those_who_agree():
    pytest.importorskip("SimpleITK")
    truth, odd = whole(ONE), ball((3, 14, 5), 3)
    noisy = []
    for seed in range(3):
        flipped = np.random.default_rng(seed).random(SHAPE) < 0.02
        noisy.append(from_mask("a", truth ^ (flipped & whole(ball((2, 9, 9), 6)))))
    found = whole(agree([*noisy, odd], "staple"))
    assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) > 0.99
    assert not (found & whole(odd) & ~truth).any()
    assert np.array_equal(whole(agree([ONE, ONE], "staple")), whole(ONE))


def test_staple_without_its_library_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SetupError, match=r"pip install hvd_imaging\[dicom\]"):
        agree([ONE, TWO], "staple")


def test_whose_opinions():
    far = ball((3, 3, 3), 2)
    named = [Annotation((ONE,), annotator="X"), Annotation((far,), annotator="X"), Annotation((TWO, far), annotator="Y")]
    assert [layer.voxels for _, layer in opinions("a", named[:2])] == [ONE.voxels + far.voxels]
    assert [name for name, _ in opinions("a", named)] == ["X", "Y"]
    # Two lesions in files of their own, by two nameless readers.
    nameless = [Annotation((layer,)) for layer in (ONE, far, TWO, far)]
    assert [layer.voxels for _, layer in opinions("a", nameless)] == [ONE.voxels + far.voxels, TWO.voxels + far.voxels]
    # Who marked nothing has said so; who was not asked has not.
    asked = [Annotation((ONE,), annotator="X"), Annotation((Layer("a"),), annotator="Y"), Annotation((), annotator="Z")]
    assert [layer.voxels for _, layer in opinions("a", asked)] == [ONE.voxels, 0]


def test_different_structures_are_no_opinions_of_each_other():
    other = Layer("b", TWO.start, TWO.inside)
    mask, notes = combine([Annotation((ONE,)), Annotation((other,))], ("background", "a", "b"), SHAPE, LabelsConfig())
    assert set(np.unique(mask)) == {0, 1, 2} and not any("annotators" in note for note in notes)


def test_readers_by_seg_and_by_rtstruct(tmp_path):
    slices = [make_slice(z) for z in HEIGHTS]
    write(tmp_path / "ct", slices)
    one, two = block(1, slice(0, 3)), block(1, slice(1, 4))
    write_seg(tmp_path / "m1", slices, {"a": one})
    seg = pydicom.dcmread(tmp_path / "m1")
    seg.ContentCreatorName = "Reader^One"
    seg.save_as(tmp_path / "m1")
    affine = np.array([[0, 0, 0.5, -10], [0, 0.8, 0, -20], [2.5, 0, 0, 0], [0, 0, 0, 1.0]])
    write_structure_set(tmp_path / "m2", {"a": trace(two > 0, affine)}, SERIES, OperatorsName="Reader^Two", ApprovalStatus="APPROVED")
    found = catalog.scan(tmp_path)
    assert [file.review for file in found.cases[0].mask] == ["", "APPROVED"]
    expected = {"majority": one * two, "union": np.maximum(one, two), "first": one}
    for method, mask in expected.items():
        chosen = catalog.choose(found, LabelsConfig(consensus=method))
        volume, got = catalog.load_case(chosen.cases[0], chosen)
        np.testing.assert_array_equal(got, mask)
        assert f"'a': 2 annotators; their consensus ({method}) is used" in volume.notes
    assert "Reader" not in repr(found) + str(volume.notes)


@pytest.mark.parametrize("names", ["[]", "[a, a]", "[background, a]", "['']"])
def test_odd_names_are_refused(names):
    from hvd_imaging.config import IngestConfig

    with pytest.raises(ConfigError, match=r"labels\.names"):
        load(IngestConfig, None, [f"labels.names={names}"])
