"""The cut of a volume against a search through every block."""

import itertools
import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hvd_imaging.shards import chunks
from hvd_imaging.shards.chunks import expected_amplification, plan_layout


def search(shape, patch, voxel, compressed):
    """The block of the greatest worth by trying all: divisors of the patch, and equal parts of an axis that it covers and more."""

    def along(p, n):
        if p <= n:
            return [b for b in range(1, p + 1) if p % b == 0]
        return sorted({math.ceil(n / k) for k in range(1, n + 1)})

    def worth(block):
        d, h, w = block
        row = min(w, 32)
        return (h * row, w <= 32, w, d) if compressed else (row, w <= 32, h, d)

    allowed = [
        block
        for block in itertools.product(*map(along, patch, shape))
        if math.prod(block) * voxel <= 32 * 1024 and expected_amplification(block, patch, shape) <= chunks.AMPLIFICATION
    ]
    return max(allowed, key=worth)


sides = st.tuples(*[st.integers(1, 9) | st.integers(1, 45)] * 3)
patches = st.tuples(*[st.sampled_from([1, 8, 16, 32, 48, 60]) | st.integers(1, 60)] * 3)
voxels = st.sampled_from([1, 2, 4, 6, 8, 24, 200])


@settings(max_examples=100, deadline=None)
@given(sides, patches, voxels, st.booleans())
@example((35, 51, 35), (40, 56, 40), 2, True)
@example((1, 45, 41), (1, 64, 64), 24, True)
def test_the_cut_is_that_of_a_search_through_all(shape, patch, voxel, compressed):
    assert plan_layout(shape, patch, voxel, compressed).block == search(shape, patch, voxel, compressed)


@given(st.integers(1, 5000))
def test_the_lengths_of_equal_parts(n):
    found = chunks.lengths(n + 1, n)
    assert found == sorted({math.ceil(n / k) for k in range(1, n + 1)})
    assert len(found) <= 2 * math.isqrt(n) + 1  # so that planning takes no time for any size
    assert chunks.lengths(n, n) == [b for b in range(1, n + 1) if n % b == 0]


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    ("shape", "patch"),
    [((1, 1000, 900), (1, 1024, 1024)), ((1000, 1000, 1000), (2000, 2000, 2000)), ((1, 30011, 29989), (1, 65536, 65536)), ((0, 5, 5), (4, 4, 4))],
)
def test_large_patches_and_volumes_are_planned(shape, patch, compressed):
    layout = plan_layout(shape, patch, 2, compressed)
    assert expected_amplification(layout.block, patch, shape) <= chunks.AMPLIFICATION and math.prod(layout.block) * 2 <= 32 * 1024
    assert all(c - b < max(n, 1) for c, b, n in zip(layout.chunk, layout.block, shape, strict=True))
