"""Series of several volumes come apart wherever something tells their frames apart, and never into a wrong volume."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from test_dicom_kinds import flat, item
from test_sources_dicom import make_slice, write

from hvd_imaging.sources.dicom import group_headers, read_series, scan_dicom
from hvd_imaging.sources.frames import Frame
from hvd_imaging.sources.headers import Header
from hvd_imaging.sources.parts import volumes_of

KEYS = {
    "TemporalPositionIdentifier": [1.0, 2.0, 3.0],
    "DiffusionBValue": [0.0, 500.0, 1000.0],
    "DiffusionGradientOrientation": ["1.0000 0.0000 0.0000", "0.0000 1.0000 0.0000", "0.0000 0.0000 1.0000"],
    "EchoNumbers": [1.0, 2.0],
    "EchoTime": [4.92, 7.38],
    "InversionTime": [800.0],
    "ImageType": ["M", "P"],
    "AcquisitionNumber": [1.0, 2.0],
}


@st.composite
def series_of_volumes(draw):
    """(key tuples of the volumes, number of positions, do times of frames tell nothing?); any volume may lack any key."""
    names = draw(st.lists(st.sampled_from(sorted(KEYS)), min_size=1, max_size=5, unique=True))
    values = st.tuples(*(st.one_of(st.none(), st.sampled_from(KEYS[name])) for name in names))
    volumes = draw(st.lists(values, min_size=2, max_size=8, unique=True))
    return names, volumes, draw(st.integers(2, 5)), draw(st.booleans()), draw(st.randoms(use_true_random=False))


@settings(max_examples=150, deadline=None)
@given(series_of_volumes())
def test_frames_come_apart_into_their_volumes_in_any_order_of_files(drawn):
    names, volumes, count, timed, random = drawn
    headers = []
    for volume, values in enumerate(volumes):
        for place in range(count):
            keys = [(name, value) for name, value in zip(names, values, strict=True) if value is not None]
            if timed:  # every frame at its own time: no two of a volume agree
                keys.append(("AcquisitionTime", f"{random.random():.6f}"))
            frame = Frame((0.0, 0.0, 2.0 * place), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0), (1.0, 1.0), keys=tuple(keys))
            headers.append(Header(Path("?"), Path(), "image", instance=f"{volume} {place}", rows=4, columns=4, frames=(frame,)))
    found = []
    for _ in range(2):
        random.shuffle(headers)
        named = sorted((replace(header, path=Path(f"{number:04d}")) for number, header in enumerate(headers)), key=lambda h: h.path)
        parts, aside = volumes_of(named)
        assert not aside
        found.append({name: frozenset(piece.header.instance for piece in pieces) for name, pieces in parts})
        assert len(found[-1]) == len(parts) == len(volumes)
    expected = {frozenset(f"{volume} {place}" for place in range(count)) for volume in range(len(volumes))}
    assert set(found[0].values()) == expected
    assert found[0] == found[1]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 2)), min_size=2, max_size=12))
def test_no_part_has_a_position_twice(drawn):
    """Whatever the values are: what does not come apart cleanly stays whole, and reading refuses it."""
    assume(len({place for place, _, _ in drawn}) < len(drawn))
    headers = []
    for number, (place, echo, time) in enumerate(drawn):
        keys = (("EchoTime", float(echo)),) * (echo > 0) + (("TemporalPositionIdentifier", float(time)),) * (time > 0)
        frame = Frame((0.0, 0.0, 2.0 * place), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0), (1.0, 1.0), keys=keys)
        headers.append(Header(Path(f"{number:02d}"), Path(), "image", instance=str(number), rows=4, columns=4, frames=(frame,)))
    parts, _ = volumes_of(headers)
    assert sum(len(pieces) for _, pieces in parts) == len(drawn)
    if len(parts) > 1:
        for _, pieces in parts:
            places = [piece.frame.position for piece in pieces]
            assert len(set(places)) == len(places)


def diffusion(index, b, direction=None, enhanced=False):
    """The slices of one volume, values ``index``; a direction only where there is one."""
    extra = {} if b is None else {"DiffusionBValue": b}
    if direction is not None:
        extra["DiffusionGradientOrientation"] = direction
    return [make_slice(z, np.full((4, 6), index, np.int16), **extra) for z in (0, 2, 4)]


WAYS = ([1.0, 0, 0], [0.0, 1, 0], [0.0, 0, 1])


def test_b0_without_a_direction_is_a_volume_of_its_own(tmp_path):
    """Classic files leave the direction of b=0 out."""
    slices = diffusion(0, 0.0)
    for index, way in enumerate(WAYS, 1):
        slices += diffusion(index, 1000.0, way)
    series = scan_dicom(write(tmp_path, slices)).series
    assert [each.part for each in series] == ["b=0", "b=1000, direction 1", "b=1000, direction 2", "b=1000, direction 3"]
    assert sorted(int(read_series(each, "stored").array.max()) for each in series) == [0, 1, 2, 3]


def test_enhanced_b0_of_directionality_none_is_a_volume_of_its_own(tmp_path):
    """Enhanced MR: DiffusionDirectionality NONE comes without the sequence of the gradient (PS3.3 C.8.13.5.9)."""
    from test_dicom_kinds import enhanced_ct

    image = enhanced_ct([(z, "1", 1) for z in (0.0, 2.0, 4.0)] * 3)
    for number, group in enumerate(image.PerFrameFunctionalGroupsSequence):
        del group.FrameContentSequence[0].TemporalPositionIndex
        diffusion = Dataset()
        diffusion.DiffusionBValue = 0.0 if number < 3 else 800.0
        diffusion.DiffusionDirectionality = "NONE" if number < 3 else "DIRECTIONAL"
        if number >= 3:
            diffusion.DiffusionGradientDirectionSequence = item(DiffusionGradientOrientation=WAYS[number // 3])
        group.MRDiffusionSequence = Sequence([diffusion])
    series = scan_dicom(write(tmp_path, [image])).series
    assert [each.part for each in series] == ["b=0", "b=800, direction 1", "b=800, direction 2"]
    assert {int(read_series(each, "stored").array[0, 0, 0]) for each in series} == {0, 3, 6}


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ([{}, {"TriggerTime": "300"}], ["no time", "time 1"]),
        ([{}, {"InversionTime": "900"}], ["no inversion", "inversion 1"]),
        ([{"EchoTime": "5"}, {"EchoTime": "5", "TemporalPositionIdentifier": "1"}], ["no time", "time 1"]),
    ],
)
def test_what_only_some_frames_have_parts_them(tmp_path, values, parts):
    slices = [make_slice(z, np.full((4, 6), i, np.int16), **more) for i, more in enumerate(values) for z in (0, 2, 4)]
    series = scan_dicom(write(tmp_path, slices)).series
    assert [each.part for each in series] == parts
    assert [int(read_series(each, "stored").array.max()) for each in series] == [0, 1]


def test_views_keep_their_names_when_files_are_renamed_and_copies_count_once(tmp_path):
    views = [flat(pixels=np.full((4, 6), value, np.int16), InstanceNumber="1") for value in (7, 8, 9)]
    shown = []
    for folder, names in (("a", ["x", "y", "z"]), ("b", ["z", "y", "x"])):
        series = scan_dicom(write(tmp_path / folder, views, names)).series
        shown.append({each.part: float(read_series(each).array.max()) for each in series})
    assert shown[0] == shown[1] and sorted(shown[0]) == ["image 1", "image 2", "image 3"]
    scan = scan_dicom(write(tmp_path / "c", [views[0], views[0]]))
    assert [each.part for each in scan.series] == [""]
    assert [(each.path, "copy" in each.reason) for each in scan.rejected] == [("f001", True)]


def test_views_of_one_uid_are_not_copies_if_they_differ(tmp_path):
    views = [flat(SOPInstanceUID="1.2.3", InstanceNumber=str(number)) for number in (1, 2)]
    assert len(group_headers_of(write(tmp_path, views))) == 2


def group_headers_of(folder):
    from hvd_imaging.sources.dicom import read_header, walk

    return group_headers([read_header(path, folder) for path in walk(folder)], folder).series
