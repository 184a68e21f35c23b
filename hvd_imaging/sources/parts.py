"""Which frames of a series make one volume: stacks, time points, b-values, echoes; and what does not belong. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from .frames import Frame
from .geometry import same_places
from .headers import Header

_NAMES = {
    "TemporalPositionIdentifier": "time",
    "TemporalPositionIndex": "time",
    "DiffusionBValue": "b",
    "DiffusionGradientOrientation": "direction",
    "EchoNumbers": "echo",
    "EchoTime": "echo",
    "EffectiveEchoTime": "echo",
    "InversionTime": "inversion",
    "InversionTimes": "inversion",
    "TriggerTime": "time",
    "NominalCardiacTriggerDelayTime": "time",
    "FrameReferenceTime": "time",
    "ImageType": "type",
    "AcquisitionNumber": "acquisition",
    "AcquisitionTime": "time",
}
"""What may tell apart images at one position, first the most telling, and what a part is called after it."""
_TIMES = ("TriggerTime", "FrameReferenceTime", "AcquisitionTime", "AcquisitionNumber", "NominalCardiacTriggerDelayTime")
_MOST_KEYS = 3
_LEAST_STACK = 8
"""So many slices a stack must have, and four times those of another plane, before those are set aside."""


@dataclass(frozen=True)
class Piece:
    """One frame of one file."""

    header: Header
    frame: Frame
    index: int

    @property
    def name(self) -> str:
        """As messages show it."""
        many = len(self.header.frames) > 1
        return f"{self.header.name} frame {self.index + 1}" if many else self.header.name


def pieces_of(header: Header, chosen: Iterable[int] | None = None) -> list[Piece]:
    """The frames of a file, or the chosen ones."""
    numbers = range(len(header.frames)) if chosen is None else chosen
    return [Piece(header, header.frames[index], index) for index in numbers]


def volumes_of(members: Sequence[Header]) -> tuple[list[tuple[str, list[Piece]]], list[tuple[str, str]]]:
    """The volumes of one series.

    Args:
        members: headers of its files, sorted by path.

    Returns:
        (part, frames) of each volume, part "" if there is one only; (name, reason) of files that are set aside.
    """
    # A damaged header has no frames: it keeps its place among the others, and reading says what is wrong.
    placed = [header for header in members if header.geometry == "patient"]
    flat = sorted(
        (header for header in members if header.geometry != "patient"), key=lambda header: (header.number, header.path)
    )
    volumes: list[tuple[str, list[Piece]]] = []
    aside: list[tuple[str, str]] = []
    broken = [Piece(header, Frame(), 0) for header in placed if header.problem or not header.frames]
    pieces = [piece for header in placed if not header.problem for piece in pieces_of(header)]
    if broken:
        volumes.append(("", [*pieces, *broken]))
    elif pieces:
        pieces, aside = regular(pieces)
        stacks = by_stack(pieces)
        for stack, members_of_stack in stacks:
            for part, chosen in split(members_of_stack):
                volumes.append((", ".join(filter(None, (stack, part))), chosen))
    alone = len(flat) == 1 and not volumes
    for number, header in enumerate(flat, 1):
        volumes.append(("" if alone else f"image {number}", pieces_of(header) or [Piece(header, Frame(), 0)]))
    return volumes, aside


def regular(pieces: list[Piece]) -> tuple[list[Piece], list[tuple[str, str]]]:
    """The frames without localizers and other odd ones, if it is clear which are odd; else all of them."""
    groups: list[list[Piece]] = []
    for piece in pieces:
        for group in groups:
            if _alike(group[0], piece):
                group.append(piece)
                break
        else:
            groups.append([piece])
            if len(groups) > 64:
                return pieces, []
    if len(groups) == 1:
        return pieces, []
    main = max(groups, key=len)
    others = [group for group in groups if group is not main]
    if any("LOCALIZER" in piece.header.image_type for piece in main):
        return pieces, []
    for group in others:
        told = all("LOCALIZER" in piece.header.image_type for piece in group)
        rare = len(main) >= max(_LEAST_STACK, 4 * len(group))
        if not told and not rare:
            return pieces, []
    kept = {piece.header.path for piece in main}
    odd = [piece for group in others for piece in group]
    if any(piece.header.path in kept for piece in odd):  # frames of one file: its own matter
        return pieces, []
    why = f"set aside: of another size or plane than the {len(main)} other images of its series (a localizer?)"
    return main, sorted({(piece.header.name, why) for piece in odd})


def _alike(a: Piece, b: Piece) -> bool:
    if a.header.frame_size != b.header.frame_size or a.header.colour != b.header.colour:
        return False
    for one, other, near in (
        (a.frame.orientation, b.frame.orientation, 1e-3),
        (a.frame.spacing, b.frame.spacing, 1e-3 * max(a.frame.spacing or (1.0,))),
    ):
        if one is None or other is None or max(abs(x - y) for x, y in zip(one, other, strict=True)) > near:
            return False
    return True


def by_stack(pieces: list[Piece]) -> list[tuple[str, list[Piece]]]:
    """Frames of each StackID."""
    stacks: dict[str, list[Piece]] = {}
    for piece in pieces:
        stacks.setdefault(piece.frame.stack, []).append(piece)
    if len(stacks) == 1:
        return [("", pieces)]
    ordered = sorted(stacks, key=lambda stack: (len(stack), stack))
    return [(f"stack {number}", stacks[stack]) for number, stack in enumerate(ordered, 1)]


def split(pieces: list[Piece]) -> list[tuple[str, list[Piece]]]:
    """Volumes with each position once, by the fewest properties that part the frames cleanly.

    Clean means: in each part every position once, and the same positions in all parts. What nothing parts stays one
    volume: reading drops equal copies and refuses others.
    """
    whole = [("", pieces)]
    place = list(range(len(pieces)))
    if any(piece.frame.position is None for piece in pieces):
        return whole
    for early, late in same_places(np.array([piece.frame.position for piece in pieces])):
        place[late] = place[early]
    # The same instance at the same place is a copy, not another time.
    twins: dict[tuple[str, int, int], int] = {}
    copies: dict[int, int] = {}
    for number, piece in enumerate(pieces):
        if piece.header.instance:
            original = twins.setdefault((piece.header.instance, place[number], piece.index), number)
            if original != number:
                copies[number] = original
    single = [number for number in range(len(pieces)) if number not in copies]
    repeats: dict[int, int] = {}
    for number in single:
        repeats[place[number]] = repeats.get(place[number], 0) + 1
    if max(repeats.values()) == 1 or len(set(repeats.values())) > 1:
        return whole
    keys = {number: dict(pieces[number].frame.keys) for number in single}
    names = [
        name
        for name in _NAMES
        if all(name in keys[number] for number in single) and len({keys[number][name] for number in single}) > 1
    ]
    for size in range(1, _MOST_KEYS + 1):
        for chosen in combinations(names, size):
            groups: dict[tuple[float | str, ...], list[int]] = {}
            for number in single:
                groups.setdefault(tuple(keys[number][name] for name in chosen), []).append(number)
            if len(groups) > 1 and _clean(groups.values(), place, len(repeats)):
                return _named(pieces, groups, chosen, copies)
    for name in names:
        if name in _TIMES:
            ranked = _by_rank(single, place, keys, name)
            if ranked:
                return _named(pieces, ranked, (name,), copies)
    return whole


def _clean(groups: Iterable[list[int]], place: Sequence[int], count: int) -> bool:
    return all(len(group) == count == len({place[number] for number in group}) for group in groups)


def _by_rank(
    single: Sequence[int], place: Sequence[int], keys: dict[int, dict[str, float | str]], name: str
) -> dict[tuple[float | str, ...], list[int]]:
    """The k-th in time at each position, if no two are at the same time."""
    places: dict[int, list[int]] = {}
    for number in single:
        places.setdefault(place[number], []).append(number)
    groups: dict[tuple[float | str, ...], list[int]] = {}
    for members in places.values():
        values = [keys[number][name] for number in members]
        if len(set(values)) != len(values) or len({type(value) for value in values}) > 1:
            return {}
        for rank, number in enumerate(sorted(members, key=lambda number: keys[number][name])):
            groups.setdefault((float(rank),), []).append(number)
    return groups


def _named(
    pieces: list[Piece],
    groups: dict[tuple[float | str, ...], list[int]],
    names: tuple[str, ...],
    copies: dict[int, int],
) -> list[tuple[str, list[Piece]]]:
    """Parts in the order of their values; called by number, except b-values: other values might identify."""
    ranks = [{value: rank for rank, value in enumerate(sorted({key[i] for key in groups}), 1)} for i in range(len(names))]
    result = []
    for key in sorted(groups):
        words = [
            f"b={value:g}" if name == "DiffusionBValue" and isinstance(value, float) else f"{_NAMES[name]} {ranks[i][value]}"
            for i, (name, value) in enumerate(zip(names, key, strict=True))
        ]
        members = set(groups[key])
        members |= {copy for copy, original in copies.items() if original in members}
        result.append((", ".join(words), [pieces[number] for number in sorted(members)]))
    return result
