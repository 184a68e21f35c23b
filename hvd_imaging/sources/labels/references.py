"""Which series an annotation belongs to: those that it names, as far as it was drawn on their slices. Pure.

SEG and RTSTRUCT may name no series at all (both references are optional), or series that they were not drawn on. Then single
frames and contours tell: the images that they name, else the frame of reference and the planes they lie in. A mask put on slices
of another distance has holes, so a series is taken only if all planes lie on its slices, and of several the one with the widest slices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..dicom import Rejected, SegFile, SeriesFiles, relative
from ..frames import Frame

_NAMES = {"seg": "DICOM SEG", "rtstruct": "RTSTRUCT", "volume": "mask volume"}
_WIDER = 1.5
"""Planes so many slices apart were not drawn on these slices, where other images than these are named."""


@dataclass(frozen=True)
class Matched:
    """What belongs to which series.

    Attributes:
        masks: source_id of the series -> its annotations, in the order of their paths.
        refused: source_id -> why an annotation that names the series is not used for it.
        rejected: annotations of no series.
        notes: what the user should know.
    """

    masks: Mapping[str, tuple[SegFile, ...]]
    refused: Mapping[str, str]
    rejected: tuple[Rejected, ...]
    notes: tuple[str, ...]


def match(files: Sequence[SegFile], series: Sequence[SeriesFiles]) -> Matched:
    """Give each annotation to its series."""
    stacks = [_Stack(item) for item in series]
    masks: dict[str, list[SegFile]] = {}
    refused: dict[str, str] = {}
    rejected = []
    found_by: dict[tuple[str, str], int] = {}
    not_all: dict[str, int] = {}
    for file in files:
        what = _NAMES[file.kind]
        named, how, why = _candidates(file, stacks)
        chosen = _drawn_on(file, named, sure=not how) if named else []
        if named and not chosen and not any(stack.placed for stack in named):
            why = f"{what} of a series of {len(named)} images without a place, and it does not say which one it is of"
        elif named and not chosen and not how:
            why = f"{what} that was drawn on slices of another distance or place than those of the series that it names"
        elif named and not chosen:
            why = f"{what} that names no series; of those that share its {how} none has the slices that it was drawn on"
        if not chosen:
            rejected.append(Rejected(relative(file.path, file.root), why))
        elif how:
            found_by[what, how] = found_by.get((what, how), 0) + 1
        others = [stack for stack in named if stack not in chosen] if not how else []
        used = {stack.uid for stack in chosen}
        not_all[what] = not_all.get(what, 0) + bool(used and {stack.uid for stack in others} - used)
        for stack in others:
            if stack.uid in used:
                refused[stack.id] = f"those of its series are of its other volumes (this is {stack.part})"
            else:
                refused[stack.id] = f"the {what} that names this series was drawn on slices of another distance or place"
        for stack in chosen:
            masks.setdefault(stack.id, []).append(file)
    notes = [
        f"{count} {what} that name{'s' * (count == 1)} no series: found by {how}" for (what, how), count in sorted(found_by.items())
    ]
    notes += [
        f"{count} {what} naming several series: used for those on whose slices it was drawn, not for the others"
        for what, count in sorted(not_all.items())
        if count
    ]
    return Matched({id: tuple(found) for id, found in masks.items()}, refused, tuple(rejected), tuple(notes))


class _Stack:
    """The slices of one series."""

    def __init__(self, series: SeriesFiles) -> None:
        self.id, self.uid, self.part, self.patient = series.source_id, series.uid, series.part, series.patient_id
        self.instances = {header.instance for header in series.headers} - {""}
        self.study = series.headers[0].study if series.headers else ""
        self.frame = series.frame_of_reference
        self._series = series
        self._slices: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None

    @property
    def placed(self) -> bool:
        """Its images have a place in the patient."""
        return all(header.geometry == "patient" for header in self._series.headers)

    @property
    def first(self) -> Frame:
        """The frame of the first file."""
        return self._series.headers[0].frames[0]

    def slices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Positions ``(N, 3)`` of the slices in their order, how far each lies along the normal ``(N,)`` in mm, and the normal ``(3,)``.

        N is 0 for images without a place.
        """
        if self._slices is None:
            frames = [
                header.frames[index]
                for number, header in enumerate(self._series.headers)
                for index in (self._series.frames[number] if self._series.frames else range(len(header.frames)))
                if header.geometry == "patient"
            ]
            placed = [frame.position for frame in frames if frame.position is not None and frame.orientation is not None]
            if not placed or len(placed) < len(frames):
                self._slices = np.zeros((0, 3)), np.zeros(0), np.zeros(3)
            else:
                orientation = np.array(frames[0].orientation)
                normal = np.cross(orientation[:3], orientation[3:])
                positions = np.array(placed)
                along = positions @ normal
                order = np.argsort(along, kind="stable")
                kept = order[np.concatenate([[True], np.diff(along[order]) > 0.01])]
                self._slices = positions[kept], along[kept], normal
        return self._slices

    @property
    def distance(self) -> float:
        """Of neighbouring slices in mm; 0 if there is one slice, or none with a place."""
        along = self.slices()[1]
        return float(np.median(np.diff(along))) if len(along) > 1 else 0.0

    def holds(self, planes: np.ndarray, size: tuple[int, int]) -> float | None:
        """The narrowest distance of the planes in slices (1 if there is one plane only), None if not all lie on these slices.

        Args:
            planes: ``(N, 3)`` points in mm.
            size: rows and columns of frames, whose planes begin at their first pixel; (0, 0) for contours.
        """
        positions, along, normal = self.slices()
        if not len(along):
            return None
        distance = self.distance or self.first.thickness or 1.0
        off = planes @ normal
        nearest = np.searchsorted((along[1:] + along[:-1]) / 2, off)
        if (np.abs(off - along[nearest]) > max(0.1 * distance, 0.1)).any():
            return None
        if size != (0, 0):
            aside = planes - positions[nearest]
            aside -= np.outer(aside @ normal, normal)
            pixel = min(self.first.spacing or (1.0, 1.0))
            if size != self._series.headers[0].frame_size or np.linalg.norm(aside, axis=1).max() > 0.5 * pixel:
                return None
        met = np.unique(nearest)
        return float(np.diff(met).min()) if len(met) > 1 else 1.0


def _candidates(file: SegFile, stacks: Sequence[_Stack]) -> tuple[list[_Stack], str, str]:
    """Series that come into question, what led to them ("" if the file names them), and why there are none."""
    what, drawn = _NAMES[file.kind], file.drawn
    if file.series:
        named = [stack for stack in stacks if stack.uid in file.series]
        return named, "", f"{what} of a series that is not in this folder"
    same = [stack for stack in stacks if not drawn.patient or stack.patient == drawn.patient]
    found = [stack for stack in same if stack.instances & (drawn.sources or drawn.listed)]
    if found:
        return found, "source images", ""
    found = [stack for stack in same if stack.frame and stack.frame in drawn.frames]
    found = [stack for stack in found if stack.study == drawn.study] or found
    return found, "frame of reference", f"{what} that names no series, and no image or frame of reference of this folder"


def _drawn_on(file: SegFile, named: Sequence[_Stack], sure: bool) -> list[_Stack]:
    """Of the candidates those on whose slices the annotation was drawn.

    Args:
        sure: the file names them: a single one is believed, unless its planes contradict.
    """
    drawn, chosen = file.drawn, []
    images = drawn.sources or drawn.listed
    for frame in dict.fromkeys(stack.frame for stack in named):
        group = [stack for stack in named if stack.frame == frame]
        own = [stack for stack in group if stack.instances & images]
        known = frame in drawn.frames
        told = [point for place, point in drawn.planes if not known or place in ("", frame)]
        if not told:
            # Nothing is marked, or single frames were not looked at, because one series is named. Of views without a place, which lie
            # in one series often, one must be named.
            chosen += own or ([stack for stack in group if stack.placed or not stack.part] if sure and not drawn.planes else [])
            continue
        planes = np.array(told)
        fits = {stack.id: stack.holds(planes, drawn.size) for stack in group}
        if len(group) == 1 and sure and (own or not images):
            chosen += group
            continue
        among = [stack for stack in own or group if fits[stack.id] is not None]
        if not own and images:
            among = [stack for stack in among if (fits[stack.id] or 0) < _WIDER]
        if not among:
            # What does not fit its own images either is told by its reader, slice by slice.
            chosen += own
            continue
        widest = max(stack.distance for stack in among)
        chosen += [
            stack
            for stack in group
            if fits[stack.id] is not None and abs(stack.distance - widest) <= 0.01 * max(widest, 1e-6)
        ]
    return chosen
