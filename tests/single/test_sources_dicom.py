"""DICOM series: order, spacing and units by what the slices say of themselves; what is no regular stack is refused."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
    generate_uid,
)

from hvd_imaging.errors import SourceError
from hvd_imaging.sources.dicom import read_series, scan_dicom, stack_geometry

SERIES = "1.2.3.4"
SECRET = "SECRET-PATIENT"


def make_slice(
    z: float,
    pixels: np.ndarray | None = None,
    position=None,
    orientation=(1, 0, 0, 0, 1, 0),
    spacing=(0.8, 0.5),
    slope=1.0,
    intercept=-1024.0,
    series: str = SERIES,
    **extra,
) -> Dataset:
    pixels = np.full((4, 6), 100 + round(z), np.int16) if pixels is None else pixels
    d = Dataset()
    d.file_meta = FileMetaDataset()
    d.file_meta.MediaStorageSOPClassUID = CTImageStorage
    d.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    d.SOPClassUID = CTImageStorage
    d.SOPInstanceUID = d.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    d.SeriesInstanceUID = series
    d.StudyInstanceUID = "1.2.3"
    d.PatientID = SECRET
    d.Modality = "CT"
    d.SliceThickness = "99"  # a lie
    d.SpacingBetweenSlices = "77"  # another
    d.ImagePositionPatient = list(position if position is not None else (-10, -20, z))
    d.ImageOrientationPatient = list(orientation)
    d.PixelSpacing = list(spacing)
    d.Rows, d.Columns = pixels.shape[:2]
    d.SamplesPerPixel = 1
    d.PhotometricInterpretation = "MONOCHROME2"
    d.BitsAllocated = d.BitsStored = 16
    d.HighBit = 15
    d.PixelRepresentation = 1
    d.RescaleSlope, d.RescaleIntercept = str(slope), str(intercept)
    d.PixelData = pixels.astype("<i2").tobytes()
    for key, value in extra.items():
        setattr(d, key, value)
    return d


def write(folder: Path, slices, names=None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index, item in enumerate(slices):
        item.save_as(folder / (names[index] if names else f"f{index:03d}"), enforce_file_format=True)
    return folder


def read(folder: Path, units="hu"):
    scan = scan_dicom(folder)
    assert len(scan.series) == 1
    return read_series(scan.series[0], units)


def reason(folder: Path) -> str:
    with pytest.raises(SourceError) as caught:
        read(folder)
    assert SECRET not in str(caught.value) and SERIES not in str(caught.value)
    return str(caught.value)


def test_slices_are_ordered_and_spaced_by_position(tmp_path):
    heights = [10.0, 2.5, 7.5, 0.0, 5.0]
    volume = read(write(tmp_path, [make_slice(z) for z in heights]))
    assert volume.shape == (5, 4, 6)
    np.testing.assert_allclose(volume.spacing, (2.5, 0.8, 0.5))
    np.testing.assert_allclose(volume.affine @ [4, 3, 5, 1], [-10 + 5 * 0.5, -20 + 3 * 0.8, 10, 1])
    np.testing.assert_allclose(volume.array[:, 0, 0], np.round([100, 102, 105, 108, 110]) - 1024, atol=0.5)
    assert [path.name for path in volume.source] == ["f003", "f001", "f004", "f002", "f000"]
    assert volume.patient == "" and volume.id == ""


def test_rescale_of_each_slice_is_its_own(tmp_path):
    pixels = np.full((4, 6), 100, np.int16)
    write(tmp_path, [make_slice(0, pixels, slope=2, intercept=1), make_slice(3, pixels, slope=0.5, intercept=-7)])
    assert read(tmp_path).array[:, 0, 0].tolist() == [201, 43]
    assert read(tmp_path, "stored").array[:, 0, 0].tolist() == [100, 100]


def test_files_are_found_by_content(tmp_path):
    write(tmp_path / "deep" / "er", [make_slice(z) for z in (0, 2, 4)], ["a.txt", "b", "c.nii.gz"])
    (tmp_path / "looks.dcm").write_text("no DICOM at all, whatever the name says")
    (tmp_path / "empty").touch()
    bare = make_slice(6)
    del bare.file_meta
    bare.save_as(tmp_path / "bare", implicit_vr=True, little_endian=True, enforce_file_format=False)
    scan = scan_dicom(tmp_path)
    assert [len(series.files) for series in scan.series] == [4]
    assert (scan.skipped, scan.rejected) == (2, ())
    assert read(tmp_path).shape[0] == 4


def test_other_objects_are_counted_and_series_kept_apart(tmp_path):
    write(tmp_path / "a", [make_slice(z) for z in (0, 2)])
    write(tmp_path / "b", [make_slice(z, series="1.2.3.5") for z in (0, 2, 4)])
    report = make_slice(0, series="1.2.3.6")
    for key in ("PixelData", "Rows", "Columns"):
        delattr(report, key)
    report.SOPClassUID = report.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.88.11"
    write(tmp_path / "c", [report])
    scan = scan_dicom(tmp_path)
    assert [len(series.files) for series in scan.series] == [2, 3]
    assert scan.others == 1 and "not images" in scan.notes[0]


def test_identifiers_stay_out_of_reprs(tmp_path):
    assert SECRET not in repr(scan_dicom(write(tmp_path, [make_slice(0)])))


def test_odd_values_are_not_quoted_in_warnings(tmp_path, caplog):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        slices = [make_slice(z, SOPInstanceUID=f"{SECRET}.{z}", PatientID=SECRET * 9) for z in (0, 2)]
        write(tmp_path, slices)
    with warnings.catch_warnings(record=True) as told, caplog.at_level("DEBUG"):
        warnings.simplefilter("always")
        caplog.clear()
        volume = read(tmp_path)
    assert volume.shape[0] == 2
    assert not told and SECRET not in caplog.text


def test_series_of_two_patients_is_set_aside(tmp_path):
    write(tmp_path, [make_slice(0), make_slice(2, PatientID="OTHER")])
    scan = scan_dicom(tmp_path)
    assert scan.series == () and "PatientID" in scan.rejected[0].reason and "OTHER" not in scan.rejected[0].reason


def test_missing_patient_id_is_told(tmp_path):
    scan = scan_dicom(write(tmp_path, [make_slice(z, PatientID="") for z in (0, 2)]))
    assert "2 files without PatientID" in scan.notes[0]


def test_missing_slice(tmp_path):
    text = reason(write(tmp_path, [make_slice(z) for z in (0, 2, 4, 8, 10, 12)]))
    assert "slices are missing" in text and "f002 and f003 is 4.00 mm, expected about 2.00 mm" in text


def test_uneven_slices(tmp_path):
    assert "not evenly spaced" in reason(write(tmp_path, [make_slice(z) for z in (0, 2, 4, 6.7, 8, 10)]))


def test_small_jitter_passes_and_is_noted(tmp_path):
    volume = read(write(tmp_path, [make_slice(z) for z in (0, 2.02, 3.99, 6)]))
    assert volume.spacing[0] == pytest.approx(2.0)
    assert "slice gaps vary from 1.97 to 2.02 mm" in volume.notes[0]


def test_gantry_tilt_is_straightened_in_the_planes(tmp_path):
    """A ramp along H in patient coordinates stays the same ramp, wherever the slices are shifted to."""
    shift = 0.3  # mm along H for each mm along the normal: 16.7 degrees
    slices = []
    for z in (0, 3, 6, 9):
        top = -20 + shift * z
        pixels = np.round(1000 + 10 * (top + 0.8 * np.arange(30)))[:, None].repeat(8, 1).astype(np.int16)
        slices.append(make_slice(z, pixels, position=(-10, top, z)))
    volume = read(write(tmp_path, slices))
    assert "gantry tilt of 16.7 degrees" in volume.notes[0]
    assert volume.source == () and volume.shape == (4, 34, 8)
    np.testing.assert_allclose(volume.affine[:3, 0], [0, 0, 3], atol=1e-9)
    np.testing.assert_allclose(volume.affine[:3, 3], [-10, -20, 0], atol=1e-9)
    y = volume.affine[1, 3] + 0.8 * np.arange(34)
    for index, z in enumerate((0, 3, 6, 9)):
        inside = (y > -20 + shift * z + 0.01) & (y < -20 + shift * z + 0.8 * 29 - 0.01)
        np.testing.assert_allclose(volume.array[index, inside, 3], (1000 + 10 * y - 1024)[inside], atol=0.6)


def test_slices_that_wander_are_refused(tmp_path):
    slices = [make_slice(z, position=(-10, -20 + (5 if z == 3 else 0), z)) for z in (0, 3, 6, 9)]
    assert "shifted by 5.00 mm sideways" in reason(write(tmp_path, slices))


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ({"orientation": (0, 1, 0, 0, 0, -1)}, "mixed orientations"),
        ({"pixels": np.zeros((5, 6), np.int16)}, "mixed image sizes"),
        ({"spacing": (0.8, 0.6)}, "mixed PixelSpacing"),
        ({"NumberOfFrames": "3"}, "multi-frame"),
        ({"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3}, "colour"),
        ({"ImagePositionPatient": None}, "no ImagePositionPatient"),
        ({"PixelSpacing": None}, "no usable PixelSpacing"),
        ({"orientation": (1, 0, 0, 0.5, 1, 0)}, "orientation"),
    ],
)
def test_what_is_no_stack_is_refused(tmp_path, other, expected):
    assert expected in reason(write(tmp_path, [make_slice(0), make_slice(2), make_slice(4, **other)]))


def test_skewed_orientation_is_refused(tmp_path):
    slices = [make_slice(z, orientation=(1, 0, 0, 0.5, 1, 0)) for z in (0, 2)]
    assert "perpendicular" in reason(write(tmp_path, slices))


def test_duplicate_is_dropped_and_told(tmp_path):
    slices = [make_slice(z) for z in (0, 2, 4)]
    again = make_slice(2)
    again.SOPInstanceUID = again.file_meta.MediaStorageSOPInstanceUID = slices[1].SOPInstanceUID
    again.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    volume = read(write(tmp_path, [*slices, again]))
    assert volume.shape[0] == 3
    assert volume.notes == ("duplicate dropped: f003 is f001 again (same SOPInstanceUID, same position, equal pixels)",)


def test_duplicate_in_a_compressed_syntax(tmp_path):
    slices = [make_slice(z) for z in (0, 2, 4)]
    again = make_slice(4)
    again.compress(RLELossless, generate_instance_uid=True)
    volume = read(write(tmp_path, [*slices, again]))
    assert volume.shape[0] == 3 and "duplicate dropped: f003 is f002" in volume.notes[0]


def test_same_position_with_other_pixels_is_refused(tmp_path):
    other = make_slice(2, np.full((4, 6), 7, np.int16))
    text = reason(write(tmp_path, [*(make_slice(z) for z in (0, 2, 4)), other]))
    assert "f001 and f003 lie at the same position with different pixels" in text


def test_one_uid_for_all_costs_no_slice(tmp_path):
    uid = generate_uid()
    volume = read(write(tmp_path, [make_slice(z, SOPInstanceUID=uid) for z in (0, 2, 4)]))
    assert volume.shape[0] == 3 and "share a SOPInstanceUID" in volume.notes[0]


def test_file_cut_in_its_pixels(tmp_path):
    write(tmp_path / "s", [make_slice(z, np.zeros((40, 60), np.int16)) for z in (0, 2, 4)])
    path = tmp_path / "s" / "f001"
    path.write_bytes(path.read_bytes()[:-2000])
    text = reason(tmp_path)
    assert text.startswith("s/f001: ") and "truncated" in text


@pytest.mark.parametrize("size", [140, 300, 400])
def test_file_cut_in_its_header(tmp_path, size):
    write(tmp_path, [make_slice(z) for z in (0, 2, 4)])
    path = tmp_path / "f002"
    path.write_bytes(path.read_bytes()[:size])
    scan = scan_dicom(tmp_path)
    assert [item.path for item in scan.rejected] == ["f002"] and "truncated" in scan.rejected[0].reason
    assert [len(series.files) for series in scan.series] == [2]


def test_file_cut_between_header_and_pixels(tmp_path):
    write(tmp_path, [make_slice(z) for z in (0, 2, 4)])
    path = tmp_path / "f002"
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index(b"\xe0\x7f\x10\x00")])
    assert reason(tmp_path).startswith("f002: no pixel data (truncated file?)")


def test_single_slice_takes_its_thickness(tmp_path):
    assert read(write(tmp_path / "a", [make_slice(0, SliceThickness="3")])).spacing == pytest.approx((3, 0.8, 0.5))
    assert "extent is not known" in reason(write(tmp_path / "b", [make_slice(0, SliceThickness=None)]))


def test_ct_without_rescale_is_told(tmp_path):
    volume = read(write(tmp_path, [make_slice(z, RescaleSlope=None, RescaleIntercept=None) for z in (0, 2)]))
    assert "without RescaleSlope" in volume.notes[0]


@settings(max_examples=50, deadline=None)
@given(
    angles=st.tuples(*[st.floats(-3.1, 3.1)] * 3),
    spacing=st.tuples(*[st.floats(0.3, 8)] * 3),
    count=st.integers(2, 12),
    seed=st.integers(0, 99),
)
def test_any_rotated_stack_comes_back_in_order(angles, spacing, count, seed):
    """Property: shuffled slices of a rotated grid give the grid's affine."""
    (ca, cb, cc), (sa, sb, sc) = np.cos(angles), np.sin(angles)
    turn = np.array([[ca, -sa, 0], [sa, ca, 0], [0, 0, 1]]) @ np.array([[1, 0, 0], [0, cb, -sb], [0, sb, cb]])
    turn = turn @ np.array([[cc, 0, sc], [0, 1, 0], [-sc, 0, cc]])
    row, column, normal = turn.T
    random = np.random.default_rng(seed)
    shuffle = random.permutation(count)
    first = random.uniform(-100, 100, 3)
    positions = first + np.outer(shuffle * spacing[0], normal)
    order, affine, gaps = stack_geometry(positions, np.concatenate([row, column]), (spacing[1], spacing[2]))
    np.testing.assert_array_equal(shuffle[order], np.arange(count))
    expected = np.stack([normal * spacing[0], column * spacing[1], row * spacing[2], first], axis=1)
    np.testing.assert_allclose(affine[:3], expected, atol=1e-9)
    np.testing.assert_allclose(gaps, spacing[0])


@pytest.mark.shared
def test_real_series_lies_as_its_positions_say(shared_data):
    volume = read(shared_data / "brain_series" / "volume")
    assert volume.shape == (20, 256, 256) and volume.modality == "MR"
    assert 6.96 <= volume.spacing[0] <= 7.07  # SpacingBetweenSlices says 2.0, SliceThickness 5.0
    assert volume.notes == ("slice gaps vary from 6.96 to 7.07 mm; 7.00 mm is used",)
    for index, path in enumerate(volume.source):
        position = np.array(pydicom.dcmread(path, stop_before_pixels=True).ImagePositionPatient, float)
        assert np.linalg.norm(volume.affine @ [index, 0, 0, 1] - [*position, 1]) < 0.15


@pytest.mark.shared
def test_real_duplicate_in_another_transfer_syntax_is_told(shared_data, tmp_path):
    for path in (shared_data / "brain_series" / "volume").iterdir():
        shutil.copyfile(path, tmp_path / path.name)
    shutil.copyfile(shared_data / "brain_series" / "explicit_big.dcm", tmp_path / "explicit_big.dcm")
    volume = read(tmp_path)
    assert volume.shape[0] == 20
    assert "duplicate dropped: explicit_big.dcm is brain_013.dcm again" in volume.notes[0]


@pytest.mark.shared
def test_real_odd_files_are_read_or_refused_with_a_reason(shared_data):
    scan = scan_dicom(shared_data / "brain_series")
    results = []
    for series in scan.series:
        try:
            results.append(read_series(series).modality)
        except SourceError as error:
            results.append(str(error).split(":")[0])
    assert "MR" in results and "explicit_little.dcm" in results  # the latter has 16 frames
    assert scan.rejected == ()
