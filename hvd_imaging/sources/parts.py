"""Which frames of a series make one volume: stacks, time points, b-values, echoes; and what does not belong. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

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
Value = float | str | None
"""Of a property; None: the frame does not have it, as a frame of b=0 has no direction (PS3.3 C.8.13.5.9)."""
Keys = dict[str, float | str]
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
    flat, copies = _views(header for header in members if header.geometry != "patient")
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
    return volumes, [*aside, *copies]


def _views(headers: Iterable[Header]) -> tuple[list[Header], list[tuple[str, str]]]:
    """Images without a place, in the order of their numbers whatever their files are called; and copies of them.

    The same instance with another number or size is no copy: some archives give one SOPInstanceUID to all their files.
    """
    ordered = sorted(headers, key=lambda header: (header.number, header.instance, header.path))
    known: dict[tuple[object, ...], Header] = {}
    kept: list[Header] = []
    aside: list[tuple[str, str]] = []
    for header in ordered:
        mark = (header.instance, header.number, header.frame_size, header.count, header.image_type, header.frames)
        if header.instance and known.setdefault(mark, header) is not header:
            aside.append((header.name, "a copy: another file of its series holds the same instance"))
        else:
            kept.append(header)
    return kept, aside


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
    chosen = _parting(single, place, keys)
    if chosen:
        return _named(pieces, _groups(single, keys, chosen), chosen, copies)
    for name in _TIMES:
        if all(name in keys[number] for number in single) and len({keys[number][name] for number in single}) > 1:
            ranked = _by_rank(single, place, keys, name)
            if ranked:
                return _named(pieces, ranked, (name,), copies)
    return whole


def _groups(single: Sequence[int], keys: Mapping[int, Keys], names: Sequence[str]) -> dict[tuple[Value, ...], list[int]]:
    """Frames by their values of some properties; a property that a frame does not have is a value like any other."""
    groups: dict[tuple[Value, ...], list[int]] = {}
    for number in single:
        groups.setdefault(tuple(keys[number].get(name) for name in names), []).append(number)
    return groups


def _parting(single: Sequence[int], place: Sequence[int], keys: Mapping[int, Keys]) -> tuple[str, ...]:
    """The fewest properties whose values are the volumes: each has every position once; () if there are none.

    A property that parts cleanly together with others is the same all over a volume. So the frames of each of its values are
    whole volumes: they have all positions equally often, and there are no more values than volumes. What fails this alone, fails it
    with others too, which leaves few combinations.
    """
    spots = np.unique([place[number] for number in single], return_inverse=True)[1]
    count = int(spots.max()) + 1
    volumes = len(single) // count
    known = [name for name in _NAMES if any(name in keys[number] for number in single)]
    codes = {}
    for name in known:
        values: dict[Value, int] = {}
        codes[name] = np.array([values.setdefault(keys[number].get(name), len(values)) for number in single])
    level: list[tuple[tuple[str, ...], np.ndarray]] = [((), np.zeros(len(single), int))]
    while level:
        finer: list[tuple[tuple[str, ...], np.ndarray]] = []
        for names, before in level:
            for name in known[known.index(names[-1]) + 1 if names else 0 :]:
                joint = before * (int(codes[name].max()) + 1) + codes[name]
                parts = np.unique(joint, return_inverse=True)[1]
                groups = int(parts.max()) + 1
                if not int(before.max()) + 1 < groups <= volumes:
                    continue
                table = np.bincount(parts * count + spots, minlength=groups * count).reshape(groups, count)
                if (table != table[:, :1]).any():
                    continue
                if groups == volumes:
                    return _with_b((*names, name), codes)
                finer.append(((*names, name), parts))
        level = finer
    return ()


def _with_b(names: tuple[str, ...], codes: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    """Directions are called by their b-value too, if each has one: it says more than their number."""
    b, direction = "DiffusionBValue", "DiffusionGradientOrientation"
    if direction not in names or b in names or b not in codes:
        return names
    told = {(way, value) for way, value in zip(codes[direction].tolist(), codes[b].tolist(), strict=True)}
    return (b, *names) if len(told) == len({way for way, _ in told}) else names


def _by_rank(
    single: Sequence[int], place: Sequence[int], keys: Mapping[int, Keys], name: str
) -> dict[tuple[Value, ...], list[int]]:
    """The k-th in time at each position, if no two are at the same time."""
    places: dict[int, list[int]] = {}
    for number in single:
        places.setdefault(place[number], []).append(number)
    groups: dict[tuple[Value, ...], list[int]] = {}
    for members in places.values():
        values = [keys[number][name] for number in members]
        if len(set(values)) != len(values) or len({type(value) for value in values}) > 1:
            return {}
        for rank, number in enumerate(sorted(members, key=lambda number: keys[number][name])):
            groups.setdefault((float(rank),), []).append(number)
    return groups


def _named(
    pieces: list[Piece],
    groups: dict[tuple[Value, ...], list[int]],
    names: tuple[str, ...],
    copies: dict[int, int],
) -> list[tuple[str, list[Piece]]]:
    """Parts in the order of their values; called by number, except b-values: other values might identify."""
    ranks = [
        {value: rank for rank, value in enumerate(sorted({key[i] for key in groups} - {None}, key=_order), 1)} for i in range(len(names))
    ]
    result = []
    taken: Counter[str] = Counter()
    for key in sorted(groups, key=lambda key: [_order(value) for value in key]):
        words = [
            f"b={value:g}" if name == "DiffusionBValue" and isinstance(value, float) else f"{_NAMES[name]} {ranks[i][value]}"
            for i, (name, value) in enumerate(zip(names, key, strict=True))
            if value is not None
        ]
        part = ", ".join(words) or f"no {_NAMES[names[0]]}"
        taken[part] += 1
        if taken[part] > 1:  # b-values that differ in digits that are not shown
            part = f"{part} ({taken[part]})"
        members = set(groups[key])
        members |= {copy for copy, original in copies.items() if original in members}
        result.append((part, [pieces[number] for number in sorted(members)]))
    return result


def _order(value: Value) -> tuple[int, float, str]:
    """Absent first, then numbers, then texts."""
    if value is None:
        return 0, 0.0, ""
    return (1, value, "") if isinstance(value, float) else (2, 0.0, str(value))
