"""Where images and labels meet: DICOM SEG on its series, CSV by patient or series, and what is refused."""

from __future__ import annotations

import copy
import shutil
import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
from test_sources_dicom import SECRET, make_slice, write

from hvd_imaging.errors import SourceError
from hvd_imaging.sources import catalog
from hvd_imaging.sources.labels import read_labels_csv, read_seg_mask, seg_classes
from hvd_imaging.volume import Volume

HEIGHTS = (0, 2.5, 5, 7.5)


def write_seg(path: Path, slices, masks: dict[str, np.ndarray], kind="BINARY", **more) -> None:
    """masks: label -> (D, H, W), values in [0, 1]."""
    import highdicom
    from pydicom.sr.codedict import codes

    pixels = np.stack(list(masks.values()), -1)
    for item in slices:  # what the library copies over
        for key in ("AccessionNumber", "PatientName", "PatientBirthDate", "PatientSex", "StudyID", "StudyDate", "StudyTime"):
            if key not in item:
                setattr(item, key, "")
        item.FrameOfReferenceUID = "1.2.9"
        item.PositionReferenceIndicator = ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seg = highdicom.seg.Segmentation(
            source_images=list(slices),
            pixel_array=pixels.astype(np.uint8) if kind == "BINARY" else pixels.astype(np.float32),
            segmentation_type=kind,
            segment_descriptions=[
                highdicom.seg.SegmentDescription(n, label, codes.SCT.Organ, codes.SCT.Lung, "MANUAL")
                for n, label in enumerate(masks, start=1)
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
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    seg.save_as(path)


def block(*where) -> np.ndarray:
    mask = np.zeros((len(HEIGHTS), 4, 6))
    mask[where] = 1
    return mask


@pytest.fixture()
def archive(tmp_path):
    """One series whose files lie in another order than its slices, and nothing else."""
    slices = [make_slice(z) for z in HEIGHTS]
    write(tmp_path / "ct", [slices[i] for i in (2, 0, 3, 1)])
    return tmp_path, slices


def load(root: Path, **more):
    found = catalog.scan(root, **more)
    return found, *catalog.load_case(found.cases[0], found)


def test_seg_frames_come_to_their_slices(archive):
    root, slices = archive
    masks = {"zebra": block(1, slice(0, 2)), "ant": block(slice(1, 4), 1, slice(2, 5))}
    # The SEG's own frames follow the order of the images that it was made from.
    order = [3, 0, 2, 1]
    write_seg(root / "seg", [slices[i] for i in order], {k: m[order] for k, m in masks.items()})
    found, volume, mask = load(root)
    assert (found.task, found.classes) == ("segmentation", ("background", "ant", "zebra"))
    expected = 2 * masks["zebra"]
    expected[masks["ant"] > 0] = 1  # the second segment lies over the first
    np.testing.assert_array_equal(mask, expected)
    assert mask.dtype == np.uint8 and mask.shape == volume.shape


def test_fractional_seg_counts_from_one_half(archive):
    root, slices = archive
    share = np.linspace(0, 1, 24).reshape(1, 4, 6) * np.ones((4, 1, 1))
    write_seg(root / "seg", slices, {"a": share}, "FRACTIONAL")
    _, _, mask = load(root)
    np.testing.assert_array_equal(mask, share >= 0.5)


def test_seg_without_positions_goes_by_its_source_images(archive):
    root, slices = archive
    wanted = block(slice(1, 3), 2)
    write_seg(root / "seg", slices, {"a": wanted})
    seg = pydicom.dcmread(root / "seg")
    for frame in seg.PerFrameFunctionalGroupsSequence:
        del frame.PlanePositionSequence
    seg.save_as(root / "seg")
    np.testing.assert_array_equal(load(root)[2], wanted)


def test_two_segs_of_one_series(archive):
    root, slices = archive
    write_seg(root / "m" / "1", slices, {"a": block(0)})
    write_seg(root / "m" / "2", slices, {"b": block(1)})
    found, _, mask = load(root)
    assert found.classes == ("background", "a", "b") and [int(m.max()) for m in mask] == [1, 2, 0, 0]


@pytest.mark.parametrize("kind", ["size", "spacing", "turned", "moved", "beyond"])
def test_seg_of_another_geometry(archive, kind):
    root, slices = archive
    write_seg(root / "seg", slices, {"a": block(1)})
    volume = load(root)[1]
    affine, array = volume.affine.copy(), volume.array
    if kind == "size":
        array = array[:, :, :-1]
    elif kind == "spacing":
        affine[:3, 1] *= 1.1
    elif kind == "turned":
        affine[:3, 1:3] = affine[:3, 1:3] @ np.array([[0.995, 0.0998], [-0.0998, 0.995]])
    elif kind == "moved":
        affine[:3, 3] += 0.4
    else:
        affine[2, 3] += 10
    with pytest.raises(SourceError, match="^seg: .*another geometry"):
        read_seg_mask(root / "seg", Volume(array, affine), ("background", "a"), root)


def test_damaged_seg_and_unknown_segment(archive):
    root, slices = archive
    write_seg(root / "seg", slices, {"a": block(1)})
    volume = load(root)[1]
    with pytest.raises(SourceError, match="1 segments that are no class"):
        read_seg_mask(root / "seg", volume, ("background", "b"), root)
    (root / "seg").write_bytes((root / "seg").read_bytes()[:-20])
    with pytest.raises(SourceError, match="^seg: .*truncated"):
        read_seg_mask(root / "seg", volume, ("background", "a"), root)


def test_series_without_mask_and_mask_without_series(archive):
    root, slices = archive
    write_seg(root / "seg", slices, {"a": block(1)})
    write(root / "other", [make_slice(z, series="1.2.3.5") for z in HEIGHTS])
    far = [make_slice(z, series="1.2.3.6") for z in HEIGHTS]
    write_seg(root / "stray", far, {"far": block(1)})
    found = catalog.scan(root)
    assert len(found.cases) == 1 and found.classes == ("background", "a")
    assert [(r.path, r.reason[:9]) for r in found.rejected] == [("other/f000", "no mask: "), ("stray", "DICOM SEG")]
    assert len(catalog.scan(root, task="unlabelled").cases) == 2


def test_catalog_survives_its_way_to_other_ranks(archive):
    root, slices = archive
    write_seg(root / "seg", slices, {"a": block(1)})
    found = catalog.scan(root)
    assert copy.deepcopy(found) == found  # as it goes to other ranks
    assert SECRET not in repr(found)


def csv(root: Path, text: str, name="labels.csv") -> Path:
    (root / name).write_text(text, encoding="utf-8")
    return root / name


def test_csv_by_patient_and_by_series(archive):
    root, _ = archive
    write(root / "b", [make_slice(z, series="1.2.3.5", PatientID="B") for z in HEIGHTS])
    csv(root, f"patientid,age,label\n{SECRET},70,ill\nB,60,healthy\n")
    found = catalog.scan(root)
    assert (found.task, found.classes) == ("classification", ("healthy", "ill"))
    assert [case.label for case in found.cases] == [1, 0]
    assert catalog.load_case(found.cases[0], found)[1] is None
    table = csv(root, "\ufeffSeriesInstanceUID;Label\n1.2.3.5;10\n1.2.3.4;9\n", "other.csv")
    found = catalog.scan(root, table)
    assert found.classes == ("9", "10") and [case.label for case in found.cases] == [0, 1]


def test_csv_beside_masks_waits_for_its_task(archive):
    root, slices = archive
    write_seg(root / "seg", slices, {"a": block(1)})
    write(root / "other", [make_slice(z, series="1.2.3.5", PatientID="B") for z in HEIGHTS])
    path = csv(root, f"PatientID,label\n{SECRET},1\nB,0\n")
    assert catalog.scan(root).task == "segmentation"
    assert catalog.scan(root, task="classification").task == "classification"
    assert catalog.scan(root, path).task == "classification"
    with pytest.raises(SourceError, match="labels from a CSV are for classification"):
        catalog.scan(root, path, "segmentation")


def test_label_for_an_unknown_patient_is_named_by_row(archive):
    root, _ = archive
    csv(root, f"PatientID,label\n{SECRET},1\nJANE-DOE,0\n")
    with pytest.raises(SourceError, match=r"labels\.csv: row 3: label for an unknown patient") as caught:
        catalog.scan(root)
    assert "JANE" not in str(caught.value)


def test_image_without_label_is_set_aside(archive):
    root, _ = archive
    write(root / "b", [make_slice(z, series="1.2.3.5", PatientID="B") for z in HEIGHTS])
    write(root / "c", [make_slice(z, series="1.2.3.6", PatientID="C") for z in HEIGHTS])
    csv(root, f"PatientID,label\n{SECRET},1\nC,0\n")
    found = catalog.scan(root)
    assert len(found.cases) == 2
    assert [(r.path, r.reason) for r in found.rejected] == [("b/f000", "no label in labels.csv")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "expected a header"),
        ("name,label\nx,1\n", "expected a header"),
        ("PatientID,label\n", "no rows"),
        ("PatientID,label\nx,1\ny,\n", "row 3: .*empty"),
        ("PatientID,label\nx\n", "row 2: .*missing"),
        ("PatientID,label\nx,1\n\nx,2\n", "row 4: another label than in row 2"),
    ],
)
def test_unusable_csv(tmp_path, text, expected):
    with pytest.raises(SourceError, match=expected):
        read_labels_csv(csv(tmp_path, text))


def test_binary_csv(tmp_path):
    (tmp_path / "l.csv").write_bytes(b"\xff\xfe\x00PatientID")
    with pytest.raises(SourceError, match="UTF-8"):
        read_labels_csv(tmp_path / "l.csv")


def test_seg_classes_are_sorted_once():
    assert seg_classes(["b", "Background", "a", "b"]) == ("background", "a", "b")


def test_folder_without_images(tmp_path):
    with pytest.raises(SourceError, match="expected a folder .* found nothing"):
        catalog.scan(tmp_path / "missing")
    (tmp_path / "notes.dcm").write_text("text")
    with pytest.raises(SourceError, match=r"no DICOM or NIfTI images .* \(1 other files"):
        catalog.scan(tmp_path)
    with pytest.raises(SourceError, match="found a file"):
        catalog.scan(tmp_path / "notes.dcm")


def test_labels_that_the_task_needs(archive):
    root, _ = archive
    with pytest.raises(SourceError, match="no labels for classification"):
        catalog.scan(root, task="classification")
    with pytest.raises(SourceError, match="no masks for segmentation"):
        catalog.scan(root, task="segmentation")
    with pytest.raises(SourceError, match="found nothing"):
        catalog.scan(root, root / "missing.csv")
    with pytest.raises(SourceError, match="expected one of"):
        catalog.scan(root, task="detection")


def nifti(path: Path) -> Path:
    import nibabel

    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(np.zeros((2, 2, 2), np.uint8), np.eye(4)), path)
    return path


def test_stray_volumes_beside_dicom_are_set_aside(archive):
    root, slices = archive
    nifti(root / "notes" / "a.nii")
    found = catalog.scan(root)
    assert ([case.kind for case in found.cases], found.task) == (["dicom"], "unlabelled")
    assert [(item.path, item.reason.split(";")[0]) for item in found.rejected] == [("notes/a.nii", "NIfTI or NRRD beside DICOM")]
    assert found.notes == ("1 NIfTI or NRRD volumes beside 1 DICOM series were set aside",)
    # Masks in their folder, or DICOM SEG, speak for DICOM however many volumes lie elsewhere.
    for name in "bcd":
        nifti(root / "notes" / f"{name}.nii.gz")
    write_seg(root / "seg", slices, {"a": block(1)})
    found = catalog.scan(root)
    assert (found.task, len(found.cases), len(found.rejected)) == ("segmentation", 1, 4)
    (root / "dataset.json").write_text('{"labels": {"background": 0, "b": 1}}')
    nifti(root / "Masks" / "ct.nii.gz")
    found = catalog.scan(root)
    assert (found.task, [len(case.mask) for case in found.cases], len(found.rejected)) == ("segmentation", [2], 4)


@pytest.mark.parametrize("layout", [False, True])
def test_stray_dicom_beside_volumes_is_set_aside(archive, layout):
    root, slices = archive
    for name in ("a", "b"):
        nifti(root / "imagesTr" / f"{name}.nii.gz")
    if layout:
        (root / "imagesTr" / "b.nii.gz").unlink()
        nifti(root / "labelsTr" / "a.nii.gz")
        write_seg(root / "seg", slices, {"a": block(1)})
        (root / "dataset.json").write_text('{"labels": {"background": 0, "x": 1}, "modality": {"0": "CT"}}')
    found = catalog.scan(root)
    assert {case.kind for case in found.cases} == {"nifti"} and found.task == ("segmentation" if layout else "unlabelled")
    assert [item.path for item in found.rejected] == ["ct/f000", "seg"][: 1 + layout]
    assert {item.reason for item in found.rejected} == {"DICOM beside a data set of NIfTI or NRRD volumes; ingest it apart"}
    assert f"{1 if layout else 2} NIfTI or NRRD cases are taken; 1 DICOM series beside them were set aside" in found.notes


def test_kinds_that_are_not_read_are_counted_and_named(archive):
    root, _ = archive
    for name in ("a.png", "b.PNG", "._c.png", "d.mha", "e.hdr", "e.img", "cut.dcm", "README.txt", "x.npz", ".png", "__MACOSX/f.png"):
        (root / "more" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "more" / name).write_bytes(b"what no reader here knows")
    expected = (
        "2 .png, 1 .hdr, 1 .img, 1 .mha, 1 .npz files are of kinds that are not read; convert images to DICOM or NIfTI, unpack archives",
        "1 .dcm file is no DICOM by what it holds (damaged or cut off?)",
    )
    assert catalog.scan(root).notes == expected
    shutil.rmtree(root / "ct")
    with pytest.raises(SourceError, match="no DICOM or NIfTI images") as caught:
        catalog.scan(root)
    assert str(caught.value).endswith("; ".join(("", *expected)))


def test_volumes_beside_pictures_are_told_of_them_too(tmp_path):
    nifti(tmp_path / "a.nii.gz")
    (tmp_path / "b.jpeg").write_bytes(b"JFIF")
    assert catalog.scan(tmp_path).notes == (
        "1 .jpeg file is of a kind that is not read; convert images to DICOM or NIfTI, unpack archives",
    )


@pytest.mark.shared
def test_seg_on_the_uneven_real_series(shared_data, tmp_path):
    for path in (shared_data / "brain_series" / "volume").iterdir():
        shutil.copyfile(path, tmp_path / path.name)
    slices = [pydicom.dcmread(path) for path in sorted(tmp_path.iterdir())]
    wanted = np.zeros((20, 256, 256))
    wanted[3:17, 100:150, 90:160] = 1
    for item in slices:
        item.SOPClassUID = item.file_meta.MediaStorageSOPClassUID
    write_seg(tmp_path / "seg", slices, {"box": wanted})
    found, volume, mask = load(tmp_path)
    np.testing.assert_array_equal(mask, wanted)
    assert 6.96 <= volume.spacing[0] <= 7.07
