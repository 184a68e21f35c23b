"""NRRD: the voxels and the geometry that SimpleITK writes; what is damaged or does not tell its geometry is refused."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from hvd_imaging.errors import SourceError
from hvd_imaging.sources import catalog
from hvd_imaging.sources.nifti import read_nifti
from hvd_imaging.sources.nrrd import detached, read_nrrd

SHAPE = (3, 4, 5)
ARRAY = np.arange(60, dtype="<i2").reshape(SHAPE)
HEAD = {
    "type": "short",
    "dimension": "3",
    "space": "left-posterior-superior",
    "sizes": "5 4 3",
    "space directions": "(0.5,0,0) (0,0.8,0) (0,0,2.5)",
    "kinds": "domain domain domain",
    "endian": "little",
    "encoding": "raw",
    "space origin": "(-10,-20,5)",
}
AFFINE = np.array([[0, 0, 0.5, -10], [0, 0.8, 0, -20], [2.5, 0, 0, 5], [0, 0, 0, 1]])


def save(path: Path, data: bytes = ARRAY.tobytes(), drop=(), **changes) -> Path:
    """An NRRD file; keyword ``space_units`` is the field "space units"."""
    fields = {**HEAD, **{key.replace("_", " "): value for key, value in changes.items()}}
    lines = ["NRRD0005", "# a comment", *(f"{key}: {value}" for key, value in fields.items() if key not in drop), "who:=cares: not"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("\n".join(lines).encode() + b"\n\n" + data)
    return path


@pytest.mark.parametrize(("encoding", "pack"), [("raw", bytes), ("gzip", gzip.compress), ("gz", gzip.compress), ("bzip2", bz2.compress)])
def test_encodings(tmp_path, encoding, pack):
    volume = read_nrrd(save(tmp_path / "a.nrrd", pack(ARRAY.tobytes()), encoding=encoding))
    np.testing.assert_array_equal(volume.array, ARRAY)
    np.testing.assert_allclose(volume.affine, AFFINE)
    assert volume.array.dtype == np.float32


@pytest.mark.parametrize(("kind", "code"), [("uchar", "u1"), ("unsigned short", "u2"), ("int", "i4"), ("float", "f4"), ("double", "f8")])
@pytest.mark.parametrize("order", ["little", "big"])
def test_types_and_byte_orders(tmp_path, kind, code, order):
    data = ARRAY.astype(("<" if order == "little" else ">") + code).tobytes()
    np.testing.assert_array_equal(read_nrrd(save(tmp_path / "a.nrrd", data, type=kind, endian=order)).array, ARRAY)


def test_spaces_channels_and_skips(tmp_path):
    ras = read_nrrd(save(tmp_path / "a.nrrd", space="RAS", space_units='"mm" "mm" "mm"'))
    np.testing.assert_allclose(ras.affine, np.diag([-1, -1, 1, 1]) @ AFFINE)
    two = np.stack([ARRAY, ARRAY + 100], -1)
    first = save(tmp_path / "b.nrrd", two.tobytes(), dimension="4", sizes="2 5 4 3", space_directions="none (0.5,0,0) (0,0.8,0) (0,0,2.5)")
    last = save(
        tmp_path / "c.nrrd", np.moveaxis(two, -1, 0).tobytes(), dimension="4", sizes="5 4 3 2",
        space_directions="(0.5,0,0) (0,0.8,0) (0,0,2.5) none",
    )  # fmt: skip
    for path in (first, last):
        np.testing.assert_array_equal(read_nrrd(path).array, two)
    np.testing.assert_array_equal(read_nrrd(save(tmp_path / "d.nrrd", b"x\ny" + ARRAY.tobytes(), line_skip="1", byte_skip="1")).array, ARRAY)
    np.testing.assert_array_equal(read_nrrd(save(tmp_path / "e.nrrd", b"xyz" + ARRAY.tobytes(), byte_skip="-1")).array, ARRAY)


@pytest.mark.parametrize("suffix", [".nrrd", ".nhdr"])
@pytest.mark.parametrize("packed", [False, True])
def test_what_another_program_writes(tmp_path, suffix, packed):
    sitk = pytest.importorskip("SimpleITK")
    image = sitk.GetImageFromArray(ARRAY)
    image.SetSpacing((0.5, 0.8, 2.5))
    image.SetOrigin((-10, -20, 5))
    c, s = np.cos(0.3), np.sin(0.3)
    image.SetDirection((c, -s, 0, s, c, 0, 0, 0, 1))
    sitk.WriteImage(image, str(tmp_path / f"a{suffix}"), packed)
    volume = read_nifti(tmp_path / f"a{suffix}")
    np.testing.assert_array_equal(volume.array, ARRAY)
    place = image.TransformIndexToPhysicalPoint((4, 2, 1))
    np.testing.assert_allclose((volume.affine @ [1, 2, 4, 1])[:3], place)
    assert (detached(tmp_path / f"a{suffix}") is not None) == (suffix == ".nhdr")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"drop": ["space directions"]}, "NRRD without 'space directions'"),
        ({"drop": ["space origin"]}, "NRRD without 'space origin'"),
        ({"drop": ["space"]}, "NRRD without 'space'"),
        ({"drop": ["endian"]}, "NRRD without 'endian'"),
        ({"space": "scanner-xyz"}, "without anatomical names"),
        ({"space_units": '"um" "um" "um"'}, "expected mm"),
        ({"space_directions": "(1,0,0) (0,1,0)"}, "2 space directions for 3 axes"),
        ({"space_directions": "(1,0,0) (0,1,0) none"}, "directions of 2 axes"),
        ({"space_directions": "(1,0,0) (0,1,0) (0,0,nan)"}, "not three finite numbers"),
        ({"space_directions": "(1,0,0) (0,1,0) (0,0,0)"}, "length 0"),
        ({"space_directions": "(1,0,0) (0.3,1,0) (0,0,1)"}, "sheared"),
        ({"sizes": "5 4"}, "as many whole sizes"),
        ({"sizes": "5 4 -3"}, "as many whole sizes"),
        ({"sizes": "5 4 4"}, "expected 160 bytes of voxels, found 120"),
        ({"sizes": "5 4 2"}, "found more"),
        ({"sizes": "99999 99999 99999"}, "cannot hold"),
        ({"type": "block"}, "unknown type"),
        ({"encoding": "hex"}, "unknown encoding"),
        ({"encoding": "gzip"}, "damaged"),
        ({"data": gzip.compress(ARRAY.tobytes())[:-30], "encoding": "gzip"}, "expected 120 bytes of voxels, found"),
        ({"data": gzip.compress(bytes(1 << 20)), "encoding": "gzip"}, "found more"),
        ({"data_file": "LIST"}, "several files"),
        ({"data_file": "a%03d.raw 1 3 1"}, "several files"),
        ({"data_file": "../b.raw"}, "outside of its own folder"),
        ({"data_file": "missing.raw"}, "is not there"),
    ],
)
def test_what_is_refused(tmp_path, changes, reason):
    (tmp_path / "b.raw").write_bytes(ARRAY.tobytes())
    path = save(tmp_path / "in" / "a.nrrd", **changes)
    with pytest.raises(SourceError, match=rf"^in/a\.nrrd: .*{reason}"):
        read_nrrd(path, tmp_path)


def test_link_out_of_the_folder_and_no_nrrd(tmp_path):
    (tmp_path / "b.raw").write_bytes(ARRAY.tobytes())
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "c.raw").symlink_to(tmp_path / "b.raw")
    with pytest.raises(SourceError, match="outside of its own folder"):
        read_nrrd(save(tmp_path / "in" / "a.nhdr", b"", data_file="c.raw"))
    (tmp_path / "x.nrrd").write_bytes(b"NRRD0004\ntype: int")
    with pytest.raises(SourceError, match="without an end"):
        read_nrrd(tmp_path / "x.nrrd")
    (tmp_path / "x.nrrd").write_bytes(b"")
    with pytest.raises(SourceError, match="not an NRRD file"):
        read_nrrd(tmp_path / "x.nrrd")


def test_mutated_files_are_read_or_refused(tmp_path):
    good = save(tmp_path / "a.nrrd", gzip.compress(ARRAY.tobytes()), encoding="gzip").read_bytes()
    random = np.random.default_rng(6)
    for _ in range(300):
        bad = bytearray(good)
        for place in random.integers(0, len(bad), 3):
            bad[place] = random.integers(256)
        (tmp_path / "a.nrrd").write_bytes(bytes(bad[: random.integers(1, len(bad) + 1)]))
        with contextlib.suppress(SourceError):
            assert read_nrrd(tmp_path / "a.nrrd").array.size <= 1 << 20


def test_layout_of_images_and_masks(tmp_path):
    mask = (ARRAY % 3).astype("u1")
    save(tmp_path / "imagesTr" / "a.nrrd")
    save(tmp_path / "labelsTr" / "a.seg.nrrd", mask.tobytes(), type="uchar")
    save(tmp_path / "imagesTr" / "b.nrrd")
    save(tmp_path / "labelsTr" / "b.nrrd", mask.tobytes(), type="uchar", space_origin="(-10,-20,6)")
    (tmp_path / "dataset.json").write_text(json.dumps({"modality": {"0": "CT"}, "labels": {"background": 0, "x": 1, "y": 2}}))
    found = catalog.scan(tmp_path)
    assert (found.task, found.classes, [case.modality for case in found.cases]) == ("segmentation", ("background", "x", "y"), ["CT"] * 2)
    np.testing.assert_array_equal(catalog.load_case(found.cases[0], found)[1], mask)
    with pytest.raises(SourceError, match=r"^labelsTr/b\.nrrd: mask of another geometry"):
        catalog.load_case(found.cases[1], found)


def test_detached_voxels_belong_to_the_case(tmp_path):
    from hvd_imaging.ingest.prepare import files_of

    (tmp_path / "one.raw").write_bytes(ARRAY.tobytes())
    save(tmp_path / "one.nhdr", b"", data_file="one.raw")
    found = catalog.scan(tmp_path)
    assert [path.name for path in files_of(found.cases[0])] == ["one.nhdr", "one.raw"]
    np.testing.assert_array_equal(catalog.load_case(found.cases[0], found)[0].array, ARRAY)
