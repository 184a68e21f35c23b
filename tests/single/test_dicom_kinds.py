"""Kinds of DICOM images beside the plain slice: each is read as what it is, or refused with the reason."""

from __future__ import annotations

import gzip
import io
import os
import signal
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import (
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
    generate_uid,
)
from test_sources_dicom import make_slice, read, reason, write

from hvd_imaging import decoders
from hvd_imaging.config import PreprocessConfig
from hvd_imaging.errors import SetupError, SourceError
from hvd_imaging.preprocess.pipeline import preprocess
from hvd_imaging.sources.dicom import group_headers, quiet, read_header, read_series, scan_dicom, walk
from hvd_imaging.sources.multiframe import cut_tiles


def item(**values) -> Sequence:
    d = Dataset()
    for key, value in values.items():
        setattr(d, key, value)
    return Sequence([d])


def enhanced_ct(places=None, size=(8, 6), **extra) -> Dataset:
    """An Enhanced CT: ``places`` are (z, StackID, TemporalPositionIndex) of the frames; frame i has the values i."""
    places = places or [(z, "1", 1) for z in (0.0, 2.5, 5.0, 7.5)]
    d = make_slice(0, np.zeros(size, np.int16))
    d.SOPClassUID = d.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    for key in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "RescaleSlope",
                "RescaleIntercept", "SpacingBetweenSlices"):  # fmt: skip
        delattr(d, key)
    d.NumberOfFrames = len(places)
    shared = Dataset()
    shared.PlaneOrientationSequence = item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])
    shared.PixelMeasuresSequence = item(PixelSpacing=[0.8, 0.5], SliceThickness=2.5)
    shared.PixelValueTransformationSequence = item(RescaleSlope=2, RescaleIntercept=-1000, RescaleType="HU")
    d.SharedFunctionalGroupsSequence = Sequence([shared])
    groups = []
    for z, stack, time in places:
        group = Dataset()
        group.PlanePositionSequence = item(ImagePositionPatient=[-10, -20, z])
        group.FrameContentSequence = item(StackID=stack, TemporalPositionIndex=time)
        groups.append(group)
    d.PerFrameFunctionalGroupsSequence = Sequence(groups)
    d.PixelData = np.arange(len(places), dtype="<i2").repeat(size[0] * size[1]).tobytes()
    for key, value in extra.items():
        setattr(d, key, value)
    return d


def as_bytes(dataset: Dataset) -> bytes:
    file = io.BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()


def test_enhanced_frames_are_ordered_by_their_own_positions(tmp_path):
    places = [(5.0, "1", 1), (0.0, "1", 1), (7.5, "1", 1), (2.5, "1", 1)]
    volume = read(write(tmp_path, [enhanced_ct(places)]))
    np.testing.assert_allclose(volume.spacing, (2.5, 0.8, 0.5))
    np.testing.assert_allclose(volume.array[:, 0, 0], 2 * np.array([1, 3, 0, 2]) - 1000)
    np.testing.assert_allclose(volume.affine[:3, 3], [-10, -20, 0])
    assert len(volume.source) == 1


def test_enhanced_stacks_and_time_points_are_volumes_of_their_own(tmp_path):
    places = [(z, stack, time) for time in (1, 2) for stack, z0 in (("1", 0), ("2", 100)) for z in (z0, z0 + 3, z0 + 6)]
    write(tmp_path, [enhanced_ct(places)])
    scan = scan_dicom(tmp_path)
    assert [series.part for series in scan.series] == [
        "stack 1, time 1", "stack 1, time 2", "stack 2, time 1", "stack 2, time 2"
    ]  # fmt: skip
    assert len({series.source_id for series in scan.series}) == 4
    volumes = [read_series(series, "stored") for series in scan.series]
    assert [volume.affine[2, 3] for volume in volumes] == [0, 0, 100, 100]
    assert [volume.array[:, 0, 0].tolist() for volume in volumes] == [[0, 1, 2], [6, 7, 8], [3, 4, 5], [9, 10, 11]]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"PerFrameFunctionalGroupsSequence": Sequence([Dataset()])}, "4 frames of pixels, but 1 functional groups"),
        ({"SharedFunctionalGroupsSequence": Sequence([Dataset()])}, "no ImagePositionPatient or ImageOrientation"),
        ({"PerFrameFunctionalGroupsSequence": None}, "without functional groups"),
    ],
)
def test_enhanced_without_the_places_of_its_frames_is_refused(tmp_path, change, expected):
    assert expected in reason(write(tmp_path, [enhanced_ct(**change)]))


SIEMENS = Path(nibabel.__file__).parent / "nicom" / "tests" / "data"


@pytest.mark.skipif(not SIEMENS.is_dir(), reason="this nibabel comes without its test data")
def test_mosaic_lies_where_nibabel_says_and_is_split_by_b_value(tmp_path):
    for name in ("siemens_dwi_0", "siemens_dwi_1000"):
        (tmp_path / name).write_bytes(gzip.decompress((SIEMENS / f"{name}.dcm.gz").read_bytes()))
    scan = scan_dicom(tmp_path)
    assert [series.part for series in scan.series] == ["b=0", "b=1000"]
    volume = read_series(scan.series[1])
    assert volume.shape == (48, 128, 128) and volume.geometry == "patient"
    with quiet():
        from nibabel.nicom.dicomwrappers import wrapper_from_data  # warns that it is experimental

        theirs = wrapper_from_data(pydicom.dcmread(tmp_path / "siemens_dwi_1000"))
        for d, h, w in ((0, 0, 0), (47, 10, 100)):
            np.testing.assert_allclose(volume.affine @ [d, h, w, 1], theirs.affine @ [h, w, d, 1], atol=1e-3)


def test_tiles_of_a_mosaic_stand_row_by_row():
    image = np.arange(36).reshape(6, 6)
    tiles = cut_tiles(image, 5)
    assert tiles.shape == (5, 2, 2)
    assert tiles[1].tolist() == [[2, 3], [8, 9]] and tiles[3].tolist() == [[12, 13], [18, 19]]


def flat(modality="CR", sop="1.2.840.10008.5.1.4.1.1.1", pixels=None, **extra) -> Dataset:
    """A projection: no place in the patient."""
    d = make_slice(0, pixels)
    d.SOPClassUID = d.file_meta.MediaStorageSOPClassUID = sop
    d.Modality = modality
    for key in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness",
                "SpacingBetweenSlices", "RescaleSlope", "RescaleIntercept"):  # fmt: skip
        delattr(d, key)
    for key, value in extra.items():
        setattr(d, key, value)
    return d


def test_projection_has_the_spacing_of_its_detector_by_the_magnification(tmp_path):
    image = flat(ImagerPixelSpacing=[0.2, 0.1], EstimatedRadiographicMagnificationFactor="2")
    volume = read(write(tmp_path, [image]))
    assert volume.geometry == "image" and volume.shape == (1, 4, 6)
    np.testing.assert_allclose(volume.spacing, (1, 0.1, 0.05))
    noted = read(write(tmp_path / "b", [flat(ImagerPixelSpacing=[0.2, 0.1])]).parent / "b")
    assert "detector" in noted.notes[0]


def test_views_of_one_series_are_cases_of_their_own(tmp_path):
    write(tmp_path, [flat(pixels=np.zeros((5, 7), np.int16), InstanceNumber="2"), flat(InstanceNumber="1")])
    series = scan_dicom(tmp_path).series
    assert [(item.part, read_series(item).shape) for item in series] == [("image 1", (1, 4, 6)), ("image 2", (1, 5, 7))]


def test_cine_lies_along_depth_and_ultrasound_regions_give_the_spacing(tmp_path):
    region = item(PhysicalUnitsXDirection=3, PhysicalUnitsYDirection=3, PhysicalDeltaX=0.05, PhysicalDeltaY=0.02)
    frames = np.arange(3, dtype=np.int16).repeat(24).reshape(3, 4, 6)
    cine = flat("US", "1.2.840.10008.5.1.4.1.1.3.1", SequenceOfUltrasoundRegions=region, NumberOfFrames="3")
    cine.PixelData = frames.tobytes()
    volume = read(write(tmp_path, [cine]))
    assert volume.geometry == "image" and volume.array[:, 0, 0].tolist() == [0, 1, 2]
    np.testing.assert_allclose(volume.spacing, (1, 0.2, 0.5))
    assert "their distance is an index" in volume.notes[0]


def test_pixels_of_no_known_size_are_not_resampled_to_mm(tmp_path):
    volume = read(write(tmp_path, [flat()]))
    assert volume.geometry == "none"
    with pytest.raises(SourceError, match="size of its pixels is not known"):
        preprocess(volume, None, PreprocessConfig(spacing=(1, 1, 1), intensity="none"))
    ready, _ = preprocess(volume, None, PreprocessConfig(spacing=None, intensity="none"))
    assert ready.array.shape == (1, 4, 6, 1)


def test_monochrome1_is_turned_but_not_measurements(tmp_path):
    pixels = np.array([[0, 1], [2, 4095]], np.int16)
    bits = dict(BitsStored=12, HighBit=11, PixelRepresentation=0, PhotometricInterpretation="MONOCHROME1")
    volume = read(write(tmp_path / "a", [flat("DX", pixels=pixels, **bits)]))
    assert volume.array[0].tolist() == [[4095, 4094], [4093, 0]]
    ct = read(write(tmp_path / "b", [make_slice(z, pixels, PhotometricInterpretation="MONOCHROME1") for z in (0, 2)]))
    assert ct.array[0].tolist() == [[-1024, -1023], [-1022, 3071]]


def test_overlays_in_unused_bits_are_no_pixels_and_signs_are_of_the_stored_bits(tmp_path):
    values = np.array([[-5, 100], [-2048, 2047]])
    stored = ((values & 0xFFF) | np.array([[0x1000, 0x8000], [0, 0x7000]])).astype(np.uint16).view(np.int16)
    volume = read(write(tmp_path, [make_slice(z, stored, BitsStored=12, HighBit=11) for z in (0, 2)]), "stored")
    assert volume.array[1].tolist() == values.tolist()
    shifted = ((values & 0xFFF) << 4).astype(np.uint16).view(np.int16)
    volume = read(
        write(tmp_path / "b", [make_slice(z, shifted, series="1.9", BitsStored=12, HighBit=15) for z in (0, 2)]), "stored"
    )
    assert volume.array[1].tolist() == values.tolist()


def test_modality_lut_gives_the_units(tmp_path):
    image = flat("DX", pixels=np.array([[9, 10], [11, 90]], np.int16))
    image.ModalityLUTSequence = item(LUTDescriptor=[3, 10, 16], LUTData=np.array([100, 200, 300], "<u2").tobytes(), ModalityLUTType="OD")
    image.PixelRepresentation = 0
    volume = read(write(tmp_path, [image]))
    assert volume.array[0].tolist() == [[100, 100], [200, 300]]
    assert read(tmp_path, "stored").array[0].tolist() == [[9, 10], [11, 90]]


def repeated(values, key="DiffusionBValue", **more):
    return [
        make_slice(z, np.full((4, 6), index, np.int16), **{key: value}, **more)
        for index, value in enumerate(values)
        for z in (0, 2, 4)
    ]


@pytest.mark.parametrize(
    ("key", "values", "parts"),
    [
        ("DiffusionBValue", [1000.0, 0.0], ["b=0", "b=1000"]),
        ("TemporalPositionIdentifier", ["2", "10", "3"], ["time 1", "time 2", "time 3"]),
        ("EchoTime", ["30", "12.5"], ["echo 1", "echo 2"]),
        ("ImageType", [["ORIGINAL", "PRIMARY", "P"], ["ORIGINAL", "PRIMARY", "M"]], ["type 1", "type 2"]),
    ],
)
def test_series_of_four_dimensions_are_split(tmp_path, key, values, parts):
    scan = scan_dicom(write(tmp_path, repeated(values, key)))
    assert [series.part for series in scan.series] == parts
    assert len({series.source_id for series in scan.series}) == len(parts)
    order = sorted(range(len(values)), key=lambda index: [values[index]] if key == "ImageType" else [float(values[index])])
    for series, index in zip(scan.series, order, strict=True):
        volume = read_series(series, "stored")
        assert volume.shape == (3, 4, 6) and np.unique(volume.array).tolist() == [index]


def test_directions_of_one_b_value_are_told_apart(tmp_path):
    slices = []
    for index, (b, direction) in enumerate([(0.0, [0.0, 0, 0]), (1000.0, [1.0, 0, 0]), (1000.0, [0.0, 1, 0])]):
        slices += [
            make_slice(z, np.full((4, 6), index, np.int16), DiffusionBValue=b, DiffusionGradientOrientation=direction)
            for z in (0, 2)
        ]
    parts = [series.part for series in scan_dicom(write(tmp_path, slices)).series]
    assert len(parts) == 3 and all("direction" in part for part in parts)


def test_times_that_differ_from_slice_to_slice_are_ranked(tmp_path):
    slices = [
        make_slice(z, np.full((4, 6), time, np.int16), TriggerTime=str(100 * time + z))
        for z in (0, 2, 4)
        for time in (2, 0, 1)
    ]
    scan = scan_dicom(write(tmp_path, slices))
    assert [series.part for series in scan.series] == ["time 1", "time 2", "time 3"]
    assert [read_series(series, "stored").array.max() for series in scan.series] == [0, 1, 2]


def test_unequal_repeats_are_not_split(tmp_path):
    slices = repeated([0.0, 1000.0])[:-1]
    assert "same position with different pixels" in reason(write(tmp_path, slices))


def test_localizer_is_set_aside_where_it_is_clear(tmp_path):
    stack = [make_slice(z) for z in range(0, 20, 2)]
    scout = make_slice(0, np.zeros((9, 9), np.int16), orientation=(0, 1, 0, 0, 0, -1))
    scan = scan_dicom(write(tmp_path, [*stack, scout]))
    assert [len(series.files) for series in scan.series] == [10]
    assert scan.rejected[0].path == "f010" and "localizer" in scan.rejected[0].reason
    assert read_series(scan.series[0]).shape == (10, 4, 6)


def test_compressed_and_plain_codings_give_the_same_voxels(tmp_path):
    """Every transfer syntax that is written here, HTJ2K among them, comes back to the bit."""
    imagecodecs = pytest.importorskip("imagecodecs")
    pixels = np.random.default_rng(3).integers(0, 4000, (40, 48)).astype(np.uint16)
    streams = {
        "1.2.840.10008.1.2.4.70": imagecodecs.ljpeg_encode(pixels, bitspersample=12),
        "1.2.840.10008.1.2.4.80": imagecodecs.jpegls_encode(pixels),
        "1.2.840.10008.1.2.4.90": imagecodecs.jpeg2k_encode(pixels, codecformat="j2k", level=0, reversible=True),
        "1.2.840.10008.1.2.4.201": imagecodecs.htj2k_encode(pixels, reversible=True),
    }
    extra = dict(BitsStored=12, HighBit=11, PixelRepresentation=0)
    for syntax, data in streams.items():
        slices = [make_slice(z, pixels, **extra) for z in (0, 2)]
        for each in slices:
            each.file_meta.TransferSyntaxUID = syntax
            each.PixelData = encapsulate([data])
            each["PixelData"].VR = "OB"
        np.testing.assert_array_equal(read(write(tmp_path / syntax, slices), "stored").array[1], pixels, syntax)
    for uid in (ExplicitVRBigEndian, ImplicitVRLittleEndian, RLELossless, ExplicitVRLittleEndian):
        slices = [make_slice(z, pixels, **extra) for z in (0, 2)]
        for each in slices:
            if uid == RLELossless:
                each.compress(uid)
            else:
                each.file_meta.TransferSyntaxUID = uid
            if uid == ExplicitVRBigEndian:
                each.PixelData = pixels.astype(">u2").tobytes()
        np.testing.assert_array_equal(read(write(tmp_path / uid, slices), "stored").array[1], pixels, uid)


def test_a_codestream_that_lies_about_its_size_is_refused(tmp_path):
    imagecodecs = pytest.importorskip("imagecodecs")
    slices = [make_slice(z, np.zeros((40, 48), np.uint16)) for z in (0, 2)]
    for each in slices:
        each.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.80"
        each.PixelData = encapsulate([imagecodecs.jpegls_encode(np.zeros((400, 480), np.uint16))])
        each["PixelData"].VR = "OB"
    assert "says 400 x 480 pixels" in reason(write(tmp_path, slices))


def test_a_header_that_asks_for_more_than_the_file_holds_is_refused_before_decoding(tmp_path):
    image = flat(NumberOfFrames="90000")
    image.Rows = image.Columns = 60000
    assert "truncated" in reason(write(tmp_path / "a", [image]))
    image.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.80"
    image["PixelData"].VR = "OB"
    image.PixelData = encapsulate([b"\xff\xd8"])
    assert "refused before decoding" in reason(write(tmp_path / "b", [image]))


def test_a_decoder_that_dies_or_hangs_costs_one_frame(monkeypatch):
    imagecodecs = pytest.importorskip("imagecodecs")
    decoder = decoders.Decoder()
    image = np.arange(64, dtype=np.uint8).reshape(8, 8)
    data = imagecodecs.jpegls_encode(image)
    expected = decoders.Expected("1.2.840.10008.1.2.4.80", 8, 8, 1, "MONOCHROME2")
    try:
        np.testing.assert_array_equal(decoder.frame(data, expected), image)
        os.kill(decoder._child.pid, signal.SIGSTOP)
        monkeypatch.setattr(decoders, "FRAME_SECONDS", 0.2)
        with pytest.raises(SourceError, match="takes longer than"):
            decoder.frame(data, expected)
        monkeypatch.setattr(decoders, "FRAME_SECONDS", 30.0)
        np.testing.assert_array_equal(decoder.frame(data, expected), image)
        os.kill(decoder._child.pid, signal.SIGSTOP)
        answer = decoders.Decoder._answer

        def dies(child, deadline):
            child.kill()
            return answer(child, deadline)

        monkeypatch.setattr(decoders.Decoder, "_answer", staticmethod(dies))
        with pytest.raises(SourceError, match="crash"):
            decoder.frame(data, expected)
    finally:
        decoder.close()


def test_missing_decoders_are_named_with_what_brings_them(tmp_path, monkeypatch):
    (tmp_path / "imagecodecs.py").write_text("raise ImportError")
    monkeypatch.syspath_prepend(tmp_path)
    decoder = decoders.Decoder()
    with pytest.raises(SetupError, match=r"pip install hvd_imaging\[dicom\]"):
        decoder.frame(b"", decoders.Expected("1.2.840.10008.1.2.4.80", 8, 8, 1, "MONOCHROME2"))


def test_an_unknown_coding_is_named_by_the_standard_only(tmp_path):
    slices = [make_slice(z) for z in (0, 2)]
    for each in slices:
        each.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.102"
        each.PixelData = encapsulate([b"1234"])
        each["PixelData"].VR = "OB"
    assert "MPEG-4" in reason(write(tmp_path, slices))


def test_rtstruct_is_found_with_its_regions_and_its_maker_stays_out_of_reprs(tmp_path):
    d = make_slice(0, series="1.2.9")
    for key in ("PixelData", "Rows", "Columns"):
        delattr(d, key)
    d.SOPClassUID = d.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.481.3"
    d.OperatorsName = "SECRET^NAME"
    d.ApprovalStatus = "APPROVED"
    d.StructureSetROISequence = item(ROIName="liver", ROINumber=1)
    d.ReferencedFrameOfReferenceSequence = item(
        RTReferencedStudySequence=item(RTReferencedSeriesSequence=item(SeriesInstanceUID="1.2.3.4"))
    )
    scan = scan_dicom(write(tmp_path, [d]))
    (found,) = scan.segmentations
    assert (found.kind, found.series, found.labels, found.review) == ("rtstruct", ("1.2.3.4",), ("liver",), "APPROVED")
    assert found.annotator == "SECRET^NAME" and "SECRET" not in repr(scan)


def test_headers_in_any_order_give_the_same_scan(tmp_path):
    write(tmp_path, [*repeated([0.0, 1000.0]), *(make_slice(z, series=generate_uid()) for z in (0, 2))])
    headers = [read_header(path, tmp_path) for path in walk(tmp_path)]
    assert group_headers(headers, tmp_path) == group_headers(reversed(headers), tmp_path) == scan_dicom(tmp_path)
