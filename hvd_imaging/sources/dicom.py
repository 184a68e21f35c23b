"""DICOM series as volumes: found by content, ordered and spaced by where the slices lie in the patient.

Files are described one by one (`headers`), which any number of ranks can share; series come from the headers alone.
Tags that describe the distance of slices in words (SpacingBetweenSlices, SliceThickness) are not believed: real series
contradict them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..errors import SourceError
from ..volume import SourceFrames, Volume
from .drawn import Drawn
from .elements import looks_like_dicom, quiet, read_dataset, relative, walk
from .frames import Frame
from .geometry import same_places, stack_geometry, tilt, upright
from .headers import CROSS_SECTIONS, Header, read_header
from .padding import Padding
from .parts import Piece, pieces_of, volumes_of
from .people import judge, plain_issuer
from .pixels import Units, scale, stored_values

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


@dataclass(frozen=True)
class Rejected:
    """An input that cannot be used: path relative to the scanned folder, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class SeriesFiles:
    """The files of one volume. Identifiers are raw: for memory only, never written.

    Attributes:
        files: sorted by path; `read_series` brings them into the order of the slices.
        root: the scanned folder; messages name files relative to it.
        issuer: IssuerOfPatientID where the same PatientID of another issuer is another patient, else "".
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
    issuer: str = field(default="", repr=False)

    @property
    def person(self) -> str:
        """Raw identifier of the patient that this counts for."""
        return f"{self.patient_id} of issuer {self.issuer}" if self.issuer else self.patient_id

    @property
    def source_id(self) -> str:
        """Raw identifier of this volume: the SeriesInstanceUID, and the part if there are several."""
        return f"{self.uid}#{self.part}" if self.part else self.uid

    @property
    def frame_of_reference(self) -> str:
        """Raw FrameOfReferenceUID, "" if it is not known."""
        return self.headers[0].frame_of_reference if self.headers else ""


@dataclass(frozen=True)
class SegFile:
    """A DICOM SEG or RTSTRUCT object, or a mask volume: the series that it refers to, and its labels.

    Attributes:
        kind: "seg", "rtstruct" or "volume".
        codes: of SEG, for each label its code, "" if it has none.
        annotator: raw name of who made it: for memory only, never written.
        review: ApprovalStatus, "" if none.
        drawn: what else tells on which images it was drawn.
        named: words in upper case by which it names or numbers people: for memory only, never written.
    """

    path: Path
    series: tuple[str, ...] = field(repr=False)
    labels: tuple[str, ...] = field(repr=False)
    root: Path = Path()
    kind: str = "seg"
    codes: tuple[str, ...] = ()
    annotator: str = field(default="", repr=False)
    review: str = ""
    drawn: Drawn = field(default_factory=Drawn, repr=False)
    named: frozenset[str] = field(default=frozenset(), repr=False)


@dataclass(frozen=True)
class DicomScan:
    """What a folder holds.

    Attributes:
        series: image series, sorted by UID and part.
        segmentations: DICOM SEG and RTSTRUCT objects, sorted by path.
        rejected: DICOM that cannot be read.
        skipped: files that are not DICOM.
        others: DICOM objects that are not images (reports, presentation states, DICOMDIR).
        notes: what the user should know.
        unknown: the files that are not DICOM, sorted.
        remarks: what the user should know of single files, which are used all the same.
    """

    series: tuple[SeriesFiles, ...]
    segmentations: tuple[SegFile, ...]
    rejected: tuple[Rejected, ...]
    skipped: int
    others: int
    notes: tuple[str, ...] = ()
    unknown: tuple[Path, ...] = field(default=(), repr=False)
    remarks: tuple[Rejected, ...] = ()


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
    """Series, segmentations and what cannot be used, from the headers of an archive's files. Pure.

    The result does not depend on the order of ``headers``.
    """
    series: dict[str, list[Header]] = {}
    segmentations: list[SegFile] = []
    rejected: list[Rejected] = []
    unknown: list[Path] = []
    others = nameless = 0
    for header in headers:
        if header.kind == "not_dicom":
            unknown.append(header.path)
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
                    header.codes,
                    header.annotator,
                    header.review,
                    header.drawn,
                    header.named,
                )
            )
    people = judge(header for members in series.values() for header in members)
    found = []
    for uid, members in sorted(series.items()):
        members.sort(key=lambda header: header.path)
        patients = {header.patient or f"study {header.study or uid}" for header in members}
        modalities = {header.modality for header in members}
        if len(patients) > 1 or len(modalities) > 1:
            what = "PatientID" if len(patients) > 1 else "Modality"
            why = (
                f"the {len(members)} files of this series have {max(len(patients), len(modalities))} values of {what}, "
                "expected one"
            )
            rejected += [Rejected(header.name, why) for header in members]
            continue
        volumes, aside = volumes_of(members)
        rejected += [Rejected(name, why) for name, why in aside]
        patient = patients.pop()
        known = (people.issuers.get((header.patient, plain_issuer(header.issuer)), "") for header in members)
        issuer = next(filter(None, known), "")
        found += [_series(pieces, patient, root, part, issuer) for part, pieces in volumes]
    notes = []
    if nameless:
        notes.append(f"{nameless} files without PatientID: each study counts as a patient of its own")
    if others:
        notes.append(f"{others} DICOM objects that are not images were left out")
    notes += people.notes
    return DicomScan(
        tuple(found),
        tuple(sorted(segmentations, key=lambda item: item.path)),
        tuple(sorted(rejected, key=lambda item: item.path)),
        len(unknown),
        others,
        tuple(notes),
        tuple(sorted(unknown)),
        tuple(Rejected(name, what) for name, what in people.examples),
    )


def _series(
    pieces: Sequence[Piece], patient: str, root: Path, part: str, issuer: str
) -> SeriesFiles:
    """One volume of frames of one or more files."""
    chosen: dict[Path, list[int]] = {}
    known: dict[Path, Header] = {}
    for piece in pieces:
        chosen.setdefault(piece.header.path, []).append(piece.index)
        known[piece.header.path] = piece.header
    members = [known[path] for path in sorted(known)]
    first = members[0]
    size = sum(math.prod(piece.header.frame_size) * (3 if piece.header.colour else 1) for piece in pieces)
    if first.geometry != "patient":
        size *= first.count
    return SeriesFiles(
        first.series,
        patient,
        first.modality,
        tuple(header.path for header in members),
        root,
        part,
        headers=tuple(members),
        frames=tuple(tuple(sorted(chosen[header.path])) for header in members),
        study_date=next((header.study_date for header in members if header.study_date), ""),
        institution=next((header.institution for header in members if header.institution), ""),
        station=next((header.station for header in members if header.station), ""),
        burned_in="YES" if any(header.burned_in == "YES" for header in members) else first.burned_in,
        bytes=4 * size,
        issuer=issuer,
    )


def read_series(series: SeriesFiles, units: Units = "hu") -> Volume:
    """Read a series as float32 ``(D, H, W)``, or ``(D, H, W, 3)`` RGB.

    D runs along the normal of the slices (row direction x column direction), H down the columns, W along the rows.
    Duplicates (one position, equal pixels) are dropped and noted. A stack sheared by a tilted gantry is resampled
    within its slices; then ``source`` is empty, because no file holds these voxels. Images without a place in the patient
    (projections, ultrasound, photographs) have their frames along D, and say so by ``geometry``.

    Args:
        units: "hu" applies rescale or modality LUT of each slice, "stored" does not.

    Raises:
        SourceError: the files are not one regular stack of slices alike, or one cannot be read.
        SetupError: an image is compressed, and the decoders are not installed.
    """
    if not series.files:
        raise SourceError("a series without files")
    headers = series.headers or tuple(read_header(path, series.root) for path in series.files)
    for header in headers:
        if header.kind != "image":
            raise SourceError(f"{header.name}: {header.reason or 'not an image'}")
        if header.problem:
            raise SourceError(f"{header.name}: {header.problem}")
    if headers[0].geometry != "patient":
        return _flat(headers[0], units)
    slices = [
        piece
        for number, header in enumerate(headers)
        for piece in pieces_of(header, series.frames[number] if series.frames else None)
    ]
    first = slices[0]
    if len(slices) == 1 and first.header.sop_class not in CROSS_SECTIONS and not first.frame.thickness:
        return _flat(first.header, units, "image")  # a capture with a place, but without extent
    _check_alike(slices)
    reader = _Reader(slices)
    notes: list[str] = []
    kept = _drop_duplicates(slices, reader, notes)
    uids = Counter(piece.header.instance for piece in kept if len(piece.header.frames) == 1)
    shared = sum(count for count in uids.values() if count > 1)
    if shared:
        notes.append(f"{shared} slices share a SOPInstanceUID at different positions; all kept, ordered by position")
    spacing = first.frame.spacing
    if spacing is None:
        raise SourceError(f"{first.name}: no usable PixelSpacing; the size of its pixels is not known")
    order, affine, gaps = stack_geometry(
        np.array([piece.frame.position for piece in kept]),
        np.array([piece.frame.orientation for piece in kept]).mean(axis=0),
        (spacing[0], spacing[1]),
        kept[0].frame.thickness,
        [piece.name for piece in kept],
    )
    kept = [kept[index] for index in order]
    shift, angle = tilt(affine, len(kept))
    if len(gaps) and np.ptp(gaps) > 1e-3 * gaps.mean():
        notes.append(f"slice gaps vary from {gaps.min():.2f} to {gaps.max():.2f} mm; {gaps.mean():.2f} mm is used")
    notes += _unscaled([piece.frame for piece in kept], units)
    if units == "hu" and series.modality == "CT" and not all(p.frame.scaled or p.frame.unscalable or p.header.lut for p in kept):
        notes.append("CT without RescaleSlope and RescaleIntercept: stored values are taken as HU")
    channels = (3,) if first.header.colour else ()
    array = np.empty((len(kept), *first.header.frame_size, *channels), np.float32)
    padding = Padding(series.modality, units)
    for index, piece in enumerate(kept):
        stored = reader.take(piece)
        scale(stored, piece.header, piece.frame, units, array[index])
        padding.look(index, stored, piece.header, piece.frame)
    notes += padding.fill(array)
    notes += dict.fromkeys(note for header in headers for note in header.notes)
    source = tuple(dict.fromkeys(piece.header.path for piece in kept))
    frames = SourceFrames(
        tuple(piece.header.path for piece in kept), tuple(piece.index for piece in kept), (len(kept), *first.header.frame_size), affine
    )
    if angle:
        array, affine = upright(array, affine, shift)
        source = ()
        notes.append(
            f"gantry tilt of {angle:.1f} degrees: the slices were moved in their planes (linear interpolation) onto a grid "
            "along their normal"
        )
    return Volume(array, affine, series.modality, source=source, frames=frames, notes=tuple(notes))


def _flat(header: Header, units: Units, geometry: str = "") -> Volume:
    """An image or a cine without a place: frames along D."""
    stored = stored_values(header)
    frame = header.frames[0]
    array = np.empty(stored.shape, np.float32)
    padding = Padding(header.modality, units)
    for index in range(len(stored)):
        scale(stored[index], header, frame, units, array[index])
        padding.look(index, stored[index], header, frame)
    affine = np.eye(4)
    if frame.spacing is not None and (geometry or header.geometry) == "image":
        affine[1, 1], affine[2, 2] = frame.spacing
    notes = header.notes + _unscaled([frame], units) + padding.fill(array)
    if len(stored) > 1:
        notes += (f"{len(stored)} frames without a place in the patient lie along D; their distance is an index",)
    return Volume(
        array, affine, header.modality, source=(header.path,), notes=notes, geometry=geometry or header.geometry
    )


def _unscaled(frames: Sequence[Frame], units: Units) -> tuple[str, ...]:
    zero = sum(frame.unscalable for frame in frames) if units == "hu" else 0
    if not zero:
        return ()
    return (f"RescaleSlope is 0 in {zero} of {len(frames)} images, which would make all values one; their stored values are taken",)


class _Reader:
    """Stored values of single frames; a file of many frames is decoded once and let go after its last frame."""

    def __init__(self, slices: Sequence[Piece]) -> None:
        self._left = Counter(piece.header.path for piece in slices)
        self._held: dict[Path, np.ndarray] = {}

    def look(self, piece: Piece) -> np.ndarray:
        """A frame that will be taken later."""
        path = piece.header.path
        if path not in self._held:
            self._held[path] = stored_values(piece.header)
        return self._held[path][piece.index]

    def take(self, piece: Piece) -> np.ndarray:
        """A frame for the last time."""
        path = piece.header.path
        self._left[path] -= 1
        if path not in self._held and not self._left[path]:
            return stored_values(piece.header)[piece.index]
        values = self.look(piece)
        if not self._left[path]:
            del self._held[path]
        return values


def _check_alike(slices: Sequence[Piece]) -> None:
    first = slices[0]
    rows, columns = first.header.frame_size
    orientations = np.array([piece.frame.orientation for piece in slices])
    turned = np.abs(orientations - orientations[0]).max(axis=1)
    spacings = np.array([piece.frame.spacing for piece in slices])
    odd = ~np.isclose(spacings, spacings[0], rtol=1e-3).all(axis=1)
    for index, piece in enumerate(slices):
        if piece.header.frame_size != (rows, columns):
            raise SourceError(
                f"mixed image sizes: {first.name} is {rows} x {columns}, {piece.name} is "
                f"{piece.header.frame_size[0]} x {piece.header.frame_size[1]}; expected one size in a series"
            )
        if piece.header.colour != first.header.colour:
            grey, colour = sorted((first, piece), key=lambda each: each.header.colour)
            raise SourceError(f"mixed grey and colour images: {colour.name} is a colour image, {grey.name} is not")
        if turned[index] > 1e-3:
            raise SourceError(
                f"mixed orientations: {piece.name} lies in another plane than {first.name} (a localizer?); expected one "
                "orientation in a series"
            )
        if odd[index]:
            raise SourceError(
                f"mixed PixelSpacing: {first.frame.spacing} mm in {first.name}, {piece.frame.spacing} mm in "
                f"{piece.name}; expected one in a series"
            )


def _drop_duplicates(slices: Sequence[Piece], reader: _Reader, notes: list[str]) -> list[Piece]:
    """The slices at different positions.

    The position decides, not the SOPInstanceUID: one that was given twice by mistake must not cost a slice.
    """
    dropped = set()
    for early, late in same_places(np.array([piece.frame.position for piece in slices])):
        twin, piece = slices[early], slices[late]
        a = reader.look(twin).astype(np.float64) * twin.frame.slope + twin.frame.intercept
        b = reader.take(piece).astype(np.float64) * piece.frame.slope + piece.frame.intercept
        if not np.array_equal(a, b):
            raise SourceError(
                f"{twin.name} and {piece.name} lie at the same position with different pixels (time points, echoes or "
                "repeats in one series?); expected one image at each position"
            )
        dropped.add(late)
        uid = twin.header.instance
        same = "same SOPInstanceUID, " if uid and uid == piece.header.instance else ""
        notes.append(f"duplicate dropped: {piece.name} is {twin.name} again ({same}same position, equal pixels)")
    return [piece for index, piece in enumerate(slices) if index not in dropped]
