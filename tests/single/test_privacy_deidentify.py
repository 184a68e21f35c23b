"""De-identification: nothing planted comes out, what images need stays, and the pixels do not change."""

import io
import json
import re
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import planted
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from hvd_imaging.errors import DatasetError, SourceError
from hvd_imaging.privacy import folder, pixels, vocabulary
from hvd_imaging.privacy.deidentify import deidentify, mapped_uid
from hvd_imaging.privacy.profile import CHARACTERISTICS, DEVICE, Options, action, table
from hvd_imaging.privacy.pseudonym import pseudonym, shifted_date
from hvd_imaging.sources.headers import read_header
from hvd_imaging.sources.pixels import stored_values

KEY = bytes(range(32))
EVERYTHING = Options(frozenset({"dates", "device", "characteristics"}))


def image(**more):
    ds = planted._image(planted._Names(0), "4711", 0)
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = "1.2.3.4", "1.2.3.5", "1.2.3.6"
    for name, value in more.items():
        setattr(ds, name, value)
    return ds


def found(identifiers, *places):
    """Identifiers in the bytes or the names of files; never shown themselves."""
    hits = []
    for place in places:
        for path in [place, *place.rglob("*")] if place.is_dir() else [place]:
            data = path.read_bytes() if path.is_file() else b""
            for number, value in enumerate(identifiers):
                if value in path.name or any(value.encode(e) in data for e in ("utf-8", "latin-1", "utf-16-le", "utf-16-be")):
                    hits.append((number, path.suffix))
    return hits


def run(*arguments):
    command = [sys.executable, "-m", "hvd_imaging.cli.main", "deidentify", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, timeout=120)


@pytest.mark.parametrize("options", [(), ("--retain", "characteristics", "--burned-in", "blank")])
def test_nothing_planted_comes_out(tmp_path, options):
    archive, out = tmp_path / "archive", tmp_path / "out"
    identifiers = planted.plant(archive, 7)
    assert len(identifiers) > 300 and len({i for i, _ in found(identifiers, archive)}) > 0.9 * len(identifiers)
    done = run(archive, out, "--json", *options)
    assert done.returncode == 10, done.stderr.decode()
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "stdout").write_bytes(done.stdout)
    (tmp_path / "log" / "stderr").write_bytes(done.stderr)
    assert found(identifiers, out, tmp_path / "log") == []
    result = json.loads(done.stdout)
    blanked = 2 if options else 0
    assert result["written"] == 17 + blanked and result["blanked"] == blanked
    assert len(result["set_aside"]) == 3 - blanked and result["patients"] == 5 + blanked
    for path in out.rglob("*.dcm"):
        ds = pydicom.dcmread(path)
        # The names were in the first 60 rows; grains of speckle below them may look like characters.
        assert not [box for box in pixels.writing(ds) if box[0] < 60] and ds.PatientIdentityRemoved == "YES" and ds.preamble == bytes(128)
        assert re.fullmatch(r"([0-9a-f]{16}/){3}[0-9a-f]{16}\.dcm", path.relative_to(out).as_posix())
    listed = tmp_path / "out.files.json"
    assert stat.S_IMODE(listed.stat().st_mode) == 0o600 and stat.S_IMODE((tmp_path / "out.key").stat().st_mode) == 0o600
    references = {item["file"] for item in json.loads((out / "quarantine.json").read_text())["quarantined"]}
    assert references <= set(json.loads(listed.read_text()))


def test_nothing_planted_comes_out_of_errors(tmp_path):
    archive = tmp_path / "archive"
    identifiers = planted.plant(archive, 3)
    secret = archive / identifiers[-1]
    for arguments in ((secret, tmp_path / "out"), (archive, archive / "out"), (archive, tmp_path / "out", "--retain", identifiers[-1])):
        done = run(*arguments)
        assert done.returncode in (2, 3, 4) and done.stderr.startswith(b"hvd-imaging: error: ")
        assert not [value for value in identifiers if value.encode() in done.stdout + done.stderr]
    for path in archive.rglob("*.dcm"):
        path.write_bytes(path.read_bytes()[:900])
    done = run(archive, tmp_path / "out")
    assert done.returncode == 3 and not [value for value in identifiers if value.encode() in done.stdout + done.stderr]
    assert not (tmp_path / "out").exists()


def test_pixels_and_geometry_stay():
    ds = image(WindowCenter="40", ConvolutionKernel="B30f", KVP="120", ImageType=["ORIGINAL", "PRIMARY", "AXIAL", "MEIER"])
    clean = deidentify(ds, KEY)
    pixels.clean(clean, Options())
    assert clean.PixelData == ds.PixelData
    for name in ("Rows", "PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient", "RescaleSlope", "WindowCenter",
                 "ConvolutionKernel", "KVP", "Modality", "SOPClassUID", "BitsStored"):  # fmt: skip
        assert clean[name].value == ds[name].value, name
    assert list(clean.ImageType) == ["ORIGINAL", "PRIMARY", "AXIAL", "OTHER"]
    assert clean.PatientID == clean.PatientName == pseudonym(KEY, "patient", "4711")
    assert ds.PatientID == "4711"


def test_the_same_identifier_is_always_mapped_alike():
    one, two = deidentify(image(), KEY), deidentify(image(SOPInstanceUID="1.2.9"), KEY)
    assert one.StudyInstanceUID == two.StudyInstanceUID == mapped_uid(KEY, "1.2.3.4") != mapped_uid(bytes(32), "1.2.3.4")
    assert one.SOPInstanceUID != two.SOPInstanceUID and one.file_meta.MediaStorageSOPInstanceUID == one.SOPInstanceUID
    assert re.fullmatch(r"2\.25\.[1-9]\d{30,38}", one.StudyInstanceUID)
    item = Dataset()
    item.ReferencedSOPInstanceUID, item.ReferencedSOPClassUID = "1.2.9", one.SOPClassUID
    referring = deidentify(image(SourceImageSequence=Sequence([item])), KEY)
    assert referring.SourceImageSequence[0].ReferencedSOPInstanceUID == two.SOPInstanceUID
    assert referring.SourceImageSequence[0].ReferencedSOPClassUID == one.SOPClassUID


def test_dates_leave_or_move_together():
    import datetime

    ds = image(StudyDate="20200228", AcquisitionDateTime="20200301101112.5+0100", StudyTime="101112", PatientBirthDate="19620312")
    bare = deidentify(ds, KEY)
    assert bare.StudyDate == "" and bare.AcquisitionDateTime in ("", "19000101000000") and bare.LongitudinalTemporalInformationModified == "REMOVED"
    kept = deidentify(ds, KEY, EVERYTHING)
    moved = shifted_date(KEY, "4711", datetime.date(2020, 2, 28))
    assert kept.StudyDate == moved.strftime("%Y%m%d") and kept.StudyTime == "101112" and kept.PatientBirthDate == ""
    assert kept.AcquisitionDateTime == (moved + datetime.timedelta(2)).strftime("%Y%m%d") + "101112.5"
    assert kept.LongitudinalTemporalInformationModified == "MODIFIED"
    codes = [item.CodeValue for item in kept.DeidentificationMethodCodeSequence]
    assert codes == ["113100", "113105", "113107", "113108", "113109"]


def test_the_method_claims_what_was_done():
    def codes(ds):
        return {item.CodeValue for item in ds.DeidentificationMethodCodeSequence}

    safe, needed = image(), image()
    safe.private_block(0x0019, "SIEMENS MR HEADER", create=True).add_new(0x0C, "IS", "1000")
    needed.private_block(0x0019, "SIEMENS MR HEADER", create=True).add_new(0x0A, "US", 36)
    clean, other = deidentify(safe, KEY), deidentify(needed, KEY)
    assert clean[0x0019100C].value == 1000 and other[0x0019100A].value == 36
    assert "113111" in codes(clean) and "113111" not in codes(other) | codes(deidentify(image(), KEY))
    assert "113101" not in codes(clean)
    pixels.clean(clean, Options(burned_in="keep"))
    assert "113101" not in codes(clean)
    pixels.clean(clean, Options())
    assert "113101" in codes(clean)


def test_device_and_characteristics_only_where_asked_for():
    ds = image(PatientAge="093Y", PatientSex="F", PatientWeight="61.2", DeviceSerialNumber="SN 5", StationName="4711 room",
               Manufacturer="Siemens Healthineers at St. Elsewhere", ManufacturerModelName="Force")  # fmt: skip
    bare, kept = deidentify(ds, KEY), deidentify(ds, KEY, EVERYTHING)
    assert bare.Manufacturer == "SIEMENS" and bare.PatientSex == ""
    for name in ("PatientAge", "PatientWeight", "StationName", "DeviceSerialNumber", "ManufacturerModelName"):
        assert bare.get(name, "") in ("", "REMOVED"), name
    assert (kept.PatientAge, kept.PatientSex, kept.PatientWeight, kept.DeviceSerialNumber) == ("090Y", "F", 61.2, "SN 5")
    assert kept.ManufacturerModelName == "Force"
    assert "StationName" not in kept  # it carries the patient's number


def test_options_keep_what_the_standard_lists():
    from pydicom.datadict import dictionary_is_retired, dictionary_VR, tag_for_keyword

    for names, option in ((DEVICE, "device"), (CHARACTERISTICS, "characteristics")):
        for name in names:
            tag = tag_for_keyword(name)
            assert tag is not None, name
            arguments = (tag, name, dictionary_VR(tag), dictionary_is_retired(tag))
            assert action(*arguments, Options(frozenset({option}))) == "keep", name
            assert action(*arguments, Options()) != "keep" or name == "Manufacturer" or name.startswith("Measured"), name
    item = Dataset()
    item.UniqueDeviceIdentifier, item.PatientName = "(01)00844868017264", "Meier"
    ds = image(UDISequence=Sequence([item]), EthnicGroup="4711", PatientSexNeutered="ALTERED", LastMenstrualDate="20200228", StationAETitle="A")
    kept = deidentify(ds, KEY, EVERYTHING)
    assert kept.UDISequence[0].UniqueDeviceIdentifier == "(01)00844868017264" and kept.UDISequence[0].PatientName == ""
    assert kept.PatientSexNeutered == "ALTERED" and kept.LastMenstrualDate not in ("", "20200228") and "StationAETitle" not in kept
    assert "EthnicGroup" not in kept  # it carries the patient's number
    bare = deidentify(ds, KEY)
    assert not {"UDISequence", "LastMenstrualDate", "EthnicGroup"} & {e.keyword for e in bare} and bare.PatientSexNeutered == ""


def test_private_tags_leave_but_for_safe_numbers():
    ds = image()
    ds.private_block(0x0019, "SIEMENS MR HEADER", create=True).add_new(0x0C, "IS", "1000")
    ds.private_block(0x0019, "SIEMENS MR HEADER").add_new(0x0E, "FD", [0.0, 1.0, 0.0])
    ds.private_block(0x0029, "SIEMENS CSA HEADER", create=True).add_new(0x10, "OB", b"Meier ")
    clean = deidentify(ds, KEY)
    assert [int(e.tag) for e in clean if e.tag.is_private] == [0x00190010, 0x0019100C, 0x0019100E]
    assert clean[0x0019, 0x100C].value == 1000


def test_codes_are_those_of_the_standard():
    known, strange = Dataset(), Dataset()
    known.CodeValue, known.CodingSchemeDesignator, known.CodeMeaning = "39607008", "SCT", "Meier's lung"
    strange.CodeValue, strange.CodingSchemeDesignator, strange.CodeMeaning = "M", "99MEIER", "Meier"
    clean = deidentify(image(AnatomicRegionSequence=Sequence([known, strange])), KEY)
    assert [item.CodeMeaning for item in clean.AnatomicRegionSequence] == [vocabulary.concepts()["SCT", "39607008"]]


@pytest.mark.parametrize(
    ("name", "kept"),
    [("Left lung", True), ("GTV 1", True), ("Meier", False), ("Tumour Meier", False), ("19620312", False), ("Leber Müller", False)],
)
def test_labels_of_segments_are_terms_or_pseudonyms(name, kept):
    label = vocabulary.label(KEY, name)
    assert label == (name if kept else vocabulary.label(KEY, name.upper())) and (kept or re.fullmatch("label-[0-9a-f]{8}", label))
    assert vocabulary.label(KEY, "lung", {"LUNG"}) != "lung"  # Mr. Lung


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("1.2.840.10008.5.1.4.1.1.88.22", "structured report"),
        ("1.2.840.10008.5.1.4.1.1.104.1", "encapsulated document"),
        ("1.2.840.10008.5.1.4.1.1.11.1", "presentation state"),
        ("1.3.12.2.1107.5.9.1", "unknown SOP class"),
    ],
)
def test_objects_of_text_leave_as_a_whole(kind, reason):
    with pytest.raises(SourceError, match=reason):
        deidentify(image(SOPClassUID=kind), KEY)


def test_the_table_is_the_standards():
    codes = table()
    assert len(codes) > 600
    assert [codes[tag] for tag in (0x00100010, 0x00080050, 0x0020000D, 0x00080080, 0x00102160)] == ["Z", "Z", "U", "X/Z/D", "X"]
    assert action(0x00104000, "PatientComments", "LT", False, EVERYTHING) == "remove"
    # What the table does not name and can hold text leaves; numbers stay.
    assert action(0x00180015, "BodyPartExamined", "CS", False, Options()) == "keep"
    assert action(0x00181020, "SoftwareVersions", "LO", False, Options()) == "remove"
    assert action(0x00180050, "SliceThickness", "DS", False, Options()) == "keep"
    assert action(0x60003000, "OverlayData", "OW", False, EVERYTHING) == "remove"


def test_unused_bits_and_bytes_behind_the_image_are_cleared():
    ds = image()
    plain = np.frombuffer(ds.PixelData, "<u2")
    ds.PixelData = (plain | 0x4000).astype("<u2").tobytes() + b"MEIER "
    clean = deidentify(ds, KEY)
    pixels.clean(clean, Options())
    assert clean.PixelData == plain.tobytes()
    ds.PixelData = ds.PixelData[:100]
    with pytest.raises(SourceError, match="cut off"):
        pixels.clean(deidentify(ds, KEY), Options())


@pytest.mark.parametrize(
    "name", ["examples_ybr_color.dcm", "JPEG2000.dcm", "examples_jpeg2k.dcm", "MR_small_RLE.dcm",
             "MR_small_jpeg_ls_lossless.dcm", "JPEG-LL.dcm", "SC_rgb_jpeg_dcmtk.dcm", "CT_small.dcm", "MR_small_bigendian.dcm"],
)  # fmt: skip
def test_decoded_pixels_stay_to_the_bit(name, tmp_path):
    from pydicom.data import get_testdata_file

    path = get_testdata_file(name, download=False)
    if not path:
        pytest.skip("not on this machine")
    with folder.silent():
        ds = pydicom.dcmread(path)
        options = Options(burned_in="keep")
        clean = deidentify(ds, KEY, options)
        pixels.clean(clean, options)
        buffer = io.BytesIO()
        clean.save_as(buffer, enforce_file_format=True)
    (tmp_path / "clean.dcm").write_bytes(buffer.getvalue())
    before, after = (read_header(Path(file), Path(file).parent) for file in (path, tmp_path / "clean.dcm"))
    assert np.array_equal(stored_values(before), stored_values(after))


def test_comments_of_compressed_frames_leave():
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.eye(32, dtype=np.uint8) * 200).save(buffer, "JPEG", comment=b"Meier", exif=b"Exif\0\0Meier")
    data = buffer.getvalue()
    stripped = pixels.strip_jpeg(data + b"Meier")
    assert data.count(b"Meier") == 2 and b"Meier" not in stripped
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(stripped))), np.asarray(Image.open(io.BytesIO(data))))
    for broken in (b"", b"\xff\xd8\xff", data[:40], b"Meier"):
        with pytest.raises(SourceError):
            assert pixels.strip_jpeg(broken) is None


def test_comments_of_jpeg_2000_leave():
    import imagecodecs

    image = (np.indices((64, 64)).sum(0) % 200).astype(np.uint8)
    plain = imagecodecs.jpeg2k_encode(image, codecformat="J2K", reversible=True)

    def comment(text):
        return b"\xff\x64" + (len(text) + 4).to_bytes(2, "big") + b"\0\1" + text

    tile = plain.index(b"\xff\x90")
    length = int.from_bytes(plain[tile + 6 : tile + 10], "big")
    planted_one = comment(b"Meier main")
    inner = comment(b"Meier tile")
    part = plain[tile : tile + 6] + (length + len(inner) if length else 0).to_bytes(4, "big") + plain[tile + 10 : tile + 12] + inner
    data = plain[:tile] + planted_one + part + plain[tile + 12 :]
    assert np.array_equal(imagecodecs.jpeg2k_decode(data), image)
    stripped = pixels.strip_jpeg_2000(data + b"Meier")
    assert data.count(b"Meier") == 2 and b"Meier" not in stripped
    assert np.array_equal(imagecodecs.jpeg2k_decode(stripped), image)
    assert pixels.strip_jpeg_2000(stripped) == stripped
    for broken in (b"", data[:60], data[: tile + 20], b"Meier"):
        with pytest.raises(SourceError):
            pixels.strip_jpeg_2000(broken)


def test_segments_that_nobody_reads_leave_a_jpeg():
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.eye(32, dtype=np.uint8) * 200).save(buffer, "JPEG")
    data = buffer.getvalue()
    strange = b"\xff\xf0\x00\x07Meier"
    stripped = pixels.strip_jpeg(data[:2] + strange + data[2:])
    assert b"Meier" not in stripped and np.array_equal(np.asarray(Image.open(io.BytesIO(stripped))), np.asarray(Image.open(io.BytesIO(data))))


def test_the_patients_number_is_not_kept_as_another_number():
    clean = deidentify(image(PatientID="0081234", AccessionNumber="555777", SeriesNumber="81234", AcquisitionNumber="555777", InstanceNumber="7"), KEY)
    assert [str(clean[name].value or "") for name in ("SeriesNumber", "AcquisitionNumber", "InstanceNumber")] == ["", "", "7"]
    assert str(deidentify(image(PatientID="120", KVP="120"), KEY).KVP) == "120"


def test_long_numbers_are_not_kept_whole():
    clean = deidentify(image(RadionuclideTotalDose="731743095533898", DistanceSourceToDetector="731743095533", KVP="120.5"), KEY)
    assert str(clean.RadionuclideTotalDose) == "7.317e+14" and "DistanceSourceToDetector" not in clean and clean.KVP == 120.5


def test_two_files_of_one_instance_and_an_output_that_exists(tmp_path):
    names = planted._Names(0)
    for name in ("a.dcm", "b.dcm"):
        planted._save(image(), tmp_path / "in" / name, names)
    outcome = folder.run(tmp_path / "in", tmp_path / "out", Options())
    assert outcome.written == 1 and [item.reason for item in outcome.set_aside] == ["another file holds the same instance"]
    with pytest.raises(DatasetError, match="OUT exists"):
        folder.run(tmp_path / "in", tmp_path / "out", Options())
    with pytest.raises(DatasetError, match="key file would lie in OUT"):
        folder.run(tmp_path / "in", tmp_path / "new", Options(), tmp_path / "new" / "key")
