"""NRRD volumes (.nrrd, or .nhdr with the voxels in a file beside it), as teem's "Definition of NRRD file format" has them.

An axis without a direction, a space without anatomical names, or a size that the voxels do not have is refused: a geometry is
read, never guessed.
"""

from __future__ import annotations

import bz2
import math
import os
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .. import limits
from ..errors import SourceError
from ..volume import Volume, filled
from . import streams
from .elements import relative

SUFFIXES = (".seg.nrrd", ".nrrd", ".nhdr")
_HEADER_BYTES = 1 << 20
_PIECE = 1 << 20
_PACKINGS: dict[str, limits.Packing] = {"raw": "none", "gzip": "gzip", "gz": "gzip", "bzip2": "bzip2", "bz2": "bzip2"}
_TYPES = {
    name: code
    for code, names in {
        "i1": "signed char, int8, int8_t",
        "u1": "uchar, unsigned char, uint8, uint8_t",
        "i2": "short, short int, signed short, signed short int, int16, int16_t",
        "u2": "ushort, unsigned short, unsigned short int, uint16, uint16_t",
        "i4": "int, signed int, int32, int32_t",
        "u4": "uint, unsigned int, uint32, uint32_t",
        "i8": "longlong, long long, long long int, signed long long, signed long long int, int64, int64_t",
        "u8": "ulonglong, unsigned long long, unsigned long long int, uint64, uint64_t",
        "f4": "float",
        "f8": "double",
    }.items()
    for name in names.split(", ")
}
# Each space's axes in LPS.
_SPACES = {
    "left-posterior-superior": (1, 1, 1), "lps": (1, 1, 1),
    "right-anterior-superior": (-1, -1, 1), "ras": (-1, -1, 1),
    "left-anterior-superior": (1, -1, 1), "las": (1, -1, 1),
}  # fmt: skip


@dataclass(frozen=True)
class _Header:
    fields: dict[str, str]
    pairs: dict[str, str] = field(repr=False)
    end: int  # where attached voxels begin


@dataclass(frozen=True)
class Segment:
    """A structure of a segmentation: its name (raw: free text), the layer it lies in, and its value there."""

    name: str = field(repr=False)
    layer: int
    value: int


def is_nrrd_name(path: Path) -> bool:
    """True for .nrrd and .nhdr; not for the ``._name`` shadows that macOS leaves in archives."""
    return path.name.lower().endswith(SUFFIXES) and not path.name.startswith(".")


def detached(path: Path) -> Path | None:
    """The file that holds the voxels of a .nhdr, None if there is none or it cannot be told. Never raises."""
    if not path.name.lower().endswith(".nhdr"):
        return None
    try:
        name = _header(path).fields.get("data file", "")
    except (SourceError, OSError):
        return None
    return path.parent / name if name and not re.search(r"%|\s|^LIST", name) else None


def segments(path: Path) -> tuple[Segment, ...]:
    """The segments that 3D Slicer describes in a header, in their order; () if it describes none. Never raises."""
    if not is_nrrd_name(path):
        return ()
    try:
        header = _header(path)
        layers = len(header.fields.get("sizes", "").split()) == 4
        numbers = sorted(int(match[1]) for key in header.pairs if (match := re.fullmatch(r"Segment(\d{1,6})_Name", key)))
        return tuple(
            Segment(
                header.pairs[f"Segment{number}_Name"].strip(),
                # Files of before layers could be shared have one segment a layer, of the value 1.
                int(header.pairs.get(f"Segment{number}_Layer", number if layers else 0)),
                int(header.pairs.get(f"Segment{number}_LabelValue", 1)),
            )
            for number in numbers
        )
    except (SourceError, OSError, ValueError):
        return ()


def read_nrrd(path: Path, root: Path = Path(), modality: str = "") -> Volume:
    """Read an NRRD file as float32 ``(D, H, W)``, or ``(D, H, W, C)`` if one axis has no direction.

    Raises:
        SourceError: not NRRD, cut off, without the directions and the origin of an anatomical space, or with the voxels in a file
            outside of its own folder.
    """
    name = relative(path, root)
    try:
        header = _header(path)
        sizes, kind = _sizes(header), _type(header)
        affine, channel = _geometry(header, sizes)
        array = _voxels(path, header, sizes, kind)
    except SourceError as error:
        raise SourceError(f"{name}: {error}") from None
    except OSError as error:
        raise SourceError(f"{name}: cannot be read ({error.strerror or type(error).__name__})") from error
    if channel is not None:  # axes of the array run the other way round
        array = np.moveaxis(array, len(sizes) - 1 - channel, -1)
        if array.shape[-1] == 1:
            array = array[..., 0]
    array, note = filled(np.ascontiguousarray(array), modality, reuse=True)
    return Volume(array, affine, modality, source=(path,), notes=(note,) if note else ())


def _header(path: Path) -> _Header:
    with open(path, "rb") as file:
        start = file.read(_HEADER_BYTES)
    if not re.match(rb"NRRD000[1-6]\r?\n", start):
        raise SourceError("not an NRRD file")
    fields: dict[str, str] = {}
    pairs: dict[str, str] = {}
    at = start.index(b"\n") + 1
    while at < len(start):
        end = start.find(b"\n", at)
        if end < 0:
            end = len(start)
        line = start[at:end].rstrip(b"\r").decode("utf-8", "replace")
        at = end + 1
        if not line:
            return _Header(fields, pairs, at)
        if line.startswith("#"):
            continue
        if ":=" in line and ": " not in line.partition(":=")[0]:
            key, _, value = line.partition(":=")
            pairs[key] = value
            continue
        key, colon, value = line.partition(": ")
        key = {"datafile": "data file"}.get(key.strip().lower(), key.strip().lower())
        if not colon or key in fields:
            raise SourceError("a damaged NRRD header: a line that is no field, or a field that stands there twice")
        fields[key] = value.strip()
        if key == "data file" and value.strip().upper().startswith("LIST"):
            break
    if "data file" in fields:
        return _Header(fields, pairs, at)
    raise SourceError("an NRRD header without an end (truncated file?)")


def _need(header: _Header, key: str) -> str:
    if not header.fields.get(key):
        raise SourceError(f"NRRD without '{key}'")
    return header.fields[key]


def _sizes(header: _Header) -> tuple[int, ...]:
    words = _need(header, "sizes").split()
    if not all(re.fullmatch(r"[1-9]\d{0,8}", word) for word in words) or _need(header, "dimension") != str(len(words)):
        raise SourceError("NRRD: expected as many whole sizes as dimensions")
    if len(words) not in (3, 4):
        raise SourceError(f"NRRD of {len(words)} dimensions, expected 3, or 4 of which one is channels")
    return tuple(map(int, words))


def _type(header: _Header) -> np.dtype:
    code = _TYPES.get(_need(header, "type").lower())
    if code is None:
        raise SourceError("NRRD of an unknown type of voxels, expected whole numbers, float or double")
    if code[1] == "1":
        return np.dtype(code)
    order = {"little": "<", "big": ">"}.get(_need(header, "endian").lower())
    if order is None:
        raise SourceError("NRRD: endian: expected little or big")
    return np.dtype(order + code)


def _geometry(header: _Header, sizes: tuple[int, ...]) -> tuple[np.ndarray, int | None]:
    """Affine ``(4, 4)`` of (d, h, w, 1) to LPS mm, and which axis holds channels."""
    space = _SPACES.get(_need(header, "space").lower())
    if space is None:
        raise SourceError("NRRD in a space without anatomical names: its place in the patient is not known")
    units = header.fields.get("space units", "")
    if units and {unit.strip().lower() for unit in re.findall(r'"([^"]*)"', units)} != {"mm"}:
        raise SourceError("NRRD: space units: expected mm")
    vectors = re.findall(r"none|\([^()]*\)", _need(header, "space directions"))
    if len(vectors) != len(sizes):
        raise SourceError(f"NRRD: {len(vectors)} space directions for {len(sizes)} axes")
    spatial = [axis for axis, vector in enumerate(vectors) if vector != "none"]
    if len(spatial) != 3:
        raise SourceError(f"NRRD with directions of {len(spatial)} axes, expected 3: its geometry is not known")
    channel = next((axis for axis in range(len(sizes)) if axis not in spatial), None)
    columns = [_vector(vectors[axis]) for axis in reversed(spatial)]
    affine = np.eye(4)
    affine[:3] = np.array(space)[:, None] * np.stack([*columns, _vector(_need(header, "space origin"))], axis=1)
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if lengths.min() <= 0:
        raise SourceError("NRRD: a space direction of length 0")
    axes = affine[:3, :3] / lengths
    if np.abs(axes.T @ axes - np.eye(3)).max() > 1e-2:
        raise SourceError("NRRD with sheared axes is not supported, expected perpendicular ones")
    return affine, channel


def _vector(text: str) -> np.ndarray:
    try:
        vector = np.array(text.strip().strip("()").split(","), dtype=np.float64)
    except ValueError:
        vector = np.zeros(0)
    if vector.shape != (3,) or not (np.abs(vector) < 1e7).all():
        raise SourceError("NRRD: a direction or origin that is not three finite numbers")
    return vector


def _voxels(path: Path, header: _Header, sizes: tuple[int, ...], kind: np.dtype) -> np.ndarray:
    """float32, axes as in the file's memory: the first size is the last axis."""
    count = math.prod(sizes)
    size = count * kind.itemsize
    start = header.end
    if "data file" in header.fields:
        path, start = _beside(path, header.fields["data file"]), 0
    skips = []
    for key in ("line skip", "byte skip"):
        text = header.fields.get(key, header.fields.get(key.replace(" ", ""), "0"))
        if not re.fullmatch(r"-1|\d{1,9}", text) or (text == "-1" and key == "line skip"):
            raise SourceError(f"NRRD: {key}: expected a whole number")
        skips.append(int(text))
    packing = _PACKINGS.get(_need(header, "encoding").lower())
    if packing is None:
        raise SourceError("NRRD of an unknown encoding, expected raw, gzip or bzip2")
    with open(path, "rb") as file:
        held = os.fstat(file.fileno()).st_size
        # Of 4 dimensions, one may have to move behind the others, which takes a copy.
        why = limits.unbelievable(max(skips[1], 0) + size, held, packing, 4 * count * (len(sizes) - 2))
        if why:
            raise SourceError(f"NRRD: {why}")
        file.seek(start)
        for number in range(skips[0]):
            if not file.readline(_HEADER_BYTES):
                raise SourceError(f"NRRD: line skip: expected {skips[0]} lines, found {number}")
        read: Callable[[int], bytes] = file.read
        if packing == "none":
            file.seek(max(held - size, 0) if skips[1] < 0 else file.tell() + skips[1])
        else:
            read = _Unpacked(file, packing == "gzip").read
            streams.skip(read, skips[1])
        out = np.empty(sizes[::-1], np.float32)
        try:
            streams.fill(out.reshape(1, -1), read, kind)
            more = read(1)
        except (zlib.error, OSError, EOFError, ValueError):
            raise SourceError("NRRD: its compressed voxels are damaged") from None
        except SourceError as error:
            raise SourceError(f"NRRD: {error}") from None
    if more:
        raise SourceError(f"NRRD: expected {size} bytes of voxels, found more (damaged header?)")
    return out


def _beside(path: Path, name: str) -> Path:
    """The file of the voxels, which has to lie in the header's own folder or below."""
    if re.search(r"%|^LIST", name):
        raise SourceError("NRRD with its voxels in several files is not supported, expected one")
    found, folder = (path.parent / name).resolve(), path.parent.resolve()
    if not found.is_relative_to(folder):
        raise SourceError("NRRD that names a file outside of its own folder; expected its voxels beside it")
    if not found.is_file():
        raise SourceError("NRRD: the file of its voxels is not there")
    return found


class _Unpacked:
    """A compressed stream, read as a file; no more is unpacked than was asked for."""

    def __init__(self, file: BinaryIO, gzip: bool) -> None:
        self._file = file
        self._inflate = zlib.decompressobj(wbits=32 + zlib.MAX_WBITS) if gzip else None
        self._bunzip = None if gzip else bz2.BZ2Decompressor()

    def read(self, size: int) -> bytes:
        parts = []
        while size > 0 and (part := self._next(size)):
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def _next(self, most: int) -> bytes:
        """Some bytes, none at the end."""
        part = b""
        if self._inflate is not None:
            while not part and not self._inflate.eof and (rest := self._inflate.unconsumed_tail or self._file.read(_PIECE)):
                part = self._inflate.decompress(rest, most)
        elif self._bunzip is not None:
            while not part and not self._bunzip.eof:
                block = self._file.read(_PIECE) if self._bunzip.needs_input else b""
                if self._bunzip.needs_input and not block:
                    return b""
                part = self._bunzip.decompress(block, most)
        return part
