"""Pixels without passengers: bytes behind the image, unused bits, comments in compressed frames, writing.

What a viewer shows stays the same, to the bit, except where writing is blanked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.pixels import apply_color_lut, convert_color_space, iter_pixels
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)

from ..decoders import DECODER, JPEG, JPEG_2000, SYNTAXES, Expected
from ..errors import HvdImagingError, SourceError
from .burned_in import Box, blank, find_text, merge, policy
from .deidentify import CONTOURS, SEGMENTATION, mark_pixels
from .profile import Options

NATIVE = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian)


def clean(ds: Dataset, options: Options, declared: str = "") -> str:
    """Clean the pixels of a de-identified object, in place.

    Args:
        ds: from `deidentify`.
        declared: the original's BurnedInAnnotation.

    Returns:
        "kept" or "blanked".

    Raises:
        SourceError: the object is to be set aside, with the reason.
    """
    if ds.SOPClassUID == CONTOURS:
        return "kept"
    syntax = ds.file_meta.TransferSyntaxUID
    if syntax == RLELossless:
        _decompress(ds)
    elif syntax in SYNTAXES:
        strip = strip_jpeg_2000 if syntax in JPEG_2000 else strip_jpeg
        try:
            frames = generate_frames(ds.PixelData, number_of_frames=int(ds.get("NumberOfFrames", 1) or 1))
            ds.PixelData = encapsulate([strip(frame) for frame in frames])
        except SourceError:
            raise
        except Exception as error:
            raise SourceError(f"compressed pixel data cannot be taken apart ({type(error).__name__})") from None
        ds["PixelData"].VR = "OB"
    elif syntax not in NATIVE:
        raise SourceError("pixel data is compressed in a way that cannot be cleaned (video or a rare transfer syntax)")
    if ds.file_meta.TransferSyntaxUID in NATIVE:
        _trim(ds)
    if options.burned_in == "keep" or ds.SOPClassUID == SEGMENTATION or "PixelData" not in ds:
        return "kept"
    boxes = writing(ds)
    decision = policy(str(ds.get("Modality", "")), declared, boxes, options.burned_in)
    if decision == "quarantine":
        raise SourceError(
            "writing in the pixels" if boxes else "BurnedInAnnotation is YES, but no writing was found that could be blanked"
        )
    if decision == "blank":
        _blank(ds, boxes)
    ds.BurnedInAnnotation = "NO"
    mark_pixels(ds)
    return "blanked" if decision == "blank" else "kept"


def writing(ds: Dataset) -> list[Box]:
    """Boxes of writing in any frame.

    Raises:
        SourceError: the pixels cannot be decoded, so nobody knows what they say.
    """
    boxes: list[Box] = []
    for frame in _frames(ds):
        boxes += find_text(frame)
    return merge(boxes)


def _frames(ds: Dataset) -> Iterator[np.ndarray]:
    """Each frame, (H, W) or (H, W, 3), colours as RGB.

    Raises:
        SourceError: one cannot be decoded.
        SetupError: the decoders are not installed.
    """
    try:
        for frame in _stored(ds):
            yield apply_color_lut(frame, ds) if ds.PhotometricInterpretation == "PALETTE COLOR" else frame
    except HvdImagingError:
        raise
    except Exception as error:
        raise SourceError(f"the pixels cannot be decoded to look for writing ({type(error).__name__})") from None


def _stored(ds: Dataset) -> Iterator[np.ndarray]:
    """Stored values of each frame, (H, W) or (H, W, 3); RGB where that is what the coding holds."""
    syntax = str(ds.file_meta.TransferSyntaxUID)
    if syntax not in SYNTAXES:
        yield from iter_pixels(ds)
        return
    samples, photometric = int(ds.SamplesPerPixel), str(ds.PhotometricInterpretation)
    expected = Expected(syntax, int(ds.Rows), int(ds.Columns), samples, photometric)
    sign = "i" if ds.get("PixelRepresentation") else "u"
    dtype = np.dtype(f"{sign}{ds.BitsAllocated // 8}")
    for data in generate_frames(ds.PixelData, number_of_frames=int(ds.get("NumberOfFrames", 1) or 1)):
        frame = DECODER.frame(bytes(data), expected)
        if samples == 3 and syntax not in JPEG and photometric.startswith("YBR_FULL"):
            frame = convert_color_space(frame, photometric, "RGB")
        yield frame.astype(dtype, copy=False)


def _decompress(ds: Dataset) -> None:
    try:
        ds.decompress(generate_instance_uid=False)
    except Exception as error:
        raise SourceError(f"the pixels cannot be decoded ({type(error).__name__})") from None


def _blank(ds: Dataset, boxes: list[Box]) -> None:
    try:
        array = np.stack(list(_stored(ds)))
        if ds.SamplesPerPixel == 3:
            # Whatever the colours were stored as: RGB, pixel by pixel.
            ds.PhotometricInterpretation, ds.PlanarConfiguration = "RGB", 0
        dark = int(array.max()) if ds.PhotometricInterpretation == "MONOCHROME1" else None
        store(ds, blank(array, boxes, dark))
    except HvdImagingError:
        raise
    except Exception as error:
        raise SourceError(f"writing in the pixels cannot be blanked ({type(error).__name__})") from None


def stored(ds: Dataset) -> np.ndarray:
    """Stored values of an image of one frame and one sample, (H, W), a new array.

    Raises:
        SourceError: they cannot be decoded.
    """
    try:
        (frame,) = _stored(ds)
        if frame.ndim != 2 or frame.dtype.kind not in "iu":
            raise SourceError("the pixels are no grey values in whole numbers")
        return np.array(frame)
    except HvdImagingError:
        raise
    except Exception as error:
        raise SourceError(f"the pixels cannot be decoded ({type(error).__name__})") from None


def store(ds: Dataset, array: np.ndarray) -> None:
    """Stored values as pixel data that is not compressed; big-endian objects stay so, as their tables have that order too."""
    big = ds.file_meta.TransferSyntaxUID == ExplicitVRBigEndian
    ds.PixelData = array.astype(array.dtype.newbyteorder(">" if big else "<"), copy=False).tobytes()
    if len(ds.PixelData) % 2:
        ds.PixelData += b"\0"
    ds["PixelData"].VR = "OW" if ds.BitsAllocated > 8 else "OB"
    ds["PixelData"].is_undefined_length = False
    if not big:
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian


def _trim(ds: Dataset) -> None:
    """Native pixel data of exactly the image's size, with zeros (or the sign) in bits that the image does not use."""
    name = next(n for n in ("PixelData", "FloatPixelData", "DoubleFloatPixelData") if n in ds)
    data = ds[name].value
    try:
        allocated = int(ds.get("BitsAllocated", {"FloatPixelData": 32, "DoubleFloatPixelData": 64}.get(name, 0)))
        pixels = int(ds.Rows) * int(ds.Columns) * int(ds.get("NumberOfFrames", 1) or 1)
        samples = int(ds.get("SamplesPerPixel", 1))
        stored = int(ds.get("BitsStored", allocated))
        high = int(ds.get("HighBit", stored - 1))
    except (AttributeError, TypeError, ValueError):
        raise SourceError("the pixel description is incomplete") from None
    bits = pixels * samples * allocated
    if str(ds.get("PhotometricInterpretation", "")) == "YBR_FULL_422":
        bits = bits * 2 // 3
    expected = math.ceil(bits / 8)
    if not expected or data is None or len(data) < expected:
        raise SourceError(f"pixel data is cut off: expected {expected} bytes, found {len(data or b'')}")
    data = bytes(data[:expected])
    big = ds.file_meta.TransferSyntaxUID == ExplicitVRBigEndian
    if name == "PixelData" and allocated in (8, 16, 32) and 0 < stored < allocated and stored - 1 <= high < allocated:
        data = _used_bits(data, allocated, stored, high, bool(ds.get("PixelRepresentation", 0)), big)
    ds[name].value = data + b"\0" * (len(data) % 2)


def _used_bits(data: bytes, allocated: int, stored: int, high: int, signed: bool, big: bool) -> bytes:
    order = ">" if big else "<"
    if allocated == 8 and big and len(data) % 2 == 0:
        order = "|"
    array = np.frombuffer(data, np.dtype(f"{'' if allocated == 8 else order}u{allocated // 8}"))
    if high == stored - 1:
        mask = (1 << stored) - 1
        unused = array & array.dtype.type(((1 << allocated) - 1) ^ mask)
        if not unused.any():
            return data
        array = array & array.dtype.type(mask)
        if signed:
            negative = (array >> (stored - 1)) & 1
            array = array | (negative * array.dtype.type(((1 << allocated) - 1) ^ mask))
    else:
        mask = ((1 << stored) - 1) << (high + 1 - stored)
        array = array & array.dtype.type(mask)
    return array.tobytes()


_CODING = frozenset({*range(0xC0, 0xC8), *range(0xC9, 0xD0), *range(0xDA, 0xE0), 0xF7, 0xF8})
"""Marker segments that decoding needs (T.81 Table B.1, T.87 C.1.1); all others can hold anything."""


def strip_jpeg(frame: bytes) -> bytes:
    """A JPEG or JPEG-LS image without comments, application data and bytes behind its end (ITU-T T.81 B.1).

    Raises:
        SourceError: it does not begin as one.
    """
    if frame[:2] != b"\xff\xd8":
        raise SourceError("a compressed frame is no JPEG image")
    result, position = [b"\xff\xd8"], 2
    while position + 2 <= len(frame):
        if frame[position] != 0xFF:
            raise SourceError("a compressed frame is damaged")
        marker = frame[position + 1]
        if marker == 0xFF:
            position += 1
            continue
        if marker == 0xD9:
            break
        length = int.from_bytes(frame[position + 2 : position + 4], "big")
        end = position + 2 + length
        if length < 2 or end > len(frame):
            raise SourceError("a compressed frame is damaged")
        body = frame[position + 4 : end]
        if marker not in _CODING:
            colours = (marker == 0xEE and body[:5] == b"Adobe" and len(body) == 12) or (marker == 0xE8 and body[:4] == b"mrfx" and len(body) == 5)
            if colours or (marker == 0xE0 and body[:5] == b"JFIF\0" and len(body) == 14):
                result.append(frame[position:end])
            position = end
            continue
        if marker == 0xDA:
            # Entropy-coded data: up to the next marker that is neither a stuffed byte nor a restart.
            while end + 1 < len(frame) and not (frame[end] == 0xFF and frame[end + 1] >= 0xC0 and not 0xD0 <= frame[end + 1] <= 0xD7 and frame[end + 1] != 0xFF):
                found = frame.find(b"\xff", end + 1)
                end = found if found >= 0 else len(frame)
            end = min(end, len(frame))
        result.append(frame[position:end])
        position = end
    if len(result) < 2:
        raise SourceError("a compressed frame is damaged")
    result.append(b"\xff\xd9")
    stripped = b"".join(result)
    return stripped + b"\0" * (len(stripped) % 2)


def strip_jpeg_2000(frame: bytes) -> bytes:
    """A JPEG 2000 codestream without comments, boxes around it, and bytes behind its end (ITU-T T.800 A.4).

    Raises:
        SourceError: there is no codestream.
    """
    position = frame.find(b"\xff\x4f\xff\x51")
    if position < 0:
        raise SourceError("a compressed frame is no JPEG 2000 codestream")
    # Lengths of tile-parts (TLM) are told twice: without them no comment's length has to be taken off there.
    header, position = _without(frame, position + 2, b"\xff\x90", (0x64, 0x55))
    result = [b"\xff\x4f", header]
    while frame[position : position + 2] == b"\xff\x90":  # a tile-part
        length = int.from_bytes(frame[position + 6 : position + 10], "big")
        end = frame.rfind(b"\xff\xd9") if length == 0 else position + length
        if end <= position or end > len(frame):
            end = len(frame)
        header, data = _without(frame, position + 12, b"\xff\x93", (0x64,))
        if data > end:
            raise SourceError("a compressed frame is damaged")
        whole = 12 + len(header) + end - data if length else 0
        result += [frame[position : position + 6], whole.to_bytes(4, "big"), frame[position + 10 : position + 12], header]
        result.append(frame[data:end])
        position = end
    result.append(b"\xff\xd9")
    stripped = b"".join(result)
    return stripped + b"\0" * (len(stripped) % 2)


def _without(frame: bytes, position: int, stop: bytes, left_out: tuple[int, ...]) -> tuple[bytes, int]:
    """Marker segments from ``position`` up to the marker ``stop``, without some, and the place of that marker."""
    result = []
    while frame[position : position + 2] != stop:
        length = int.from_bytes(frame[position + 2 : position + 4], "big")
        if frame[position : position + 1] != b"\xff" or length < 2 or position + 2 + length > len(frame):
            raise SourceError("a compressed frame is damaged")
        if frame[position + 1] not in left_out:
            result.append(frame[position : position + 2 + length])
        position += 2 + length
    return b"".join(result), position
