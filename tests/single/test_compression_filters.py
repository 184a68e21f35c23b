"""Networks as graphs of channels: norms that go into convolutions, filters that leave, and what is left to compute."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_imaging.compression import filters, graph, macs, norms
from hvd_imaging.config import ModelConfig, PreprocessConfig
from hvd_imaging.errors import RunError
from hvd_imaging.models import architecture, build
from hvd_imaging.models.blocks import GroupNorm
from hvd_imaging.models.losses import sample_losses
from hvd_imaging.models.spec import ModelSpec

layers = tf.keras.layers
RANDOM = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def same_weights():
    tf.keras.utils.set_random_seed(0)


def spec(name="unet3d", patch=(8, 8, 8), **model):
    return ModelSpec(
        task="segmentation" if name == "unet3d" else "classification", classes=("a", "b", "c"), patch=patch, channels=1,
        preprocess=PreprocessConfig(), model=ModelConfig(name=name, **model), dataset_hash="", run="test",
    )  # fmt: skip


def shaken(model, seed=0):
    random = np.random.default_rng(seed)
    for weight in model.weights:
        weight.assign(weight + 0.1 * random.normal(size=weight.shape).astype(np.float32))
    return model


def unet(norm="none", **more):
    return shaken(build(spec(filters=8, depth=2, norm=norm, **more)))


def residual(norm=None):
    """A skip by addition, a norm, a flattening and a dense layer behind."""
    image = tf.keras.Input((8, 8, 1), name="image")
    a = layers.Conv2D(8, 3, padding="same", activation="relu", name="a")(image)
    b = layers.Conv2D(8, 3, padding="same", name="b")(a)
    if norm is not None:
        b = norm(b)
    c = layers.ReLU(name="c")(layers.Add(name="add")([a, b]))
    d = layers.MaxPooling2D(2, name="pool")(layers.Conv2D(6, 3, padding="same", activation="relu", name="d")(c))
    e = layers.Dense(5, activation="relu", name="e")(layers.Flatten(name="flat")(d))
    return shaken(tf.keras.Model(image, layers.Dense(3, name="logits")(e), name="residual"))


def patch(model, count=2):
    return RANDOM.random((count, *model.input.shape[1:]), np.float32)


# --- norms ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["instance", "group"])
def test_frozen_norms_are_exact_where_the_statistics_are_the_patchs_own(norm):
    model = unet(norm)
    image = patch(model, 1)
    frozen = norms.freeze(model, lambda: [image])
    assert norms.count(model) and not norms.count(frozen)
    np.testing.assert_allclose(frozen(image), model(image), atol=2e-4, rtol=1e-4)


def test_statistics_are_the_same_however_the_patches_are_spread():
    model, images = unet("group"), patch(unet(), 6)
    alone = norms.freeze(model, lambda: [images])
    # Two ranks: what each sums is added before it is divided.
    parts = [images[:1], images[1:]]
    sums = {}

    def recorded(rank):
        def reduce(arrays):
            key = len(sums.setdefault(rank, []))
            sums[rank].append([a.copy() for a in arrays])
            return arrays if rank == 0 else [a + b for a, b in zip(arrays, sums[0][key], strict=True)]

        return reduce

    one_norm = [layer for layer in model.layers if isinstance(layer, GroupNorm)][:1]
    assert one_norm
    # The first norm depends on no other: its map from both parts is the map from all.
    scaled = norms._with_fixed(model)
    norms._mean_map(one_norm[0], scaled, lambda: [parts[0]], recorded(0))
    joined = norms._mean_map(one_norm[0], scaled, lambda: [parts[1]], recorded(1))
    whole = norms._mean_map(one_norm[0], scaled, lambda: [images], lambda arrays: arrays)
    np.testing.assert_allclose(joined[0], whole[0], rtol=1e-6)
    np.testing.assert_allclose(joined[1], whole[1], rtol=1e-5, atol=1e-6)
    assert not norms.count(alone)


def test_batch_norms_fold_exactly_and_one_that_can_not_stays():
    model = residual(lambda x: layers.BatchNormalization(name="bn", trainable=False)(x))
    model.get_layer("bn").set_weights([RANDOM.random(8), RANDOM.random(8), RANDOM.random(8), RANDOM.random(8) + 0.5])
    image = patch(model)
    folded = norms.fold(model)
    assert "bn" not in [layer.name for layer in folded.layers]
    np.testing.assert_allclose(folded(image), model(image), atol=1e-5)
    image_in = tf.keras.Input((8, 8, 1))
    alone = tf.keras.Model(image_in, layers.Conv2D(2, 1)(layers.BatchNormalization(name="first")(image_in)))
    assert norms.count(norms.fold(alone)) == 1


def test_without_a_patch_nothing_is_frozen():
    with pytest.raises(RunError, match="no patch"):
        norms.freeze(unet("group"), list)


# --- channels -------------------------------------------------------------------------------------------------------


def test_what_is_added_leaves_together_and_outputs_stay():
    found = graph.describe(residual())
    opened = {tuple(sorted(space.openers)): space for space in found.spaces.values() if space.openers}
    assert set(opened) == {("a", "b"), ("d",), ("e",), ("logits",)}
    assert opened["logits",].pinned and not opened["a", "b"].pinned
    assert found.given["e"].repeat == 16


def test_skips_are_read_in_their_order():
    found = graph.describe(unet())
    first, second = found.given["up0_conv1"].segments
    assert found.spaces[first].openers == ["up0_up"] and found.spaces[second].openers == ["down0_conv2"]


def test_an_unknown_layer_pins_what_it_reads_and_is_named():
    image = tf.keras.Input((8, 8, 1))
    a = layers.Conv2D(4, 3, name="a")(image)
    model = tf.keras.Model(image, layers.Dense(2, name="logits")(layers.Flatten()(layers.DepthwiseConv2D(3, name="odd")(a))))
    found = graph.describe(model)
    space = next(s for s in found.spaces.values() if s.openers == ["a"])
    assert "odd" in space.pinned and "DepthwiseConv2D" in space.pinned
    with pytest.raises(RunError, match="odd"):
        filters.importance(model, list, lambda y, x: x)


def test_a_subclassed_network_and_one_inside_another_are_refused():
    class Mine(tf.keras.Model):
        def call(self, x):
            return x

    with pytest.raises(RunError, match="not a functional"):
        graph.describe(Mine())
    image = tf.keras.Input((8, 8, 1))
    inner = tf.keras.Model(image, layers.Conv2D(2, 1)(image), name="inner")
    with pytest.raises(RunError, match="inner"):
        graph.describe(tf.keras.Model(image, inner(image)))


# --- filters --------------------------------------------------------------------------------------------------------


def silence(model, found, space, gone):
    """Make channels of a space zero behind their activation: no weight, no bias, no scale, no shift."""
    for name in found.spaces[space].openers:
        layer = model.get_layer(name)
        weights = layer.get_weights()
        transposed = isinstance(layer, graph.TRANSPOSED)
        (weights[0].swapaxes(-1, -2) if transposed else weights[0])[..., gone] = 0
        for bias in weights[1:]:
            bias[gone] = 0
        layer.set_weights(weights)
    for layer in model.layers:
        if isinstance(layer, GroupNorm) and found.made[layer.name].segments == (space,):
            gamma, beta = layer.get_weights()
            gamma[gone], beta[gone] = 0, 0
            layer.set_weights([gamma, beta])


@pytest.mark.parametrize(
    "make", [unet, lambda: unet("instance"), lambda: unet(dropout=0.1), residual, lambda: shaken(build(spec("vgg16", (1, 32, 32), width=0.125)))],
    ids=["unet", "instance", "dropout", "residual", "vgg16"],
)  # fmt: skip
def test_filters_that_do_nothing_leave_without_a_trace(make, tmp_path):
    model = make()
    found = graph.describe(model)
    keep = {}
    for number, space in found.spaces.items():
        if not space.pinned and space.openers:
            gone = np.arange(space.size)[1::3]
            silence(model, found, number, gone)
            keep[number] = np.setdiff1d(np.arange(space.size), gone)
    image = patch(model)
    small = filters.remove(model, keep)
    before, after = macs.totals(model), macs.totals(small)
    assert after.parameters < 0.7 * before.parameters and after.macs < 0.8 * before.macs
    expected = model(image).numpy()
    np.testing.assert_allclose(small(image), expected, atol=2e-5 * max(1, abs(expected).max()))
    # It is a plain Keras network: it comes back from its description.
    architecture.save(small, tmp_path)
    again = architecture.load(tmp_path)
    again.set_weights(small.get_weights())
    np.testing.assert_array_equal(again(image), small(image))


def test_group_norms_lose_as_many_channels_in_every_group():
    model = unet("group")
    found = graph.describe(model)
    scores = {n: RANDOM.random(s.size) for n, s in found.spaces.items() if not s.pinned}
    keep = filters.choose(model, scores, 0.4, "parameters", 0.2)
    small = filters.remove(model, keep)
    assert np.isfinite(small(patch(small)).numpy()).all()
    for number, kept in keep.items():
        space = found.spaces[number]
        assert len(set(np.bincount(kept // (space.size // space.groups), minlength=space.groups))) == 1


def test_importance_finds_the_filter_that_does_nothing_and_adds_up_over_ranks():
    model = unet()
    found = graph.describe(model)
    space = next(n for n, s in found.spaces.items() if s.openers == ["down1_conv1"])
    silence(model, found, space, [3])
    images, labels = patch(model, 4), RANDOM.integers(0, 3, (4, 8, 8, 8)).astype(np.int32)

    def loss(y, x):
        return sample_losses("dice_ce", y, x, tf.ones(3))

    whole = filters.importance(model, lambda: [(images, labels)], loss)
    assert whole[space][3] == 0 < np.delete(whole[space], 3).max()
    parts = [filters.importance(model, lambda cut=cut: [(images[cut], labels[cut])], loss) for cut in (slice(1), slice(1, 4))]
    for number, score in whole.items():
        np.testing.assert_allclose(parts[0][number] + parts[1][number], score, rtol=1e-3, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.floats(0.05, 0.7), st.sampled_from(["parameters", "macs", "both"]), st.floats(0.05, 0.3), st.integers(0, 99))
def test_the_choice_removes_what_is_wanted_and_keeps_the_floor(share, measure, floor, seed):
    random = np.random.default_rng(seed)
    sizes = {0: 1, 1: 16, 2: 32, 3: 7, 4: 2}
    found = [filters.Work((a,), b, 1, 27, places, 1) for a, b, places in ((0, 1, 2000), (1, 2, 200), (2, 3, 200))]
    found.append(filters.Work((3, 1), 4, 1, 1, 2000, 1))
    scores = {n: random.random(sizes[n]) for n in (1, 2, 3)}
    keep = filters.select(scores, sizes, found, share, measure, floor)
    left = sizes | {n: len(kept) for n, kept in keep.items()}
    assert all(left[n] >= max(1, int(np.ceil(floor * sizes[n]))) for n in (1, 2, 3)) and left[4] == 2
    assert all((np.diff(kept) > 0).all() for kept in keep.values())
    for number, kept in keep.items():  # the weakest are gone
        gone = np.setdiff1d(np.arange(sizes[number]), kept)
        assert scores[number][gone].max() <= scores[number][kept].min()
    before, after = filters.cost(found, sizes), filters.cost(found, left)
    done = (before - after) / before
    wanted = done[{"parameters": [0], "macs": [1], "both": [0, 1]}[measure]].min()
    floors = all(left[n] - (4 if sizes[n] >= filters.WIDE else 1) < max(1, int(np.ceil(floor * sizes[n]))) for n in (1, 2, 3))
    assert wanted >= share or floors


# --- costs ----------------------------------------------------------------------------------------------------------


def test_costs_are_as_counted_by_hand():
    rows = {row.name: row for row in macs.table(residual())}
    assert (rows["a"].parameters, rows["a"].macs) == (9 * 8 + 8, 64 * 9 * 8)
    assert (rows["d"].parameters, rows["d"].macs) == (9 * 8 * 6 + 6, 64 * 9 * 8 * 6)
    assert (rows["e"].parameters, rows["e"].macs) == (96 * 5 + 5, 96 * 5)
    model = unet()
    up = next(row for row in macs.table(model) if row.name == "up0_up")
    assert up.macs == 4**3 * 8 * 16 * 8  # each voxel that is read meets the whole kernel
    kernel = model.get_layer("down0_conv1").kernel
    kernel.assign(tf.zeros_like(kernel))
    assert macs.totals(model).zeros == 27 * 8
