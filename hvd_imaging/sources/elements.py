"""Elements of a DICOM file: a quick scanner for plain files, pydicom for all others, one way to ask both.

Most files of an archive are single images in a plain coding. For them a scanner of a few lines finds the wanted
elements without a parser's objects for all the others; whatever it does not expect goes to pydicom, which decides.
"""

from __future__ import annotations

import contextlib
import logging
import os
import struct
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pydicom
from pydicom.datadict import tag_for_keyword
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from ..errors import SourceError
from ..inflate import inflated
from ..privacy import vocabulary

START_BYTES = 16 << 10
"""Read at first: holds the header of nearly all classic images in one read."""
LARGEST_HEADER = 8 << 20
"""The scanner gives longer headers to pydicom: they hold what it does not look for anyway."""

UNCOMPRESSED = (
    str(ImplicitVRLittleEndian),
    str(ExplicitVRLittleEndian),
    str(ExplicitVRBigEndian),
    str(DeflatedExplicitVRLittleEndian),
)


def relative(path: Path, root: Path) -> str:
    """A path as messages show it."""
    return Path(os.path.relpath(path, root)).as_posix() if root != Path() else Path(path).as_posix()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence pydicom's warnings and log: they quote values, and values can be identifiers.

    Values are parsed when they are asked for, so this belongs around all use of a data set, not only around reading it.
    """
    log = logging.getLogger("pydicom")
    before = log.disabled
    log.disabled = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.disabled = before


def read_dataset(path: Path, tags: Sequence[Any] | None = None, pixels: bool = False) -> pydicom.Dataset:
    """`pydicom.dcmread` of any file, with the asked tags only; use it inside `quiet`.

    Raises:
        SourceError: a deflated data set that is damaged, or larger than `limits.INFLATED_LIMIT`.
    """
    with open(path, "rb") as file:
        return pydicom.dcmread(
            inflated(file) or file, force=True, stop_before_pixels=not pixels, specific_tags=None if tags is None else list(tags)
        )


def walk(root: Path) -> Iterator[Path]:
    """All regular files below ``root``, in a fixed order."""
    for folder, folders, names in os.walk(root):
        folders.sort()
        for name in sorted(names):
            path = Path(folder) / name
            if path.is_file():
                yield path


def looks_like_dicom(start: bytes) -> bool:
    """True for a file's first 132 bytes if it has the DICM prefix, or begins as a data set without preamble."""
    if start[128:132] == b"DICM":
        return True
    if len(start) < 16:
        return False
    group, element = int.from_bytes(start[:2], "little"), int.from_bytes(start[2:4], "little")
    return (group in (0x0002, 0x0008) and element <= 0x0070) or start[:3] == b"\x00\x08\x00"  # last: big endian


# Elements the scanner looks for, by the way their value is written.
_TEXT = {
    0x00080005: "SpecificCharacterSet",
    0x00080008: "ImageType",
    0x00080016: "SOPClassUID",
    0x00080018: "SOPInstanceUID",
    0x00080020: "StudyDate",
    0x00080032: "AcquisitionTime",
    0x00080060: "Modality",
    0x00080080: "InstitutionName",
    0x00081010: "StationName",
    0x00100010: "PatientName",
    0x00100020: "PatientID",
    0x00100021: "IssuerOfPatientID",
    0x00100030: "PatientBirthDate",
    0x0020000D: "StudyInstanceUID",
    0x0020000E: "SeriesInstanceUID",
    0x00200052: "FrameOfReferenceUID",
    0x00280004: "PhotometricInterpretation",
    0x00280301: "BurnedInAnnotation",
    0x00209056: "StackID",
}
_DECIMAL = {
    0x00180050: "SliceThickness",
    0x00180081: "EchoTime",
    0x00180082: "InversionTime",
    0x00180086: "EchoNumbers",
    0x00181060: "TriggerTime",
    0x00181114: "EstimatedRadiographicMagnificationFactor",
    0x00181164: "ImagerPixelSpacing",
    0x00200012: "AcquisitionNumber",
    0x00200013: "InstanceNumber",
    0x00200032: "ImagePositionPatient",
    0x00200037: "ImageOrientationPatient",
    0x00200100: "TemporalPositionIdentifier",
    0x00280008: "NumberOfFrames",
    0x00280030: "PixelSpacing",
    0x00281052: "RescaleIntercept",
    0x00281053: "RescaleSlope",
    0x00541300: "FrameReferenceTime",
}
_SHORT = {
    0x00280002: "SamplesPerPixel",
    0x00280006: "PlanarConfiguration",
    0x00280010: "Rows",
    0x00280011: "Columns",
    0x00280100: "BitsAllocated",
    0x00280101: "BitsStored",
    0x00280102: "HighBit",
    0x00280103: "PixelRepresentation",
    0x00280120: "PixelPaddingValue",
    0x00280121: "PixelPaddingRangeLimit",
}
_DOUBLE = {0x00189087: "DiffusionBValue", 0x00189089: "DiffusionGradientOrientation"}
SIEMENS_B, GE_B, CSA_IMAGE = 0x0019100C, 0x00431039, 0x00291010
# Elements whose meaning needs a parser of sequences or of private data.
_DEEP = {
    0x00186011: "SequenceOfUltrasoundRegions",
    0x00283000: "ModalityLUTSequence",
    0x3004000C: "GridFrameOffsetVector",
    0x3004000E: "DoseGridScaling",
    0x00620002: "SegmentSequence",
    0x00081115: "ReferencedSeriesSequence",
    0x30060010: "ReferencedFrameOfReferenceSequence",
    0x30060020: "StructureSetROISequence",
    0x300E0002: "ApprovalStatus",
    0x00700084: "ContentCreatorName",
    0x52009229: "SharedFunctionalGroupsSequence",
    0x52009230: "PerFrameFunctionalGroupsSequence",
}
_PRIVATE = (SIEMENS_B, GE_B)
_WANTED = frozenset([*_TEXT, *_DECIMAL, *_SHORT, *_DOUBLE, *_PRIVATE])
_TAG_OF = {name: tag for table in (_TEXT, _DECIMAL, _SHORT, _DOUBLE) for tag, name in table.items()}
SOURCE_IMAGES, CONTOURS = 0x00082112, 0x30060039
TAGS = [*_TEXT, *_DECIMAL, *_SHORT, *_DOUBLE, *_DEEP, *_PRIVATE, CSA_IMAGE, 0x00180088, 0x00081070, SOURCE_IMAGES,
        0x00280122, 0x00280123, 0x00280124, 0x00280125,  # padding of floats
        *(tag for keyword in vocabulary.NAMING if (tag := tag_for_keyword(keyword)) is not None)]  # fmt: skip
_LONG_VRS = frozenset((b"OB", b"OW", b"OF", b"OD", b"OL", b"OV", b"SQ", b"UN", b"UT", b"UC", b"UR", b"SV", b"UV"))
_SHORT_VRS = frozenset(
    b"AE AS AT CS DA DS DT FL FD IS LO LT PN SH SL SS ST TM UI UL US".split()
)
_PIXELS = (0x7FE00010, 0x7FE00008, 0x7FE00009)
_UNDEFINED = 0xFFFFFFFF
_head = struct.Struct("<HH2sH").unpack_from
_head_implicit = struct.Struct("<HHI").unpack_from
_long = struct.Struct("<I").unpack_from


class Unsure(Exception):
    """The scanner met what it does not know; pydicom decides."""


class Plain:
    """Values as the scanner finds them."""

    def __init__(self, values: dict[int, bytes]) -> None:
        self.values = values

    def text(self, keyword: str) -> str:
        raw = self.values.get(_TAG_OF[keyword], b"")
        if not raw.isascii() or b"\x1b" in raw:  # escapes switch the character set
            raise Unsure
        return raw.decode("ascii").strip(" \0")

    def raw_text(self, keyword: str) -> str:
        """The bytes of a text, one character each, whatever its character set is: to compare, not to show."""
        return self.values.get(_TAG_OF[keyword], b"").decode("latin-1").strip(" \0")

    def integer(self, keyword: str, default: int) -> int:
        raw = self.values.get(_TAG_OF[keyword])
        if raw is None or not raw:
            return default
        if len(raw) != 2:
            raise Unsure
        return int.from_bytes(raw, "little")

    def padding(self, signed: bool) -> tuple[float, float] | None:
        """Lowest and highest stored value that is padding (C.7.5.1.1.2), or None."""
        ends = [self.integer(keyword, -1) for keyword in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
        return None if ends[0] < 0 else _ends([as_stored(end, signed) for end in ends if end >= 0])

    def numbers(self, keyword: str, count: int) -> tuple[float, ...] | None:
        tag = _TAG_OF[keyword]
        raw = self.values.get(tag)
        if raw is None:
            return None
        if tag in _DOUBLE:
            if len(raw) % 8:
                raise Unsure
            return checked(keyword, struct.unpack(f"<{len(raw) // 8}d", raw), count)
        raw = raw.strip(b" \0")
        if not raw:
            return None
        try:
            return checked(keyword, tuple(map(float, raw.split(b"\\"))), count)
        except ValueError:
            raise Unsure from None

    def private_b(self) -> float | None:
        if SIEMENS_B in self.values or GE_B in self.values:
            raise Unsure
        return None

    dataset: pydicom.Dataset | None = None


class Parsed:
    """Values as pydicom finds them."""

    def __init__(self, dataset: pydicom.Dataset) -> None:
        self.dataset: pydicom.Dataset | None = dataset
        self._get = dataset.get

    def text(self, keyword: str) -> str:
        value: Any = self._get(keyword)
        if value is None:
            return ""
        if isinstance(value, list | pydicom.multival.MultiValue):
            return "\\".join(map(str, value))
        return str(value).strip(" \0")

    def raw_text(self, keyword: str) -> str:
        """As `Plain.raw_text`."""
        assert self.dataset is not None
        tag = _TAG_OF[keyword]
        value: Any = self.dataset.get_item(tag).value if tag in self.dataset else None
        return value.decode("latin-1").strip(" \0") if isinstance(value, bytes) else str(value or "").strip(" \0")

    def integer(self, keyword: str, default: int) -> int:
        value: Any = self._get(keyword)
        return default if value is None or value == "" else int(value)

    def padding(self, signed: bool) -> tuple[float, float] | None:
        """Lowest and highest stored value that is padding (C.7.5.1.1.2), or None if there is none, or none that is a number."""
        assert self.dataset is not None
        for kind in ("", "Float", "DoubleFloat"):
            ends: list[float] = []
            for keyword in (f"{kind}PixelPaddingValue", f"{kind}PixelPaddingRangeLimit"):
                try:
                    value: Any = self._get(keyword)
                    if isinstance(value, bytes):  # of unknown type
                        value = int.from_bytes(value[:2], "little" if self.dataset.original_encoding[1] else "big") if value else None
                    if value is not None and value != "":
                        ends.append(float(value) if kind else as_stored(int(value), signed))
                except (TypeError, ValueError, OverflowError):
                    break
                if not ends:
                    break
            if ends:
                return _ends(ends)
        return None

    def numbers(self, keyword: str, count: int) -> tuple[float, ...] | None:
        return numbers_of(self.dataset, keyword, count)

    def private_b(self) -> float | None:
        """The b-value where Siemens and GE put it before the standard had a place."""
        for tag, scale in ((SIEMENS_B, None), (GE_B, 1_000_000_000)):
            element: Any = self._get(tag)
            if element is None:
                continue
            value = element.value
            try:
                if isinstance(value, bytes):
                    value = value.decode("ascii").strip(" \0").split("\\")[0]
                elif isinstance(value, list | pydicom.multival.MultiValue):
                    value = value[0]
                number = float(value)
            except (ValueError, TypeError, IndexError, UnicodeDecodeError):
                continue
            return number % scale if scale else number
        return None


def as_stored(value: int, signed: bool) -> int:
    """A word of type US or SS, which writers confuse, in the sense of PixelRepresentation. Pure."""
    value &= 0xFFFF
    return value - 0x10000 if signed and value & 0x8000 else value


def _ends(ends: Sequence[float]) -> tuple[float, float]:
    return min(ends), max(ends)


def numbers_of(dataset: Any, keyword: str, count: int) -> tuple[float, ...] | None:
    """A numeric element as ``count`` finite floats, None if it is absent or empty; count 0: any number of them.

    Raises:
        SourceError: not numeric, or another number of values.
    """
    value: Any = dataset.get(keyword)
    if value is None or (isinstance(value, str) and value == ""):
        return None
    try:
        numbers = np.atleast_1d(np.array(value, dtype=np.float64))
    except (TypeError, ValueError):
        raise SourceError(f"{keyword} is not numeric") from None
    if not numbers.size:
        return None
    return checked(keyword, tuple(map(float, numbers.ravel())), count)


def checked(keyword: str, numbers: tuple[float, ...], count: int) -> tuple[float, ...]:
    if (count and len(numbers) != count) or not all(-1e300 < number < 1e300 for number in numbers):
        raise SourceError(f"{keyword}: expected {count or 'some'} finite numbers, found {len(numbers)} values")
    return numbers


def _meta(start: bytes) -> tuple[str, int] | None:
    """(TransferSyntaxUID, where the data set begins) of a file with a plain file meta group; else None."""
    if start[128:132] != b"DICM":
        return None
    pos, syntax, size = 132, "", len(start)
    while pos + 12 <= size:
        group, element, vr, length = _head(start, pos)
        if group != 2:
            return (syntax, pos) if syntax else None
        if vr in _LONG_VRS:
            length = _long(start, pos + 8)[0]
            pos += 12
        elif vr in _SHORT_VRS:
            pos += 8
        else:
            return None
        if element == 0x0010:
            syntax = start[pos : pos + length].decode("ascii", "replace").strip(" \0")
        pos += length
    return None


def _skip(buffer: bytes, pos: int, implicit: bool, depth: int = 0) -> int:
    """The place behind a sequence of undefined length whose first item is at ``pos``."""
    if depth > 16:
        raise Unsure
    while True:
        group, element, length = _head_implicit(buffer, pos)
        pos += 8
        if group != 0xFFFE:
            raise Unsure
        if element == 0xE0DD:
            return pos
        if length != _UNDEFINED:
            pos += length
            continue
        while True:
            group, element, vr, length = _head(buffer, pos)
            if group == 0xFFFE:
                pos += 8
                break
            if implicit:
                length = _long(buffer, pos + 4)[0]
                pos += 8
            elif vr in _LONG_VRS:
                length = _long(buffer, pos + 8)[0]
                pos += 12
            elif vr in _SHORT_VRS:
                pos += 8
            else:
                raise Unsure
            pos = _skip(buffer, pos, implicit or vr == b"UN", depth + 1) if length == _UNDEFINED else pos + length


def _scan_elements(buffer: bytes, pos: int, implicit: bool) -> tuple[dict[int, bytes], int, int]:
    """The wanted elements before the pixels, where the value of PixelData begins, and its length.

    Raises:
        Unsure: anything that is not plain.
        struct.error: the buffer ends first.
    """
    values: dict[int, bytes] = {}
    last, size = 0, len(buffer)
    while True:
        group, element, vr, length = _head(buffer, pos)
        if implicit:
            length = _long(buffer, pos + 4)[0]
            pos += 8
        elif vr in _SHORT_VRS:
            pos += 8
        elif vr in _LONG_VRS:
            length = _long(buffer, pos + 8)[0]
            pos += 12
        else:
            raise Unsure
        tag = group << 16 | element
        if tag <= last:
            raise Unsure
        last = tag
        if tag in _WANTED:
            if length > 4096:
                raise Unsure
            if pos + length > size:
                raise struct.error
            values[tag] = buffer[pos : pos + length]
        elif tag in _DEEP:
            raise Unsure
        elif tag >= 0x7FE00000:
            if tag != 0x7FE00010:
                raise Unsure
            return values, pos, length
        pos = _skip(buffer, pos, implicit or vr == b"UN") if length == _UNDEFINED else pos + length


def scan_plain(file: BinaryIO, start: bytes, size: int) -> tuple[Plain, str, int, int] | None:
    """Values, transfer syntax, offset and length of the pixels of a plain file; None: let pydicom read it."""
    meta = _meta(start)
    if meta is None or meta[0] in (str(ExplicitVRBigEndian), str(DeflatedExplicitVRLittleEndian)):
        return None
    syntax, pos = meta
    implicit = syntax == str(ImplicitVRLittleEndian)
    while True:
        try:
            values, offset, length = _scan_elements(start, pos, implicit)
        except Unsure:
            return None
        except struct.error:
            if len(start) >= min(size, LARGEST_HEADER):
                return None
            file.seek(0)
            start = file.read(len(start) * 8)
            continue
        return Plain(values), syntax, offset, length
