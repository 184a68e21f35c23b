"""DICOM series as volumes: found by content, ordered and spaced by where the slices lie in the patient.

Files are described one by one (`headers`), which any number of ranks can share; series come from the headers alone.
Tags that describe the distance of slices in words (SpacingBetweenSlices, SliceThickness) are not believed: real series
contradict them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from ..errors import SourceError
from ..volume import Volume
from .elements import looks_like_dicom, quiet, read_dataset, relative, walk
from .geometry import same_places, stack_geometry, tilt, upright
from .headers import Frame, Header, read_header
from .pixels import stored_values

__all__ = [
    "DicomScan",
    "Frame",
    "Header",
    "Rejected",
    "SegFile",
    "SeriesFiles",
    "Units",
    "group_headers",
    "looks_like_dicom",
    "quiet",
    "read_dataset",
    "read_header",
    "read_series",
    "relative",
    "scan_dicom",
    "stack_geometry",
    "walk",
]

Units = Literal["hu", "stored"]


@dataclass(frozen=True)
class Rejected:
    """An input that can not be used: path relative to the scanned folder, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class SeriesFiles:
    """The files of one volume. Identifiers are raw: for memory only, never written.

    Attributes:
        files: sorted by path; `read_series` brings them into the order of the slices.
        root: the scanned folder; messages name files relative to it.
        part: "" or which part of a series of several volumes this is ("b=1000", "time 3"); safe to show.
        headers: of the files, in their order; without them `read_series` reads them.
        frames: of each file the frames that belong to this volume; empty: all of all.
        bytes: size of the decoded voxels as float32, to balance work.
    """

    uid: str = field(repr=False)
    patient_id: str = field(repr=False)
    modality: str
    files: tuple[Path, ...]
    root: Path = Path()
    part: str = ""
    headers: tuple[Header, ...] = field(default=(), repr=False)
    frames: tuple[tuple[int, ...], ...] = field(default=(), repr=False)
    study_date: str = field(default="", repr=False)
    institution: str = field(default="", repr=False)
    station: str = field(default="", repr=False)
    burned_in: str = field(default="", repr=False)
    bytes: int = 0

    @property
    def source_id(self) -> str:
        """Raw identifier of this volume: the SeriesInstanceUID, and the part if there are several."""
        return f"{self.uid}#{self.part}" if self.part else self.uid


@dataclass(frozen=True)
class SegFile:
    """A DICOM SEG or RTSTRUCT object: the series that it refers to, and the labels of its segments or regions.

    Attributes:
        annotator: raw name of who made it: for memory only, never written.
        review: ApprovalStatus, "" if none.
    """

    path: Path
    series: tuple[str, ...] = field(repr=False)
    labels: tuple[str, ...]
    root: Path = Path()
    kind: str = "seg"
    annotator: str = field(default="", repr=False)
    review: str = ""


@dataclass(frozen=True)
class DicomScan:
    """What a folder holds.

    Attributes:
        series: image series, sorted by UID and part.
        segmentations: DICOM SEG and RTSTRUCT objects, sorted by path.
        rejected: DICOM that can not be read.
        skipped: files that are not DICOM.
        others: DICOM objects that are not images (reports, presentation states, DICOMDIR).
        notes: what the user should know.
    """

    series: tuple[SeriesFiles, ...]
    segmentations: tuple[SegFile, ...]
    rejected: tuple[Rejected, ...]
    skipped: int
    others: int
    notes: tuple[str, ...] = ()


def scan_dicom(root: Path, on_file: Callable[[Path], None] | None = None) -> DicomScan:
    """Read the headers of all files below ``root``; what is DICOM is decided by content, never by name.

    Files that are not DICOM are counted only. A DICOM file without what identifies it (mostly: cut off in the header)
    is rejected.
    """

    def headers() -> Iterable[Header]:
        for path in walk(root):
            if on_file is not None:
                on_file(path)
            yield read_header(path, root)

    return group_headers(headers(), root)


def group_headers(headers: Iterable[Header], root: Path) -> DicomScan:
    """Series, segmentations and what can not be used, from the headers of an archive's files. Pure.

    The result does not depend on the order of ``headers``.
    """
    series: dict[str, list[Header]] = {}
    segmentations: list[SegFile] = []
    rejected: list[Rejected] = []
    skipped = others = nameless = 0
    for header in headers:
        if header.kind == "not_dicom":
            skipped += 1
        elif header.kind == "other":
            others += 1
        elif header.kind == "rejected":
            rejected.append(Rejected(header.name, header.reason))
        elif header.kind == "image":
            nameless += not header.patient
            series.setdefault(header.series, []).append(header)
        else:
            segmentations.append(
                SegFile(
                    header.path,
                    header.references,
                    header.labels,
                    root,
                    header.kind,
                    header.annotator,
                    header.review,
                )
            )
    found = []
    for uid, members in sorted(series.items()):
        members.sort(key=lambda header: header.path)
        patients = {header.patient or f"study {header.study or uid}" for header in members}
        modalities = {header.modality for header in members}
        if len(patients) > 1 or len(modalities) > 1:
            what = "PatientID" if len(patients) > 1 else "Modality"
            rejected.append(
                Rejected(
                    members[0].name,
                    f"the {len(members)} files of this series have {max(len(patients), len(modalities))} values of "
                    f"{what}, expected one",
                )
            )
            continue
        found.append(_series(members, patients.pop(), root))
    notes = []
    if nameless:
        notes.append(f"{nameless} files without PatientID: each study counts as a patient of its own")
    if others:
        notes.append(f"{others} DICOM objects that are not images were left out")
    return DicomScan(
        tuple(found),
        tuple(sorted(segmentations, key=lambda item: item.path)),
        tuple(sorted(rejected, key=lambda item: item.path)),
        skipped,
        others,
        tuple(notes),
    )


def _series(members: Sequence[Header], patient: str, root: Path) -> SeriesFiles:
    first = members[0]
    return SeriesFiles(
        first.series,
        patient,
        first.modality,
        tuple(header.path for header in members),
        root,
        headers=tuple(members),
        study_date=next((header.study_date for header in members if header.study_date), ""),
        institution=next((header.institution for header in members if header.institution), ""),
        station=next((header.station for header in members if header.station), ""),
        burned_in="YES" if any(header.burned_in == "YES" for header in members) else first.burned_in,
        bytes=4 * sum(header.rows * header.columns * header.samples * header.count for header in members),
    )


@dataclass(frozen=True)
class _Slice:
    """One frame of a series."""

    header: Header
    frame: Frame
    index: int
    name: str


def read_series(series: SeriesFiles, units: Units = "hu") -> Volume:
    """Read a series as float32 ``(D, H, W)``.

    D runs along the normal of the slices (row direction x column direction), H down the columns, W along the rows.
    Duplicates (one position, equal pixels) are dropped and noted. A stack sheared by a tilted gantry is resampled
    within its slices; then ``source`` is empty, because no file holds these voxels.

    Args:
        units: "hu" applies RescaleSlope and RescaleIntercept of each slice, "stored" does not.

    Raises:
        SourceError: the files are not one regular stack of grey slices, or one can not be read.
    """
    if not series.files:
        raise SourceError("a series without files")
    headers = series.headers or tuple(read_header(path, series.root) for path in series.files)
    for header in headers:
        if header.kind != "image":
            raise SourceError(f"{header.name}: {header.reason or 'not an image'}")
        if header.problem:
            raise SourceError(f"{header.name}: {header.problem}")
        if header.samples != 1 or not header.photometric.startswith("MONOCHROME"):
            raise SourceError(
                f"{header.name}: colour image ({header.photometric}) is not supported yet, expected MONOCHROME1 or 2"
            )
        if header.geometry != "patient":
            raise SourceError(f"{header.name}: no ImagePositionPatient or ImageOrientationPatient; its place is not known")
    slices = [_Slice(header, header.frames[0], 0, header.name) for header in headers]
    _check_alike(slices)
    notes: list[str] = []
    kept, pixels = _drop_duplicates(slices, notes)
    uids = Counter(item.header.instance for item in kept)
    shared = sum(count for count in uids.values() if count > 1)
    if shared:
        notes.append(f"{shared} slices share a SOPInstanceUID at different positions; all kept, ordered by position")
    spacing = kept[0].frame.spacing
    assert spacing is not None
    order, affine, gaps = stack_geometry(
        np.array([item.frame.position for item in kept]),
        np.array([item.frame.orientation for item in kept]).mean(axis=0),
        (spacing[0], spacing[1]),
        kept[0].frame.thickness,
        [item.name for item in kept],
    )
    kept = [kept[index] for index in order]
    if len(gaps) and np.ptp(gaps) > 1e-3 * gaps.mean():
        notes.append(f"slice gaps vary from {gaps.min():.2f} to {gaps.max():.2f} mm; {gaps.mean():.2f} mm is used")
    if units == "hu" and series.modality == "CT" and not all(item.frame.scaled for item in kept):
        notes.append("CT without RescaleSlope and RescaleIntercept: stored values are taken as HU")
    array = np.empty((len(kept), kept[0].header.rows, kept[0].header.columns), np.float32)
    for index, item in enumerate(kept):
        stored = pixels.pop(item.header.path, None)
        _scale(_stored(item) if stored is None else stored, item.frame, units, array[index])
    source = tuple(item.header.path for item in kept)
    shift, angle = tilt(affine, len(kept))
    if angle:
        array, affine = upright(array, affine, shift)
        source = ()
        notes.append(
            f"gantry tilt of {angle:.1f} degrees: the slices were moved in their planes (linear interpolation) onto a grid "
            "along their normal"
        )
    return Volume(array, affine, series.modality, source=source, notes=tuple(notes))


def _stored(item: _Slice) -> np.ndarray:
    return stored_values(item.header)[item.index]


def _scale(stored: np.ndarray, frame: Frame, units: Units, out: np.ndarray) -> None:
    """Rescale into float32; in float64 where float32 would round twice."""
    if units == "stored" or (frame.slope == 1 and frame.intercept == 0):
        out[...] = stored
    elif frame.slope == 1 and frame.intercept == round(frame.intercept) and stored.dtype.itemsize <= 2:
        np.add(stored, np.float32(frame.intercept), out=out, dtype=np.float32)
    else:
        out[...] = stored.astype(np.float64) * frame.slope + frame.intercept


def _check_alike(slices: Sequence[_Slice]) -> None:
    first = slices[0]
    rows, columns = first.header.rows, first.header.columns
    orientations = np.array([item.frame.orientation for item in slices])
    turned = np.abs(orientations - orientations[0]).max(axis=1)
    spacings = np.array([item.frame.spacing for item in slices])
    odd = ~np.isclose(spacings, spacings[0], rtol=1e-3).all(axis=1)
    for index, item in enumerate(slices):
        if (item.header.rows, item.header.columns) != (rows, columns):
            raise SourceError(
                f"mixed image sizes: {first.name} is {rows} x {columns}, {item.name} is "
                f"{item.header.rows} x {item.header.columns}; expected one size in a series"
            )
        if turned[index] > 1e-3:
            raise SourceError(
                f"mixed orientations: {item.name} lies in another plane than {first.name} (a localizer?); expected one "
                "orientation in a series"
            )
        if odd[index]:
            raise SourceError(
                f"mixed PixelSpacing: {first.frame.spacing} mm in {first.name}, {item.frame.spacing} mm in "
                f"{item.name}; expected one in a series"
            )


def _drop_duplicates(slices: Sequence[_Slice], notes: list[str]) -> tuple[list[_Slice], dict[Path, np.ndarray]]:
    """The slices at different positions, and the pixels that had to be read for it.

    The position decides, not the SOPInstanceUID: one that was given twice by mistake must not cost a slice.
    """
    pixels: dict[Path, np.ndarray] = {}
    dropped = set()
    for early, late in same_places(np.array([item.frame.position for item in slices])):
        twin, item = slices[early], slices[late]
        for each in (twin, item):
            if each.header.path not in pixels:
                pixels[each.header.path] = _stored(each)
        a, b = (
            pixels[each.header.path].astype(np.float64) * each.frame.slope + each.frame.intercept
            for each in (twin, item)
        )
        if not np.array_equal(a, b):
            raise SourceError(
                f"{twin.name} and {item.name} lie at the same position with different pixels (time points, echoes or "
                "repeats in one series?); expected one image at each position"
            )
        dropped.add(late)
        del pixels[item.header.path]
        uid = twin.header.instance
        same = "same SOPInstanceUID, " if uid and uid == item.header.instance else ""
        notes.append(f"duplicate dropped: {item.name} is {twin.name} again ({same}same position, equal pixels)")
    return [item for index, item in enumerate(slices) if index not in dropped], pixels
