"""Networks, losses and metrics."""

import numpy as np
import pytest
import tensorflow as tf

from hvd_imaging import models
from hvd_imaging.config import ModelConfig, PreprocessConfig
from hvd_imaging.errors import ConfigError
from hvd_imaging.models.blocks import GroupNorm, group_count
from hvd_imaging.models.losses import cross_entropy, sample_losses, soft_dice
from hvd_imaging.models.metrics import dice_of_counts, overlap_counts
from hvd_imaging.models.spec import ModelSpec


def spec(patch, task="segmentation", classes=3, channels=1, **model):
    return ModelSpec(
        task=task,
        classes=tuple(f"c{i}" for i in range(classes)),
        patch=patch,
        channels=channels,
        preprocess=PreprocessConfig(intensity="none"),
        model=ModelConfig(**model),
        dataset_hash="",
        run="",
    )


def test_full_size_vgg16_is_the_papers():
    net = models.build(spec((1, 224, 224), "classification", 1000, 3, name="vgg16", head="dense", norm="none"))
    assert net.count_params() == 138_357_544  # Simonyan and Zisserman (2015), configuration D
    assert net.output_shape == (None, 1000)


@pytest.mark.parametrize("norm", ["none", "group", "instance"])
@pytest.mark.parametrize(
    "wanted",
    [
        spec((1, 32, 40), "classification", 2, name="vgg16", width=0.125),
        spec((8, 16, 16), "classification", 2, 2, name="cnn3d", width=0.25),
        spec((8, 16, 12), channels=2, name="unet3d", filters=4, depth=3),
    ],
    ids=lambda s: s.model.name,
)
def test_shapes_and_gradients(wanted, norm):
    wanted = wanted.model_copy(update={"model": wanted.model.model_copy(update={"norm": norm})})
    net = models.build(wanted)
    image = tf.random.stateless_uniform((2, *wanted.patch, wanted.channels), (1, 2))
    with tf.GradientTape() as tape:
        logits = net(image, training=True)
        loss = tf.reduce_sum(tf.square(logits))
    expected = (2, *wanted.patch, 3) if wanted.task == "segmentation" else (2, 2)
    assert logits.shape == expected and logits.dtype == tf.float32
    gradients = tape.gradient(loss, net.trainable_variables)
    assert all(g is not None and np.isfinite(g.numpy()).all() for g in gradients)


def test_deep_supervision_has_coarser_outputs_that_inference_drops():
    net = models.build(spec((8, 16, 16), name="unet3d", filters=4, depth=3, deep_supervision=True))
    assert [tuple(o.shape[1:4]) for o in net.outputs] == [(8, 16, 16), (4, 8, 8)]
    assert len(models.inference_model(net).outputs) == 1
    labels = tf.zeros((2, 8, 16, 16), tf.int32)
    losses = sample_losses("dice_ce", labels, net(tf.zeros((2, 8, 16, 16, 1))), tf.ones(3))
    assert losses.shape == (2,)


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (spec((8, 16, 15), name="unet3d", depth=3), r"8, 16, 15.*nearest: \[8, 16, 16\]"),
        (spec((4, 64, 64), "classification", name="vgg16"), "projection=mip"),
        (spec((1, 16, 64), "classification", name="vgg16"), "at least 32 x 32"),
        (spec((8, 8, 8), name="unet3"), "nearest valid names: unet3d"),
    ],
)
def test_what_a_network_can_not_take_is_explained(wanted, words):
    with pytest.raises(ConfigError, match=words):
        models.build(wanted)


def test_a_user_adds_a_network_with_a_function_and_an_entry(monkeypatch):
    def linear(s):
        inputs = tf.keras.Input((*s.patch, s.channels))
        return tf.keras.Model(inputs, tf.keras.layers.Conv3D(len(s.classes), 1)(inputs))

    monkeypatch.setitem(models.BUILDERS, "linear", linear)
    assert models.build(spec((2, 4, 4), name="linear")).count_params() == 6


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_group_norm_equals_keras(groups):
    x = tf.random.stateless_normal((3, 4, 5, 6, 8), (1, 2)) * 3 + 1
    ours, theirs = GroupNorm(groups), tf.keras.layers.GroupNormalization(groups, epsilon=1e-5)
    np.testing.assert_allclose(ours(x), theirs(x), atol=2e-5)


def test_no_sample_of_a_batch_changes_another():
    # What splitting a batch over ranks rests on.
    for wanted in (spec((8, 8, 8), name="unet3d", filters=4, depth=2), spec((1, 32, 32), "classification", name="vgg16", width=0.125, norm="group")):
        net = models.build(wanted)
        a = tf.random.stateless_uniform((3, *wanted.patch, 1), (3, 4))
        together, alone = net(a), tf.concat([net(a[i : i + 1]) for i in range(3)], 0)
        np.testing.assert_allclose(together, alone, atol=1e-5)


def test_group_count_divides():
    assert [group_count(c) for c in (4, 8, 12, 20, 64, 7)] == [4, 8, 6, 5, 8, 7]


def test_losses_against_hand_worked_values():
    labels = tf.constant([[[[0, 1]]]])
    even = tf.zeros((1, 1, 1, 2, 2))
    assert cross_entropy(labels, even, tf.ones(2)).numpy() == pytest.approx([np.log(2)])
    assert cross_entropy(labels, even, tf.constant([1.0, 3.0])).numpy() == pytest.approx([2 * np.log(2)])
    # Foreground: overlap 1/2, sums 1 + 1, smooth 1: 1 - (2 * 0.5 + 1) / (2 + 1)
    assert soft_dice(labels, even).numpy() == pytest.approx([1 / 3])
    sure = tf.constant([[[[[50.0, -50.0], [-50.0, 50.0]]]]])
    assert sample_losses("dice_ce", labels, sure, tf.ones(2)).numpy() == pytest.approx([0], abs=1e-6)


def test_overlaps_are_exact_counts():
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 3, (2, 4, 5, 6)), rng.integers(0, 3, (2, 4, 5, 6))
    counts = overlap_counts(tf.constant(labels), tf.one_hot(predicted, 3)).numpy()
    for sample in range(2):
        for label in range(3):
            t, p = labels[sample] == label, predicted[sample] == label
            assert list(counts[sample, label]) == [t.sum(), p.sum(), (t & p).sum()]
    assert dice_of_counts(np.array([2, 4, 1])) == pytest.approx(1 / 3)
    assert np.isnan(dice_of_counts(np.array([0, 0, 0])))
