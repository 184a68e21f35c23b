"""The inner loop of reading: positional reads, check, decode, convert and place, compiled and outside Python's lock.

One call of `read` reads one box of one array. It takes the tables that `index` made once and never calls HDF5, whose one lock
would let a single thread read at a time. Import it through `kernel.inner_loop`, which loads the decoder first.

Places are unsigned where they index: Numba tests signed ones for wrap-around, which costs half the speed of the copies.
"""

from __future__ import annotations

import os
from pathlib import Path

import numba
import numpy as np
from numba import types

# What the stored items become: copies of 1, 2 or 4 bytes, or float32.
COPY1, COPY2, COPY4, FROM_UINT8, FROM_INT16, FROM_FLOAT16 = range(6)

OK, SHORT_READ, BAD_CHECK, BAD_BLOCK = range(4)

_ONE, _TWO, _THREE, _FOUR, _FIVE = (
    np.uint64(prime)
    for prime in (
        11400714785074694791,
        14029467366897019727,
        1609587929392839161,
        9650029242287828579,
        2870177450012600261,
    )
)
_SMALLEST_HALF = np.float32(2.0**-24)
u32, u64, f32, i64 = np.uint32, np.uint64, np.float32, np.int64

_pread = types.ExternalFunction("pread", types.int64(types.int32, types.intp, types.uint64, types.int64))
memcpy = types.ExternalFunction("memcpy", types.intp(types.uint64, types.uint64, types.uint64))
_getitem = types.ExternalFunction(
    "blosc2_getitem_ctx",
    types.int32(types.intp, types.intp, types.int32, types.int32, types.int32, types.intp, types.int32),
)


def cacheable() -> bool:
    """Numba refuses to compile where it can write no cache: then each process compiles for itself."""
    if os.environ.get("NUMBA_CACHE_DIR"):
        return True
    folder = Path(__file__).parent / "__pycache__"
    if os.access(folder if folder.is_dir() else folder.parent, os.W_OK):
        return True
    home = Path.home() / ".cache"
    return os.access(home if home.is_dir() else home.parent, os.W_OK)


@numba.njit(nogil=True)
def _turn(value, bits):
    return (value << u64(bits)) | (value >> u64(64 - bits))


@numba.njit(nogil=True)
def check_sum(data, at, size):
    """Low half of XXH64 with seed 0 of ``data[at:at + size]`` (uint8)."""
    lanes = size // 8
    words = data[at : at + lanes * 8].view(np.uint64)
    i = 0
    if size >= 32:
        a, b, c, d = _ONE + _TWO, _TWO, u64(0), u64(0) - _ONE
        while i + 4 <= lanes:
            a = _turn(a + words[i] * _TWO, 31) * _ONE
            b = _turn(b + words[i + 1] * _TWO, 31) * _ONE
            c = _turn(c + words[i + 2] * _TWO, 31) * _ONE
            d = _turn(d + words[i + 3] * _TWO, 31) * _ONE
            i += 4
        h = _turn(a, 1) + _turn(b, 7) + _turn(c, 12) + _turn(d, 18)
        for lane in (a, b, c, d):
            h = (h ^ (_turn(lane * _TWO, 31) * _ONE)) * _ONE + _FOUR
    else:
        h = _FIVE
    h += u64(size)
    while i < lanes:
        h = _turn(h ^ (_turn(words[i] * _TWO, 31) * _ONE), 27) * _ONE + _FOUR
        i += 1
    left, end = at + lanes * 8, at + size
    if end - left >= 4:
        word = u64(data[left]) | u64(data[left + 1]) << u64(8)
        word |= u64(data[left + 2]) << u64(16) | u64(data[left + 3]) << u64(24)
        h = _turn(h ^ (word * _ONE), 23) * _TWO + _THREE
        left += 4
    while left < end:
        h = _turn(h ^ (u64(data[left]) * _FIVE), 11) * _ONE
        left += 1
    h = (h ^ (h >> u64(33))) * _TWO
    h = (h ^ (h >> u64(29))) * _THREE
    return u32((h ^ (h >> u64(32))) & u64(0xFFFFFFFF))


@numba.njit(nogil=True)
def _copy(data, p, pitch_y, pitch_z, out, o, out_y, out_z, depth, height, width, item):
    """Bytes as they are; all of one row are moved at once."""
    size = width * item
    source, target = u64(data.ctypes.data), u64(out.ctypes.data)
    for _ in range(depth):
        a, b = source + p * item, target + o * item
        for _ in range(height):
            memcpy(b, a, size)
            a += pitch_y * item
            b += out_y * item
        p += pitch_z
        o += out_z


@numba.njit(nogil=True)
def _scale(data, p, pitch_y, pitch_z, out, o, out_y, out_z, depth, height, width, scale, offset):
    for _ in range(depth):
        a, b = p, o
        for _ in range(height):
            for x in range(width):
                out[b + x] = f32(data[a + x]) * scale + offset
            a += pitch_y
            b += out_y
        p += pitch_z
        o += out_z


@numba.njit(nogil=True)
def _widen(data, p, pitch_y, pitch_z, out, bits, o, out_y, out_z, depth, height, width):
    """Halves to floats by their bits: a thread of TensorFlow takes small floats for 0, and must not give other voxels."""
    for _ in range(depth):
        a, b = p, o
        for _ in range(height):
            for x in range(width):
                half = u32(data[a + x])
                sign, exponent, fraction = (half & u32(0x8000)) << u32(16), half >> u32(10) & u32(31), half & u32(0x3FF)
                if exponent == u32(31):  # infinite, or not a number
                    bits[b + x] = sign | u32(0x7F800000) | fraction << u32(13)
                elif exponent != u32(0):
                    bits[b + x] = sign | (exponent + u32(112)) << u32(23) | fraction << u32(13)
                else:
                    out[b + x] = f32(fraction) * _SMALLEST_HALF
                    bits[b + x] |= sign
            a += pitch_y
            b += out_y
        p += pitch_z
        o += out_z


@numba.njit(nogil=True)
def _pairs(data):
    """All bytes that can make items of two: a mapped file, or a buffer that a mask was decoded into, may have one more."""
    return data[: data.size // 2 * 2]


@numba.njit(nogil=True)
def _place(mode, data, p, pitch_y, pitch_z, out, o, out_y, out_z, depth, height, width, scale, offset):
    """Put depth x height rows of ``width`` items at their places; all places and pitches in items."""
    if mode == COPY1:
        _copy(data, p, pitch_y, pitch_z, out, o, out_y, out_z, depth, height, width, u64(1))
    elif mode == COPY2:
        _copy(data, p, pitch_y, pitch_z, out, o, out_y, out_z, depth, height, width, u64(2))
    elif mode == COPY4:
        _copy(data, p, pitch_y, pitch_z, out, o, out_y, out_z, depth, height, width, u64(4))
    elif mode == FROM_UINT8:
        _scale(data, p, pitch_y, pitch_z, out.view(np.float32), o, out_y, out_z, depth, height, width, scale, offset)
    elif mode == FROM_INT16:
        _scale(
            _pairs(data).view(np.int16), p, pitch_y, pitch_z, out.view(np.float32), o, out_y, out_z, depth, height, width, scale,
            offset,
        )  # fmt: skip
    else:
        _widen(
            _pairs(data).view(np.uint16), p, pitch_y, pitch_z, out.view(np.float32), out.view(np.uint32), o, out_y, out_z, depth,
            height, width,
        )  # fmt: skip


@numba.njit(nogil=True, cache=cacheable())
def read(
    fd, packed, item, mode, offsets, frames, start, check, head, lengths, seen, grid, chunk, slices, low, high, out, out_shape, origin,
    scale, offset, context, source, scratch, gap, info,
):  # fmt: skip
    """Read the voxels from ``low`` up to ``high`` into ``out``. All triples are along (D, H, W x C).

    Args:
        fd: file descriptor; -1: ``source`` is the whole file, mapped, and nothing is read.
        packed: Blosc2, else plain bytes.
        item: bytes of a stored item.
        mode: what becomes of the items.
        offsets: int64 (chunks,): first byte of each chunk in the file.
        frames: int64 (chunks,): where the Blosc2 chunk begins inside the HDF5 chunk.
        start, check: tables of the blocks, see `frames.py`.
        head: uint8 (chunks, n): first bytes of each Blosc2 chunk, with the list of its blocks.
        lengths: int64 (chunks,): how many of them.
        seen: uint8 (chunks, blocks): 1 where the check sum was compared before.
        grid, chunk: chunks of the array; items of a chunk.
        slices: of a block.
        out: uint8 (bytes,), the whole output in C order, of ``out_shape`` items.
        origin: the place in the array of the output's first item.
        scale, offset: float32, of FROM_UINT8 and FROM_INT16.
        context, source, scratch: of the thread, see `kernel.Scratch`. The first half of ``source`` is room for the head of a chunk
            of which only later blocks are read; the second half takes the bytes of a row of chunks.
        gap: bytes between two wanted pieces that are rather read than skipped by a second read.
        info: int64 (2,): chunk and block of a failure.

    Returns:
        OK, or what failed.
    """
    cz, cy, cx = chunk
    items = slices * cy * cx
    out_y = u64(out_shape[2])
    out_z = u64(out_shape[1]) * out_y
    room = source.size // 2
    gx0, gx1 = low[2] // cx, (high[2] - 1) // cx
    for gz in range(low[0] // cz, (high[0] - 1) // cz + 1):
        z0, z1 = max(low[0] - gz * cz, 0), min(high[0] - gz * cz, cz)
        k0, k1 = z0 // slices, (z1 - 1) // slices
        for gy in range(low[1] // cy, (high[1] - 1) // cy + 1):
            y0, y1 = max(low[1] - gy * cy, 0), min(high[1] - gy * cy, cy)
            row = (gz * grid[1] + gy) * grid[2]
            have, until = i64(0), i64(0)  # bytes of the file that stand in the second half of ``source``
            for gx in range(gx0, gx1 + 1):
                c = row + gx
                x0, x1 = max(low[2] - gx * cx, 0), min(high[2] - gx * cx, cx)
                first, last = offsets[c] + i64(start[c, k0]), offsets[c] + i64(start[c, k1 + 1])
                info[0], info[1] = c, k0
                there = have <= first and last <= until and (first - have) % item == 0
                if fd >= 0 and last > first and not there:
                    # These blocks and those of the chunks after it in this row, as long as the gaps are small.
                    end = last
                    for other in range(c + 1, row + gx1 + 1):
                        a, b = offsets[other] + i64(start[other, k0]), offsets[other] + i64(start[other, k1 + 1])
                        if b > a:
                            if a < end or a - end > gap or b - first > room or (a - first) % item:
                                break
                            end = b
                    if end - first > room:
                        return BAD_BLOCK
                    if _pread(fd, source.ctypes.data + room, u64(end - first), first) != end - first:
                        return SHORT_READ
                    have, until = first, end
                # Of the HDF5 chunk in ``source``; may lie before what was read.
                at = room + offsets[c] - have if fd >= 0 else offsets[c]
                begin = i64(0)
                if packed:
                    at = room if last == first else at
                    begin = at + frames[c]
                    if begin < 0 or begin + lengths[c] > source.size:
                        return BAD_BLOCK
                to = u64(gy * cy + y0 - origin[1]) * out_y + u64(gx * cx + x0 - origin[2])
                for k in range(k0, k1 + 1):
                    if seen[c, k] == 0:
                        a, b = i64(start[c, k]), i64(start[c, k + 1])
                        info[1] = k
                        if check_sum(source, at + a, b - a) != check[c, k]:
                            return BAD_CHECK
                        seen[c, k] = 1
                if not packed:  # all blocks of the chunk stand one after another
                    begins = (at + i64(start[c, k0])) // item
                    _place(
                        mode, source, u64(begins + ((z0 - k0 * slices) * cy + y0) * cx + x0), u64(cx), u64(cy * cx),
                        out, u64(gz * cz + z0 - origin[0]) * out_z + to, out_y, out_z, z1 - z0, y1 - y0, u64(x1 - x0),
                        scale, offset,
                    )  # fmt: skip
                    continue
                for i in range(lengths[c]):
                    source[begin + i] = head[c, i]
                for k in range(k0, k1 + 1):
                    info[1] = k
                    size = _getitem(
                        context, source.ctypes.data + begin, source.size - begin, k * items, items, scratch.ctypes.data,
                        items * item,
                    )  # fmt: skip
                    if size != items * item:
                        return BAD_BLOCK
                    az, ez = max(z0, k * slices), min(z1, k * slices + slices)
                    _place(
                        mode, scratch, u64(((az - k * slices) * cy + y0) * cx + x0), u64(cx), u64(cy * cx),
                        out, u64(gz * cz + az - origin[0]) * out_z + to, out_y, out_z, ez - az, y1 - y0, u64(x1 - x0),
                        scale, offset,
                    )  # fmt: skip
    return OK
