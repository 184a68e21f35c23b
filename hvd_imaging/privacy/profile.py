"""What happens to each attribute: the standard's table first, then rules for what the table does not name.

The table is PS3.15 Table E.1-1 as dicom-anonymizer (KitwareMedical, BSD-3-Clause) carries it; only the table is used.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import Literal

from ..errors import SetupError
from .burned_in import Mode

EDITION = "2026c"
Retained = Literal["dates", "device", "characteristics"]
RETAINABLE: tuple[Retained, ...] = ("dates", "device", "characteristics")
Action = Literal["keep", "remove", "empty", "dummy", "uid", "shift"]


@dataclass(frozen=True)
class Options:
    """Options of the basic profile.

    Attributes:
        retain: "dates": shifted by the patient's own number of days, times as they are; "device": which machine;
            "characteristics": age, sex, size, weight, ethnic group.
        burned_in: what to do with images that hold writing.
        deface: cut faces off the head series of CT and MR.
    """

    retain: frozenset[Retained] = frozenset()
    burned_in: Mode = "quarantine"
    deface: bool = False


_NAMES = {
    "D_TAGS": "D", "Z_TAGS": "Z", "X_TAGS": "X", "U_TAGS": "U", "Z_D_TAGS": "Z/D", "X_Z_TAGS": "X/Z", "X_D_TAGS": "X/D",
    "X_Z_D_TAGS": "X/Z/D", "X_Z_U_STAR_TAGS": "X/Z/U*",
}  # fmt: skip

GROUPS = frozenset({0x0008, 0x0010, 0x0018, 0x0020, 0x0022, 0x0028, 0x0040, 0x0048, 0x0052, 0x0054, 0x0062, 0x0066, 0x2050,
                    0x3002, 0x3004, 0x3006, 0x5200, 0x7FE0})  # fmt: skip
"""Groups that describe images, segmentations and contours. The others (orders, visits, signatures, printing, curves,
overlays, device data) leave as a whole."""

DEVICE = frozenset(
    # Those that the option's column of Table E.1-1 keeps; AE titles, which it wants cleaned, leave.
    ["DeviceSerialNumber", "DeviceUID", "DeviceDescription", "DeviceLabel", "StationName", "GantryID", "DetectorID", "CassetteID", "PlateID", "GeneratorID", "ManufacturerDeviceIdentifier", "ManufacturerDeviceClassUID", "ModifyingDeviceID", "ModifyingSystem", "XRayDetectorID", "XRayDetectorLabel", "XRaySourceID", "UniqueDeviceIdentifier", "UDISequence", "LensMake", "LensModel", "LensSerialNumber", "LensSpecification", "SourceSerialNumber", "SourceManufacturer", "TreatmentMachineName", "TransducerIdentificationSequence", "ScheduledStationName", "ScheduledStationNameCodeSequence", "ScheduledStationGeographicLocationCodeSequence", "ScheduledProcedureStepLocation", "ScheduledStudyLocation", "PerformedStationName", "PerformedStationNameCodeSequence", "PerformedStationGeographicLocationCodeSequence"]
    # Text that the table does not name.
    + ["Manufacturer", "ManufacturerModelName", "SoftwareVersions", "DeviceID", "SecondaryCaptureDeviceManufacturer", "SecondaryCaptureDeviceManufacturerModelName", "TransducerData"]
)
"""The option's dates of calibration are dates like others: they tell when the examination was."""
CHARACTERISTICS = frozenset(
    # Those that the option's column keeps; free text that it wants cleaned (allergies, needs, state) leaves.
    ["PatientAge", "PatientSex", "PatientSize", "PatientWeight", "PatientSexNeutered", "PregnancyStatus", "SmokingStatus", "EthnicGroup", "EthnicGroupCodeSequence"]
    # Numbers that the table does not name.
    + ["PatientBodyMassIndex", "MeasuredAPDimension", "MeasuredLateralDimension"]
)
NEVER_DATES = frozenset({"PatientBirthDate", "PatientBirthTime"})
"""The dates of Table E.1-1 that the options for dates do not keep (the others are not in `GROUPS`)."""
LABELS = frozenset({"ROIName", "SegmentLabel"})
NEEDED_TEXT = frozenset({"SegmentAlgorithmName", "ContentLabel", "StructureSetLabel", "DimensionDescriptionLabel"})
"""Required text (type 1): a dummy takes its place."""
BINARY = frozenset(
    ["PixelData", "FloatPixelData", "DoubleFloatPixelData", "RedPaletteColorLookupTableData", "GreenPaletteColorLookupTableData", "BluePaletteColorLookupTableData", "SegmentedRedPaletteColorLookupTableData", "SegmentedGreenPaletteColorLookupTableData", "SegmentedBluePaletteColorLookupTableData", "LUTData", "PixelPaddingValue", "PixelPaddingRangeLimit", "LUTDescriptor", "LargestImagePixelValue", "SmallestImagePixelValue", "SurfacePointsSequence", "PointCoordinatesData"]
)
"""Attributes that may have the VRs of bytes and words."""
LARGE = frozenset({"RadionuclideTotalDose", "DoseCalibrationFactor", "ImagingFrequency", "EstimatedRadiographicMagnificationFactor"})
"""Measurements that may have more than 7 digits; elsewhere such a number may be one of a patient."""

NUMBERS = frozenset({"US", "SS", "UL", "SL", "UV", "SV", "FL", "FD", "AT"})
DATES = frozenset({"DA", "DT", "TM"})

SAFE_PRIVATE: dict[tuple[int, str, int], str] = {
    # (group, creator in upper case, last byte of the element): VR. Numbers of PS3.15 Table E.3.10-1 that measuring needs.
    (0x7053, "PHILIPS PET PRIVATE GROUP", 0x00): "DS",  # SUV factor
    (0x7053, "PHILIPS PET PRIVATE GROUP", 0x09): "DS",  # activity concentration factor
    (0x2001, "PHILIPS IMAGING DD 001", 0x03): "FL",  # b-value
    (0x2005, "PHILIPS MR IMAGING DD 001", 0x0D): "FL",  # scale intercept
    (0x2005, "PHILIPS MR IMAGING DD 001", 0x0E): "FL",  # scale slope
    (0x0019, "GEMS_ACQU_01", 0x23): "DS",  # table speed
    (0x0019, "GEMS_ACQU_01", 0x24): "DS",  # mid scan time
    (0x0019, "GEMS_ACQU_01", 0x27): "DS",  # rotation speed
    (0x0043, "GEMS_PARM_01", 0x39): "IS",  # b-values
    (0x0019, "SIEMENS MR HEADER", 0x0C): "IS",  # b-value
    (0x0019, "SIEMENS MR HEADER", 0x0E): "FD",  # diffusion direction
    (0x0019, "SIEMENS MR HEADER", 0x27): "FD",  # b-matrix
}
NEEDED_PRIVATE: dict[tuple[int, str, int], str] = {
    # Not in that table, but a number without which a mosaic cannot be read.
    (0x0019, "SIEMENS MR HEADER", 0x0A): "US",  # tiles of a mosaic
}


@functools.cache
def table() -> dict[int, str]:
    """Tag -> action code of PS3.15 Table E.1-1.

    Raises:
        SetupError: dicom-anonymizer is not installed.
    """
    try:
        module = importlib.import_module(f"dicomanonymizer.dicom_anonymization_databases.dicomfields_{EDITION}")
    except ImportError as error:
        raise SetupError(
            "de-identification needs dicom-anonymizer, which carries the standard's table; `pip install hvd_imaging[dicom]`"
        ) from error
    # Entries of four numbers are the repeating groups 50xx and 60xx, which leave as a whole anyway.
    return {(tag[0] << 16) | tag[1]: code for name, code in _NAMES.items() for tag in getattr(module, name) if len(tag) == 2}


def action(tag: int, keyword: str, vr: str, retired: bool, options: Options) -> Action:
    """What to do with a standard attribute. Pure. Sequences that are kept are cleaned item by item.

    Args:
        tag: group and element.
        keyword: of the dictionary, "" if the dictionary does not know it.
        vr: two letters.
        retired: by the dictionary.
    """
    group, code = tag >> 16, table().get(tag)
    if keyword in DEVICE and "device" in options.retain:
        return "keep"  # also device UIDs: they are the identity that is to be retained
    if not keyword or tag & 0xFFFF == 0 or (group not in GROUPS and keyword not in NEEDED_TEXT):
        return "remove"
    if keyword in CHARACTERISTICS and "characteristics" in options.retain:
        return "keep"
    if keyword in DEVICE and code is None:
        return "keep" if keyword == "Manufacturer" else "remove"
    if keyword in LABELS:
        return "keep"
    if vr in DATES and "dates" in options.retain and keyword not in NEVER_DATES:
        return "shift"
    if code is not None:
        return _by_table(code, vr, keyword)
    if group == 0x0010 or retired or vr in DATES:
        return "remove"
    if vr == "UI":
        return "uid"
    if keyword in NEEDED_TEXT:
        return "keep" if vr == "CS" else "dummy"
    if vr in ("SQ", "CS", "DS", "IS") or vr in NUMBERS or keyword in BINARY or keyword == "ConvolutionKernel":
        return "keep"
    return "remove"


def _by_table(code: str, vr: str, keyword: str) -> Action:
    if code == "U":
        return "uid"
    if code == "X/Z/U*":
        return "keep"
    if code == "X":
        return "empty" if keyword == "AcquisitionContextSequence" else "remove"
    # X/Z, X/D, X/Z/D depend on what the kind of object requires: an empty or a dummy value is right for all kinds.
    return "empty" if code in ("Z", "X/Z") or vr == "SQ" else "dummy"
