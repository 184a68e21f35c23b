"""Pixel data as numbers: read by position where it is plain, else decoded."""

from __future__ import annotations

import numpy as np
from pydicom.uid import (
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from ..errors import SourceError
from .elements import quiet, read_dataset
from .headers import Header

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
]


def stored_values(header: Header) -> np.ndarray:
    """Stored values of a file, ``(N, H, W)`` or ``(N, H, W, C)``: integers, or floats of FloatPixelData.

    Raises:
        SourceError: the pixel data is cut off, damaged, or in a coding without a decoder here.
    """
    if header.offset >= 0 and header.samples == 1 and header.bits_allocated in (8, 16, 32):
        array = _plain(header)
    else:
        array = _decoded(header)
    return _within_bits(array, header)


def _plain(header: Header) -> np.ndarray:
    """Uncompressed values by position."""
    name = header.name
    values = header.rows * header.columns * header.count
    width = header.bits_allocated // 8
    if header.length < values * width or header.offset + values * width > header.size:
        raise _cut(header)
    big = header.syntax == str(ExplicitVRBigEndian)
    if big and width == 1:
        return _decoded(header)
    dtype = np.dtype(f"{'>' if big else '<'}{'i' if header.signed else 'u'}{width}")
    try:
        array = np.fromfile(header.path, dtype, values, offset=header.offset)
    except OSError as error:
        raise SourceError(f"{name}: can not be read ({error.strerror})") from error
    if array.size != values:
        raise _cut(header)
    return array.reshape(header.count, header.rows, header.columns)


def _within_bits(array: np.ndarray, header: Header) -> np.ndarray:
    """Values of the stored bits only: overlays and padding in the bits above and below them are no pixels."""
    if array.dtype.kind not in "iu" or header.bits_stored >= 8 * array.dtype.itemsize:
        return array
    low = header.high_bit + 1 - header.bits_stored
    if header.signed:
        above = 8 * array.dtype.itemsize - 1 - header.high_bit
        return (array << above) >> (above + low)
    return (array >> low) & ((1 << header.bits_stored) - 1)


def _cut(header: Header) -> SourceError:
    return SourceError(
        f"{header.name}: pixel data is truncated or damaged, expected {header.rows} x {header.columns} pixels of "
        f"{header.count} frame(s); get this file again from its source"
    )


@quiet()
def _decoded(header: Header) -> np.ndarray:
    name, syntax = header.name, ""
    try:
        dataset = read_dataset(header.path, _PIXEL_TAGS, pixels=True)
        if "TransferSyntaxUID" in dataset.file_meta:
            syntax = dataset.file_meta.TransferSyntaxUID.name
        else:  # a data set without preamble and file meta: not compressed, coded as the parser found
            implicit, little = dataset.original_encoding
            dataset.file_meta.TransferSyntaxUID = (
                ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian if little else ExplicitVRBigEndian
            )
        if not any(key in dataset for key in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
            raise SourceError(f"{name}: no pixel data (truncated file?); get this file again from its source")
        array = dataset.pixel_array
    except SourceError:
        raise
    except (RuntimeError, NotImplementedError, ImportError) as error:
        raise SourceError(
            f"{name}: pixel data in {syntax or 'an unknown coding'} can not be decoded ({type(error).__name__}): "
            "damaged, or its decoder is missing (the extra 'dicom' brings JPEG decoders)"
        ) from error
    except Exception as error:
        raise _cut(header) from error
    shape = (header.count, header.rows, header.columns) + ((header.samples,) if header.samples > 1 else ())
    if array.size != np.prod(shape):
        raise SourceError(f"{name}: pixel data of shape {array.shape}, expected {shape}")
    return array.reshape(shape)
