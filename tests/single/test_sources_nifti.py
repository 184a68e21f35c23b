"""NIfTI: axes and world coordinates agree with nibabel; MSD and nnU-Net folders become cases."""

from __future__ import annotations

import gzip
import json
import unicodedata
from pathlib import Path

import nibabel
import numpy as np
import pytest

from hvd_imaging.errors import SourceError
from hvd_imaging.privacy.redact import Redactor
from hvd_imaging.sources import catalog
from hvd_imaging.sources.nifti import parse_classes, parse_modality, read_nifti, scan_nifti, write_nifti
from hvd_imaging.volume import Volume

TURNED = np.array([[0, -1.5, 0, 30], [0.8, 0, 0, -12], [0, 0, 3.0, 7], [0, 0, 0, 1]], float)


def save(path: Path, array: np.ndarray, affine=TURNED) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return path


def ramp(shape=(5, 4, 3), dtype=np.int16) -> np.ndarray:
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


def test_world_coordinates_agree_with_nibabel(tmp_path):
    path = save(tmp_path / "a.nii.gz", ramp())
    volume, image = read_nifti(path), nibabel.load(path)
    assert volume.shape == (3, 4, 5) and volume.spacing == pytest.approx((3, 1.5, 0.8))
    for w, h, d in np.ndindex(5, 4, 3):
        ras = image.affine @ [w, h, d, 1]
        np.testing.assert_allclose(volume.affine @ [d, h, w, 1], [-ras[0], -ras[1], ras[2], 1], atol=1e-5)
        assert volume.array[d, h, w] == ramp()[w, h, d]


@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz"])
@pytest.mark.parametrize("dtype", [np.float32, np.uint8, np.int64, bool])
def test_what_is_written_is_read_again(tmp_path, name, dtype):
    array = (ramp((3, 4, 5), np.int64) % 2).astype(dtype)
    affine = read_nifti(save(tmp_path / "ref.nii", ramp())).affine
    write_nifti(tmp_path / name, Volume(array, affine))
    again = read_nifti(tmp_path / name)
    np.testing.assert_array_equal(again.array, array)
    np.testing.assert_allclose(again.affine, affine, atol=1e-5)
    image = nibabel.load(tmp_path / name)
    np.testing.assert_allclose(image.get_qform(), image.get_sform(), atol=1e-4)


def test_channels_are_last(tmp_path):
    volume = read_nifti(save(tmp_path / "a.nii", ramp((5, 4, 3, 2))))
    assert volume.array.shape == (3, 4, 5, 2)
    write_nifti(tmp_path / "b.nii.gz", volume)
    np.testing.assert_array_equal(read_nifti(tmp_path / "b.nii.gz").array, volume.array)
    assert read_nifti(save(tmp_path / "c.nii", ramp((5, 4, 3, 1)))).array.shape == (3, 4, 5)


def test_scale_of_the_header_is_applied(tmp_path):
    image = nibabel.Nifti1Image(ramp(), TURNED)
    image.header.set_slope_inter(2, -3)
    nibabel.save(image, tmp_path / "a.nii")
    raw = nibabel.load(tmp_path / "a.nii")
    np.testing.assert_allclose(read_nifti(tmp_path / "a.nii").array, raw.get_fdata().transpose(2, 1, 0), rtol=1e-6)


def test_voxels_that_are_not_finite_are_told(tmp_path):
    array = ramp(dtype=np.float32)
    array[0, 0, 0] = np.nan
    volume = read_nifti(save(tmp_path / "a.nii", array))
    assert np.isfinite(volume.array).all() and "1 voxels that are not finite" in volume.notes[0]


@pytest.mark.parametrize("kind", ["cut", "cut.gz", "text", "2d", "shear", "colour"])
def test_unusable_files_are_refused_by_name(tmp_path, kind):
    path = tmp_path / ("bad.nii.gz" if kind == "cut.gz" else "bad.nii")
    if kind == "text":
        path.write_text("not an image")
    elif kind == "2d":
        save(path, ramp((4, 4)))
    elif kind == "shear":
        save(path, ramp(), TURNED + np.array([[0, 0, 2, 0]] + [[0] * 4] * 3))
    elif kind == "colour":
        save(path, np.zeros((3, 3, 3), [("R", "u1"), ("G", "u1"), ("B", "u1")]))
    else:
        save(path, np.random.default_rng(0).integers(0, 999, (20, 20, 20)).astype(np.int16))
        path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(SourceError, match=r"^bad\.nii"):
        read_nifti(path, tmp_path)


def msd(root: Path, cases=("a", "b"), labels=None, **more) -> Path:
    for index, name in enumerate(cases):
        save(root / "imagesTr" / f"{name}.nii.gz", ramp() + index)
        save(root / "labelsTr" / f"{name}.nii.gz", (ramp() % 2).astype(np.uint8))
    save(root / "imagesTs" / "held.nii.gz", ramp())
    description = {
        "modality": {"0": "CT"},
        "labels": labels or {"0": "background", "1": "tumour"},
        "training": [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in cases],
        **more,
    }
    (root / "dataset.json").write_text(json.dumps(description))
    return root


def test_decathlon_folder(tmp_path):
    (msd(tmp_path) / "imagesTr" / "._a.nii.gz").write_bytes(b"shadow file of macOS")
    found = catalog.scan(tmp_path)
    assert (found.task, found.classes) == ("segmentation", ("background", "tumour"))
    assert [(case.source_id, case.patient_id, case.modality) for case in found.cases] == [("a", "a", "CT"), ("b", "b", "CT")]
    volume, mask = catalog.load_case(found.cases[1], found)
    np.testing.assert_array_equal(volume.array, (ramp() + 1).transpose(2, 1, 0))
    np.testing.assert_array_equal(mask, (ramp() % 2).transpose(2, 1, 0))
    assert mask.dtype == np.uint8
    assert [case.source_id for case in catalog.scan(tmp_path, task="unlabelled").cases] == ["a", "b", "held"]


def test_listed_but_missing_and_unmasked_cases_are_set_aside(tmp_path):
    msd(tmp_path, ("a", "b", "c"))
    (tmp_path / "imagesTr" / "b.nii.gz").unlink()
    (tmp_path / "labelsTr" / "c.nii.gz").unlink()
    found = catalog.scan(tmp_path)
    assert [case.source_id for case in found.cases] == ["a"]
    assert [(r.path, r.reason.split(" (")[0]) for r in found.rejected] == [
        ("imagesTr/b.nii.gz", "named in dataset.json, but not in imagesTr"),
        ("imagesTr/c.nii.gz", "no mask of this name in labelsTr"),
    ]


def test_what_is_listed_but_missing_lies_in_its_own_folder(tmp_path):
    """So that the folder's name, which may be a patient's, is known to what hides names."""
    msd(tmp_path / "DOE_JOHN", ("a", "b"))
    (tmp_path / "DOE_JOHN/imagesTr/b.nii.gz").unlink()
    (rejected,) = catalog.scan(tmp_path).rejected
    assert rejected.path == "DOE_JOHN/imagesTr/b.nii.gz"
    assert "DOE" not in Redactor(b"k" * 32, tmp_path).text(rejected.reason, [rejected.path])


def test_nnunet_folder(tmp_path):
    for channel in range(2):
        save(tmp_path / "imagesTr" / f"case_1_{channel:04d}.nii.gz", ramp() + 100 * channel)
    save(tmp_path / "imagesTr" / "case_2_0000.nii.gz", ramp())
    save(tmp_path / "labelsTr" / "case_1.nii.gz", (ramp() % 3).astype(np.uint8))
    (tmp_path / "dataset.json").write_text(
        json.dumps(
            {
                "channel_names": {"0": "T1", "1": "FLAIR"},
                "labels": {"background": 0, "edema": 1, "core": 2},
                "numTraining": 2,
                "file_ending": ".nii.gz",
            }
        )
    )
    found = catalog.scan(tmp_path)
    assert found.classes == ("background", "edema", "core")
    assert [(r.path, r.reason[:25]) for r in found.rejected] == [("imagesTr/case_2_0000.nii.gz", "case of 1 channel files, ")]
    (case,) = found.cases
    volume, mask = catalog.load_case(case, found)
    assert (case.source_id, volume.modality, volume.array.shape) == ("case_1", "MR", (3, 4, 5, 2))
    np.testing.assert_array_equal(volume.array[..., 1] - volume.array[..., 0], 100)
    assert mask.max() == 2


def test_plain_folder_is_unlabelled(tmp_path):
    save(tmp_path / "x" / "one.nii.gz", ramp())
    save(tmp_path / "y" / "one.nii", ramp())
    found = catalog.scan(tmp_path)
    assert (found.task, found.classes, [c.source_id for c in found.cases]) == ("unlabelled", (), ["x/one", "y/one"])
    volume, mask = catalog.load_case(found.cases[0], found)
    assert volume.shape == (3, 4, 5) and mask is None


@pytest.mark.parametrize("kind", ["shape", "place", "values", "fraction"])
def test_mask_that_does_not_fit_is_refused(tmp_path, kind):
    msd(tmp_path)
    path = tmp_path / "labelsTr" / "a.nii.gz"
    mask = (ramp() % 2).astype(np.float32)
    if kind == "shape":
        save(path, np.repeat(mask, 2, axis=0))  # marks beyond the image
    elif kind == "place":
        save(path, mask, TURNED + np.array([[0, 0, 0, 1.0]] + [[0] * 4] * 3))
    else:
        mask[0, 0, 0] = 2 if kind == "values" else 0.5
        save(path, mask)
    found = catalog.scan(tmp_path)
    expected = "another geometry" if kind in ("shape", "place") else r"expected whole numbers from 0 to 1"
    with pytest.raises(SourceError, match=rf"^labelsTr/a\.nii\.gz: .*{expected}"):
        catalog.load_case(found.cases[0], found)


@pytest.mark.parametrize("suffix", [".nii.gz", ".NII.GZ", ".Nii", ".nii.GZ", ".nrrd"])
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_of_images_and_masks_meet(tmp_path, suffix, form):
    """Letters with marks in either form of Unicode, endings in capitals, dots, blanks, names that end like a channel."""
    names = ["case.1.2", "with space", "Fälle_äöü", "BRATS_001_0000", "ÅÇ"]
    description = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "a": 1}}
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    for index, name in enumerate(names):
        save(tmp_path / "imagesTr" / f"{unicodedata.normalize('NFC', name)}_0000.nii.gz", ramp() + index)
        label = tmp_path / "labelsTr" / f"{unicodedata.normalize(form, name)}{suffix}"
        if suffix == ".nrrd":
            label.parent.mkdir(exist_ok=True)
            label.write_bytes(b"NRRD0005")
        else:
            save(tmp_path / "labelsTr" / "x.nii", (ramp() % 2).astype(np.uint8))
            data = (tmp_path / "labelsTr" / "x.nii").read_bytes()
            label.write_bytes(gzip.compress(data) if suffix.lower().endswith("gz") else data)
            (tmp_path / "labelsTr" / "x.nii").unlink()
    (tmp_path / "labelsTr" / "._case.1.2.nii.gz").write_bytes(b"shadow file of macOS")
    found = catalog.scan(tmp_path)
    assert [case.source_id for case in found.cases] == sorted(unicodedata.normalize("NFC", name) for name in names)
    assert not found.rejected
    if suffix != ".nrrd":
        assert all(catalog.load_case(case, found)[1].any() for case in found.cases)
    # A table that another system wrote names them too.
    (tmp_path / "t.csv").write_text("PatientID,label\n" + "".join(f"{unicodedata.normalize(form, n)},{len(n) % 2}\n" for n in names))
    assert len(catalog.scan(tmp_path, tmp_path / "t.csv").cases) == len(names)


@pytest.mark.parametrize("key", ["modality", "channel_names"])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("masks", [False, True])
def test_channels_are_split_as_the_files_are(tmp_path, key, channels, split, masks):
    """nnU-Net of version 1 says `modality` as the Decathlon does; a Decathlon's cases may be numbered with four digits."""
    if split is False and key == "channel_names" and not masks:
        pytest.skip("nothing tells it from channels")
    names = ["a_0001", "a_0002", "a_0003"]
    for name in names:
        if split:
            for channel in range(channels):
                save(tmp_path / "imagesTr" / f"{name}_{channel:04d}.nii.gz", ramp() + channel)
        else:
            save(tmp_path / "imagesTr" / f"{name}.nii.gz", ramp((5, 4, 3, channels)))
        if masks:
            save(tmp_path / "labelsTr" / f"{name}.nii.gz", (ramp() % 2).astype(np.uint8))
    training = [{"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"} for name in names]
    description = {key: {str(c): "CT" for c in range(channels)}, "labels": {"0": "background", "1": "a"}, "training": training}
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    found = catalog.scan(tmp_path)
    assert [case.source_id for case in found.cases] == names and not found.rejected
    assert found.task == ("segmentation" if masks else "unlabelled")
    array = catalog.load_case(found.cases[0], found)[0].array
    assert array.shape == ((3, 4, 5) if channels == 1 else (3, 4, 5, 2))


def test_what_a_data_set_does_not_name_is_told(tmp_path):
    msd(tmp_path)
    save(tmp_path / "imagesTr" / "a.nii", ramp())
    save(tmp_path / "labelsTr" / "a.nii", ramp())
    save(tmp_path / "labelsTr" / "far.nii.gz", ramp())
    save(tmp_path / "labelsTs" / "held.nii.gz", ramp())
    save(tmp_path / "notes" / "old.nii.gz", ramp())
    found = catalog.scan(tmp_path)
    assert [case.image.files[0].name for case in found.cases] == ["a.nii", "b.nii.gz"]
    assert [(item.path, item.reason) for item in found.rejected] == [
        ("imagesTr/a.nii.gz", "another file has the same name before its suffix"),
        ("labelsTr/a.nii", "another mask has the same name before its suffix"),
        ("labelsTr/far.nii.gz", "mask without an image of this name in imagesTr"),
        ("notes/old.nii.gz", "outside of the folders of dataset.json; ingest it apart"),
    ]
    assert found.notes == ("1 masks in labelsTs are not read: images of imagesTs are held out",)


def test_channels_that_are_not_those_named(tmp_path):
    for channel in (0, 2):
        save(tmp_path / "imagesTr" / f"a_{channel:04d}.nii.gz", ramp())
    (tmp_path / "dataset.json").write_text(json.dumps({"channel_names": {"0": "T1", "1": "T2"}}))
    save(tmp_path / "imagesTr" / "b_0000.nii.gz", ramp())
    save(tmp_path / "imagesTr" / "b_0001.nii.gz", ramp())
    found = catalog.scan(tmp_path)
    assert [case.source_id for case in found.cases] == ["b"]
    assert [item.reason for item in found.rejected] == ["case whose 2 channel files are not numbered 0000 to 0001"]


def test_channel_on_another_grid_is_refused(tmp_path):
    save(tmp_path / "imagesTr" / "c_0000.nii.gz", ramp())
    save(tmp_path / "imagesTr" / "c_0001.nii.gz", ramp((5, 4, 2)))
    (tmp_path / "dataset.json").write_text(json.dumps({"channel_names": {"0": "T1", "1": "T2"}}))
    found = catalog.scan(tmp_path)
    with pytest.raises(SourceError, match="channel on another grid"):
        catalog.load_case(found.cases[0], found)


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ({"0": "background", "1": "a", "2": "b"}, ("background", "a", "b")),
        ({"background": 0, "b": 2, "a": 1}, ("background", "a", "b")),
        (None, ()),
    ],
)
def test_class_names(labels, classes):
    assert parse_classes(labels, "dataset.json") == classes


@pytest.mark.parametrize(
    "labels",
    [
        [],
        {"0": "background", "2": "a"},
        {"background": 0, "whole": [1, 2]},
        {"0": 1.5},
        {"background": 0, "a": 1, "ignore": 2},
        {"a": 0, "background": 1},
        {"0": "a", "1": "Background"},
    ],
)
def test_odd_class_names_are_refused(labels):
    with pytest.raises(SourceError, match="labels"):
        parse_classes(labels, "dataset.json")


@pytest.mark.parametrize(
    ("channels", "modality"),
    [({"0": "CT"}, "CT"), ({"0": "MRI"}, "MR"), ({"0": "FLAIR", "1": "T1w"}, "MR"), ({"0": "MR or CT"}, ""), (None, "")],
)
def test_modality(channels, modality):
    assert parse_modality(channels) == modality


def test_damaged_or_several_descriptions(tmp_path):
    msd(tmp_path / "one")
    msd(tmp_path / "two")
    with pytest.raises(SourceError, match="2 data sets"):
        scan_nifti(tmp_path)
    (tmp_path / "one" / "dataset.json").write_text("{")
    with pytest.raises(SourceError, match=r"dataset\.json: cannot be read as JSON"):
        scan_nifti(tmp_path / "one")


@pytest.mark.shared
def test_real_lesions(shared_data):
    found = catalog.scan(shared_data / "lesions")
    assert (found.task, found.classes, found.rejected) == ("segmentation", ("background", "lesion"), ())
    shapes = {}
    for case in found.cases:
        volume, mask = catalog.load_case(case, found)
        assert mask.shape == volume.shape and mask.any()
        shapes[case.source_id] = volume.shape
    assert shapes == {"brain1": (25, 256, 256), "breast1": (21, 120, 45), "lung2": (61, 512, 512)}
