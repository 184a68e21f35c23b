"""The sliding window must be invisible: a voxel-wise network gives exactly its own function of the volume."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_imaging.errors import RunError
from hvd_imaging.inference.sliding import (
    center_patch,
    extract,
    importance,
    sliding_window,
    window_starts,
)


def voxelwise(batch: np.ndarray) -> np.ndarray:
    """(N, D, H, W, C) -> two "probabilities" of each voxel's own value."""
    p = 1 / (1 + np.exp(-batch[..., :1] * 3))
    return np.concatenate([1 - p, p], -1).astype(np.float32)


sizes = st.tuples(st.integers(1, 17), st.integers(1, 19), st.integers(1, 18))
patches = st.tuples(st.integers(1, 8), st.integers(1, 9), st.integers(1, 8))


@settings(max_examples=60, deadline=None)
@given(sizes, patches, st.floats(0, 0.9), st.integers(1, 4), st.integers(0, 3), st.integers(0, 99))
def test_a_voxelwise_network_is_reproduced_for_any_shape_patch_overlap_and_budget(
    shape, patch, overlap, batch, extra, seed
):
    image = np.random.default_rng(seed).normal(size=(*shape, 1)).astype(np.float32)
    least = min(patch[0], shape[0]) * min(patch[1], shape[1]) * shape[2] * 2 * 4
    arguments = {"overlap": overlap, "batch": batch, "memory_bytes": least * (1 + extra)}
    expected = voxelwise(image[None])[0]
    found = sliding_window(voxelwise, image, patch, 2, **arguments)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    labels = sliding_window(voxelwise, image, patch, 2, mode="labels", **arguments)
    sure = np.abs(expected[..., 0] - expected[..., 1]) > 1e-4
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels[sure], expected.argmax(-1)[sure])


def test_the_budget_never_changes_the_result():
    """A network that sees its whole window (here: its mean), so that the weighting matters."""

    def blurred(batch: np.ndarray) -> np.ndarray:
        middle = batch.mean(axis=(1, 2, 3), keepdims=True)
        return np.concatenate([batch + middle, batch - middle], -1)

    image = np.random.default_rng(1).random((21, 30, 17, 1), np.float32)
    large = sliding_window(blurred, image, (8, 8, 8), 2)
    for budget in (8 * 8 * 17 * 2 * 4, 8 * 13 * 17 * 2 * 4):
        np.testing.assert_array_equal(large, sliding_window(blurred, image, (8, 8, 8), 2, memory_bytes=budget))


def test_the_accumulator_stays_within_the_budget(monkeypatch):
    sizes_made: list[int] = []
    zeros = np.zeros

    def watched(shape, dtype=float):
        made = zeros(shape, dtype)
        if made.ndim == 4 and made.shape[-1] == 3:
            sizes_made.append(made.nbytes)
        return made

    monkeypatch.setattr(np, "zeros", watched)
    budget = 40_000
    image = zeros((40, 40, 20, 1), np.float32)
    sliding_window(
        lambda batch: np.repeat(batch, 3, -1), image, (8, 8, 8), 3, memory_bytes=budget, mode="labels"
    )
    assert sizes_made and max(sizes_made) <= budget


def test_a_budget_below_one_row_of_patches_is_refused():
    with pytest.raises(RunError, match=r"expected at least"):
        sliding_window(voxelwise, np.zeros((32, 32, 32, 1), np.float32), (8, 8, 8), 2, memory_bytes=1000)


def test_a_network_of_another_shape_is_refused():
    with pytest.raises(RunError, match=r"returned an array of shape"):
        sliding_window(lambda batch: batch, np.zeros((8, 8, 8, 1), np.float32), (8, 8, 8), 2)


def test_windows_end_flush_with_the_border_and_cover_every_voxel():
    assert window_starts(20, 8, 0.5) == [0, 4, 8, 12]
    assert window_starts(21, 8, 0.5) == [0, 4, 8, 12, 13]
    assert window_starts(8, 8, 0.5) == [0]
    assert window_starts(5, 8, 0.5) == [-1]
    for length in range(1, 40):
        for patch in range(1, 12):
            starts = window_starts(length, patch, 0.4)
            covered = {v for s in starts for v in range(s, s + patch)}
            assert covered >= set(range(length))


def test_weights_peak_in_the_middle_and_are_never_zero():
    weight = importance(96)
    assert weight.min() > 0
    assert weight.argmax() in (47, 48)
    np.testing.assert_allclose(weight, weight[::-1])
    # one sigma = patch / 8 beside the middle
    assert importance(17)[8] == 1
    np.testing.assert_allclose(importance(16)[9:10], np.exp(-0.5 * (1.5 / 2) ** 2))


def test_center_patch_crops_and_pads():
    image = np.arange(5 * 4 * 3, dtype=np.float32).reshape(5, 4, 3, 1)
    patch = center_patch(image, (3, 6, 3))
    assert patch.shape == (3, 6, 3, 1)
    np.testing.assert_array_equal(patch[:, 1:5], image[1:4])
    assert not patch[:, 0].any() and not patch[:, 5].any()


def test_extract_far_outside_is_empty():
    assert not extract(np.ones((2, 2, 2, 1), np.float32), (5, 0, 0), (2, 2, 2)).any()


def test_progress_counts_every_window():
    seen: list[tuple[int, int]] = []
    sliding_window(
        voxelwise,
        np.zeros((12, 12, 12, 1), np.float32),
        (8, 8, 8),
        2,
        batch=3,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen[-1] == (8, 8)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
