"""Which series a SEG or RTSTRUCT belongs to: by name, source images, frame of reference and planes; never by a guess."""

from __future__ import annotations

import numpy as np
import pydicom
import pytest
from contours import structure_set, trace
from pydicom.dataset import Dataset
from test_sources_catalog import HEIGHTS, block, write_seg
from test_sources_dicom import SECRET, make_slice, write

from hvd_imaging.errors import SourceError
from hvd_imaging.sources import catalog

FINE = tuple(np.arange(0, 8.75, 1.25))
AFFINE = np.array([[0, 0, 0.5, -10], [0, 0.8, 0, -20], [2.5, 0, 0, 0], [0, 0, 0, 1.0]])
MASK = block(slice(1, 4), slice(1, 3), slice(1, 4)).astype(bool)


def stack(folder, heights=HEIGHTS, series="1.2.3.4", frame="1.2.9", **more):
    slices = [make_slice(z, series=series, FrameOfReferenceUID=frame, **more) for z in heights]
    write(folder, slices)
    return slices


def seg(path, slices, masks, names=(), sources=True, listed=True, planes=True, **more):
    """A SEG that names the series ``names`` only; ``sources``, ``listed``, ``planes``: keep what tells of images and places."""
    write_seg(path, slices, masks)
    d = pydicom.dcmread(path)
    kept = d.ReferencedSeriesSequence[0].ReferencedInstanceSequence
    d.ReferencedSeriesSequence = []
    for number, name in enumerate(names):
        item = Dataset()
        item.SeriesInstanceUID, item.ReferencedInstanceSequence = name, kept if listed and not number else []
        d.ReferencedSeriesSequence.append(item)
    if not names:
        del d.ReferencedSeriesSequence
    if not listed:
        d.pop("SourceImageSequence", None)
    for group in d.PerFrameFunctionalGroupsSequence:
        if not sources:
            del group.DerivationImageSequence
        if not planes:
            del group.PlanePositionSequence
    for key, value in more.items():
        setattr(d, key, value)
    d.save_as(path)


def rt(path, mask=MASK, names=(), images=(), frame="1.2.9", affine=AFFINE, **more):
    """An RTSTRUCT that names the series ``names``, and in its contours the slices ``images``."""
    d = structure_set({"organ": trace(mask, affine)}, "1.2.3.4", frame=frame, patient=SECRET, **more)
    study = d.ReferencedFrameOfReferenceSequence[0].RTReferencedStudySequence[0]
    study.RTReferencedSeriesSequence = []
    for name in names:
        item = Dataset()
        item.SeriesInstanceUID = name
        study.RTReferencedSeriesSequence.append(item)
    if not names:
        del d.ReferencedFrameOfReferenceSequence[0].RTReferencedStudySequence
    by_place = {round(float(item.ImagePositionPatient[2]), 3): item.SOPInstanceUID for item in images}
    for contour in d.ROIContourSequence[0].ContourSequence:
        uid = by_place.get(round(float(contour.ContourData[2]), 3))
        if uid:
            item = Dataset()
            item.ReferencedSOPInstanceUID = uid
            contour.ContourImageSequence = [item]
    d.save_as(path, enforce_file_format=True)


def where(found):
    return {case.image.files[0].parent.name: len(case.mask) for case in found.cases}


def masks(found):
    return {case.image.files[0].parent.name: catalog.load_case(case, found)[1] for case in found.cases}


@pytest.mark.parametrize(
    ("told", "by"),
    [
        ({}, "source images"),
        ({"sources": False}, "source images"),
        ({"listed": False}, "source images"),
        ({"planes": False}, "source images"),
        ({"sources": False, "listed": False}, "frame of reference"),
    ],
)
def test_seg_that_names_no_series(tmp_path, told, by):
    slices = stack(tmp_path / "ct")
    stack(tmp_path / "other", series="1.2.3.5", frame="1.2.10", PatientID="B")
    seg(tmp_path / "seg", slices, {"organ": MASK}, **told)
    found = catalog.scan(tmp_path)
    assert where(found) == {"ct": 1} and found.notes == (f"1 DICOM SEG that names no series: found by {by}",)
    np.testing.assert_array_equal(masks(found)["ct"], MASK)


@pytest.mark.parametrize("images", [False, True])
def test_rtstruct_that_names_no_series(tmp_path, images):
    slices = stack(tmp_path / "ct")
    stack(tmp_path / "other", series="1.2.3.5", frame="1.2.10")
    rt(tmp_path / "rt", images=slices if images else ())
    found = catalog.scan(tmp_path)
    assert where(found) == {"ct": 1}
    assert found.notes == (f"1 RTSTRUCT that names no series: found by {'source images' if images else 'frame of reference'}",)
    np.testing.assert_array_equal(masks(found)["ct"], MASK)


@pytest.mark.parametrize("kind", ["seg", "rt"])
@pytest.mark.parametrize("drawn", ["ct", "fine"])
@pytest.mark.parametrize("named", [(), ("1.2.3.4", "1.2.3.5"), ("1.2.3.5", "1.2.3.4")])
@pytest.mark.parametrize("images", [False, True])
def test_of_two_series_the_one_that_it_was_drawn_on(tmp_path, kind, drawn, named, images):
    """Every slice of one series lies on every second one of the other: on the wrong one the mask would have stripes."""
    stacks = {"ct": stack(tmp_path / "ct"), "fine": stack(tmp_path / "fine", FINE, "1.2.3.5")}
    mask, affine = MASK, AFFINE.copy()
    if drawn == "fine":
        mask = np.zeros((len(FINE), 4, 6), bool)
        mask[1:5, 1:3, 1:4] = True
        affine[2, 0] = 1.25
    if kind == "seg":
        seg(tmp_path / "seg", stacks[drawn], {"organ": mask}, named, sources=images, listed=False)
    else:
        rt(tmp_path / "rt", mask, named, stacks[drawn] if images else (), affine=affine)
    found = catalog.scan(tmp_path)
    assert where(found) == {drawn: 1}
    np.testing.assert_array_equal(masks(found)[drawn], mask)
    (other,) = found.rejected
    if named:
        assert "that names this series was drawn on slices of another distance or place" in other.reason
        assert "naming several series: used for those on whose slices it was drawn" in found.notes[0]
    else:
        assert "no DICOM SEG or RTSTRUCT refers to this series" in other.reason


def test_series_of_the_same_slices_share_a_mask(tmp_path):
    slices = stack(tmp_path / "t1")
    stack(tmp_path / "t2", series="1.2.3.5")
    seg(tmp_path / "seg", slices, {"organ": MASK}, ("1.2.3.4", "1.2.3.5"))
    found = catalog.scan(tmp_path)
    assert where(found) == {"t1": 1, "t2": 1} and not found.rejected and not found.notes
    for mask in masks(found).values():
        np.testing.assert_array_equal(mask, MASK)


def test_the_series_that_it_was_drawn_on_is_not_there(tmp_path):
    """What is named is there, but the slices are others'."""
    slices = stack(tmp_path / "gone")
    seg(tmp_path / "seg", slices, {"organ": MASK}, ("1.2.3.4", "1.2.3.5"))
    rt(tmp_path / "rt", names=("1.2.3.4", "1.2.3.5"), images=slices)
    stack(tmp_path / "fine", FINE, "1.2.3.5")
    for path in (tmp_path / "gone").iterdir():
        path.unlink()
    found = catalog.scan(tmp_path)
    assert found.task == "unlabelled" and len(found.cases) == 1
    assert [(item.path, item.reason) for item in found.rejected] == [
        ("rt", "RTSTRUCT that was drawn on slices of another distance or place than those of the series that it names"),
        ("seg", "DICOM SEG that was drawn on slices of another distance or place than those of the series that it names"),
    ]
    with pytest.raises(SourceError, match="no masks for segmentation.*; 2 were set aside: RTSTRUCT that was drawn"):
        catalog.scan(tmp_path, task="segmentation")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"frame": "1.2.77"}, "RTSTRUCT that names no series, and no image or frame of reference of this folder"),
        ({"patient": "SOMEBODY"}, "RTSTRUCT that names no series, and no image or frame of reference of this folder"),
        ({"shift": 1.0}, "RTSTRUCT that names no series; of those that share its frame of reference none has the slices"),
        ({"empty": True}, "RTSTRUCT that names no series; of those that share its frame of reference none has the slices"),
    ],
)
def test_what_fits_nothing_has_its_own_reason(tmp_path, change, reason):
    stack(tmp_path / "ct")
    affine = AFFINE.copy()
    affine[2, 3] += change.get("shift", 0)
    rt(tmp_path / "rt", MASK & (not change.get("empty")), frame=change.get("frame", "1.2.9"), affine=affine)
    if "patient" in change:
        d = pydicom.dcmread(tmp_path / "rt")
        d.PatientID = change["patient"]
        d.save_as(tmp_path / "rt")
    (aside,) = catalog.scan(tmp_path).rejected
    assert aside.reason.startswith(reason) and SECRET not in aside.reason


def test_one_frame_of_reference_for_all_patients(tmp_path):
    """As careless de-identification leaves it: the patient decides."""
    stack(tmp_path / "a")
    stack(tmp_path / "b", series="1.2.3.5", PatientID="B")
    rt(tmp_path / "rt")
    assert where(catalog.scan(tmp_path)) == {"a": 1}


def test_regions_of_two_frames_of_reference(tmp_path):
    """Contours of another frame of reference are not taken for those of a series that is found by its own."""
    slices = stack(tmp_path / "ct")
    rt(tmp_path / "rt", images=slices)
    d = pydicom.dcmread(tmp_path / "rt")
    other = structure_set({"far": trace(block(0).astype(bool), AFFINE)}, "1.2.3.99", frame="1.2.10")
    other.StructureSetROISequence[0].ROINumber = other.ROIContourSequence[0].ReferencedROINumber = 7
    d.StructureSetROISequence.append(other.StructureSetROISequence[0])
    d.ROIContourSequence.append(other.ROIContourSequence[0])
    d.save_as(tmp_path / "rt")
    found = catalog.scan(tmp_path)
    volume, mask = catalog.load_case(found.cases[0], found)
    assert "1 regions of another frame of reference were left out" in volume.notes
    np.testing.assert_array_equal(mask == found.classes.index("organ"), MASK)


def test_damaged_references_are_no_crash(tmp_path):
    slices = stack(tmp_path / "ct")
    seg(tmp_path / "seg", slices, {"organ": MASK})
    d = pydicom.dcmread(tmp_path / "seg")
    d.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence[0].ImagePositionPatient = [1, 2]
    d.save_as(tmp_path / "seg")
    rt(tmp_path / "rt")
    d = pydicom.dcmread(tmp_path / "rt")
    d.ROIContourSequence[0].ContourSequence[0].ContourData = ["1", "2"]
    d.save_as(tmp_path / "rt")
    assert {item.path for item in catalog.scan(tmp_path).rejected} == {"seg", "rt"}
    found = catalog.scan(tmp_path, task="unlabelled")
    assert found.task == "unlabelled" and SECRET not in repr(found)


def test_seg_of_one_echo_is_not_of_the_other(tmp_path):
    """Volumes of one series: the images that the SEG names tell which of them it is of."""
    first = stack(tmp_path / "e1", Modality="MR", EchoTime=10)
    stack(tmp_path / "e2", Modality="MR", EchoTime=20)
    seg(tmp_path / "seg", first, {"organ": MASK}, ("1.2.3.4",))
    found = catalog.scan(tmp_path)
    assert where(found) == {"e1": 1} and not any("SEG" in note for note in found.notes)
    assert [item.reason.split(" (--")[0] for item in found.rejected] == ["no mask: those of its series are of its other volumes (this is echo 2)"]
    seg(tmp_path / "seg", first, {"organ": MASK}, ("1.2.3.4",), sources=False, listed=False)
    assert where(catalog.scan(tmp_path)) == {"e1": 1, "e2": 1}
