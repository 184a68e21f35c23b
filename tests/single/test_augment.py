"""Augmentation: image and mask move together, draws belong to the sample."""

import numpy as np
import pytest

from hvd_imaging.config import AugmentConfig
from hvd_imaging.pipeline.augment import augment, draw, source_slices
from hvd_imaging.pipeline.plan import generator

OFF = dict(flip=(False, False, False), rotate_deg=0, scale=0, shift=0, gamma=0, noise=0)


def example():
    mask = np.zeros((4, 20, 24), np.uint8)
    mask[1:3, 5:12, 6:20] = 1
    mask[2, 8:10, 8:12] = 3
    return (mask[..., None] / 4).astype(np.float32), mask


def changed(image, mask, config, random):
    return augment(image, mask, config, draw(config, random))


def test_nothing_on_changes_nothing():
    image, mask = example()
    out, out_mask = changed(image, mask, AugmentConfig(**OFF), generator(0))
    np.testing.assert_array_equal(out, image)
    np.testing.assert_array_equal(out_mask, mask)


@pytest.mark.parametrize("change", [dict(flip=(True, True, True)), dict(rotate_deg=30), dict(scale=0.3)])
def test_image_and_mask_move_together(change):
    image, mask = example()
    config = AugmentConfig(**(OFF | change), probability=1)
    moved = 0
    for seed in range(6):
        out, out_mask = changed(image, mask, config, generator(seed))
        assert set(np.unique(out_mask)) <= {0, 1, 3}
        # Linear and nearest interpolation disagree on the border only.
        agree = (out[..., 0] > 0.125) == (out_mask > 0)
        assert agree.mean() > 0.97
        moved += (out_mask != mask).any()
    assert moved >= 3


def test_draws_depend_on_the_sample_alone():
    image, mask = example()
    config = AugmentConfig(probability=1)
    first, _ = changed(image, mask, config, generator(1, "a"))
    changed(image, mask, config, generator(1, "b"))
    again, _ = changed(image, mask, config, generator(1, "a"))
    other, _ = changed(image, mask, config, generator(1, "b"))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_switching_one_change_off_leaves_the_others_as_they_were():
    image, mask = example()
    base = OFF | dict(rotate_deg=20.0)
    one, _ = changed(image, mask, AugmentConfig(**base, probability=1), generator(5))
    two, _ = changed(image, mask, AugmentConfig(**(base | dict(gamma=0.0)), probability=1), generator(5))
    noisy, _ = changed(image, mask, AugmentConfig(**(base | dict(noise=1e-3)), probability=1), generator(5))
    np.testing.assert_array_equal(one, two)
    assert 0 < np.abs(noisy - one).max() < 1e-2


def test_gamma_of_images_outside_the_unit_range_stays_finite():
    image = np.full((1, 8, 8, 1), -0.5, np.float32)
    out, none = changed(image, None, AugmentConfig(gamma=0.5), generator(0))
    assert np.isfinite(out).all() and none is None


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("slab", [(0, 3), (3, 4), (1, 7)])
def test_a_slab_is_augmented_like_the_whole(seed, slab):
    random = np.random.default_rng(seed)
    image, mask = random.random((7, 12, 10, 2), np.float32), random.integers(0, 3, (7, 12, 10), np.uint8)
    config = AugmentConfig(flip=(True, True, True), probability=0.7)
    draws = draw(config, generator(seed))
    whole, whole_mask = augment(image, mask, config, draws)
    first, last = source_slices(draws, 7, slab)
    part, part_mask = augment(image[first:last], mask[first:last], config, draws, slab[0])
    np.testing.assert_array_equal(part, whole[slab[0] : slab[1]])
    np.testing.assert_array_equal(part_mask, whole_mask[slab[0] : slab[1]])
