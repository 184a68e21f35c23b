"""Pixel data as numbers: read by position where it is plain, else decoded; then tables, colour and sense.

Sizes are checked against the file before anything is allocated: a header of a few bytes can ask for terabytes.
"""

from __future__ import annotations

import contextlib
from typing import Any, Literal

import numpy as np
import pydicom
from pydicom.encaps import generate_frames
from pydicom.pixels import get_decoder
from pydicom.pixels.processing import apply_color_lut, convert_color_space
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    RLELossless,
)

from .. import limits
from ..decoders import DECODER, JPEG, SYNTAXES, Expected
from ..errors import SourceError
from .elements import UNCOMPRESSED, quiet, read_dataset
from .frames import Frame
from .headers import Header
from .multiframe import cut_tiles

Units = Literal["hu", "stored"]

MEASURED = ("CT", "PT", "RTDOSE")
"""Modalities whose rescaled values are measurements: MONOCHROME1 then says how to show them, not what they mean."""

_PIXEL_TAGS = [
    "Rows",
    "Columns",
    "NumberOfFrames",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "PlanarConfiguration",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PixelData",
    "FloatPixelData",
    "DoubleFloatPixelData",
    "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths",
]
_PALETTE_TAGS = [f"{colour}PaletteColorLookupTable{part}" for colour in ("Red", "Green", "Blue")
                 for part in ("Descriptor", "Data")] + [
    f"Segmented{colour}PaletteColorLookupTableData" for colour in ("Red", "Green", "Blue")
]  # fmt: skip


def stored_values(header: Header) -> np.ndarray:
    """Values of a file's frames as stored: ``(N, H, W)`` integers or floats, ``(N, H, W, 3)`` for colour (RGB).

    The tiles of a mosaic are frames. Palette colours are looked up; MONOCHROME1 is turned into the sense of MONOCHROME2
    (except for `MEASURED` modalities). Overlays in unused bits are no pixels.

    Raises:
        SourceError: the pixel data is cut off, damaged, or in a coding without a decoder here.
        SetupError: it is compressed, and the decoders are not installed.
    """
    _check_size(header)
    if header.offset >= 0 and header.samples == 1 and header.bits_allocated in (8, 16, 32):
        cells = _plain(header)
        array = _keep_padding(cells, _within_bits(cells, header), header)
    else:
        array = _decoded(header)
    if _is_inverted(header, array.dtype):
        array = _inverted(array, header)
    return cut_tiles(array[0], header.tiles) if header.tiles else array


def padding_in(header: Header, dtype: np.dtype) -> tuple[float, float] | None:
    """Lowest and highest of the values, as `stored_values` gives them in ``dtype``, that are padding; None if none are. Pure."""
    if header.padding is None or header.colour:
        return None
    if not _is_inverted(header, dtype):
        return header.padding
    low, high = (_flipped(value, header, dtype) for value in header.padding)
    return high, low


def _is_inverted(header: Header, dtype: np.dtype) -> bool:
    return header.photometric == "MONOCHROME1" and header.modality not in MEASURED and dtype.kind in "iu"


def scale(stored: np.ndarray, header: Header, frame: Frame, units: Units, out: np.ndarray) -> None:
    """Stored values of one frame into float32 ``out``, rescaled if ``units`` is "hu"; float64 where float32 would
    round twice. Colour has no rescale."""
    if units == "stored" or header.colour:
        out[...] = stored
    elif header.lut:
        out[...] = modality_lut(header, stored)
    elif frame.slope == 1 and frame.intercept == 0:
        out[...] = stored
    elif frame.slope == 1 and frame.intercept == round(frame.intercept) and stored.dtype.itemsize <= 2:
        np.add(stored, np.float32(frame.intercept), out=out, dtype=np.float32)
    else:
        out[...] = stored.astype(np.float64) * frame.slope + frame.intercept


@quiet()
def modality_lut(header: Header, stored: np.ndarray) -> np.ndarray:
    """Stored values through ModalityLUTSequence (C.11.1), float32 of the same shape.

    Raises:
        SourceError: the table is damaged.
    """
    try:
        dataset = read_dataset(header.path, ["PixelRepresentation", "ModalityLUTSequence"])
        item = dataset.ModalityLUTSequence[0]
        count, first, bits = (int(number) for number in item.LUTDescriptor)
        data, word = item.LUTData, "<u2" if dataset.original_encoding[1] else ">u2"
        if isinstance(data, bytes):
            table = np.frombuffer(data, "u1" if bits <= 8 and len(data) == (count or 65536) else word)
        else:
            table = np.atleast_1d(np.array(data, np.int64)) & 0xFFFF
        if header.signed and first > 32767:
            first -= 65536
        if len(table) < (count or 65536):
            raise ValueError
    except Exception as error:
        raise SourceError(f"{header.name}: ModalityLUTSequence is damaged ({type(error).__name__})") from error
    return table[np.clip(stored.astype(np.int64) - first, 0, (count or 65536) - 1)].astype(np.float32)


def _check_size(header: Header) -> None:
    values = header.rows * header.columns * header.count * header.samples
    if header.syntax in UNCOMPRESSED and header.syntax != str(DeflatedExplicitVRLittleEndian):
        # 2 of 3 values of YBR_FULL_422 are there.
        if values * header.bits_allocated // 8 * 2 // 3 > header.size:
            raise _cut(header)
    elif values > max(limits.SURE_VALUES, limits.MOST_VALUES_A_BYTE * header.size):
        raise SourceError(
            f"{header.name}: the header asks for {values} values, which a compressed file of {header.size} bytes hardly "
            "holds; refused before decoding"
        )
    if header.samples not in (1, 3):
        raise SourceError(f"{header.name}: {header.samples} samples a pixel, expected 1 or 3")


def _plain(header: Header) -> np.ndarray:
    """Uncompressed values by position."""
    values = header.rows * header.columns * header.count
    width = header.bits_allocated // 8
    if header.length < values * width or header.offset + values * width > header.size:
        raise _cut(header)
    big = header.syntax == str(ExplicitVRBigEndian)
    if big and width == 1:  # bytes may be swapped in words
        return _decoded(header)
    dtype = np.dtype(f"{'>' if big else '<'}{'i' if header.signed else 'u'}{width}")
    try:
        array = np.fromfile(header.path, dtype, values, offset=header.offset)
    except OSError as error:
        raise SourceError(f"{header.name}: cannot be read ({error.strerror})") from error
    if array.size != values:
        raise _cut(header)
    array = array.reshape(header.count, header.rows, header.columns)
    return _palette(array, header) if header.photometric == "PALETTE COLOR" else array


def _within_bits(array: np.ndarray, header: Header, low: int | None = None) -> np.ndarray:
    """Values of the stored bits only: overlays and padding in the bits above and below them are no pixels."""
    if array.dtype.kind not in "iu" or header.photometric == "PALETTE COLOR":
        return array
    width = 8 * array.dtype.itemsize
    stored = min(header.bits_stored, width)
    if low is None:
        low = header.high_bit + 1 - header.bits_stored
    if stored < 1 or low < 0 or low + stored > width:
        raise SourceError(
            f"{header.name}: BitsStored {header.bits_stored} and HighBit {header.high_bit} contradict BitsAllocated "
            f"{header.bits_allocated}"
        )
    array = array.view(np.dtype(f"{array.dtype.byteorder}{'i' if header.signed else 'u'}{array.dtype.itemsize}"))
    if stored == width:
        return array
    if header.signed:
        return (array << (width - stored - low)) >> (width - stored)
    return (array >> low if low else array) & ((1 << stored) - 1)


def _inverted(array: np.ndarray, header: Header) -> np.ndarray:
    """MONOCHROME1 (small is bright) in the sense of MONOCHROME2; the range of values stays."""
    return _flipped(array, header, array.dtype)


def _flipped(value: Any, header: Header, dtype: np.dtype) -> Any:
    if header.signed:
        return -1 - value
    return ((1 << min(header.bits_stored, 8 * dtype.itemsize)) - 1) - value


def _keep_padding(cells: np.ndarray, array: np.ndarray, header: Header) -> np.ndarray:
    """``array`` with padding that BitsStored cannot hold as the whole cell has it: cut to the stored bits it would look like tissue."""
    if header.padding is None or header.colour or array.dtype.kind not in "iu":
        return array
    low, high = header.padding
    least = -(1 << (header.bits_stored - 1)) if header.signed else 0
    if least <= low and high < least + (1 << header.bits_stored):
        return array
    padded = (cells >= low) & (cells <= high)
    if not padded.any():
        return array
    array = array.astype(np.int64 if array.dtype.itemsize > 2 else np.int32)
    array[padded] = cells[padded]
    return array


def _cut(header: Header) -> SourceError:
    return SourceError(
        f"{header.name}: pixel data is truncated or damaged, expected {header.rows} x {header.columns} pixels of "
        f"{header.count} frame(s); get this file again from its source"
    )


@quiet()
def _decoded(header: Header) -> np.ndarray:
    """What is not plain: compressed, deflated, colour, odd widths, floats."""
    try:
        dataset = read_dataset(header.path, _PIXEL_TAGS, pixels=True)
        if not any(key in dataset for key in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
            raise SourceError(f"{header.name}: no pixel data (truncated file?); get this file again from its source")
        if header.syntax in SYNTAXES:
            return _compressed(dataset, header)
        if header.syntax != RLELossless and header.syntax not in UNCOMPRESSED:
            raise SourceError(
                f"{header.name}: pixel data in the transfer syntax {_syntax_name(header.syntax)}, which is not supported"
            )
        return _by_pydicom(dataset, header)
    except SourceError:
        raise
    except Exception as error:
        raise _cut(header) from error


def _syntax_name(syntax: str) -> str:
    """Of the standard's list only: what else stands there is not shown."""
    uid = UID(syntax)
    with contextlib.suppress(Exception):
        if uid.is_transfer_syntax and uid.name != uid:
            return uid.name
    return "of no known name"


def _by_pydicom(dataset: pydicom.Dataset, header: Header) -> np.ndarray:
    syntax = UID(header.syntax)
    if syntax == DeflatedExplicitVRLittleEndian:  # `read_dataset` has inflated it
        syntax = dataset.file_meta.TransferSyntaxUID
    if "PixelData" in dataset:
        needed = header.rows * header.columns * header.count * header.samples * header.bits_allocated // 8
        if syntax != RLELossless and len(dataset.PixelData) < needed * 2 // 3:
            raise _cut(header)
    array, found = get_decoder(syntax).as_array(dataset, raw=True)
    array = _shaped(array, header)
    if header.samples == 3:
        return _rgb(array, str(found.get("photometric_interpretation", header.photometric)), header)
    if header.photometric == "PALETTE COLOR":
        return _palette(array, header)
    return _within_bits(array, header) if header.bits_allocated > 1 else array


def _compressed(dataset: pydicom.Dataset, header: Header) -> np.ndarray:
    expected = Expected(header.syntax, header.rows, header.columns, header.samples, header.photometric)
    result: np.ndarray | None = None
    index = -1
    frames = generate_frames(dataset.PixelData, number_of_frames=header.count)
    for index, data in enumerate(frames):
        if index >= header.count:
            break
        try:
            frame = DECODER.frame(bytes(data), expected)
        except SourceError as error:
            which = f"frame {index + 1}: " if header.count > 1 else ""
            raise SourceError(f"{header.name}: {which}{error}") from None
        if result is None:
            result = np.empty((header.count, *frame.shape), frame.dtype)
        if frame.dtype != result.dtype:
            raise _cut(header)
        result[index] = frame
    if result is None or index + 1 < header.count:
        raise SourceError(
            f"{header.name}: {index + 1} compressed frames, the header says {header.count}; get this file again"
        )
    if header.samples == 3:
        # JPEG and JPEG 2000 have given RGB where they transform; JPEG 2000 without a transform keeps what it was given.
        done = header.syntax in JPEG or header.photometric in ("RGB", "YBR_ICT", "YBR_RCT")
        return _rgb(result, "RGB" if done else header.photometric, header)
    result = _within_bits(result, header, low=0)
    return _palette(result, header) if header.photometric == "PALETTE COLOR" else result


def _shaped(array: np.ndarray, header: Header) -> np.ndarray:
    shape = (header.count, header.rows, header.columns) + ((header.samples,) if header.samples > 1 else ())
    if array.size != np.prod(shape):
        raise SourceError(f"{header.name}: pixel data of shape {array.shape}, expected {shape}")
    return array.reshape(shape)


def _rgb(array: np.ndarray, photometric: str, header: Header) -> np.ndarray:
    if photometric in ("RGB", "YBR_ICT", "YBR_RCT"):
        return array
    if photometric in ("YBR_FULL", "YBR_FULL_422") and array.dtype == np.uint8:
        return convert_color_space(array, "YBR_FULL", "RGB", per_frame=True)
    raise SourceError(f"{header.name}: colours of a kind that is not supported, expected RGB, YBR_FULL or PALETTE COLOR")


@quiet()
def _palette(array: np.ndarray, header: Header) -> np.ndarray:
    """Colours of a palette as 8-bit RGB, as other colour images are; tables of 16 bits hold them in their high bytes."""
    try:
        tables: Any = read_dataset(header.path, _PALETTE_TAGS)
        if not tables.original_encoding[1]:  # `apply_color_lut` takes words for little endian
            for keyword in _PALETTE_TAGS:
                if keyword.endswith("TableData") and not keyword.startswith("Segmented") and keyword in tables:
                    words = np.frombuffer(tables[keyword].value, ">u2").astype("<u2")
                    tables[keyword].value = words.tobytes()
        colours = apply_color_lut(array.view(f"{array.dtype.byteorder}u{array.dtype.itemsize}"), tables)[..., :3]
    except Exception as error:
        raise SourceError(f"{header.name}: its palette is missing or damaged ({type(error).__name__})") from error
    wide = colours.dtype.itemsize > 1 and colours.size and int(colours.max()) > 255
    return (colours >> 8).astype(np.uint8) if wide else colours.astype(np.uint8)
