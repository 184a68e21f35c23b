"""The inner loop of writing: chunks are cut, compressed, framed and summed, compiled. Import through `kernel.inner_pack`."""

from __future__ import annotations

import numba
import numpy as np
from numba import types

from .inner_loop import cacheable, check_sum, memcpy

DONE, FULL, UNIFORM, FAILED = range(4)
_HEADER, _MEMCPYED, _SPECIAL = 32, 0x02, 0x70  # see `frames`
i64, u32, u64 = np.int64, np.uint32, np.uint64

_compress = types.ExternalFunction(
    "blosc2_compress_ctx", types.int32(types.intp, types.intp, types.int32, types.intp, types.int32)
)


@numba.njit(nogil=True)
def _gather(source, item, shape, chunk, place, out):
    """A chunk out of the volume; past the volume's end come zeros."""
    depth, height, width = min(chunk[0], shape[0] - place[0]), min(chunk[1], shape[1] - place[1]), min(chunk[2], shape[2] - place[2])
    if depth < chunk[0] or height < chunk[1] or width < chunk[2]:
        out[:] = 0
    size, pitch = u64(width * item), u64(chunk[2] * item)
    for z in range(depth):
        a = u64(source.ctypes.data) + u64((((place[0] + z) * shape[1] + place[1]) * shape[2] + place[2]) * item)
        b = u64(out.ctypes.data) + u64(z * chunk[1]) * pitch
        for _ in range(height):
            memcpy(b, a, size)
            a += u64(shape[2] * item)
            b += pitch


@numba.njit(nogil=True)
def _big_endian(out, at, value):
    for i in range(8):
        out[at + i] = (value >> (56 - 8 * i)) & 255


@numba.njit(nogil=True, cache=cacheable())
def pack(
    context, source, item, shape, chunk, grid, first, blocks, prefix, suffix, size_at, chunks_at, scratch, out, ends, start, check, head,
):  # fmt: skip
    """Pack the chunks from number ``first`` on, one after another into ``out``.

    Args:
        context: compressor of Blosc2; 0: chunks stay as they are.
        source: uint8, the volume in C order; ``shape`` and ``chunk`` (D, H, W) in voxels of ``item`` bytes.
        grid: chunks along D, H, W.
        blocks: of a chunk.
        prefix, suffix: uint8, what stands before and after the Blosc2 chunk in a frame; the sizes of the frame and of its chunk
            go to ``size_at`` and ``chunks_at`` of it.
        scratch: uint8, room for one chunk.
        ends: int64 (chunks,): where the bytes of each chunk end in ``out``.
        start, check, head: tables to fill, see `frames`.

    Returns:
        Why it ended, and the number of the chunk at which it did: DONE all, FULL ``out`` has no room, UNIFORM one value all
        over and compressed otherwise, FAILED.
    """
    plain = scratch.size
    at = i64(0)
    for c in range(first, grid[0] * grid[1] * grid[2]):
        if at + prefix.size + plain + _HEADER + suffix.size > out.size:
            return FULL, c
        place = (c // (grid[1] * grid[2]) * chunk[0], c // grid[2] % grid[1] * chunk[1], c % grid[2] * chunk[2])
        begin = at
        if context == 0:
            _gather(source, item, shape, chunk, place, out[at : at + plain])
            at += plain
            for k in range(blocks + 1):
                start[c, k] = k * (plain // blocks)
        else:
            _gather(source, item, shape, chunk, place, scratch)
            inner = at + prefix.size
            length = i64(_compress(context, scratch.ctypes.data, plain, out.ctypes.data + inner, plain + _HEADER))
            if length <= 0:
                return FAILED, c
            if out[inner + 31] & _SPECIAL:
                return UNIFORM, c
            out[at:inner] = prefix
            out[inner + length : inner + length + suffix.size] = suffix
            at = inner + length + suffix.size
            _big_endian(out, begin + size_at, at - begin)
            _big_endian(out, begin + chunks_at, length)
            for i in range(min(head.shape[1], length)):
                head[c, i] = out[inner + i]
            if out[inner + 2] & _MEMCPYED:
                for k in range(blocks + 1):
                    start[c, k] = prefix.size + _HEADER + k * (plain // blocks)
            else:
                for k in range(blocks):
                    p = inner + _HEADER + 4 * k
                    start[c, k] = prefix.size + (
                        i64(out[p]) | i64(out[p + 1]) << 8 | i64(out[p + 2]) << 16 | i64(out[p + 3]) << 24
                    )
                    if k and start[c, k] < start[c, k - 1]:
                        return FAILED, c
                start[c, blocks] = prefix.size + length
        for k in range(blocks):
            check[c, k] = check_sum(out, begin + i64(start[c, k]), i64(start[c, k + 1]) - i64(start[c, k]))
        ends[c] = at
    return DONE, i64(grid[0]) * grid[1] * grid[2]
