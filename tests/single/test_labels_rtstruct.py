"""RTSTRUCT: the same masks as DICOM SEG; holes, keyholes, gaps, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest
from contours import trace, write_structure_set
from scipy.ndimage import distance_transform_edt
from test_sources_dicom import SECRET, SERIES, make_slice, write

from hvd_imaging.errors import SourceError
from hvd_imaging.sources import catalog
from hvd_imaging.sources.labels import read_rtstruct
from hvd_imaging.sources.labels.rtstruct import rasterize
from hvd_imaging.sources.phantom import draw_patient, make_archive
from hvd_imaging.volume import Volume

AFFINE = np.array([[0, 0, 0.5, -10], [0, 0.8, 0, -20], [2.5, 0, 0, 5], [0, 0, 0, 1.0]])


def image(shape=(4, 20, 24), affine=AFFINE) -> Volume:
    return Volume(np.zeros(shape, np.float32), affine)


def at(*indices, affine=AFFINE) -> np.ndarray:
    """mm of voxel indices (d, h, w)."""
    return np.array(indices, float) @ affine[:3, :3].T + affine[:3, 3]


def square(d, low, high, affine=AFFINE) -> np.ndarray:
    return at((d, low, low), (d, low, high), (d, high, high), (d, high, low), affine=affine)


def mask_of(annotation, label, shape=(4, 20, 24)) -> np.ndarray:
    mask = np.zeros(shape, bool)
    layer = next(layer for layer in annotation.layers if layer.label == label)
    if layer.inside.size:
        mask[layer.box] = layer.inside
    return mask


def surface_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Farthest voxel of one mask that is not of the other, in voxels from the other's surface."""
    far = 0.0
    for one, other in ((a, b), (b, a)):
        wrong = one & ~other
        if wrong.any():
            far = max(far, float(distance_transform_edt(~other)[wrong].max()))
    return far


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    """The same four patients twice: with DICOM SEG, and with RTSTRUCT; two of them are oblique or head last."""
    root = tmp_path_factory.mktemp("phantom")
    make_archive(root / "seg", 3, seed=3)
    for index in range(3):
        folder = root / "seg" / f"patient_{index:04d}"
        patient = draw_patient(3, index)
        points = patient.acquisition.points()
        labels = patient.anatomy.labels(points)
        regions = {
            name: trace(labels == value, patient.acquisition.affine)
            for value, name in ((1, "lung"), (2, "nodule"))
            if (labels == value).any()
        }
        to = root / "rt" / f"patient_{index:04d}"
        (to / "series").mkdir(parents=True)
        for path in (folder / "series").iterdir():
            (to / "series" / path.name).hardlink_to(path)
        write_structure_set(
            to / "rs", regions, patient.uid("series"), patient.patient_id, frame=patient.uid("frame of reference"), decimals=2
        )
    return root


def test_phantom_with_seg_and_with_rtstruct_has_the_same_masks(phantoms):
    by_seg, by_contours = (catalog.scan(phantoms / kind, task="segmentation") for kind in ("seg", "rt"))
    assert by_seg.classes == by_contours.classes == ("background", "lung", "nodule")
    assert len(by_contours.cases) == 3 and not by_contours.rejected
    for one, other in zip(by_seg.cases, by_contours.cases, strict=True):
        volume, seg = catalog.load_case(one, by_seg)
        again, contours = catalog.load_case(other, by_contours)
        assert np.array_equal(volume.array, again.array)
        for value in range(1, 3):
            a, b = seg == value, contours == value
            assert a.any() == b.any()
            assert surface_distance(a, b) <= 1
            assert np.count_nonzero(a ^ b) <= 0.001 * max(a.sum(), 1)
    assert sum(draw_patient(3, index).acquisition.oblique for index in range(3)) == 1


@pytest.mark.parametrize("position", ["head first supine", "feet first supine", "head first prone", "sagittal"])
def test_any_position_of_the_patient(position):
    """Row, column and slice direction of the patient positions; contours around a mask give the mask back."""
    row, column, normal = {
        "head first supine": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
        "feet first supine": ((-1, 0, 0), (0, 1, 0), (0, 0, -1)),
        "head first prone": ((-1, 0, 0), (0, -1, 0), (0, 0, 1)),
        "sagittal": ((0, 1, 0), (0, 0, -1), (-1, 0, 0)),
    }[position]
    affine = np.eye(4)
    affine[:3, :] = np.stack([np.array(normal) * 3.0, np.array(column) * 0.8, np.array(row) * 0.7, (-90.0, 40.0, 11.0)], axis=1)
    random = np.random.default_rng(4)
    index = np.stack(np.meshgrid(np.arange(9), np.arange(30), np.arange(40), indexing="ij"), -1)
    truth = np.linalg.norm((index - (4, 14, 22)) * (3, 0.8, 0.7), axis=-1) < 8
    truth &= ~(np.linalg.norm((index - (4, 14, 22)) * (3, 0.8, 0.7), axis=-1) < 4)  # a shell: holes
    truth[:, 2:4, 2:5] = random.random((9, 2, 3)) < 0.5
    contours = trace(truth, affine)
    random.shuffle(contours)
    found = _read(contours, Volume(np.zeros(truth.shape, np.float32), affine))
    assert np.array_equal(mask_of(found, "a", truth.shape), truth)


def _read(contours, volume=None, name="a", series=SERIES, **more):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = write_structure_set(Path(folder) / "rs", {name: contours}, SERIES, **more)
        return read_rtstruct(path, volume or image(), series, Path(folder))


def test_pixel_centres_decide():
    assert np.array_equal(np.argwhere(rasterize([np.array([(0.6, 0.6), (0.6, 3.4), (2.4, 3.4), (2.4, 0.6)])], (5, 5))),
                          [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3)])  # fmt: skip
    # Polygons that share an edge through pixel centres share no pixel and leave none out.
    left = np.array([(-0.5, -0.5), (-0.5, 2.0), (4.5, 2.0), (4.5, -0.5)])
    right = np.array([(-0.5, 2.0), (-0.5, 4.5), (4.5, 4.5), (4.5, 2.0)])
    one, two = rasterize([left], (5, 5)), rasterize([right], (5, 5))
    assert not (one & two).any() and (one | two).all()


def test_rasterizing_agrees_with_another_program():
    from matplotlib.path import Path as Polygon

    random = np.random.default_rng(5)
    rows, columns = np.mgrid[:40, :50]
    for _ in range(20):
        points = random.uniform(-5, 55, (random.integers(3, 12), 2))
        centre = points.mean(axis=0)
        order = np.argsort(np.arctan2(*(points - centre).T))  # no edge crosses another
        polygon = points[order]
        expected = Polygon(polygon).contains_points(np.stack([rows.ravel(), columns.ravel()], 1)).reshape(rows.shape)
        assert np.array_equal(rasterize([polygon], rows.shape), expected)


def test_hole_by_two_contours_and_by_a_keyhole():
    outer, inner = square(1, 1.5, 12.5), square(1, 4.5, 8.5)
    expected = np.zeros((4, 20, 24), bool)
    expected[1, 2:13, 2:13] = True
    expected[1, 5:9, 5:9] = False
    assert np.array_equal(mask_of(_read([outer, inner]), "a"), expected)
    keyhole = np.concatenate([outer, outer[:1], inner[[0, 3, 2, 1, 0]]])
    assert np.array_equal(mask_of(_read([keyhole]), "a"), expected)
    assert np.array_equal(mask_of(_read([outer, inner], kind="CLOSEDPLANAR_XOR"), "a"), expected)


def test_slices_without_contours_stay_empty_and_are_told():
    found = _read([square(0, 1.5, 6.5), square(3, 1.5, 6.5)])
    assert [int(plane.sum()) for plane in mask_of(found, "a")] == [25, 0, 0, 25]
    assert found.notes == ("'a': 2 slices between its first and its last have no contour; they stay empty",)


def test_what_has_no_inside_or_stands_twice_or_lies_outside_is_left_out_and_told():
    points = at((1, 3, 3))
    line = at((1, 3, 3), (1, 5, 5), (1, 7, 3))
    beyond = square(2, -6.5, 3.5)
    found = _read([("POINT", points), ("OPEN_PLANAR", line), square(1, 1.5, 6.5), square(1, 1.5, 6.5), square(9, 1.5, 6.5), beyond])
    assert [int(plane.sum()) for plane in mask_of(found, "a")] == [0, 25, 16, 0]
    assert [note.partition(": ")[2].split(",")[0] for note in found.notes] == [
        "2 points or open contours were left out",
        "1 contours that stand there twice count once",
        "1 contours lie outside of the image and were left out",
        "1 contours reach beyond the edge of the image and were cut",
    ]


def test_region_without_contours_is_empty_not_unknown():
    found = _read([])
    assert found.layers[0].voxels == 0


@pytest.mark.parametrize("implicit", [False, True])
def test_region_of_another_frame_of_reference_is_left_out(tmp_path, implicit):
    path = write_structure_set(tmp_path / "rs", {"a": [square(1, 1.5, 6.5)], "b": [square(1, 1.5, 6.5)]}, SERIES, implicit=implicit)
    dataset = pydicom.dcmread(path)
    dataset.StructureSetROISequence[1].ReferencedFrameOfReferenceUID = "1.2.10"
    dataset.save_as(path)
    found = read_rtstruct(path, image(), SERIES)
    assert [layer.label for layer in found.layers] == ["a"] and "another frame of reference" in found.notes[0]


def test_planes_that_are_not_the_slices(tmp_path):
    oblique = square(1, 1.5, 12.5)
    oblique[:2] += (0, 0, 2.5)
    with pytest.raises(SourceError, match=r"^rs: region 'a': a contour runs through 1\.0 slices \(oblique"):
        _read([oblique])
    with pytest.raises(SourceError, match=r"between slices 1 and 2, 1\.25 mm from the nearest one"):
        _read([square(1.5, 1.5, 6.5)])
    with pytest.raises(SourceError, match=r"slice 1 has contours of several planes, 1\.50 mm apart"):
        _read([square(0.7, 1.5, 6.5), square(1.3, 8.5, 10.5)])
    moved = _read([square(1.3, 1.5, 6.5)])
    assert mask_of(moved, "a")[1].sum() == 25 and "up to 0.75 mm from the slices" in moved.notes[0]


@pytest.mark.parametrize("data", [["1", "2"], ["1", "2", "nan"], ["1", "2", "x", "4", "5", "6", "7", "8", "9"]])
def test_damaged_contours(tmp_path, data):
    path = write_structure_set(tmp_path / "rs", {"a": [square(1, 1.5, 6.5)]}, SERIES)
    text = path.read_bytes()
    old = "\\".join(f"{value:.4f}" for value in square(1, 1.5, 6.5).ravel()).encode()
    assert old in text
    path.write_bytes(text.replace(old, "\\".join(data).encode().ljust(len(old))))
    with pytest.raises(SourceError, match="^rs: region 'a': a contour"):
        read_rtstruct(path, image(), SERIES, tmp_path)
    (tmp_path / "rs").write_bytes(text[: len(text) // 2])
    with pytest.raises(SourceError, match="^rs: "):
        read_rtstruct(path, image(), SERIES, tmp_path)


def test_archive_with_contours(tmp_path):
    write(tmp_path / "ct", [make_slice(z) for z in (0, 2.5, 5, 7.5)])
    affine = np.array([[0, 0, 0.5, -10], [0, 0.8, 0, -20], [2.5, 0, 0, 0], [0, 0, 0, 1.0]])
    write_structure_set(tmp_path / "rs", {"b": [square(1, 0.5, 2.5, affine)], "a": [square(1, -0.5, 3.5, affine)], "": []}, SERIES)
    write_structure_set(tmp_path / "stray", {"far": []}, "1.2.77")
    found = catalog.scan(tmp_path)
    assert (found.task, found.classes) == ("segmentation", ("background", "a", "b"))
    assert [(item.path, item.reason) for item in found.rejected] == [("stray", "RTSTRUCT of a series that is not in this folder")]
    volume, mask = catalog.load_case(found.cases[0], found)
    # The smaller structure lies on top, in whatever order they come.
    assert mask[1].tolist() == [[1, 1, 1, 1, 0, 0], [1, 2, 2, 1, 0, 0], [1, 2, 2, 1, 0, 0], [1, 1, 1, 1, 0, 0]]
    assert "4 voxels belong to more than one structure; the smaller structure has them" in volume.notes
    assert SECRET not in repr(found) and SECRET not in " ".join(volume.notes)
