"""Preprocessing keeps the world where it is."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from hvd_imaging.config import PreprocessConfig
from hvd_imaging.errors import SourceError
from hvd_imaging.preprocess import crop, resample
from hvd_imaging.preprocess.intensity import normalize, percentile, scale, window, zscore
from hvd_imaging.preprocess.pipeline import preprocess, project, resolve
from hvd_imaging.volume import Volume

shapes = st.tuples(*[st.integers(1, 14)] * 3)
spacings = st.tuples(*[st.floats(0.3, 6.0)] * 3)
seeds = st.integers(0, 2**32 - 1)


def affine_of(spacing, seed=0):
    """A rotated grid somewhere in space."""
    random = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(random.normal(size=(3, 3)))
    affine = np.eye(4)
    affine[:3, :3] = rotation * np.array(spacing)
    affine[:3, 3] = random.uniform(-200, 200, 3)
    return affine


def worlds(affine, shape):
    """World coordinates (D, H, W, 3) of all voxel centres."""
    index = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), -1)
    return index @ affine[:3, :3].T + affine[:3, 3]


@settings(max_examples=60, deadline=None)
@given(shapes, spacings, spacings, seeds)
def test_grid_has_the_spacing_and_the_field_of_view(shape, old, new, seed):
    affine = affine_of(old, seed)
    shape_, affine_, positions = resample.grid(shape, affine, new)
    assert np.allclose(np.linalg.norm(affine_[:3, :3], axis=0), new, rtol=2e-6)
    assert [len(x) for x in positions] == list(shape_)
    middle = affine @ [*((np.array(shape) - 1) / 2), 1]
    middle_ = affine_ @ [*((np.array(shape_) - 1) / 2), 1]
    assert np.allclose(middle, middle_, atol=1e-6)
    extent, extent_ = np.array(shape) * old, np.array(shape_) * new
    assert (np.abs(extent - extent_) <= np.maximum(np.array(new) * 0.5000001, new - extent + 1e-6)).all()


@settings(max_examples=60, deadline=None)
@given(shapes, spacings, spacings, seeds)
def test_positions_are_where_the_affine_says(shape, old, new, seed):
    """A voxel of the new grid and its position in the old one are one point in the patient."""
    affine = affine_of(old, seed)
    shape_, affine_, positions = resample.grid(shape, affine, new)
    index = np.stack(np.meshgrid(*positions, indexing="ij"), -1)
    assert np.allclose(index @ affine[:3, :3].T + affine[:3, 3], worlds(affine_, shape_), atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.tuples(*[st.integers(4, 14)] * 3), spacings, seeds)
def test_a_ramp_stays_where_it_is(shape, old, seed):
    """An image that holds its own world coordinate shows that coordinate after up-sampling, away from the border."""
    affine = affine_of(old, seed)
    image = worlds(affine, shape)[..., 0].astype(np.float32)
    new = tuple(s * 0.6 for s in old)
    shape_, affine_, positions = resample.grid(shape, affine, new)
    result = resample.linear(image, positions)
    inside = np.ones(shape_, bool)
    for axis, x in enumerate(positions):
        inside &= ((x >= 0) & (x <= shape[axis] - 1)).reshape([-1 if a == axis else 1 for a in range(3)])
    assert np.allclose(result[inside], worlds(affine_, shape_)[..., 0][inside], atol=2e-3)


@settings(max_examples=40, deadline=None)
@given(shapes, spacings, spacings, st.floats(-1000, 3000, width=32))
def test_constant_stays_constant(shape, old, new, value):
    _, _, positions = resample.grid(shape, affine_of(old), new)
    result = resample.linear(np.full(shape, value, np.float32), positions)
    assert result.dtype == np.float32
    assert np.allclose(result, value, rtol=1e-5, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(shapes, spacings, spacings, seeds)
def test_no_new_labels_and_no_new_range(shape, old, new, seed):
    random = np.random.default_rng(seed)
    labels = random.choice(np.array([0, 1, 3, 7], np.uint8), shape)
    image = random.normal(size=shape).astype(np.float32)
    _, _, positions = resample.grid(shape, affine_of(old), new)
    moved = resample.nearest(labels, positions)
    assert moved.dtype == np.uint8 and set(np.unique(moved)) <= set(np.unique(labels))
    result = resample.linear(image, positions)
    assert result.shape == moved.shape
    assert image.min() - 1e-5 <= result.min() and result.max() <= image.max() + 1e-5


def test_linear_agrees_with_scipy():
    image = np.random.default_rng(0).normal(size=(9, 11, 10)).astype(np.float32)
    _, _, positions = resample.grid(image.shape, np.diag([2.0, 1, 1, 1]), (1.3, 0.7, 0.9))
    where = np.stack(np.meshgrid(*positions, indexing="ij"))
    expected = ndimage.map_coordinates(image, where, order=1, mode="nearest")
    assert np.allclose(resample.linear(image, positions), expected, atol=1e-5)


def test_down_sampling_is_smoothed():
    """A pattern above the new grid's resolution goes to its mean instead of becoming a false one."""
    image = np.zeros((1, 1, 64), np.float32)
    image[..., ::2] = 1
    _, _, positions = resample.grid(image.shape, np.eye(4), (1.0, 1.0, 4.0))
    inner = resample.linear(image, positions)[0, 0, 2:-2]
    assert np.allclose(inner, 0.5, atol=0.05)


def test_same_spacing_copies_the_voxels():
    image = np.random.default_rng(0).normal(size=(4, 5, 6)).astype(np.float32)
    affine = np.diag([3.0, 0.7, 0.7, 1.0])
    shape, affine_, positions = resample.grid(image.shape, affine, (3.0, 0.7 + 1e-9, 0.7))
    assert shape == image.shape and np.array_equal(affine, affine_)
    assert np.array_equal(resample.linear(image, positions), image)


def test_absurd_spacing_is_refused():
    with pytest.raises(SourceError, match=r"preprocess\.spacing"):
        resample.grid((100, 512, 512), np.eye(4), (0.001, 0.001, 0.001))


@settings(max_examples=40, deadline=None)
@given(st.tuples(*[st.integers(3, 12)] * 3), spacings, st.floats(0, 10), seeds)
def test_crop_keeps_the_landmark(shape, spacing, margin, seed):
    random = np.random.default_rng(seed)
    image = np.zeros(shape, np.float32)
    landmark = tuple(int(random.integers(n)) for n in shape)
    image[landmark] = 5
    affine = affine_of(spacing, seed)
    config = PreprocessConfig(intensity="none", orientation="source", crop="foreground", crop_margin_mm=margin)
    result, _ = preprocess(Volume(image, affine), None, config)
    found = np.argwhere(result.array[..., 0] == 5)
    assert len(found) == 1
    assert np.allclose(result.affine @ [*found[0], 1], affine @ [*landmark, 1], atol=1e-6)
    for axis in range(3):  # margin on both sides, as far as the volume reaches
        before, after = found[0][axis], result.shape[axis] - 1 - found[0][axis]
        assert before * spacing[axis] >= margin - 1e-4 or before == landmark[axis]
        assert after * spacing[axis] >= margin - 1e-4 or after == shape[axis] - 1 - landmark[axis]


def test_body_is_the_largest_component_in_hu():
    image = np.full((10, 40, 40), -1000, np.float32)
    image[2:8, 10:30, 10:30] = 40
    image[:, 38, :] = 100  # the table
    config = PreprocessConfig(intensity="window", crop="body", crop_margin_mm=0)
    mask = np.zeros(image.shape, np.uint8)
    mask[5, 20, 20] = 2
    result, moved = preprocess(Volume(image, np.eye(4)[:, [2, 1, 0, 3]], "CT"), mask, config)
    assert result.shape == (6, 20, 20) and moved.shape == (6, 20, 20)
    assert moved[3, 10, 10] == 2 and moved.sum() == 2
    assert np.allclose(result.array, (40 + 1000) / 1400)


def test_crop_errors_say_what_to_do():
    air = Volume(np.full((3, 3, 3), -1000, np.float32), np.eye(4), "CT")
    with pytest.raises(SourceError, match=r"-500 HU.*preprocess\.crop"):
        preprocess(air, None, PreprocessConfig(intensity="none", crop="body"))
    with pytest.raises(SourceError, match="modality MR"):
        preprocess(Volume(air.array, np.eye(4), "MR"), None, PreprocessConfig(intensity="none", crop="body"))
    with pytest.raises(SourceError, match=r"not 0.*preprocess\.crop"):
        preprocess(air.with_array(air.array * 0), None, PreprocessConfig(intensity="none", crop="foreground"))


@settings(max_examples=40, deadline=None)
@given(seeds, st.sampled_from(["window", "percentile", "zscore"]), st.floats(0.1, 1000), st.floats(-1000, 1000))
def test_intensities_end_in_0_to_1_and_keep_their_order(seed, intensity, gain, offset):
    image = (np.random.default_rng(seed).normal(size=(4, 5, 6)) * gain + offset).astype(np.float32)
    result = normalize(image, PreprocessConfig(intensity=intensity))
    assert result.dtype == np.float32 and result.min() >= 0 and result.max() <= 1
    order = np.argsort(image, axis=None)
    assert (np.diff(result.reshape(-1)[order]) >= 0).all()


def test_intensity_rules():
    assert np.allclose(window(np.array([-2000.0, -1000, -300, 400, 900]), (-1000, 400)), [0, 0, 0.5, 1, 1])
    image = np.concatenate([np.zeros(1000), np.arange(1, 102)]).astype(np.float32)  # the zeros do not count
    assert np.allclose(percentile(image, (0.0, 0.5))[1000:], np.clip(np.arange(101) / 50, 0, 1))
    values = np.array([1, 3, 1, 3, 0], np.float32)  # mean 2, deviation 1
    assert np.allclose(zscore(values, 4.0), [0.375, 0.625, 0.375, 0.625, 0.25])
    for flat in (np.zeros(5), np.full(5, 7.0)):
        for rule in (lambda a: percentile(a, (0.1, 0.9)), lambda a: zscore(a, 3.0), lambda a: scale(a, 1, 1)):
            assert (rule(flat) == 0).all()


def test_resolve():
    auto = PreprocessConfig()
    assert resolve(auto, "CT").intensity == "window"
    assert resolve(auto, "MR").intensity == resolve(auto, "").intensity == "percentile"
    assert resolve(PreprocessConfig(intensity="zscore"), "CT").intensity == "zscore"
    with pytest.raises(ValueError, match="resolve"):
        normalize(np.zeros((1, 1, 1)), auto)


@pytest.mark.parametrize("how", ["mip", "mean"])
def test_projection_is_one_thick_slice_in_the_middle(how):
    image = np.random.default_rng(0).random((5, 6, 7, 2), dtype=np.float32)
    mask = np.zeros((5, 6, 7), np.uint8)
    mask[1, 2, 3], mask[4, 2, 3] = 1, 2
    affine = affine_of((2.0, 1.0, 0.5))
    flat, labels, thick = project(image, mask, affine, how)
    assert flat.shape == (1, 6, 7, 2) and labels.shape == (1, 6, 7) and labels[0, 2, 3] == 2
    assert np.allclose(flat[0], image.max(0) if how == "mip" else image.mean(0), atol=1e-6)
    assert np.allclose(thick @ [0, 2, 3, 1], affine @ [2, 2, 3, 1])
    assert np.allclose(np.linalg.norm(thick[:3, :3], axis=0), (10.0, 1.0, 0.5))


def test_channels_are_treated_apart():
    random = np.random.default_rng(0)
    image = np.stack([random.random((6, 8, 8)), 1000 * random.random((6, 8, 8)) + 50], -1).astype(np.float32)
    config = PreprocessConfig(intensity="percentile", spacing=(1.5, 1.5, 1.5))
    both, _ = preprocess(Volume(image, np.eye(4)), None, config)
    assert both.array.shape[3] == 2
    for channel in range(2):
        alone, _ = preprocess(Volume(image[..., channel], np.eye(4)), None, config)
        assert np.array_equal(alone.array[..., 0], both.array[..., channel])


def test_the_whole_chain_on_a_rotated_volume():
    """A bright ball is found at its place after crop, resample and window; its mask stays with it."""
    affine = affine_of((4.0, 1.5, 1.5), 3)
    shape = (20, 50, 50)
    centre = worlds(affine, shape)[10, 25, 22]
    image = np.full(shape, -1000, np.float32)
    image[3:18, 5:45, 5:45] = 0
    ball = np.linalg.norm(worlds(affine, shape) - centre, axis=-1) < 10
    image[ball] = 400
    config = PreprocessConfig(intensity="window", crop="body", spacing=(2.0, 2.0, 2.0))
    result, mask = preprocess(Volume(image, affine, "CT"), ball.astype(np.uint8), config)
    assert result.array.dtype == np.float32 and mask.dtype == np.uint8 and mask.shape == result.shape
    assert np.allclose(result.spacing, 2.0)
    bright = worlds(result.affine, result.shape)[result.array[..., 0] > 0.9].mean(0)
    labelled = worlds(result.affine, result.shape)[mask > 0].mean(0)
    assert np.linalg.norm(bright - centre) < 1 and np.linalg.norm(labelled - centre) < 1


def test_nan_background_becomes_background():
    image = np.full((4, 4, 4), np.nan, np.float32)
    image[1:3, 1:3, 1:3] = [[[1, 2], [3, 4]]] * 2
    result, _ = preprocess(Volume(image, np.eye(4)), None, PreprocessConfig(intensity="none"))
    assert result.array[0, 0, 0, 0] == 0 and np.isfinite(result.array).all()
    with pytest.raises(SourceError, match="finite"):
        preprocess(Volume(image * np.nan, np.eye(4)), None, PreprocessConfig(intensity="none"))


def test_mask_of_another_shape_is_refused():
    with pytest.raises(SourceError, match="mask"):
        preprocess(Volume(np.zeros((3, 3, 3)), np.eye(4)), np.zeros((3, 3, 4), np.uint8), PreprocessConfig())


def test_a_larger_margin_reaches_the_border_only():
    box = crop.widen((slice(2, 3), slice(0, 5), slice(4, 6)), 5.0, (5.0, 0.1, 3.0), (10, 100, 7))
    assert box == (slice(1, 4), slice(0, 55), slice(2, 7))


def test_the_input_is_not_changed():
    image = np.random.default_rng(0).normal(size=(5, 6, 7)).astype(np.float32)
    before = image.copy()
    for crop_ in ("none", "foreground"):
        preprocess(Volume(image, np.eye(4), "CT"), None, PreprocessConfig(intensity="window", crop=crop_))
    assert np.array_equal(image, before)


@pytest.mark.parametrize("intensity", ["window", "percentile", "zscore", "none"])
def test_overwriting_the_input_gives_the_same(intensity):
    array = np.random.default_rng(0).normal(0, 300, (4, 6, 5, 2)).astype(np.float32)
    array[..., 1] = 0
    config = PreprocessConfig(intensity=intensity)
    kept, _ = preprocess(Volume(array.copy(), np.eye(4), "CT"), None, config)
    for voxels in (array.copy(), np.broadcast_to(array, array.shape)):  # the second cannot be written
        assert np.array_equal(preprocess(Volume(voxels, np.eye(4), "CT"), None, config, reuse=True)[0].array, kept.array)


def test_a_slab_projection_takes_its_slices_alone():
    array = np.zeros((10, 3, 4), np.float32)
    array[2], array[5], array[9] = 1, 0.5, 1
    volume = Volume(array, np.diag([2.0, 1.0, 1.0, 1.0]))
    config = PreprocessConfig(intensity="none", orientation="source", projection="mip", projection_slab=(0.3, 0.7))
    flat, _ = preprocess(volume, None, config)
    assert flat.shape == (1, 3, 4) and (flat.array == 0.5).all()
    # Slices 3 to 6: centre at 4.5 slices of 2 mm, 8 mm thick.
    assert flat.affine[0, 3] == 9 and flat.spacing[0] == 8
