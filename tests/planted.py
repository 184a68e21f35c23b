"""An archive full of identifiers, in every place that can hold text; what comes out of it may hold none of them."""

from __future__ import annotations

import json
import random
import string
import warnings
from pathlib import Path

import numpy as np
import pydicom
from PIL import Image, ImageDraw, ImageFont
from pydicom.datadict import DicomDictionary
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.tag import Tag
from pydicom.uid import ExplicitVRLittleEndian, JPEGBaseline8Bit

TEXT_VRS = ["AE", "AS", "CS", "DA", "DS", "DT", "IS", "LO", "LT", "PN", "SH", "ST", "TM", "UC", "UI", "UR", "UT", "UN", "OB"]
LIMIT = {"AE": 16, "CS": 16, "SH": 16, "DA": 8, "DS": 16, "IS": 12, "TM": 14}
# What reading an image needs, and what has to be equal in all files of a series.
ESSENTIAL = {"SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "PatientID", "Modality", "PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient", "PhotometricInterpretation", "RescaleSlope", "RescaleIntercept", "SpecificCharacterSet", "NumberOfFrames", "SliceThickness", "RescaleType", "SeriesNumber", "AcquisitionNumber", "InstanceNumber", "TimezoneOffsetFromUTC", "TemporalPositionIdentifier", "DiffusionBValue", "TriggerTime", "BurnedInAnnotation", "ImageType", "EchoNumbers", "StackID", "PatientName", "SmallestImagePixelValue", "PixelData", "EncapsulatedDocument", "TransferSyntaxUID", "TemporalPositionIndex", "EchoTime", "ModalityLUTSequence", "GantryDetectorTilt", "ConversionType", "LossyImageCompression", "LUTExplanation", "ImagerPixelSpacing", "NominalScannedPixelSpacing", "RequestedSOPInstanceUID", "AcquisitionDateTime", "ContentTime", "ContentDate", "AcquisitionTime", "AcquisitionDate", "PresentationLUTShape", "PixelAspectRatio", "PresentationIntentType", "VolumetricProperties"}  # fmt: skip


class _Names:
    """Identifiers that are found again for sure: no word, no number of anything else."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.made: list[str] = []

    def word(self, length: int = 12) -> str:
        return self._keep("Q" + "".join(self.random.choices("BCDFGHJKLMNPQRSTVWXZ", k=length - 1)))

    def number(self, length: int = 12) -> str:
        return self._keep("7" + "".join(self.random.choices(string.digits, k=length - 1)))

    def date(self) -> str:
        return self._keep(f"{self.random.randint(1931, 1989)}{self.random.randint(1, 12):02}{self.random.randint(10, 28)}")

    def uid(self) -> str:
        return self._keep("1.2.826.0.1.3680043.99." + self.number(20))

    def of(self, vr: str) -> str:
        """An identifier for a VR: for those of numbers and dates now a right value, now text that does not belong there."""
        if vr == "UI":
            return self.uid()
        if vr == "DA":
            return self.date()
        if vr == "DT":
            return self._keep(self.date() + "101112")
        if vr in ("IS", "DS") and self.random.random() < 0.5:
            return self.number(LIMIT[vr])
        if vr == "UR":
            return "http://" + self.word().lower() + ".example/" + self.word()
        if vr == "PN":
            return f"{self.word()}^{self.word(8)}"
        return self.word(min(12, LIMIT.get(vr, 12)))

    def _keep(self, value: str) -> str:
        self.made.append(value)
        return value


def _put(ds: Dataset, tag: int, vr: str, value: str | bytes) -> None:
    """Bytes as they are: pydicom would refuse text in a number."""
    data = value if isinstance(value, bytes) else value.encode()
    data += b"\0" * (len(data) % 2)
    ds[tag] = RawDataElement(Tag(tag), vr, len(data), data, 0, False, True)


def _attributes() -> dict[str, list[int]]:
    """VR -> attributes of the standard with it, in groups that an image may have."""
    found: dict[str, list[int]] = {vr: [] for vr in TEXT_VRS}
    for tag, (vr, _, _, _, keyword) in DicomDictionary.items():
        group = tag >> 16
        ours = group in (0x8, 0x10, 0x12, 0x18, 0x20, 0x28, 0x32, 0x38, 0x40, 0x54, 0x88, 0x400) and tag & 0xFFFF
        if ours and vr in found and keyword not in ESSENTIAL:
            found[vr].append(tag)
    return found


def _image(names: _Names, patient: str, number: int, side: int = 32) -> Dataset:
    ds = Dataset()
    ds.SOPClassUID, ds.Modality = "1.2.840.10008.5.1.4.1.1.2", "CT"
    ds.SOPInstanceUID = names.uid()
    ds.PatientID = patient
    ds.Rows = ds.Columns = side
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.PixelSpacing, ds.ImageOrientationPatient = [1, 1], [1, 0, 0, 0, 1, 0]
    ds.ImagePositionPatient, ds.InstanceNumber = [0, 0, 2.0 * number], number + 1
    ds.SliceThickness, ds.RescaleSlope, ds.RescaleIntercept = 2, 1, -1024
    noise = np.random.default_rng(number).integers(900, 1100, (side, side)).astype("<u2")
    noise[8:24, 8:24] += 400
    ds.PixelData = noise.tobytes()
    return ds


def _save(ds: Dataset, path: Path, names: _Names, syntax=ExplicitVRLittleEndian) -> None:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = ds.SOPClassUID, ds.SOPInstanceUID
    meta.TransferSyntaxUID = syntax
    meta.SourceApplicationEntityTitle = names.word()
    meta.PrivateInformationCreatorUID = names.uid()
    meta.PrivateInformation = names.word().encode()
    ds.file_meta = meta
    ds.preamble = names.word().encode().ljust(128, b"\0")
    path.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(path, ds, enforce_file_format=True)


def plant(folder: Path, seed: int) -> list[str]:
    """`_plant` without pydicom's warnings: it sees what does not belong there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _plant(folder, seed)


def _plant(folder: Path, seed: int) -> list[str]:
    """Write an archive of four CT series, ultrasound with burned-in names, and side-cars below ``folder``.

    Returns:
        Every identifier in it, at least 300. Ordinary CT slices can be read; images with writing are multi-frame and
        colour ultrasound.
    """
    names = _Names(seed)
    folder = Path(folder)
    attributes = _attributes()
    for series in range(4):
        patient, study, uid, frame = names.word(), names.uid(), names.uid(), names.uid()
        place = folder / names.word() / f"{names.word()} {names.date()}"
        for number in range(4):
            ds = _image(names, patient, number)
            ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = study, uid, frame
            ds.SpecificCharacterSet = "ISO_IR 192" if series % 2 else "ISO_IR 100"
            _put(ds, 0x00100010, "PN", (names._keep(f"Müß{names.word()}") + "^Jörg").encode("utf-8" if series % 2 else "latin-1"))
            for vr in TEXT_VRS:
                choice = attributes[vr] or [tag for tag in attributes["LO"] if tag not in ds]
                for _ in range(2):
                    tag = names.random.choice([tag for tag in choice if tag not in ds] or [0x00091001])
                    _put(ds, tag, vr if attributes[vr] else "UN", names.of(vr))
            _put(ds, 0x00090010, "LO", names.word())
            for offset, vr in enumerate(names.random.sample(TEXT_VRS, 6)):
                _put(ds, 0x00091002 + offset, vr, names.of(vr))
            # A creator of the safe list, with text where numbers should be.
            _put(ds, 0x00190010, "LO", "SIEMENS MR HEADER")
            _put(ds, 0x0019100C, "IS", names.word())
            inner, outer, code = Dataset(), Dataset(), Dataset()
            code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = names.word(10), "99LOCAL", names.word()
            inner.PatientName, inner.ReferencedSOPInstanceUID, inner.ReferencedSOPClassUID = names.of("PN"), names.uid(), ds.SOPClassUID
            inner.PurposeOfReferenceCodeSequence = Sequence([code])
            outer.ReferencedImageSequence = Sequence([inner])
            outer.add_new(0x00081030, "LO", names.word())
            ds.ReferencedImageSequence = Sequence([inner])
            ds.RequestAttributesSequence = Sequence([outer])
            ds.DerivationCodeSequence = Sequence([code])
            ds.SourceImageSequence = Sequence([outer])
            ds.PixelData += names.word().encode()  # behind the image
            ds.add_new(0xFFFCFFFC, "OB", names.word().encode())
            ds.add_new(0x60003000, "OW", names.word().encode())
            ds.add_new(0x60000022, "LO", names.word())
            ds.add_new(0x50000022, "LO", names.word())
            _save(ds, place / f"{names.word()}_{number}.dcm", names)
        (place / f"{names.word()}.json").write_text(json.dumps({"PatientName": names.word(), "StudyDate": names.date()}))
    (folder / "notes.txt").write_text(names.word())
    _ultrasound(folder / names.word(), names)
    _compressed(folder / names.word(), names)
    _report(folder, names)
    return sorted(set(names.made))


def render(text: str, size: int = 20) -> np.ndarray:
    """White writing on black, (H, W) uint8."""
    font = ImageFont.load_default(size)
    width = int(font.getlength(text)) + 10
    image = Image.new("L", (width, 2 * size))
    ImageDraw.Draw(image).text((5, size // 3), text, 255, font)
    return np.asarray(image)


def _ultrasound(place: Path, names: _Names) -> None:
    """Three frames of speckle, with name and date burned in; grey and colour."""
    random = np.random.default_rng(1)
    for colour in (False, True):
        ds = _image(names, names.word(), 0)
        ds.StudyInstanceUID, ds.SeriesInstanceUID = names.uid(), names.uid()
        ds.SOPClassUID, ds.Modality = "1.2.840.10008.5.1.4.1.1.3.1", "US"
        for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope", "RescaleIntercept"):
            delattr(ds, keyword)
        speckle = random.rayleigh(30, (3, 240, 320)).clip(0, 255).astype(np.uint8)
        speckle[:, :60] = 0
        for frame in speckle:
            for row, text in ((2, names.word()), (30, f"{names.word()} {names.date()}")):
                banner = render(text, 16)[:26, :310]
                frame[row : row + banner.shape[0], 5 : 5 + banner.shape[1]] = banner
        ds.NumberOfFrames, ds.Rows, ds.Columns = 3, 240, 320
        ds.BitsAllocated, ds.BitsStored, ds.HighBit = 8, 8, 7
        if colour:
            speckle = np.stack([speckle] * 3, -1)
            ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PlanarConfiguration = 3, "RGB", 0
        ds.PixelData = speckle.tobytes()
        _save(ds, place / f"{names.word()}.dcm", names)


def _compressed(place: Path, names: _Names) -> None:
    """A JPEG frame with a comment, EXIF and bytes behind its end."""
    from io import BytesIO

    buffer = BytesIO()
    grey = Image.fromarray((np.indices((64, 64)).sum(0) * 2).astype(np.uint8))
    grey.save(buffer, "JPEG", comment=names.word().encode(), exif=b"Exif\0\0" + names.word().encode())
    ds = _image(names, names.word(), 0)
    ds.StudyInstanceUID, ds.SeriesInstanceUID = names.uid(), names.uid()
    ds.SOPClassUID, ds.Modality = "1.2.840.10008.5.1.4.1.1.7", "OT"
    ds.Rows = ds.Columns = 64
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 8, 8, 7
    ds.PixelData = encapsulate([buffer.getvalue() + names.word().encode()])
    ds["PixelData"].VR = "OB"
    _save(ds, place / f"{names.word()}.dcm", names, JPEGBaseline8Bit)


def _report(place: Path, names: _Names) -> None:
    ds = Dataset()
    ds.SOPClassUID, ds.Modality = "1.2.840.10008.5.1.4.1.1.88.11", "SR"
    ds.SOPInstanceUID, ds.StudyInstanceUID, ds.SeriesInstanceUID = names.uid(), names.uid(), names.uid()
    ds.PatientID, ds.PatientName = names.word(), names.of("PN")
    text = Dataset()
    text.TextValue = names.word()
    ds.ContentSequence = Sequence([text])
    _save(ds, place / f"{names.word()}.dcm", names)


def plant_annotated(folder: Path, seed: int) -> list[str]:
    """`_plant_annotated` without pydicom's warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _plant_annotated(folder, seed)


def _plant_annotated(folder: Path, seed: int) -> list[str]:
    """Six patients with a CT series and a SEG each, whose free texts and code strings are identifiers wherever a writer may put one.

    Returns:
        Every identifier in it, at least 100. Names of structures that are terms of medicine are none: "Lung" is in all SEGs.
    """
    names = _Names(seed)
    for series in range(6):
        patient, surname, study, uid, frame = names.word(), names.word(), names.uid(), names.uid(), names.uid()
        place = folder / names.word()
        images = []
        for number in range(4):
            ds = _image(names, patient, number)
            ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = study, uid, frame
            ds.PatientName, ds.StudyDate = f"{surname}^{names.word()}", names.date()
            if series == 1:
                ds.Modality = names.word(10)
            _put(ds, 0x00081030, "LO", names.word())
            _save(ds, place / f"{names.word()}_{number}.dcm", names)
            images.append(ds)
        seg = _seg(names, images, ["Lung", f"{surname} mass" if series else surname])
        if series == 2:
            seg.SegmentationType = names.word(10)
        if series == 3:
            seg.SegmentSequence[1].SegmentLabel = f"mass {patient}"
        if series == 4:
            seg.ApprovalStatus = names.word(10)
        _save(seg, place / f"{names.word()}.seg", names)
    return sorted(set(names.made))


def _seg(names: _Names, images: list[Dataset], labels: list[str]) -> Dataset:
    first, side = images[0], int(images[0].Rows)
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality = "1.2.840.10008.5.1.4.1.1.66.4", names.uid(), "SEG"
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = first.StudyInstanceUID, names.uid(), first.FrameOfReferenceUID
    ds.PatientID, ds.PatientName = first.PatientID, first.PatientName
    ds.ContentCreatorName, ds.SeriesDescription = names.of("PN"), names.word()
    ds.SegmentationType, ds.Rows, ds.Columns, ds.NumberOfFrames = "BINARY", side, side, len(images) * len(labels)
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 1, 1, 0, 0
    segments, frames, pixels = [], [], []
    for number, label in enumerate(labels, 1):
        item, code = Dataset(), Dataset()
        code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = names.word(10), names.word(8), names.word()
        item.SegmentNumber, item.SegmentLabel, item.SegmentDescription = number, label, names.word()
        item.SegmentAlgorithmName, item.SegmentAlgorithmType = names.word(), "MANUAL"
        item.SegmentedPropertyTypeCodeSequence = item.SegmentedPropertyCategoryCodeSequence = Sequence([code])
        segments.append(item)
        for image in images:
            group, segment, position = Dataset(), Dataset(), Dataset()
            segment.ReferencedSegmentNumber, position.ImagePositionPatient = number, image.ImagePositionPatient
            group.SegmentIdentificationSequence, group.PlanePositionSequence = Sequence([segment]), Sequence([position])
            frames.append(group)
            mask = np.zeros((side, side), np.uint8)
            mask[8 * number : 8 * number + 6, 8:20] = 1
            pixels.append(mask)
    ds.SegmentSequence, ds.PerFrameFunctionalGroupsSequence = Sequence(segments), Sequence(frames)
    shared, orientation, measures = Dataset(), Dataset(), Dataset()
    orientation.ImageOrientationPatient, measures.PixelSpacing, measures.SliceThickness = first.ImageOrientationPatient, first.PixelSpacing, 2
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = Sequence([orientation]), Sequence([measures])
    ds.SharedFunctionalGroupsSequence = Sequence([shared])
    reference = Dataset()
    reference.SeriesInstanceUID, reference.ReferencedInstanceSequence = first.SeriesInstanceUID, Sequence([])
    ds.ReferencedSeriesSequence = Sequence([reference])
    ds.PixelData = np.packbits(np.stack(pixels).reshape(-1), bitorder="little").tobytes()
    return ds
