"""PixelPaddingValue of every coding becomes air or background; a RescaleSlope of 0 scales nothing."""

from __future__ import annotations

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless
from test_dicom_kinds import enhanced_ct, item
from test_sources_dicom import make_slice, read, reason, write

HEIGHTS = (0, 2.5, 5)
RING = np.zeros((8, 10), bool)
RING[0], RING[:, -1] = True, True


def stored(seed: int, low=0, high=2000) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, RING.shape)


def series(folder, value, signed=True, bits=16, low=0, high=2000, kind="SS", end=None, syntax=ExplicitVRLittleEndian, cell=None, **more):
    """Three slices whose ring holds ``cell`` (else ``value``); (stored values, folder)."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = []
    for index, z in enumerate(HEIGHTS):
        array = stored(index, low, high)
        arrays.append(array.copy())
        array[RING] = value if cell is None else cell
        d = make_slice(z, np.zeros(RING.shape, np.int16), **more)
        d.PixelRepresentation, d.BitsStored, d.HighBit = int(signed), bits, bits - 1
        d.add_new(0x00280120, kind, value)
        if end is not None:
            d.add_new(0x00280121, kind, end)
        d.PixelData = (array & 0xFFFF).astype("<u2").tobytes()
        d["PixelData"].VR = "OW"
        d.file_meta.TransferSyntaxUID = syntax
        if syntax == ExplicitVRBigEndian:
            d.PixelData = (array & 0xFFFF).astype(">u2").tobytes()
            d.save_as(folder / f"f{index}", enforce_file_format=True)
        elif syntax == RLELossless:
            d.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
            d.compress(RLELossless)
            d.save_as(folder / f"f{index}", enforce_file_format=True)
        else:
            d.save_as(folder / f"f{index}", enforce_file_format=True)
    return np.stack(arrays), folder


def check(values, folder, fill, slope=1.0, intercept=-1024.0, units="hu"):
    volume = read(folder, units)
    expected = values * slope + intercept if units == "hu" else values.astype(float)
    expected[:, RING] = fill
    np.testing.assert_allclose(volume.array, expected, rtol=1e-6)
    return volume


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless])
@pytest.mark.parametrize(
    ("signed", "kind", "value", "cell"),
    [
        (True, "SS", -2000, None),
        (True, "US", 63536, -2000),  # the type contradicts PixelRepresentation: the bits count
        (False, "US", 63536, None),
        (False, "SS", -2000, 63536),
        (False, "US", 0, None),
    ],
)
def test_every_coding_of_ct(tmp_path, syntax, signed, kind, value, cell):
    values, folder = series(tmp_path / "a", value, signed, kind=kind, syntax=syntax, cell=cell, low=1)
    assert check(values, folder, -1000.0).notes == ()
    check(values, folder, 24.0, units="stored")


def test_stored_units_and_a_slope(tmp_path):
    values, folder = series(tmp_path / "a", -3000, slope=2, intercept=-1001)
    check(values, folder, 0.5, units="stored")
    check(values, folder, -1000.0, slope=2, intercept=-1001)


@pytest.mark.parametrize("bits", [12, 14])
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian])
def test_padding_that_the_stored_bits_can_not_hold(tmp_path, bits, syntax):
    """Cut to the stored bits it would be a value of tissue: 63536 in 12 bits is 2096, bone."""
    cut = 63536 & ((1 << bits) - 1)
    values, folder = series(tmp_path / "a", 63536, False, bits, kind="US", syntax=syntax)
    values[1, 4, 4] = cut
    d = pydicom.dcmread(folder / "f1")
    array = np.frombuffer(d.PixelData, ">u2" if syntax == ExplicitVRBigEndian else "<u2").reshape(RING.shape).copy()
    array[4, 4] = cut
    d.PixelData = array.tobytes()
    d.save_as(folder / "f1")
    check(values, folder, -1000.0)


@pytest.mark.parametrize(("value", "end"), [(-3000, -2000), (-2000, -3000)])
def test_range_in_either_order(tmp_path, value, end):
    values, folder = series(tmp_path / "a", value, end=end, cell=-2500)
    check(values, folder, -1000.0)


@pytest.mark.parametrize(
    ("modality", "low", "fill"),
    [("MR", 0, 0), ("MR", 5, 0), ("PT", 5, 0), ("MR", -50, 0), ("DX", 0, 0), ("DX", 130, 130)],
)
def test_background_of_other_modalities(tmp_path, modality, low, fill):
    values, folder = series(tmp_path / "a", -32768, low=low, intercept=0, Modality=modality)
    if low == 0:  # a pixel of no signal
        d = pydicom.dcmread(folder / "f1")
        values[1, 4, 4] = 0
        d.PixelData = d.PixelData[: 2 * 44] + bytes(2) + d.PixelData[2 * 45 :]
        d.save_as(folder / "f1")
    check(values, folder, fill if fill != 130 else values[:, ~RING].min(), intercept=0)


@pytest.mark.parametrize("bits", [12, 16])
def test_monochrome1_is_dark_outside(tmp_path, bits):
    top = (1 << bits) - 1
    d = make_slice(0, np.zeros(RING.shape, np.int16), Modality="DX", intercept=0, PhotometricInterpretation="MONOCHROME1")
    array = stored(1, 300, 900)
    array[RING] = top
    d.PixelRepresentation, d.BitsStored, d.HighBit = 0, bits, bits - 1
    d.add_new(0x00280120, "US", top)
    d.PixelData = array.astype("<u2").tobytes()
    volume = read(write(tmp_path, [d]))
    np.testing.assert_array_equal(volume.array[0][~RING], top - array[~RING])
    assert (volume.array[0][RING] == (top - array[~RING]).min()).all()


def test_multi_frame_and_mixed_slices(tmp_path):
    d = enhanced_ct()
    d.add_new(0x00280120, "SS", 0)
    d.Columns, d.Rows = 6, 8
    volume = read(write(tmp_path / "e", [d]))
    assert volume.array[:, 0, 0].tolist() == [-1000, -998, -996, -994]
    values, folder = series(tmp_path / "m", -2000)
    d = pydicom.dcmread(folder / "f1")
    del d[0x00280120]
    d.save_as(folder / "f1")
    volume = read(folder)
    assert (volume.array[1, RING] == -3024).all() and (volume.array[0, RING] == -1000).all()


def test_padding_in_the_middle_is_told_once(tmp_path):
    values, folder = series(tmp_path / "a", 40, low=38, high=43, intercept=0)
    notes = [note for note in read(folder).notes if "PixelPaddingValue" in note]
    assert len(notes) == 1 and "became -1000 HU as the standard says" in notes[0]
    # Nothing changes where padding is what background is.
    values, folder = series(tmp_path / "b", 0, low=0, high=3, intercept=0, Modality="MR")
    assert read(folder).notes == ()


def test_no_value_and_all_padding(tmp_path):
    d = make_slice(0)
    d.SliceThickness = 1
    d.add_new(0x00280120, "SS", None)
    assert (read(write(tmp_path / "a", [d])).array == 100 - 1024).all()
    d = make_slice(0, Modality="MR", intercept=0)
    d.add_new(0x00280120, "SS", 100)
    assert (read(write(tmp_path / "b", [d])).array == 0).all()


def test_colour_has_no_padding(tmp_path):
    d = make_slice(0, np.zeros((4, 6), np.int16), PhotometricInterpretation="RGB", SamplesPerPixel=3, PlanarConfiguration=0)
    d.BitsAllocated = d.BitsStored = 8
    d.HighBit, d.PixelRepresentation = 7, 0
    d.add_new(0x00280120, "US", 7)
    d.PixelData = bytes([7]) * 72
    assert (read(write(tmp_path, [d])).array == 7).all()


@pytest.mark.parametrize("modality", ["CT", "MR", "PT"])
@pytest.mark.parametrize("intercept", [0, -1024])
def test_slope_zero_gives_stored_values(tmp_path, modality, intercept):
    pixels = [stored(index)[:4, :6].astype(np.int16) for index in range(3)]
    slices = [make_slice(z, p, slope=0, intercept=intercept, Modality=modality) for z, p in zip(HEIGHTS, pixels, strict=True)]
    volume = read(write(tmp_path, slices))
    np.testing.assert_array_equal(volume.array, np.stack(pixels))
    assert volume.notes == ("RescaleSlope is 0 in 3 of 3 images, which would make all values one; their stored values are taken",)
    assert read(tmp_path, "stored").notes == ()


def test_slope_zero_of_single_slices_and_frames(tmp_path):
    pixels = [np.full((4, 6), 100 + index, np.int16) for index in range(3)]
    slices = [make_slice(z, p, slope=s, intercept=0, Modality="PT") for z, p, s in zip(HEIGHTS, pixels, (2, 0, 3), strict=True)]
    volume = read(write(tmp_path / "a", slices))
    assert volume.array[:, 0, 0].tolist() == [200, 101, 306] and "is 0 in 1 of 3 images" in volume.notes[0]
    d = enhanced_ct()
    values = item(RescaleSlope=0, RescaleIntercept=-1000, RescaleType="HU")
    d.PerFrameFunctionalGroupsSequence[1].PixelValueTransformationSequence = values
    volume = read(write(tmp_path / "b", [d]))
    assert volume.array[:, 0, 0].tolist() == [-1000, 1, -996, -994] and "is 0 in 1 of 4 images" in volume.notes[0]
    flat = make_slice(0, pixels[0], slope=0, intercept=7, Modality="DX")
    flat.SOPClassUID = flat.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    del flat.ImagePositionPatient
    volume = read(write(tmp_path / "c", [flat]))
    assert (volume.array == 100).all() and "is 0 in 1 of 1 images" in volume.notes[0]


def test_dose_without_scaling_is_refused(tmp_path):
    d = make_slice(0, np.zeros((2, 4, 6), np.int16).reshape(2, 4, 6)[0], Modality="RTDOSE")
    d.SOPClassUID = d.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.481.2"
    d.DoseGridScaling, d.GridFrameOffsetVector, d.NumberOfFrames = 0, [0, 2], 2
    d.PixelData = bytes(2 * 4 * 6 * 2)
    assert "DoseGridScaling is 0" in reason(write(tmp_path, [d]))


def test_float_padding(tmp_path):
    d = make_slice(0, Modality="MR", intercept=0)
    d.SOPClassUID = d.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.30"
    del d.PixelData
    array = np.linspace(1, 2, 24, dtype="<f4")
    array[:5] = -9999.5
    d.BitsAllocated = 32
    for key in ("BitsStored", "HighBit", "PixelRepresentation"):
        delattr(d, key)
    d.FloatPixelData, d.FloatPixelPaddingValue, d.NumberOfFrames = array.tobytes(), -9999.5, 1
    shared = Dataset()
    shared.PixelMeasuresSequence = item(PixelSpacing=[1, 1], SliceThickness=1)
    d.SharedFunctionalGroupsSequence = Sequence([shared])
    found = read(write(tmp_path, [d])).array.ravel()
    assert (found[:5] == 0).all() and (found[5:] > 1).all()
