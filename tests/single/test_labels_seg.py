"""DICOM SEG of all kinds on its series: fractional, label maps, overlaps, parts of the stack, codes."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.sr.codedict import codes
from test_sources_catalog import HEIGHTS, block, load, write_seg
from test_sources_dicom import SECRET, SERIES, make_slice, write

from hvd_imaging.config import LabelsConfig
from hvd_imaging.errors import SourceError
from hvd_imaging.sources import catalog
from hvd_imaging.sources.labels import read_seg


@pytest.fixture()
def archive(tmp_path):
    """One series whose files lie in another order than its slices, and nothing else."""
    slices = [make_slice(z) for z in HEIGHTS]
    write(tmp_path / "ct", [slices[i] for i in (2, 0, 3, 1)])
    return tmp_path, slices


def described(path: Path, slices, pixels: np.ndarray, labels, kind="BINARY", code=codes.SCT.Lung, **more) -> None:
    """A SEG of pixels as highdicom takes them, each label with the same code."""
    import highdicom

    write_seg(path, slices, {"a": np.ones((len(slices), 4, 6))})  # what the library copies over
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        highdicom.seg.Segmentation(
            source_images=list(slices),
            pixel_array=pixels,
            segmentation_type=kind,
            segment_descriptions=[
                highdicom.seg.SegmentDescription(n, label, codes.SCT.Organ, code, "MANUAL") for n, label in enumerate(labels, 1)
            ],
            series_instance_uid=pydicom.uid.generate_uid(),
            series_number=2,
            sop_instance_uid=pydicom.uid.generate_uid(),
            instance_number=1,
            manufacturer="test",
            manufacturer_model_name="test",
            software_versions="1",
            device_serial_number="0",
            **more,
        ).save_as(path)


@pytest.mark.parametrize("fractional", ["PROBABILITY", "OCCUPANCY"])
@pytest.mark.parametrize("highest", [255, 10])
def test_fractions_of_any_kind_and_scale(archive, fractional, highest):
    root, slices = archive
    share = np.linspace(0, 1, 96).reshape(4, 4, 6).astype(np.float32)
    described(root / "seg", slices, share[..., None], ["a"], "FRACTIONAL", fractional_type=fractional, max_fractional_value=highest)
    np.testing.assert_array_equal(load(root)[2], np.round(share * highest) >= highest / 2)


@pytest.mark.parametrize("bits", [8, 16])
def test_label_map(archive, bits):
    root, slices = archive
    names = [f"s{number:03d}" for number in range(1, 4 if bits == 8 else 301)]
    wanted = np.zeros((4, 4, 6), np.uint8 if bits == 8 else np.uint16)
    wanted[1, :2], wanted[1:3, 2:, :3], wanted[2, 0, 5] = 1, 2, len(names)
    described(root / "seg", slices, wanted, names, "LABELMAP")
    assert int(pydicom.dcmread(root / "seg").BitsAllocated) == bits
    found = catalog.scan(root)
    if bits == 16:
        with pytest.raises(SourceError, match=r"300 different structures, expected at most 255; choose some with --set labels\.names"):
            catalog.choose(found, LabelsConfig())
        found = catalog.choose(found, LabelsConfig(names=["s002", "s001", "s300"]))
        wanted = np.array([0, 2, 1, 3])[np.where(wanted == 300, 3, wanted)]
    assert [case.mask[0].kind for case in found.cases] == ["seg"]
    np.testing.assert_array_equal(catalog.load_case(found.cases[0], found)[1], wanted)


def test_overlap_is_told_and_the_smaller_lies_on_top(archive):
    root, slices = archive
    small, large = block(1, 1, slice(2, 4)), block(slice(0, 3), slice(0, 3))
    write_seg(root / "seg", slices, {"nodule": small, "lung": large})
    _, volume, mask = load(root)
    np.testing.assert_array_equal(mask, np.where(small > 0, 2, large))
    assert "2 voxels belong to more than one structure; the smaller structure has them" in volume.notes


def test_segments_over_a_part_of_the_stack(archive):
    root, slices = archive
    write_seg(root / "seg", slices[1:3], {"a": block(1)[1:3], "b": block(2, 3)[1:3]})
    np.testing.assert_array_equal(load(root)[2], block(1) + 2 * block(2, 3))


def test_segments_of_one_label_are_united_and_absent_ones_known(archive):
    root, slices = archive
    write_seg(root / "seg", slices, {"a": block(0), "b": block(3), "c": np.zeros((4, 4, 6))})
    seg = pydicom.dcmread(root / "seg")
    seg.SegmentSequence[1].SegmentLabel = "a "
    seg.save_as(root / "seg")
    found, volume, mask = load(root)
    assert found.classes == ("background", "a", "c")
    np.testing.assert_array_equal(mask, block(0) + block(3))
    assert [layer.voxels for layer in read_seg(root / "seg", volume, root).layers] == [48, 0]


@pytest.mark.parametrize("syntax", [pydicom.uid.RLELossless, pydicom.uid.JPEGLSLossless])
def test_compressed_frames(archive, syntax):
    if syntax != pydicom.uid.RLELossless:
        pytest.importorskip("imagecodecs")
        pytest.importorskip("jpeg_ls")
    root, slices = archive
    share = np.linspace(0, 1, 96).reshape(4, 4, 6).astype(np.float32)
    described(root / "seg", slices, share[..., None], ["a"], "FRACTIONAL", transfer_syntax_uid=syntax)
    np.testing.assert_array_equal(load(root)[2], share >= 0.5)


def test_one_label_with_two_codes_and_two_spellings_are_told(archive):
    root, slices = archive
    write(root / "other", [make_slice(z, series="1.2.3.5", PatientID="B") for z in HEIGHTS])
    second = [pydicom.dcmread(path) for path in sorted((root / "other").iterdir())]
    write_seg(root / "s1", slices, {"mass": block(1), "Left Lung": block(2)})
    described(root / "s2", second, block(1).astype(np.uint8)[..., None], ["mass"], code=codes.SCT.Mass)
    described(root / "s3", second, block(2).astype(np.uint8)[..., None], ["left_lung"])
    notes = catalog.choose(catalog.scan(root), LabelsConfig()).notes
    assert notes == (
        "'mass' stands for different things: it has the codes SCT:39607008, SCT:4147007",
        "Left Lung, left_lung: different classes that differ in spelling only",
    )


def test_names_choose_classes_and_their_order(archive):
    root, slices = archive
    write_seg(root / "seg", slices, {"a": block(0), "b": block(1), "c": block(2)})
    found = catalog.choose(catalog.scan(root), LabelsConfig(names=["c", "a"]))
    volume, mask = catalog.load_case(found.cases[0], found)
    assert found.classes == ("background", "c", "a") and [int(m.max()) for m in mask] == [2, 0, 1, 0]
    assert "1 structures that are no class of this dataset were left out" in volume.notes
    with pytest.raises(SourceError, match=r"labels\.names: no annotation has d; found: a, b, c"):
        catalog.choose(catalog.scan(root), LabelsConfig(names=["d"]))


def test_names_of_structures_are_free_text_and_name_nobody(archive, tmp_path):
    from hvd_imaging.privacy.redact import Redactor

    root, slices = archive
    write_seg(root / "seg", slices, {"Left lung": block(0), "GTV Mustermann": block(1)})
    redactor = Redactor(b"k" * 32, root)
    found = catalog.choose(catalog.scan(root), LabelsConfig(), redactor.label)
    assert found.classes[:2] == ("background", "Left lung") and found.classes[2].startswith("label-")
    assert redactor.known == {found.classes[2]: "GTV Mustermann"}
    assert found.notes[-1].startswith("1 names of structures that are no terms of medicine stand as label-<hex>")
    volume, mask = catalog.load_case(found.cases[0], found)
    assert [int(m.max()) for m in mask] == [1, 2, 0, 0] and "Muster" not in str(volume.notes) + repr(found)
    with pytest.raises(SourceError, match="no annotation has GTV; found: Left lung, label-") as caught:
        catalog.choose(catalog.scan(root), LabelsConfig(names=["GTV"]), redactor.label)
    assert "Muster" not in str(caught.value)
    chosen = catalog.choose(catalog.scan(root), LabelsConfig(names=["GTV Mustermann"]), redactor.label)
    assert chosen.classes == ("background", "GTV Mustermann")


def test_empty_and_cut_masks(archive):
    root, slices = archive
    write_seg(root / "seg", slices, {"a": block(3, 1, slice(2, 4))})
    assert "a: reaches the first or last slice; it may go on outside of the image" in load(root)[1].notes
    seg = pydicom.dcmread(root / "seg")
    seg.PixelData = bytes(len(seg.PixelData))
    seg.save_as(root / "seg")
    found, volume, mask = load(root)
    assert not mask.any() and volume.notes[-1] == "the mask is empty"
    with pytest.raises(SourceError, match=r"nothing is marked in this image \(labels\.empty=keep"):
        catalog.load_case(found.cases[0], catalog.choose(found, LabelsConfig(empty="quarantine")))


def test_damaged_label_map_and_lies_about_frames(archive):
    root, slices = archive
    wanted = np.zeros((4, 4, 6), np.uint8)
    wanted[1] = 1
    described(root / "seg", slices, wanted, ["a"], "LABELMAP", omit_empty_frames=False)
    good = pydicom.dcmread(root / "seg")
    volume = load(root)[1]
    good.PixelData = good.PixelData.replace(b"\x01", b"\x07")
    good.save_as(root / "seg")
    with pytest.raises(SourceError, match=r"^seg: frame \d: pixels of 1 segments that are not in SegmentSequence"):
        read_seg(root / "seg", volume, root)
    good.NumberOfFrames = 99_999
    good.save_as(root / "seg")
    with pytest.raises(SourceError, match="99999 frames of pixels, but 4 described"):
        read_seg(root / "seg", volume, root)
    good.NumberOfFrames, good.PixelData = 4, good.PixelData[:30]
    good.save_as(root / "seg")
    with pytest.raises(SourceError, match="^seg: .*truncated") as caught:
        read_seg(root / "seg", volume, root)
    assert SECRET not in str(caught.value) and SERIES not in str(caught.value)


@pytest.mark.parametrize(("slices", "told"), [((2, 4, 6, 8), True), ((2, 5, 8, 11), True), ((2, 4, 6), False), ((2, 3, 4, 5), False), ((2, 4, 6, 7), False)])
def test_stripes_are_told(slices, told):
    from hvd_imaging.sources.labels.checks import doubts

    mask = np.zeros((14, 6, 6), np.uint8)
    mask[list(slices), 2:4, 2:4] = 1
    assert any("slice is marked" in note for note in doubts(mask, ("background", "a"))) is told
