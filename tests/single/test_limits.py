"""Small files that ask for much: refused in one line before anything is allocated, and nothing else is lost."""

from __future__ import annotations

import bz2
import gzip
import math
import struct
import tracemalloc

import nibabel
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_imaging import limits
from hvd_imaging.errors import SourceError
from hvd_imaging.sources.nifti import read_nifti
from hvd_imaging.sources.nrrd import read_nrrd

ZEROS = 300 << 20  # bytes, packed to some hundred KB


class Peak:
    """Most bytes that Python and NumPy held at once."""

    def __enter__(self):
        tracemalloc.start()
        return self

    def __exit__(self, *_):
        self.bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()


@given(st.integers(0, 1 << 70), st.integers(0, 1 << 40), st.sampled_from(["none", "gzip", "bzip2", "other"]))
def test_what_a_file_can_hold_is_believed_and_more_is_not(claimed, held, packing):
    why = limits.unbelievable(claimed, held, packing)
    assert "\n" not in why and len(why) < 300
    if claimed <= min(held * limits.HOLDS[packing], limits.FREELY):
        assert not why
    if claimed > held * limits.HOLDS[packing] + (1 << 16) or (packing != "none" and claimed > max(limits.FREELY, 200 * held)):
        assert why


def test_what_a_result_takes_counts_too():
    assert not limits.unbelievable(900 << 20, 2 << 20, "gzip")
    assert "more than 200 times" in limits.unbelievable(900 << 20, 2 << 20, "gzip", memory=3600 << 20)
    assert not limits.unbelievable(900 << 20, 200 << 20, "gzip", memory=3600 << 20)


@given(st.integers(-(10**30), 10**30))
def test_numbers_are_brief(number):
    assert len(limits.brief(number)) <= 21


def test_huge_numbers_are_brief():
    assert limits.brief(10**5000) == "10^5000" and limits.brief(-(10**5000)) == "-10^5000"


def nifti(shape, data=b"", dtype=16, offset=352.0, second=False, order="<"):
    """A NIfTI file with these claims and these bytes of voxels."""
    header = (nibabel.Nifti2Header if second else nibabel.Nifti1Header)(endianness=order)
    header.set_data_dtype(nibabel.nifti1.data_type_codes.dtype[dtype])
    header.set_data_shape((1, 1, 1))
    header["dim"] = [len(shape), *shape, *[1] * (7 - len(shape))]
    header["vox_offset"] = offset
    header.set_sform(np.eye(4), 1)
    return header.binaryblock.ljust(int(max(min(offset, 1000), 0)), b"\0") + data


HUGE = [(1024, 1024, 700), (32767, 32767, 32767), (32767, 1, 32767, 100)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("shape", HUGE)
def test_a_nifti_header_without_its_voxels(tmp_path, shape, order, packed):
    data = nifti(shape, dtype=64, order=order)
    path = tmp_path / ("a.nii.gz" if packed else "a.nii")
    path.write_bytes(gzip.compress(data) if packed else data)
    with Peak() as peak, pytest.raises(SourceError, match=r"^a\.nii(\.gz)?: .*which a file of \d+ bytes cannot hold"):
        read_nifti(path, tmp_path)
    assert peak.bytes < 8 << 20


@pytest.mark.parametrize(
    "shape, dtype",
    [((400_000_000, 1, 1), 2), ((1, 1, 400_000_000), 2), ((1, 1, 1, 300_000_000), 2), ((20_000, 20_000, 1), 64), ((1,) * 3 + (2**62,), 64)],
)
def test_a_nifti_2_that_unpacks_to_much(tmp_path, shape, dtype):
    path = tmp_path / "a.nii.gz"
    path.write_bytes(gzip.compress(nifti(shape, dtype=dtype, offset=544, second=True) + bytes(64 << 20)))
    with Peak() as peak, pytest.raises(SourceError, match="cannot hold|more than 200 times"):
        read_nifti(path, tmp_path)
    assert peak.bytes < 8 << 20


def test_a_nifti_of_many_channels_is_read_soon(tmp_path):
    path = tmp_path / "a.nii.gz"
    path.write_bytes(gzip.compress(nifti((1, 1, 1, 2_000_000), bytes(range(200)) * 10_000, dtype=2, offset=544, second=True)))
    assert np.array_equal(read_nifti(path).array.ravel(), np.tile(np.arange(200), 10_000))


@pytest.mark.parametrize("offset", [-352, 0, 1e30, float("inf"), float("nan"), 2.0**31])
def test_where_the_voxels_of_a_nifti_begin(tmp_path, offset):
    data = bytearray(nifti((2, 3, 4), bytes(200)))
    data[108:112] = struct.pack("<f", offset)
    (tmp_path / "a.nii").write_bytes(data)
    with pytest.raises(SourceError, match=r"^a\.nii: "):
        read_nifti(tmp_path / "a.nii", tmp_path)


def test_extensions_of_a_nifti_are_passed_over(tmp_path):
    """Their lengths can claim anything, and nothing of them is used."""
    data = nifti((2, 3, 4), offset=400)
    data = data[:348] + b"\1\0\0\0" + struct.pack("<ii", 2**31 - 8, 6) + bytes(40) + np.arange(24, dtype="<f4").tobytes()
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(data))
    assert np.array_equal(read_nifti(tmp_path / "a.nii.gz").array.ravel(), np.arange(24))


def test_a_large_empty_mask_is_read_in_the_memory_of_its_voxels(tmp_path):
    shape = (256, 256, 256)
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(nifti(shape, bytes(8 * math.prod(shape)), dtype=64)))
    with Peak() as peak:
        assert not read_nifti(tmp_path / "a.nii.gz").array.any()
    assert peak.bytes < 4 * math.prod(shape) + (32 << 20)


def test_values_beyond_float32_are_filled_and_told(tmp_path):
    data = np.array([1e300, -1e300, 5, 7], "<f8").tobytes()
    (tmp_path / "a.nii").write_bytes(nifti((2, 2, 1), data, dtype=64))
    volume = read_nifti(tmp_path / "a.nii")
    assert volume.array.ravel().tolist() == [0, 0, 5, 7] and "2 voxels" in volume.notes[0]


NRRD = "NRRD0005\ntype: {type}\ndimension: 3\nspace: left-posterior-superior\nsizes: {sizes}\n" \
       "space directions: (1,0,0) (0,1,0) (0,0,1)\nspace origin: (0,0,0)\nendian: little\nencoding: {encoding}\n{more}\n"  # fmt: skip


def nrrd(path, data=b"", type="uint8", sizes="2 3 4", encoding="raw", more=""):
    path.write_bytes(NRRD.format(type=type, sizes=sizes, encoding=encoding, more=more).encode() + data)
    return path


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"more": "line skip: 999999999\n"}, "line skip: expected 999999999 lines, found 0"),
        ({"more": "byte skip: 999999999\n"}, "cannot hold"),
        ({"more": "byte skip: 999999999\n", "encoding": "gzip", "data": gzip.compress(bytes(24))}, "cannot hold"),
        ({"more": "byte skip: 999999999\n", "encoding": "bzip2", "data": bz2.compress(bytes(ZEROS))}, "expected 24 bytes|200 times|cannot hold"),
        ({"sizes": "99999 99999 9", "encoding": "gzip", "data": gzip.compress(bytes(24))}, "cannot hold"),
        ({"sizes": "9999 9999 9", "encoding": "bzip2", "data": bz2.compress(bytes(ZEROS)), "type": "double"}, "200 times|cannot hold"),
        ({"sizes": "9999 999 99", "encoding": "bzip2", "data": bz2.compress(bytes(24)), "type": "double"}, "200 times|cannot hold"),
    ],
)  # fmt: skip
def test_nrrd_that_asks_for_much(tmp_path, changes, reason):
    with Peak() as peak, pytest.raises(SourceError, match=reason):
        read_nrrd(nrrd(tmp_path / "a.nrrd", **changes), tmp_path)
    assert peak.bytes < 64 << 20


@pytest.mark.parametrize("encoding, pack", [("raw", bytes), ("gzip", gzip.compress), ("bzip2", bz2.compress)])
def test_lines_and_bytes_before_the_voxels_of_a_nrrd(tmp_path, encoding, pack):
    path = nrrd(tmp_path / "a.nrrd", b"one\ntwo\n" + pack(b"xyz" + bytes(range(24))), encoding=encoding, more="line skip: 2\nbyte skip: 3\n")
    assert read_nrrd(path).array.ravel().tolist() == list(range(24))


def test_one_such_file_among_others(tmp_path):
    """It is set aside, the others become samples."""
    from hvd_imaging.config import IngestConfig
    from hvd_imaging.ingest import ingest

    pytest.importorskip("h5py")
    del ingest, IngestConfig
