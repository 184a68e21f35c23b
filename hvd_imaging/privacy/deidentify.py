"""A DICOM object without what identifies: PS3.15 Annex E, basic profile with options, as a pure function.

A new object is built from what is known to be harmless; nothing is copied because nobody thought of it. Values are
checked too: a code string is a defined term, a number is a number, a code is one of PS3.16.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import re
import uuid
from collections.abc import Iterator
from typing import Any

from pydicom.datadict import (
    dictionary_has_tag,
    dictionary_is_retired,
    dictionary_keyword,
    dictionary_VM,
    dictionary_VR,
)
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.sr._snomed_dict import mapping
from pydicom.tag import BaseTag, Tag
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian, UID_dictionary

from ..errors import SourceError
from . import vocabulary
from .profile import (
    BINARY,
    DATES,
    DEVICE,
    LABELS,
    LARGE,
    NEEDED_PRIVATE,
    NUMBERS,
    SAFE_PRIVATE,
    Options,
    action,
)
from .pseudonym import pseudonym, shifted_date

SEGMENTATION, CONTOURS = "1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.481.3"
DIRECTORY = "1.2.840.10008.1.3.10"
_OUT = {
    "1.2.840.10008.5.1.4.1.1.88.": "a structured report",
    "1.2.840.10008.5.1.4.1.1.104.": "an encapsulated document",
    "1.2.840.10008.5.1.4.1.1.11.": "a presentation state",
    "1.2.840.10008.5.1.4.1.1.9.": "a waveform",
}
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_TIME = re.compile(r"\d{2}(\d{2}(\d{2}(\.\d{1,6})?)?)?")
_KERNEL = re.compile(r"[A-Za-z]{1,3}\d{1,3}[a-z]{0,2}|\d")
_DUMMIES = {"DA": "19000101", "TM": "000000", "DT": "19000101000000", "DS": "0", "IS": "0", "AS": "000Y", "UR": "http://removed.invalid"}
_NUMBER_DUMMIES = dict.fromkeys(("US", "SS", "UL", "SL", "FL", "FD", "UV", "SV"), 0)
_TEXT = frozenset({"AE", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UT"})


def mapped_uid(key: bytes, uid: str) -> str:
    """Another UID, ``2.25.<UUID>``, equal for equal ones; those that the standard itself defines stay."""
    uid = uid.strip(" \0")
    if uid in UID_dictionary:
        return uid
    digest = hmac.new(key, f"uid\0{uid}".encode(errors="surrogatepass"), hashlib.sha256).digest()
    # PS3.5 B.2: 2.25 stands before the integer of a UUID, so its version and variant bits are set.
    return f"2.25.{uuid.UUID(bytes=digest[:16], version=5).int}"


def patient_of(ds: Dataset) -> str:
    """The raw patient identifier, as reading takes it: PatientID, else the study counts as a patient of its own."""
    patient = _text(ds, "PatientID").strip()
    return patient or f"study {_text(ds, 'StudyInstanceUID') or _text(ds, 'SeriesInstanceUID')}"


def refuse(ds: Dataset) -> None:
    """Objects that consist of text or carry documents leave as a whole.

    Raises:
        SourceError: saying what it is.
    """
    kind = _text(ds, "SOPClassUID")
    for start, name in _OUT.items():
        if kind.startswith(start):
            raise SourceError(f"{name}: left out as a whole")
    if UID_dictionary.get(kind, ("", ""))[1] != "SOP Class":
        raise SourceError("not an object of the standard (unknown SOP class): left out as a whole")
    pixels = any(name in ds for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData"))
    if "EncapsulatedDocument" in ds or not (pixels or kind == CONTOURS):
        raise SourceError("not an image, a segmentation or a structure set: left out as a whole")
    if not _text(ds, "SOPInstanceUID") or not _text(ds, "SeriesInstanceUID") or not _text(ds, "StudyInstanceUID"):
        raise SourceError("a UID of study, series or instance is missing")


def deidentify(ds: Dataset, key: bytes, options: Options = Options()) -> Dataset:
    """A new object that names nobody. The given one stays as it is.

    The pixels are those of ``ds``: `pixels.clean` looks at them.

    Args:
        ds: as read by pydicom, with or without file meta information.
        key: the pseudonym key.

    Raises:
        SourceError: an object that leaves as a whole, or one that cannot be cleaned.
        SetupError: the package with the standard's table is missing.
    """
    refuse(ds)
    patient = patient_of(ds)
    cleaner = _Cleaner(key, options, patient, _named(ds))
    result = cleaner.clean(ds)
    name = pseudonym(key, "patient", patient)
    result.PatientName, result.PatientID = name, name
    result.PatientBirthDate = ""
    if "PatientSex" not in result:
        result.PatientSex = ""
    _mark(result, options)
    meta = FileMetaDataset()
    meta.FileMetaInformationVersion = b"\x00\x01"
    meta.MediaStorageSOPClassUID = result.SOPClassUID
    meta.MediaStorageSOPInstanceUID = result.SOPInstanceUID
    meta.TransferSyntaxUID = _transfer_syntax(ds)
    result.file_meta = meta
    result.preamble = b"\0" * 128
    return result


class _Cleaner:
    """Builds clean copies of one object's data sets, nested ones too."""

    def __init__(self, key: bytes, options: Options, patient: str, named: frozenset[str]) -> None:
        self._key = key
        self._options = options
        self._patient = patient
        self._named = named
        self._numbers = frozenset(word.lstrip("0") for word in named if word.isdigit())

    def clean(self, ds: Dataset, depth: int = 0) -> Dataset:
        if depth > 16:
            raise SourceError("sequences are nested more than 16 deep")
        result = Dataset()
        for tag in sorted(ds.keys()):
            if tag.is_private:
                continue
            element = self._standard(ds, Tag(tag), depth)
            if element is not None:
                result.add(element)
        self._private(ds, result)
        return result

    def _standard(self, ds: Dataset, tag: BaseTag, depth: int) -> DataElement | None:
        if not dictionary_has_tag(tag):
            return None
        keyword, known = dictionary_keyword(tag), dictionary_VR(tag).split(" or ")
        claimed = ds.get_item(tag).VR or "UN"
        if claimed not in known and claimed not in ("UN", "OB", "OW", *dictionary_VR(tag).split("+")) and " or " not in claimed:
            return None  # an attribute that is not what it claims to be
        vr = claimed if claimed in known else known[0]
        what = action(int(tag), keyword, vr, dictionary_is_retired(tag), self._options)
        if what == "remove":
            return None
        if what == "empty":
            return DataElement(tag, vr, [] if vr == "SQ" else "" if vr in _TEXT | DATES | {"UI", "AS", "DS", "IS", "UR"} else None)
        if what == "uid" or (what == "dummy" and vr == "UI"):
            values = [mapped_uid(self._key, part) for part in _text(ds, tag).split("\\") if part.strip(" \0")]
            return DataElement(tag, "UI", values or "")
        if what == "dummy":
            value: Any = _DUMMIES.get(vr, _NUMBER_DUMMIES.get(vr, "REMOVED" if vr in _TEXT else None))
            return None if value is None else DataElement(tag, vr, value)
        if what == "shift":
            return self._shifted(ds, tag, vr)
        return self._kept(ds, tag, keyword, vr, depth)

    def _kept(self, ds: Dataset, tag: BaseTag, keyword: str, vr: str, depth: int) -> DataElement | None:
        if vr == "SQ":
            return self._sequence(ds, tag, keyword, depth)
        if vr in NUMBERS or keyword in BINARY:
            return _binary(ds, tag, keyword, vr)
        text = _text(ds, tag)
        if vr in ("DS", "IS"):
            numbers = [part.strip() for part in text.split("\\")]
            if not all(_is_number(n, vr, keyword) for n in numbers):
                return None
            if any(len(n) > 4 and n.lstrip("0") in self._numbers for n in numbers):
                return DataElement(tag, vr, "")  # the number of the patient or the examination once more
            # A large measurement keeps four digits: all of them could be the number of a person.
            numbers = [f"{float(n):.4g}" if n and abs(float(n)) >= 1e7 else n for n in numbers]
            return DataElement(tag, vr, "\\".join(numbers))
        if vr == "CS":
            terms = [part.strip() for part in text.split("\\")]
            if len(terms) == 1:
                single = terms[0] if not terms[0] or vocabulary.is_term(terms[0]) else "OTHER" if keyword == "ContentLabel" else ""
                return DataElement(tag, vr, single) if single or not terms[0] else None
            return DataElement(tag, vr, [term if not term or vocabulary.is_term(term) else "OTHER" for term in terms])
        if vr == "AS":
            return _age(tag, text)
        if keyword in LABELS:
            return DataElement(tag, vr, vocabulary.label(self._key, text, self._named))
        if keyword == "ConvolutionKernel":
            known = all(_KERNEL.fullmatch(part) or vocabulary.is_term(part.upper()) for part in text.split("\\"))
            return DataElement(tag, vr, text.split("\\")) if text and known else None
        if keyword == "Manufacturer" and "device" not in self._options.retain:
            return DataElement(tag, vr, vocabulary.vendor(text))
        if vr == "UI":
            return DataElement(tag, vr, text) if UID(text).is_valid else None
        if keyword in DEVICE or keyword == "EthnicGroup":
            words = set(re.findall(r"\w+", text.upper()))
            harmless = text.isascii() and text.isprintable() and len(text) <= 64 and not words & self._named
            return DataElement(tag, vr, text) if harmless else None
        return None

    def _sequence(self, ds: Dataset, tag: BaseTag, keyword: str, depth: int) -> DataElement:
        items = []
        for item in _value(ds, tag) or []:
            if not isinstance(item, Dataset):
                continue
            if "CodeMeaning" in item or "CodeValue" in item or "LongCodeValue" in item:
                code = _code(item)
                if code is None and keyword.startswith("SegmentedProperty"):
                    code = _coded("SCT", "91723000", "Anatomical structure")  # required: the most general one
                if code is not None:
                    items.append(code)
                continue
            items.append(self.clean(item, depth + 1))
        return DataElement(tag, "SQ", Sequence(items))

    def _shifted(self, ds: Dataset, tag: BaseTag, vr: str) -> DataElement | None:
        values = [part.strip() for part in _text(ds, tag).split("\\")]
        moved = [self._moved(value, vr) if value else "" for value in values]
        if any(value is None for value in moved):
            return None
        return DataElement(tag, vr, moved if len(moved) > 1 else moved[0])

    def _moved(self, value: str, vr: str) -> str | None:
        if vr == "TM":
            return value if _TIME.fullmatch(value) else None
        value = re.sub(r"(\d{4})\.(\d{2})\.(\d{2})", r"\1\2\3", value) if vr == "DA" else value
        found = re.fullmatch(r"(\d{4})(\d{2})(\d{2})(.*)", value)
        if not found:
            return None
        # An offset from UTC tells the country; distances within a study do not need it.
        time = re.sub(r"[+-]\d{4}$", "", found[4])
        if time and (vr == "DA" or not _TIME.fullmatch(time)):
            return None
        try:
            day = datetime.date(int(found[1]), int(found[2]), int(found[3]))
        except ValueError:
            return None
        return shifted_date(self._key, self._patient, day).strftime("%Y%m%d").rjust(8, "0") + time

    def _private(self, ds: Dataset, result: Dataset) -> None:
        for tag in sorted(tag for tag in list(ds.keys()) if tag.is_private and tag.element >= 0x1000):
            creator = _text(ds, Tag(tag.group, tag.element >> 8)).strip()
            name = (tag.group, creator.upper(), tag.element & 0xFF)
            vr = SAFE_PRIVATE.get(name) or NEEDED_PRIVATE.get(name)
            if vr is None:
                continue
            text = _text(ds, Tag(tag)) if vr in ("DS", "IS") else ""
            value: Any = text.split("\\") if text and all(_is_number(n.strip(), vr, "") for n in text.split("\\")) else None
            if vr not in ("DS", "IS"):
                value = _numbers(_value(ds, Tag(tag)))
                value = None if value is None or len(value) > 6 else value
            if value:
                result.private_block(tag.group, creator, create=True).add_new(tag.element & 0xFF, vr, value)


def _mark(ds: Dataset, options: Options) -> None:
    """PS3.15 E.1.1 item 6, with the codes of CID 7050. What was done to the pixels is not told yet, see `mark_pixels`."""
    codes = [("113100", "Basic Application Confidentiality Profile"), ("113105", "Clean Descriptors Option")]
    if "dates" in options.retain:
        codes.append(("113107", "Retain Longitudinal Temporal Information Modified Dates Option"))
    if "characteristics" in options.retain:
        codes.append(("113108", "Retain Patient Characteristics Option"))
    if "device" in options.retain:
        codes.append(("113109", "Retain Device Identity Option"))
    private = set(_private_names(ds))
    if private and private <= SAFE_PRIVATE.keys():
        codes.append(("113111", "Retain Safe Private Option"))
    ds.PatientIdentityRemoved = "YES"
    ds.DeidentificationMethod = "hvd_imaging: PS3.15 Annex E"
    ds.DeidentificationMethodCodeSequence = Sequence([_coded("DCM", code, meaning[:64]) for code, meaning in codes])
    ds.LongitudinalTemporalInformationModified = "MODIFIED" if "dates" in options.retain else "REMOVED"


def mark_pixels(ds: Dataset) -> None:
    """The pixels of this object were searched for writing, and what was found is gone."""
    ds.DeidentificationMethodCodeSequence.insert(1, _coded("DCM", "113101", "Clean Pixel Data Option"))


def mark_face(ds: Dataset) -> None:
    """The face that the series of this object showed is gone."""
    ds.DeidentificationMethodCodeSequence.append(_coded("DCM", "113102", "Clean Recognizable Visual Features Option"))
    ds.RecognizableVisualFeatures = "NO"


def _private_names(ds: Dataset) -> Iterator[tuple[int, str, int]]:
    """Private elements of a clean object, nested ones too, as `SAFE_PRIVATE` names them."""
    for element in ds.iterall():
        if element.tag.is_private and not element.tag.is_private_creator:
            yield element.tag.group, str(element.private_creator or "").upper(), element.tag.element & 0xFF


def _coded(scheme: str, value: str, meaning: str) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning[:64]
    return item


def _code(item: Dataset) -> Dataset | None:
    """The code with the standard's own meaning; None for one that the standard does not list."""
    scheme, value = _text(item, "CodingSchemeDesignator").strip(), _text(item, "CodeValue").strip()
    if scheme == "SNM3":
        scheme = "SRT"
    known = vocabulary.concepts()
    meaning = known.get((scheme, value)) or known.get(("SCT", mapping["SRT"].get(value, "")) if scheme == "SRT" else ("", ""))
    return None if meaning is None or len(value) > 16 else _coded(scheme, value, meaning)


def _named(ds: Dataset) -> frozenset[str]:
    """Words that the object gives as names or numbers of somebody."""
    return vocabulary.naming_words(_text(ds, keyword) for keyword in vocabulary.NAMING)


def _text(ds: Dataset, tag: Any) -> str:
    """The value as text, several values with backslashes between; "" if there is none. Never raises for odd values."""
    tag = Tag(tag)
    if tag not in ds:
        return ""
    element = ds.get_item(tag)
    value = element.value
    if value is None:
        return ""
    if isinstance(value, bytes):
        return value.decode("utf-8" if _is_utf8(value) else "latin-1").strip(" \0")
    if isinstance(value, str):
        return value.strip(" \0")
    if isinstance(value, Sequence):
        return ""
    try:
        return "\\".join(str(part) for part in value).strip(" \0")
    except TypeError:
        return str(value)


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _value(ds: Dataset, tag: BaseTag) -> Any:
    """The parsed value; None if it cannot be parsed."""
    try:
        return ds[tag].value
    except Exception:  # pydicom raises many kinds on damaged values, and their text quotes them
        return None


def _numbers(value: Any) -> list[float] | None:
    parts = value if isinstance(value, list | tuple) or (hasattr(value, "__iter__") and not isinstance(value, str | bytes)) else [value]
    parts = list(parts)
    return parts if parts and all(isinstance(part, int | float) for part in parts) else None


def _binary(ds: Dataset, tag: BaseTag, keyword: str, vr: str) -> DataElement | None:
    value = _value(ds, tag)
    if isinstance(value, bytes):
        short = {"PixelPaddingValue": 2, "PixelPaddingRangeLimit": 2, "LUTDescriptor": 6, "LargestImagePixelValue": 2,
                 "SmallestImagePixelValue": 2}.get(keyword)  # fmt: skip
        if keyword not in BINARY or (short is not None and len(value) > short) or (keyword == "LUTData" and len(value) > 131072):
            return None
        element = ds[tag]
        return DataElement(tag, element.VR, value)
    if vr == "AT":
        return DataElement(tag, vr, value) if value else None
    numbers = _numbers(value)
    if numbers is None:
        return None
    count = dictionary_VM(tag)
    if count.isdigit() and len(numbers) != int(count):
        return None  # more numbers than there should be may be letters
    claimed = ds[tag].VR
    return DataElement(tag, claimed, numbers if len(numbers) > 1 else numbers[0])


def _is_number(text: str, vr: str, keyword: str) -> bool:
    """True for "" and for a number as the VR allows it; long ones may be the number of a person."""
    if not text:
        return True
    if len(text) > 16 or not _NUMBER.fullmatch(text) or (vr == "IS" and not re.fullmatch(r"[+-]?\d+", text)):
        return False
    return keyword in LARGE or abs(float(text)) < (1e6 if vr == "IS" else 1e7)


def _age(tag: BaseTag, text: str) -> DataElement | None:
    """Ages of 90 years and more are rare enough to point at somebody: they become 90 years."""
    if not re.fullmatch(r"\d{3}[DWMY]", text):
        return None
    return DataElement(tag, "AS", "090Y" if text[3] == "Y" and int(text[:3]) > 90 else text)


def _transfer_syntax(ds: Dataset) -> UID:
    meta = getattr(ds, "file_meta", None)
    found = str(getattr(meta, "TransferSyntaxUID", "") or "")
    if found:
        if UID_dictionary.get(found, ("", ""))[1] != "Transfer Syntax":
            raise SourceError("unknown transfer syntax")
        return UID(found)
    implicit, little = getattr(ds, "original_encoding", (True, True))
    if little is False:
        raise SourceError("big-endian object without file meta information")
    return ImplicitVRLittleEndian if implicit in (True, None) else ExplicitVRLittleEndian
