"""How much a file may ask for. Pure: a claim is compared with what the file can hold before anything is allocated.

Files come from outside, and a header of a few bytes can ask for terabytes. All readers ask here, so that one rule holds for
every format; they raise their own errors, with the file's name and the next step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

Packing = Literal["none", "gzip", "bzip2", "other"]

FREELY = 1000 << 20
"""Bytes that any file may unpack to, however well it is packed: a mask of 512 x 512 x 1000 voxels, which is nearly empty, as float32."""
MOST_RATIO = 200
"""Unpacked to packed size above `FREELY`. Of CT and MR it is below 10; of a bomb above 1000."""
HOLDS: dict[Packing, float] = {"none": 1, "gzip": 1032, "bzip2": 1 << 21, "other": float("inf")}
"""Most bytes that one byte of a file can stand for: of deflate see RFC 1951 (258 bytes of two bits), bzip2 counts runs before."""

SURE_VALUES = 64 << 20
"""Decoded values that any DICOM file may ask for: 256 frames of 512 x 512. As float32 256 MiB."""
MOST_VALUES_A_BYTE = 50
"""Above `SURE_VALUES`, decoded values for each byte of the file: lossy cine has about 20, a bomb thousands."""
INFLATED_LIMIT = 256 << 20
"""Largest deflated DICOM data set, decompressed: the largest images in clinical use are smaller, and a rank's memory stays
below 1 GiB with the decoded copy beside it."""


def unbelievable(claimed: int, held: int, packing: Packing = "none", memory: int | None = None) -> str:
    """Why a file cannot be believed to hold what it claims; "" if it can. Pure.

    Args:
        claimed: bytes of data, unpacked, as the header has it.
        held: bytes of the file.
        packing: how the data is packed.
        memory: bytes that the result takes; default: ``claimed``.
    """
    if claimed < 0:
        return f"a size of {brief(claimed)} bytes"
    if claimed > HOLDS[packing] * held + (1 << 16 if packing != "none" else 0):
        return f"its header asks for {brief(claimed)} bytes, which a file of {held} bytes cannot hold (damaged or truncated)"
    if max(claimed, memory or 0) > FREELY and packing != "none" and claimed > MOST_RATIO * held:
        return (
            f"would unpack from {held} to {brief(claimed)} bytes, more than {MOST_RATIO} times as many: medical images do not "
            "compress like this; unpack it yourself if that is right"
        )
    return ""


def grows_too_much(before: Sequence[int], after: Sequence[int], most: float) -> bool:
    """True if a grid of the shape ``after`` is large, and more than ``most`` times one of the shape ``before``. Pure."""
    old, new = (math.prod(int(side) for side in shape) for shape in (before, after))
    return new > max(SURE_VALUES, most * old)


def brief(number: int) -> str:
    """A whole number as a message shows it: of a very large one the power of ten. Pure."""
    # str() of a number of thousands of digits is slow, or refused.
    bits = number.bit_length()
    return str(number) if bits <= 64 else f"{'-' if number < 0 else ''}10^{int(bits * 0.30103)}"
