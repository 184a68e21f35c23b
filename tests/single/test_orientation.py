"""All sources come to one anatomical order in memory, and answers go back to the order of their input."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from datasets import make_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from test_dicom_kinds import enhanced_ct
from test_predict import Fake
from test_sources_dicom import make_slice, write

from hvd_imaging.config import IngestConfig, PreprocessConfig
from hvd_imaging.errors import RunError, SourceError
from hvd_imaging.inference.predict import answer_volume, predict
from hvd_imaging.ingest.plan import inherit
from hvd_imaging.models.spec import ModelSpec
from hvd_imaging.orientation import Turn, placed, to_patient
from hvd_imaging.preprocess.pipeline import preprocess
from hvd_imaging.shards import manifest as manifests
from hvd_imaging.sources.dicom import quiet, read_series, scan_dicom
from hvd_imaging.sources.labels import read_mask, read_seg_mask
from hvd_imaging.sources.nifti import read_case, read_nifti, scan_nifti, write_nifti
from hvd_imaging.volume import Volume, flip_ras_lps, same_voxels

AXIAL = np.array([[0, 0, 0.9, -40], [0, 1.1, 0, -60], [2.5, 0, 0, 300], [0, 0, 0, 1]], float)
"""(d, h, w) to LPS of an axial series: D to S, H to P, W to L."""
TURNS = [Turn(order, flips) for order in itertools.permutations(range(3)) for flips in itertools.product((False, True), repeat=3)]
SHAPE = (9, 18, 17)


def rotation(degrees) -> np.ndarray:
    a, b, c = np.radians(degrees)
    rx = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    ry = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    rz = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    return rx @ ry @ rz


def rotated(affine: np.ndarray, degrees) -> np.ndarray:
    whole = np.eye(4)
    whole[:3, :3] = rotation(degrees)
    return whole @ affine


def phantom(affine=AXIAL, shape=SHAPE) -> Volume:
    """No two voxels alike, no symmetry; whole numbers, so that each source holds them exactly."""
    array = np.random.default_rng(1).permutation(int(np.prod(shape))).reshape(shape).astype(np.float32)
    return Volume(array, affine)


def turned(volume: Volume, turn: Turn) -> Volume:
    return volume.with_array(np.ascontiguousarray(turn.array(volume.array)), turn.affine(volume.affine, volume.shape))


def oriented(volume: Volume) -> Volume:
    ready, _ = preprocess(volume, None, PreprocessConfig(intensity="none"))
    return ready


def test_an_axial_series_is_the_order_that_all_come_to():
    assert to_patient(AXIAL, SHAPE).is_identity


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        # D, H, W of the source point to these directions of LPS; expected: what D, H, W of the result are made of.
        (((1, 0, 0), (0, 0, -1), (0, 1, 0)), Turn((1, 2, 0), (True, False, False))),  # sagittal DICOM
        (((0, 1, 0), (0, 0, -1), (1, 0, 0)), Turn((1, 0, 2), (True, False, False))),  # coronal DICOM
        (((0, 0, 1), (0, -1, 0), (-1, 0, 0)), Turn((0, 1, 2), (False, True, True))),  # NIfTI in RAS
        (((0, 0, 1), (0, -1, 0), (1, 0, 0)), Turn((0, 1, 2), (False, True, False))),  # NIfTI as dcm2niix writes it
        (((0, 0, -1), (0, 1, 0), (1, 0, 0)), Turn((0, 1, 2), (True, False, False))),  # feet first
    ],
)
def test_known_orders(columns, expected):
    affine = np.eye(4)
    affine[:3, :3] = np.array(columns, float).T
    assert to_patient(affine, (5, 6, 7)) == expected


angles = st.tuples(*[st.sampled_from([0.0, 45.0, 90.0]) | st.floats(-180, 180)] * 3)


@settings(max_examples=150, deadline=None)
@given(angles, st.sampled_from(TURNS), st.tuples(*[st.integers(1, 6)] * 3))
def test_every_order_of_one_grid_comes_to_the_same_array(degrees, turn, shape):
    """Also at 45 degrees, where two axes are equally near, and for images of one slice."""
    volume = phantom(rotated(AXIAL, degrees), shape)
    once, other = oriented(volume), oriented(turned(volume, turn))
    if shape.count(1) < 2:  # of one row, voxels alone do not tell an order
        np.testing.assert_array_equal(once.array, other.array)
        np.testing.assert_allclose(once.affine, other.affine, atol=1e-9)
    axes = once.affine[:3, :3] / once.spacing
    if 1 not in shape:
        # Nearest: no other pairing of axes and directions lies nearer.
        best = max(sum(abs(axes[t, a]) for t, a in zip((2, 1, 0), order, strict=True)) for order in itertools.permutations(range(3)))
        assert sum(axes[t, a] for t, a in zip((2, 1, 0), range(3), strict=True)) == pytest.approx(best, abs=1e-4)


@given(st.sampled_from(TURNS), angles)
@settings(max_examples=60, deadline=None)
def test_voxels_stay_where_they_lie(turn, degrees):
    volume = phantom(rotated(AXIAL, degrees), (2, 3, 4))
    other = turned(volume, turn)
    for index in np.ndindex(*other.shape):
        place = np.linalg.inv(volume.affine) @ other.affine @ [*index, 1]
        d, h, w = np.round(place[:3]).astype(int)
        assert np.abs(place[:3] - (d, h, w)).max() < 1e-6 and volume.array[d, h, w] == other.array[index]


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_an_image_of_one_slice_keeps_its_plane(plane):
    through = {"axial": 0, "coronal": 1, "sagittal": 2}[plane]
    shape = tuple(1 if axis == through else side for axis, side in enumerate((5, 6, 7)))
    results = [oriented(turned(phantom(shape=shape), turn)) for turn in TURNS]
    assert {result.array.shape for result in results} == {{"axial": (1, 6, 7, 1), "coronal": (1, 5, 7, 1), "sagittal": (1, 5, 6, 1)}[plane]}
    for result in results:
        np.testing.assert_array_equal(result.array, results[0].array)
    # In its plane: S before P before L, each in its own sense.
    directions = {"axial": (1, 0), "coronal": (2, 0), "sagittal": (2, 1)}[plane]
    assert all(results[0].affine[component, axis] > 0 for axis, component in zip((1, 2), directions, strict=True))


def test_a_mask_goes_with_its_image_and_projections_without_a_place_stay():
    volume = turned(phantom(), TURNS[29])
    mask = (volume.array % 7 == 0).astype(np.uint8)
    ready, moved = preprocess(volume, mask, PreprocessConfig(intensity="none"))
    np.testing.assert_array_equal(moved, ready.array[..., 0] % 7 == 0)
    flat = Volume(volume.array, volume.affine, geometry="image")
    np.testing.assert_array_equal(oriented(flat).array[..., 0], volume.array)
    source, _ = preprocess(volume, None, PreprocessConfig(intensity="none", orientation="source"))
    np.testing.assert_array_equal(source.array[..., 0], volume.array)


def as_nifti(volume: Volume, folder: Path) -> Path:
    write_nifti(folder / "image.nii.gz", volume)
    return folder / "image.nii.gz"


def as_nrrd(volume: Volume, folder: Path) -> Path:
    """In RAS, so that the space is read and not assumed."""
    affine = flip_ras_lps(volume.affine)
    vectors = " ".join("(" + ",".join(map(repr, map(float, affine[:3, axis]))) + ")" for axis in (2, 1, 0))
    head = (
        "NRRD0004\ntype: float\ndimension: 3\nspace: right-anterior-superior\n"
        f"sizes: {' '.join(map(str, volume.shape[::-1]))}\nspace directions: {vectors}\nendian: little\nencoding: raw\n"
        f"space origin: ({','.join(map(repr, map(float, affine[:3, 3])))})\n\n"
    )
    (folder / "image.nrrd").write_bytes(head.encode() + volume.array.astype("<f4").tobytes())
    return folder / "image.nrrd"


def dicom_slices(volume: Volume) -> list:
    spacing = volume.spacing
    orientation = [*(volume.affine[:3, 2] / spacing[2]), *(volume.affine[:3, 1] / spacing[1])]
    return [
        make_slice(
            0, plane.astype(np.int16), (volume.affine @ [d, 0, 0, 1])[:3].tolist(), orientation, spacing[1:], intercept=0.0,
            StudyID="", AccessionNumber="", PatientName="", PatientBirthDate="", PatientSex="", StudyDate="", StudyTime="",
            FrameOfReferenceUID="1.2.9", PositionReferenceIndicator="",
        )
        for d, plane in enumerate(volume.array)
    ]  # fmt: skip


def as_dicom(volume: Volume, folder: Path) -> Path:
    with quiet():
        return write(folder / "series", dicom_slices(volume))


def read_dicom(folder: Path) -> Volume:
    (series,) = scan_dicom(folder).series
    return read_series(series)


@pytest.mark.parametrize("degrees", [(0, 0, 0), (12, -20, 31)])
def test_all_sources_give_one_array_and_one_answer_in_the_patient(tmp_path, degrees):
    """48 orders as NIfTI and NRRD, and the 48 as DICOM, where slices are read along row x column."""
    whole = phantom(rotated(AXIAL, degrees))
    expected = oriented(whole)
    level = float(np.prod(SHAPE)) * 0.8
    predictor = Fake(level=level)
    truth = whole.array > level
    with quiet():
        for number, turn in enumerate(TURNS):
            volume = turned(whole, turn)
            folder = tmp_path / str(number)
            folder.mkdir()
            nifti, nrrd, dicom = as_nifti(volume, folder), as_nrrd(volume, folder), as_dicom(volume, folder)
            for found in (read_nifti(nifti), read_nifti(nrrd), read_dicom(dicom)):
                ready = oriented(found)
                np.testing.assert_array_equal(ready.array, expected.array)
                np.testing.assert_allclose(ready.affine, expected.affine, atol=2e-4)
            answer = answer_volume(predictor, read_nifti(nifti))
            np.testing.assert_array_equal(answer.labels, turn.array(truth))
            assert answer.labels.shape == volume.shape and np.allclose(answer.volume.affine, volume.affine, atol=1e-4)
            shutil.rmtree(folder)


@pytest.mark.parametrize("turn", [TURNS[0], TURNS[20], TURNS[33], TURNS[47]])
def test_a_seg_goes_back_to_the_slices_of_its_series(tmp_path, turn):
    """Also through another spacing: what the model found lies where the series has it."""
    volume = turned(phantom(rotated(AXIAL, (8, -5, 11))), turn)
    volume = volume.with_array(np.zeros(volume.shape, np.float32))
    volume.array[2:-1, 3:-2, 4:-2] = 100
    folder = as_dicom(volume, tmp_path)
    read = read_dicom(folder)
    for number, settings_ in enumerate(({}, {"spacing": (2.0, 1.0, 1.0)})):
        predict(Fake(level=50, **settings_), folder, tmp_path / f"{number}.dcm")
        mask = read_seg_mask(tmp_path / f"{number}.dcm", read, ("background", "lesion"))
        wrong = np.count_nonzero(mask != (read.array > 50))
        assert wrong == 0 if not settings_ else wrong < 0.2 * mask.sum()


def test_masks_and_channels_in_any_order_of_the_same_voxels(tmp_path):
    image = phantom(rotated(AXIAL, (5, 9, -30)))
    labels = (image.array % 3).astype(np.uint8)
    folder = tmp_path / "set"
    for name, volume in (("a_0000", image), ("a_0001", turned(image, TURNS[17]))):
        (folder / "imagesTr").mkdir(parents=True, exist_ok=True)
        write_nifti(folder / "imagesTr" / f"{name}.nii.gz", volume)
    (folder / "labelsTr").mkdir()
    (folder / "dataset.json").write_text(json.dumps({"channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0, "a": 1, "b": 2}}))
    (case,) = scan_nifti(folder).cases
    both = read_case(case)
    np.testing.assert_array_equal(both.array[..., 0], both.array[..., 1])
    for turn in TURNS:
        write_nifti(folder / "labelsTr/a.nii.gz", turned(image.with_array(labels), turn))
        np.testing.assert_array_equal(read_mask(folder / "labelsTr/a.nii.gz", both, ("background", "a", "b")), labels)
    moved = image.affine.copy()
    moved[:3, 3] += 0.5
    write_nifti(folder / "labelsTr/a.nii.gz", Volume(labels, moved))
    with pytest.raises(SourceError, match="mask of another geometry"):
        read_mask(folder / "labelsTr/a.nii.gz", both, ("background", "a", "b"))


def test_other_grids_are_not_taken_for_the_same():
    moved = AXIAL.copy()
    moved[0, 3] += 0.9  # by a whole voxel along W
    assert placed(AXIAL, SHAPE, moved, 0.01) == (Turn(), (0, 0, -1))
    assert same_voxels(Volume(np.zeros(SHAPE), moved), phantom()) is None
    assert same_voxels(Volume(np.zeros((9, 17, 18)), AXIAL), phantom()) is None
    moved[0, 3] += 0.3
    assert placed(AXIAL, SHAPE, moved, 0.01) is None
    assert placed(AXIAL, SHAPE, rotated(AXIAL, (0, 0, 0.2)), 0.01) is None
    assert placed(AXIAL, SHAPE, AXIAL @ np.diag([1, 1, 1.01, 1]), 0.01) is None
    cube = phantom(shape=(5, 5, 5))
    other = turned(cube, TURNS[11])
    np.testing.assert_array_equal(same_voxels(other, cube), cube.array)


def test_settings_stored_without_a_word_on_orientation_keep_the_order_of_the_files(tmp_path):
    manifest = make_dataset(tmp_path / "data")
    assert manifest.preprocess.orientation == "lps"
    values = json.loads((tmp_path / "data/manifest.json").read_text())
    del values["preprocess"]["orientation"]
    (tmp_path / "data/manifest.json").write_text(json.dumps(values))
    bare = manifests.load(tmp_path / "data")
    assert bare.preprocess.orientation == "source"
    # Its name is the one that it had: the key does not count where it says nothing.
    other = manifest.model_copy(update={"preprocess": manifest.preprocess.model_copy(update={"orientation": "source"})})
    assert bare.hash() == other.hash() != manifest.hash() and "orientation" not in bare.preprocess.named()
    assert inherit(IngestConfig(), bare).preprocess.orientation == "source"
    assert inherit(IngestConfig(preprocess=PreprocessConfig(orientation="lps")), bare).preprocess.orientation == "lps"
    spec = Fake().spec.model_dump(mode="json")
    del spec["preprocess"]["orientation"]
    assert ModelSpec.model_validate(spec).preprocess.orientation == "source"


def test_units_of_nifti_are_honoured(tmp_path):
    for unit, factor in (("mm", 1), ("meter", 0.001), ("micron", 1000), ("unknown", 1)):
        affine = np.diag([2.0, 2.0, 2.0, 1.0])
        affine[:3, 3] = 10, 20, 30
        affine[:3] *= factor
        image = nibabel.Nifti1Image(np.zeros((4, 5, 6), np.int16), affine)
        image.header.set_xyzt_units(unit)
        nibabel.save(image, tmp_path / f"{unit}.nii")
        volume = read_nifti(tmp_path / f"{unit}.nii")
        np.testing.assert_allclose(volume.spacing, (2, 2, 2), rtol=1e-5)
        np.testing.assert_allclose(volume.affine[:3, 3], (-10, -20, 30), rtol=1e-5)
    image = nibabel.Nifti1Image(np.zeros((4, 5, 6), np.int16), np.diag([2.0, 2.0, 2.0, 1.0]))
    image.header.set_xyzt_units("meter")
    nibabel.save(image, tmp_path / "slip.nii")
    volume = read_nifti(tmp_path / "slip.nii")
    assert volume.spacing == (2, 2, 2) and volume.notes == ("voxels of 2 m by the header's unit: its numbers are taken as mm",)


@pytest.mark.parametrize(("modality", "background"), [("CT", -1000), ("MR", 0), ("", 0)])
def test_what_is_not_finite_becomes_air_or_background(tmp_path, modality, background):
    array = np.full((5, 4, 3), 40, np.float32)
    array[0, 0, 0], array[1, 0, 0], array[2, 0, 0] = np.nan, np.inf, -np.inf
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / "a.nii")
    volume = read_nifti(tmp_path / "a.nii", modality=modality)
    assert volume.array[0, 0, :3].tolist() == [background] * 3 and volume.array[0, 0, 3] == 40
    assert volume.notes == (f"3 voxels that are not finite were set to {background}",)
    ready, _ = preprocess(Volume(array, AXIAL, modality), None, PreprocessConfig(intensity="none", orientation="source"))
    assert ready.array[:3, 0, 0, 0].tolist() == [background] * 3
    array[:] = -1024
    array[0, 0, 0] = np.nan
    assert preprocess(Volume(array, AXIAL, modality), None, PreprocessConfig(intensity="none"))[0].array.min() == -1024


def tilted(folder: Path) -> Path:
    """A gantry tilted by 15 degrees: the plane of the slices leans, the table moves along z."""
    lean = np.radians(15)
    column = [0, np.cos(lean), -np.sin(lean)]
    whole = Volume(np.zeros((10, 24, 24), np.float32), np.eye(4))
    slices = []
    for d, z in enumerate(np.arange(10) * 4.0):
        plane = np.full((24, 24), -1000, np.int16)
        if 3 <= d < 7:
            plane[8:15, 6:12] = 60
        whole.array[d] = plane
        slices.append(
            make_slice(
                z, plane, (-10, -20, z), (1, 0, 0, *column), (1.0, 1.0), intercept=0.0, StudyID="", AccessionNumber="",
                PatientName="", PatientBirthDate="", PatientSex="", StudyDate="", StudyTime="", FrameOfReferenceUID="1.2.9",
                PositionReferenceIndicator="",
            )
        )  # fmt: skip
    with quiet():
        return write(folder, slices)


def test_a_seg_of_a_tilted_series_lies_on_its_own_slices(tmp_path):
    folder = tilted(tmp_path / "ct")
    predict(Fake(level=-470), folder, tmp_path / "mask.dcm")
    with quiet():
        seg = pydicom.dcmread(tmp_path / "mask.dcm")
        positions = sorted(
            tuple(map(float, group.PlanePositionSequence[0].ImagePositionPatient)) for group in seg.PerFrameFunctionalGroupsSequence
        )
        frames = seg.pixel_array.reshape(-1, 24, 24)
    assert [p[2] for p in positions] == [12, 16, 20, 24] and {p[:2] for p in positions} == {(-10, -20)}
    expected = np.zeros((24, 24), bool)
    expected[8:15, 6:12] = True
    for frame in frames:  # within the half pixel that each slice was moved by
        assert np.count_nonzero(frame.astype(bool) != expected) <= 6


def test_a_seg_of_one_object_of_many_frames_names_its_frames(tmp_path):
    places = [(5.0, "1", 1), (0.0, "1", 1), (7.5, "1", 1), (2.5, "1", 1)]
    more = dict.fromkeys(("StudyID", "AccessionNumber", "PatientName", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime"), "")
    with quiet():
        write(tmp_path / "ct", [enhanced_ct(places, **more, FrameOfReferenceUID="1.2.9", PositionReferenceIndicator="")])
    volume = read_dicom(tmp_path / "ct")
    predict(Fake(level=-997), tmp_path / "ct", tmp_path / "mask.dcm")  # frames 2 and 3: slices at 7.5 and 2.5 mm
    with quiet():
        seg = pydicom.dcmread(tmp_path / "mask.dcm")
        found = {float(g.PlanePositionSequence[0].ImagePositionPatient[2]) for g in seg.PerFrameFunctionalGroupsSequence}
    assert found == {7.5, 2.5}
    mask = read_seg_mask(tmp_path / "mask.dcm", volume, ("background", "lesion"))
    np.testing.assert_array_equal(mask.astype(bool), volume.array > -997)


def test_what_no_seg_can_refer_to_is_told_before_the_work(tmp_path):
    class Working(Fake):
        def __call__(self, batch):
            raise AssertionError("the work has begun")

    places = [(0.0, "1", 1), (2.5, "1", 1)]
    with quiet():
        write(tmp_path / "two", [enhanced_ct(places), enhanced_ct([(5.0, "1", 1), (7.5, "1", 1)])])
        write(tmp_path / "bare", [make_slice(z) for z in (0, 2.5, 5)])
        for path in (tmp_path / "bare").iterdir():
            item = pydicom.dcmread(path)
            del item.StudyInstanceUID
            item.save_as(path)
    with pytest.raises(RunError, match="2 objects of many frames; write .nii.gz instead"):
        predict(Working(), tmp_path / "two", tmp_path / "a.dcm")
    with pytest.raises(SourceError, match="the series lacks what a DICOM SEG must refer to"):
        predict(Working(), tmp_path / "bare", tmp_path / "a.dcm")
    assert not (tmp_path / "a.dcm").exists()
