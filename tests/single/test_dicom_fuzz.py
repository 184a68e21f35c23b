"""Mutated DICOM: whatever a file holds, reading ends soon, in bounded memory, and the file is accounted for.

The suite tests some hundred; ``python tests/single/test_dicom_fuzz.py`` tests 2,000 and reports time and memory.
"""

from __future__ import annotations

import resource
import struct
import sys
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pydicom
from pydicom.data import get_testdata_file

from hvd_imaging.decoders import DECODER
from hvd_imaging.errors import SourceError
from hvd_imaging.sources.dicom import group_headers, read_header, read_series

SEED = 20240229
BASES = (
    "CT_small.dcm",
    "MR_small.dcm",
    "MR_small_implicit.dcm",
    "MR_small_bigendian.dcm",
    "MR_small_RLE.dcm",
    "MR_small_jp2klossless.dcm",
    "MR_small_jpeg_ls_lossless.dcm",
    "JPGExtended.dcm",
    "JPEG2000.dcm",
    "SC_rgb_jpeg_dcmtk.dcm",
    "SC_rgb_jpeg_gdcm.dcm",
    "SC_rgb_rle_2frame.dcm",
    "SC_ybr_full_422_uncompressed.dcm",
    "image_dfl.dcm",
    "examples_palette.dcm",
    "liver_1frame.dcm",
    "rtstruct.dcm",
    "rtdose.dcm",
    "ExplVR_BigEnd.dcm",
    "no_meta.dcm",
)


def bases() -> list[bytes]:
    """Small real files of many kinds; an enhanced one among them."""
    files = [Path(str(get_testdata_file(name, download=False))).read_bytes() for name in BASES]
    return [*files, enhanced()]


def enhanced() -> bytes:
    from test_dicom_kinds import as_bytes, enhanced_ct

    return as_bytes(enhanced_ct())


def mutate(data: bytes, random: np.random.Generator) -> bytes:
    """One file with one kind of damage."""
    return MUTATIONS[random.integers(len(MUTATIONS))](bytearray(data), random)


def flip(data: bytearray, random: np.random.Generator) -> bytes:
    for place in random.integers(0, len(data), random.integers(1, 40)):
        data[place] ^= 1 << int(random.integers(8))
    return bytes(data)


def flip_header(data: bytearray, random: np.random.Generator) -> bytes:
    for place in random.integers(128, min(len(data), 3000), random.integers(1, 20)):
        data[place] = int(random.integers(256))
    return bytes(data)


def cut(data: bytearray, random: np.random.Generator) -> bytes:
    return bytes(data[: random.integers(0, len(data))])


def drop(data: bytearray, random: np.random.Generator) -> bytes:
    start = int(random.integers(132, len(data)))
    del data[start : start + int(random.integers(1, 200))]
    return bytes(data)


def lengths(data: bytearray, random: np.random.Generator) -> bytes:
    """Wrong lengths in the heads of elements."""
    for _ in range(int(random.integers(1, 4))):
        at = _element(data, random)
        value = int(random.choice([0, 1, 3, 0xFFFF, 0xFFFE, 0x7FFF]))
        data[at + 6 : at + 8] = struct.pack("<H", value)
        if data[at + 4 : at + 6] in (b"OB", b"OW", b"SQ", b"UN", b"UT"):
            data[at + 8 : at + 12] = struct.pack("<I", int(random.choice([0, 0xFFFFFFFF, 0xFFFFFFFE, 0x7FFFFFFF])))
    return bytes(data)


def nest(data: bytearray, random: np.random.Generator) -> bytes:
    """Sequences in sequences, closed or not, of defined and undefined length."""
    at = _element(data, random)
    depth = int(random.choice([5, 60, 1200, 20000]))
    inner = b"\x09\x00\x10\x00SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff" * depth
    if random.integers(2):
        inner += b"\xfe\xff\x0d\xe0\0\0\0\0\xfe\xff\xdd\xe0\0\0\0\0" * depth
    return bytes(data[:at]) + inner + bytes(data[at:])


def huge(data: bytearray, random: np.random.Generator) -> bytes:
    """Rows, Columns, NumberOfFrames, bits and samples that ask for far more than the file holds."""
    for tag in (b"\x28\x00\x10\x00US\x02\x00", b"\x28\x00\x11\x00US\x02\x00"):
        at = data.find(tag)
        if at > 0:
            data[at + 8 : at + 10] = struct.pack("<H", int(random.choice([0xFFFF, 0x8000, 20000, 0])))
    at = data.find(b"\x28\x00\x10\x00US")
    if at > 0 and random.integers(2):
        frames = str(random.choice(["99999", "2147483647", "-5", "1e300", "3000"])).encode()
        frames += b" " * (len(frames) % 2)
        data[at:at] = b"\x28\x00\x08\x00IS" + struct.pack("<H", len(frames)) + frames
    at = data.find(b"\x28\x00\x00\x01US")
    if at > 0 and random.integers(2):
        data[at + 8 : at + 10] = struct.pack("<H", int(random.choice([1, 8, 12, 32, 64, 255])))
    return bytes(data)


def lying_stream(data: bytearray, random: np.random.Generator) -> bytes:
    """Codestreams whose own header lies about the size, or is damaged."""
    for mark in (b"\xff\xc0\x00\x11", b"\xff\xc1\x00\x0b", b"\xff\xc3\x00", b"\xff\xf7\x00", b"\xff\x4f\xff\x51"):
        at = data.find(mark)
        if at > 0:
            for place in random.integers(at + 4, at + 40, random.integers(1, 5)):
                data[place] = int(random.integers(256))
            return bytes(data)
    return flip(data, random)


def deflate_bomb(data: bytearray, random: np.random.Generator) -> bytes:
    """A deflated data set: of gigabytes, cut, or damaged."""
    kind = int(random.integers(8))
    if kind == 0:
        return BOMB
    start = _meta_end(data)
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    body = bytearray(packer.compress(bytes(data[start:])) + packer.flush())
    if kind < 4:
        del body[int(random.integers(len(body))) :]
    elif kind < 7:
        for place in random.integers(0, len(body), 3):
            body[place] ^= 1 << int(random.integers(8))
    return _deflated_head() + bytes(body)


def _deflated_head() -> bytes:
    uid = b"1.2.840.10008.1.2.1.99"
    meta = b"\x02\x00\x10\x00UI" + struct.pack("<H", len(uid)) + uid
    return b"\0" * 128 + b"DICM" + b"\x02\x00\x00\x00UL\x04\x00" + struct.pack("<I", len(meta)) + meta


def _meta_end(data: bytes) -> int:
    if data[128:132] != b"DICM":
        return 0
    at = data.find(b"\x08\x00", 132)
    return max(at, 132)


def _element(data: bytes, random: np.random.Generator) -> int:
    """The place of some element's head, as far as it is found by looking at VRs."""
    places = [at for at in range(132, min(len(data), 6000) - 12, 2) if bytes(data[at + 4 : at + 6]).isalpha()
              and bytes(data[at + 4 : at + 6]).isupper()]  # fmt: skip
    return places[int(random.integers(len(places)))] if places else 132


def _bomb() -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    zeros = bytes(1 << 20)
    body = b"".join(packer.compress(zeros) for _ in range(2048))
    return _deflated_head() + body + packer.flush()


BOMB = _bomb()
MUTATIONS = (flip, flip, flip_header, flip_header, cut, drop, lengths, nest, huge, huge, lying_stream, deflate_bomb)


def account(path: Path) -> str:
    """Read one file as ingest does; where it went. Raises what nobody expects."""
    scan = group_headers([read_header(path, path.parent)], path.parent)
    places = (
        len({file for series in scan.series for file in series.files})
        + len(scan.segmentations)
        + len(scan.rejected)
        + scan.skipped
        + scan.others
    )
    assert places == 1, f"{places} accounts of one file"
    if not scan.series:
        assert all(item.reason for item in scan.rejected)
        return "rejected" if scan.rejected else "mask" if scan.segmentations else "no image"
    outcome = "read"
    for series in scan.series:
        try:
            volume = read_series(series)
            assert volume.array.dtype == np.float32 and np.isfinite(volume.affine).all()
        except SourceError as error:
            assert str(error)
            outcome = "quarantined"
    return outcome


def test_mutated_files_are_all_accounted_for(tmp_path):
    random = np.random.default_rng(SEED)
    originals = bases()
    outcomes: Counter[str] = Counter()
    path = tmp_path / "mutated"
    for number in range(300):
        path.write_bytes(mutate(originals[number % len(originals)], random))
        outcomes[account(path)] += 1
    assert sum(outcomes.values()) == 300
    assert outcomes["read"] > 30 and outcomes["rejected"] > 20 and outcomes["quarantined"] > 20


def main(count: int = 2000) -> None:
    import tempfile

    random = np.random.default_rng(SEED)
    originals = bases()
    outcomes: Counter[str] = Counter()
    slowest = 0.0
    begin = time.perf_counter()
    pydicom.config.settings.reading_validation_mode = pydicom.config.WARN
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mutated"
        for number in range(count):
            data = mutate(originals[number % len(originals)], random)
            path.write_bytes(data)
            start = time.perf_counter()
            try:
                outcomes[account(path)] += 1
            except BaseException:
                Path("crashing.dcm").write_bytes(data)
                print(f"file {number} of {BASES[number % len(originals)] if number % len(originals) < len(BASES) else 'enhanced'}")
                raise
            spent = time.perf_counter() - start
            if spent > 1:
                print(f"file {number}: {spent:.1f} s")
            slowest = max(slowest, spent)
    DECODER.close()
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10
    print(f"{count} mutated files in {time.perf_counter() - begin:.1f} s: {dict(outcomes.most_common())}")
    print(f"slowest {slowest:.2f} s, peak memory {own} MiB, of a decoding process {child} MiB")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main(*map(int, sys.argv[1:]))
