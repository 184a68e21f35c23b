"""What one DICOM file says of itself, read once: kind, identifiers, geometry of its frames, where its pixels lie."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

import pydicom
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    MediaStorageDirectoryStorage,
    RTStructureSetStorage,
    SegmentationStorage,
)

from ..errors import SourceError
from ..inflate import inflated
from ..privacy import vocabulary
from .drawn import Drawn, by_segmentation, by_structure_set
from .elements import (
    START_BYTES,
    TAGS,
    UNCOMPRESSED,
    Parsed,
    Plain,
    Unsure,
    looks_like_dicom,
    quiet,
    relative,
    scan_plain,
)
from .frames import Frame, rescale
from .multiframe import dose_grid, functional_groups, mosaic, tiles_across, ultrasound_spacing

Kind = Literal["image", "seg", "rtstruct", "other", "not_dicom", "rejected"]

MOST_FRAMES = 100_000
"""More frames than any acquisition has; a number above it is a damaged header."""

@dataclass(frozen=True)
class Header:
    """One file. Identifiers are raw: for memory only, never written; they stay out of ``repr``.

    Attributes:
        kind: "other" is DICOM without an image (reports, plans, DICOMDIR); "rejected" cannot be used, see ``reason``.
        problem: why the image cannot be read although the file belongs to a series; "" if nothing is known against it.
        geometry: "patient" (frames have a place), "image" (spacing in mm, no place), "none" (no known size).
        syntax: TransferSyntaxUID.
        offset, length: where the value of uncompressed PixelData begins and its bytes; -1 if it must be decoded.
        size: of the file in bytes.
        frames: one entry for each frame; cine without a place has one entry for all.
        tiles: number of tiles of a Siemens mosaic, else 0.
        references: SeriesInstanceUIDs that a SEG or RTSTRUCT refers to.
        labels: segment labels or ROI names.
        codes: of SEG, for each label its code ("SCT:39607008"), "" if it has none that the standard lists.
        annotator, review: who made it, and ApprovalStatus.
        named: of a SEG or RTSTRUCT, words in upper case by which it names or numbers people.
        padding: lowest and highest stored value that is padding, or None.
        frame_of_reference: FrameOfReferenceUID, "" if none.
        drawn: of a SEG or RTSTRUCT, what tells on which images it was drawn.
    """

    path: Path
    root: Path
    kind: Kind
    reason: str = ""
    problem: str = ""
    sop_class: str = ""
    instance: str = field(default="", repr=False)
    series: str = field(default="", repr=False)
    study: str = field(default="", repr=False)
    patient: str = field(default="", repr=False)
    issuer: str = field(default="", repr=False)
    person_name: str = field(default="", repr=False)
    birth_date: str = field(default="", repr=False)
    modality: str = ""
    study_date: str = field(default="", repr=False)
    institution: str = field(default="", repr=False)
    station: str = field(default="", repr=False)
    burned_in: str = field(default="", repr=False)
    number: int = 0
    image_type: tuple[str, ...] = ()
    geometry: str = "patient"
    rows: int = 0
    columns: int = 0
    count: int = 1
    samples: int = 1
    photometric: str = "MONOCHROME2"
    planar: int = 0
    bits_allocated: int = 16
    bits_stored: int = 16
    high_bit: int = 15
    signed: bool = False
    lut: bool = False
    syntax: str = field(default="", repr=False)
    offset: int = -1
    length: int = 0
    size: int = 0
    tiles: int = 0
    frames: tuple[Frame, ...] = ()
    notes: tuple[str, ...] = ()
    references: tuple[str, ...] = field(default=(), repr=False)
    labels: tuple[str, ...] = field(default=(), repr=False)
    codes: tuple[str, ...] = ()
    annotator: str = field(default="", repr=False)
    named: frozenset[str] = field(default=frozenset(), repr=False)
    review: str = ""
    padding: tuple[float, float] | None = None
    frame_of_reference: str = field(default="", repr=False)
    drawn: Drawn = field(default_factory=Drawn, repr=False)

    @property
    def name(self) -> str:
        """As messages show it: relative to the scanned folder."""
        return relative(self.path, self.root)

    @property
    def decoded_bytes(self) -> int:
        """Size of its pixels as stored, in memory."""
        return self.rows * self.columns * self.count * self.samples * max(self.bits_allocated // 8, 1)

    @property
    def frame_size(self) -> tuple[int, int]:
        """Rows and columns of one frame; of a mosaic those of a tile."""
        across = tiles_across(self.tiles) if self.tiles else 1
        return self.rows // across, self.columns // across

    @property
    def colour(self) -> bool:
        """Its pixels come as RGB."""
        return self.samples == 3 or self.photometric == "PALETTE COLOR"


CROSS_SECTIONS = frozenset(
    f"1.2.840.10008.5.1.4.1.1.{tail}"
    for tail in ("2", "2.1", "2.2", "4", "4.1", "4.3", "4.4", "128", "128.1", "130", "481.2")
)
"""CT, MR and PET, classic, enhanced and converted, and RT Dose: without a place of each frame they are of no use."""
_RT_DOSE = "1.2.840.10008.5.1.4.1.1.481.2"
_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"
LABEL_MAP = "1.2.840.10008.5.1.4.1.1.66.7"
"""Label Map Segmentation Storage."""


@quiet()
def read_header(path: Path, root: Path) -> Header:
    """Read one file's header. Never raises for what a file holds.

    Returns:
        kind "not_dicom" if the content is no DICOM, "rejected" with the reason if it is DICOM that cannot be used.
    """
    try:
        with open(path, "rb") as file:
            return _read(file, path, root)
    except OSError as error:
        return Header(path, root, "rejected", reason=f"cannot be opened ({error.strerror})")


def _read(file: BinaryIO, path: Path, root: Path) -> Header:
    start = file.read(START_BYTES)
    if not looks_like_dicom(start[:132]):
        return Header(path, root, "not_dicom")
    size = len(start) if len(start) < START_BYTES else os.fstat(file.fileno()).st_size
    certain = start[128:132] == b"DICM"
    plain = scan_plain(file, start, size)
    if plain is not None:
        values, syntax, offset, length = plain
        try:
            return _describe(values, syntax, offset, length, size, path, root, certain)
        except Unsure:
            pass
    try:
        file.seek(0)
        source: Any = inflated(file)
        deflated = source is not None
        source = file if source is None else source
        dataset = pydicom.dcmread(source, force=True, stop_before_pixels=True, specific_tags=list(TAGS))
        syntax = str(DeflatedExplicitVRLittleEndian) if deflated else _syntax(dataset)
        offset, length = (-1, 0) if deflated else _pixels_at(source, dataset)
        if deflated:
            size = len(source.getvalue())
        header = _describe(Parsed(dataset), syntax, offset, length, size, path, root, certain)
    except SourceError as error:
        return Header(path, root, "rejected", reason=str(error))
    except (Exception, RecursionError) as error:  # pydicom raises many kinds; their text may quote values
        if not certain:
            return Header(path, root, "not_dicom")
        return Header(
            path, root, "rejected", reason=f"damaged or truncated DICOM header ({type(error).__name__})"
        )
    return header


def _syntax(dataset: pydicom.Dataset) -> str:
    """TransferSyntaxUID; of a data set without file meta the coding that the parser found."""
    meta = getattr(dataset, "file_meta", None)
    if meta is not None and "TransferSyntaxUID" in meta:
        return str(meta.TransferSyntaxUID)
    implicit, little = dataset.original_encoding
    return str(ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian if little else ExplicitVRBigEndian)


def _pixels_at(file: BinaryIO, dataset: pydicom.Dataset) -> tuple[int, int]:
    """Offset and length of the value of PixelData, where the parser stopped; (-1, 0) if it is not there."""
    at = file.tell()
    implicit, little = dataset.original_encoding
    order: Literal["little", "big"] = "little" if little else "big"
    head = file.read(12)
    if len(head) < 12 or int.from_bytes(head[:2], order) != 0x7FE0 or int.from_bytes(head[2:4], order) != 0x0010:
        return -1, 0
    if implicit:
        return at + 8, int.from_bytes(head[4:8], order)
    if head[4:6] not in (b"OB", b"OW", b"UN"):
        return -1, 0
    return at + 12, int.from_bytes(head[8:12], order)


def _describe(
    values: Plain | Parsed, syntax: str, offset: int, length: int, size: int, path: Path, root: Path, certain: bool
) -> Header:
    text = values.text
    dataset = values.dataset
    kind = text("SOPClassUID")
    if not kind and dataset is not None:
        kind = str(getattr(dataset, "file_meta", {}).get("MediaStorageSOPClassUID", ""))
    series = text("SeriesInstanceUID")
    if kind == MediaStorageDirectoryStorage:
        return Header(path, root, "other", sop_class=kind)
    rows = values.integer("Rows", -1)
    shows = "Image Storage" in UID(kind).name if kind else rows >= 0
    if not kind or not series:
        if not certain:
            return Header(path, root, "not_dicom")
        if kind and not shows and rows < 0:
            return Header(path, root, "other", sop_class=kind)
        missing = "SeriesInstanceUID" if kind else "SOPClassUID"
        cut = " (truncated file?)" if rows < 0 else "; it cannot be told what it belongs to"
        return Header(path, root, "rejected", reason=f"DICOM header without {missing}{cut}")
    known: dict[str, Any] = dict(
        sop_class=kind,
        instance=text("SOPInstanceUID"),
        series=series,
        study=text("StudyInstanceUID"),
        patient=text("PatientID"),
        frame_of_reference=text("FrameOfReferenceUID"),
        issuer=values.raw_text("IssuerOfPatientID"),
        person_name=values.raw_text("PatientName"),
        birth_date=values.raw_text("PatientBirthDate"),
        modality=vocabulary.modality(text("Modality")),
        study_date=text("StudyDate"),
        institution=text("InstitutionName"),
        station=text("StationName"),
        burned_in=text("BurnedInAnnotation"),
        size=size,
    )
    if kind in (SegmentationStorage, LABEL_MAP, RTStructureSetStorage):
        assert dataset is not None
        return _labels(path, root, dataset, known)
    if rows < 0:
        if certain and shows:
            return Header(path, root, "rejected", reason="an image without Rows: its header ends before (truncated file?)")
        return Header(path, root, "other", **known)
    allocated = values.integer("BitsAllocated", 16)
    stored = values.integer("BitsStored", allocated)
    known.update(
        rows=rows,
        columns=values.integer("Columns", 0),
        samples=values.integer("SamplesPerPixel", 1),
        photometric=text("PhotometricInterpretation") or "MONOCHROME2",
        planar=values.integer("PlanarConfiguration", 0),
        bits_allocated=allocated,
        bits_stored=stored,
        high_bit=values.integer("HighBit", stored - 1),
        signed=values.integer("PixelRepresentation", 0) == 1,
        syntax=syntax,
        offset=offset if syntax in UNCOMPRESSED else -1,
        length=length,
        image_type=tuple(part.strip() for part in text("ImageType").split("\\")),
    )
    known["padding"] = values.padding(known["signed"])
    try:
        number = values.numbers("InstanceNumber", 1)
        known["number"] = int(number[0]) if number else 0
    except SourceError:
        known["number"] = 0
    try:
        known.update(_place(values, known))
    except SourceError as error:
        known["problem"] = str(error)
    return Header(path, root, "image", **known)


def _labels(path: Path, root: Path, dataset: pydicom.Dataset, known: dict[str, Any]) -> Header:
    names = [str(dataset.get(tag) or "").strip() for tag in ("ContentCreatorName", "OperatorsName")]
    # An institute's name has words of medicine, which its structures have too.
    known["named"] = vocabulary.naming_words(
        str(dataset.get(tag) or "") for tag in vocabulary.NAMING if tag not in ("InstitutionName", "PatientAddress")
    )
    known["annotator"] = names[0] or names[1]
    known["review"] = str(dataset.get("ApprovalStatus") or "")
    if known["sop_class"] in (SegmentationStorage, LABEL_MAP):
        known["references"] = tuple(str(item.SeriesInstanceUID) for item in dataset.get("ReferencedSeriesSequence", []))
        known["labels"] = tuple(str(item.SegmentLabel).strip() for item in dataset.get("SegmentSequence", []))
        known["codes"] = tuple(map(_code, dataset.get("SegmentSequence", [])))
        known["drawn"] = _drawn(lambda deep: by_segmentation(dataset, deep), known)
        return Header(path, root, "seg", **known)
    named = [
        series
        for place in dataset.get("ReferencedFrameOfReferenceSequence", [])
        for study in place.get("RTReferencedStudySequence", [])
        for series in study.get("RTReferencedSeriesSequence", [])
    ]
    known["references"] = tuple(dict.fromkeys(str(series.SeriesInstanceUID) for series in named))
    known["labels"] = tuple(
        str(item.get("ROIName") or "").strip() for item in dataset.get("StructureSetROISequence", [])
    )
    known["drawn"] = _drawn(lambda deep: by_structure_set(dataset, path, deep), known)
    return Header(path, root, "rtstruct", **known)


def _drawn(read: Callable[[bool], Drawn], known: dict[str, Any]) -> Drawn:
    """What the object was drawn on; of one that names its one series no more is needed."""
    try:
        found = read(len(known["references"]) != 1)
    except Exception:  # a damaged frame or contour: its reader will say which
        found = Drawn()
    return replace(found, patient=known["patient"], study=known["study"])
def _code(segment: pydicom.Dataset) -> str:
    """What kind of thing a segment is, as scheme and value."""
    for item in segment.get("SegmentedPropertyTypeCodeSequence") or []:
        value = item.get("CodeValue") or item.get("LongCodeValue") or item.get("URNCodeValue")
        if value:
            return vocabulary.code(f"{item.get('CodingSchemeDesignator') or ''}:{value}")
    return ""


def _place(values: Plain | Parsed, known: dict[str, Any]) -> dict[str, Any]:
    """Number and geometry of the frames.

    Raises:
        SourceError: a value that cannot be what it must be.
    """
    told = values.numbers("NumberOfFrames", 1)
    count = int(told[0]) if told else 1
    if count < 1 or count > MOST_FRAMES:
        raise SourceError(f"NumberOfFrames is {count}, expected 1 to {MOST_FRAMES}")
    if min(known["rows"], known["columns"]) < 1:
        raise SourceError(f"image of {known['rows']} rows and {known['columns']} columns")
    kind, dataset = known["sop_class"], values.dataset
    if kind == _SLIDE:
        raise SourceError("whole-slide microscopy: its frames are tiles of one image, not slices; not supported")
    cross = kind in CROSS_SECTIONS
    frame = _frame(values, known["image_type"])
    frames: tuple[Frame, ...] = (frame,)
    found: dict[str, Any] = {"count": count}
    if dataset is not None:
        found["lut"] = bool(dataset.get("ModalityLUTSequence"))
        if kind == _RT_DOSE:
            frames = dose_grid(dataset, frame, count)
        elif dataset.get("PerFrameFunctionalGroupsSequence"):
            frames = functional_groups(dataset, count)
    if "MOSAIC" in known["image_type"]:
        if dataset is None:
            raise Unsure
        frames = mosaic(dataset, frame, known["rows"], known["columns"])
        found["tiles"] = len(frames)
    placed = all(each.position is not None and each.orientation is not None for each in frames)
    if count > 1 and len(frames) != count and cross:
        raise SourceError(
            f"multi-frame image ({count} frames) without functional groups: the places of its frames are not known"
        )
    sized = all(each.spacing is not None and min(each.spacing) > 0 for each in frames)
    if cross and not placed:
        raise SourceError("no ImagePositionPatient or ImageOrientationPatient; its place is not known")
    if cross and not sized:
        raise SourceError("no usable PixelSpacing; the size of its pixels is not known")
    if cross or (placed and sized and len(frames) == count):
        return {**found, "frames": frames}
    return {**found, **_flat(values, frame if len(frames) != count else frames[0], kind)}


def _frame(values: Plain | Parsed, image_type: tuple[str, ...]) -> Frame:
    """What stands at the top of a data set."""
    thickness = values.numbers("SliceThickness", 1)
    return Frame(
        values.numbers("ImagePositionPatient", 3),
        values.numbers("ImageOrientationPatient", 6),
        values.numbers("PixelSpacing", 2),
        thickness[0] if thickness else None,
        stack=values.text("StackID"),
        keys=_keys(values, image_type),
        **rescale(values.numbers("RescaleSlope", 1), values.numbers("RescaleIntercept", 1)),
    )


def _flat(values: Plain | Parsed, frame: Frame, kind: str) -> dict[str, Any]:
    """Geometry of an image that has no place in the patient: the size of its pixels, if something tells it."""
    notes: tuple[str, ...] = ()
    spacing = frame.spacing
    if spacing is None and values.dataset is not None:
        spacing = ultrasound_spacing(values.dataset)
    if spacing is None:
        spacing = values.numbers("ImagerPixelSpacing", 2)
        factor = values.numbers("EstimatedRadiographicMagnificationFactor", 1)
        if spacing is not None and factor is not None and factor[0] > 0:
            spacing = (spacing[0] / factor[0], spacing[1] / factor[0])
        elif spacing is not None:
            notes = ("pixel spacing is that of the detector; structures in the body are smaller by the magnification",)
    sized = spacing is not None and min(spacing) > 0
    return {
        "geometry": "image" if sized else "none",
        "frames": (replace(frame, spacing=spacing if sized else None),),
        "notes": notes if sized else (),
    }


_SPLIT_BY = ("TemporalPositionIdentifier", "DiffusionBValue", "EchoNumbers", "EchoTime", "InversionTime", "TriggerTime",
             "FrameReferenceTime", "AcquisitionNumber")  # fmt: skip


def _keys(values: Plain | Parsed, image_type: tuple[str, ...]) -> tuple[tuple[str, float | str], ...]:
    keys: list[tuple[str, float | str]] = []
    for keyword in _SPLIT_BY:
        try:
            number = values.numbers(keyword, 1)
        except SourceError:
            continue
        if number is not None:
            keys.append((keyword, number[0]))
    b = values.private_b()
    if b is not None and not any(name == "DiffusionBValue" for name, _ in keys):
        keys.append(("DiffusionBValue", b))
    try:
        direction = values.numbers("DiffusionGradientOrientation", 3)
    except SourceError:
        direction = None
    if direction is not None:
        keys.append(("DiffusionGradientOrientation", " ".join(f"{x:.4f}" for x in direction)))
    if len(image_type) > 2:
        keys.append(("ImageType", "\\".join(image_type[2:])))
    time = values.text("AcquisitionTime")
    if time:
        keys.append(("AcquisitionTime", time))
    return tuple(keys)
