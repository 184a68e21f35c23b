"""Lowered networks give what the 3D ones give: every option that the networks use, and more."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import tensorflow as tf

from hvd_imaging import models
from hvd_imaging.config import ModelConfig, PreprocessConfig
from hvd_imaging.errors import RunError
from hvd_imaging.lowering import layers as own
from hvd_imaging.lowering.lower import lower
from hvd_imaging.models.blocks import GroupNorm
from hvd_imaging.models.spec import ModelSpec

layers = tf.keras.layers
SHAPE = (7, 6, 9, 3)
THREE_D = (
    layers.Conv3D, layers.Conv3DTranspose, layers.MaxPooling3D, layers.AveragePooling3D, layers.UpSampling3D,
    layers.ZeroPadding3D, layers.Cropping3D, GroupNorm,
)  # fmt: skip


def shaken(model):
    """All weights random, so that none hides behind a zero or a one."""
    generator = np.random.default_rng(0)
    model.set_weights([generator.uniform(0.2, 0.6, w.shape).astype(np.float32) * generator.choice([-1, 1], w.shape)
                       if "variance" not in v.name else generator.uniform(0.5, 2, w.shape)
                       for v, w in zip(model.weights, model.get_weights(), strict=True)])  # fmt: skip
    return model


def net(*stack, shape=SHAPE):
    x = inputs = tf.keras.Input(shape)
    for layer in stack:
        x = layer(x)
    return shaken(tf.keras.Model(inputs, x))


def assert_equal(model, batch=2, tolerance=1e-5):
    lowered = lower(model)
    assert lowered.input_shape == model.input_shape
    assert model.name == "vgg16" or not any(isinstance(layer, THREE_D) for layer in lowered.layers)
    for size in {1, batch}:
        x = np.random.default_rng(1).normal(size=(size, *model.input_shape[1:])).astype(np.float32)
        wanted, found = tf.nest.flatten(model(x)), tf.nest.flatten(lowered(x))
        for a, b in zip(wanted, found, strict=True):
            assert a.shape == b.shape
            assert np.abs(a).max() > 0
            scale = max(1.0, float(np.abs(a).max()))
            np.testing.assert_allclose(b, a, rtol=0, atol=tolerance * scale)
    # A batch of one known in advance takes a shorter way: no reshape around each layer.
    x = np.random.default_rng(2).normal(size=(1, *model.input_shape[1:])).astype(np.float32)
    alone = tf.function(lambda t: lowered(t, training=False), input_signature=[tf.TensorSpec(x.shape, tf.float32)])
    for a, b in zip(tf.nest.flatten(model(x)), tf.nest.flatten(alone(x)), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=tolerance * max(1.0, float(np.abs(a).max())))
    return lowered


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize(
    ("size", "strides", "dilation"),
    [(1, 1, 1), (3, 1, 1), (3, 2, 1), (2, 2, 1), ((3, 1, 2), (1, 2, 1), 1), ((1, 3, 3), (2, 1, 1), 1), (3, 1, (2, 1, 2)), (4, (3, 1, 2), 1)],
)
def test_convolutions(size, strides, dilation, padding):
    assert_equal(net(layers.Conv3D(4, size, strides=strides, dilation_rate=dilation, padding=padding, activation="relu")))


@pytest.mark.parametrize(
    ("size", "strides", "padding", "bias"),
    [(*a, padding, bias) for a, padding, bias in itertools.product(
        [(2, 2), (3, 2), (3, 1), (4, 2), (3, 3), (5, 3), (1, 2), ((2, 3, 2), (2, 1, 2)), ((1, 2, 2), (1, 2, 2))], ["same", "valid"], [True])]
    + [(2, 2, "valid", False)],
)  # fmt: skip
def test_transposed_convolutions(size, strides, padding, bias):
    assert_equal(net(layers.Conv3DTranspose(4, size, strides=strides, padding=padding, use_bias=bias)))


@pytest.mark.parametrize("kind", [layers.MaxPooling3D, layers.AveragePooling3D])
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize(("size", "strides"), [(2, None), (3, 2), ((1, 2, 2), None), ((2, 1, 1), None), (3, 1)])
def test_pooling(kind, size, strides, padding):
    assert_equal(net(kind(size, strides, padding=padding)))


@pytest.mark.parametrize(
    "stack",
    [
        lambda: [layers.UpSampling3D(2)],
        lambda: [layers.UpSampling3D((1, 3, 2))],
        lambda: [layers.UpSampling3D((3, 1, 1))],
        lambda: [layers.ZeroPadding3D(((1, 2), (0, 0), (3, 0)))],
        lambda: [layers.Cropping3D(((2, 1), (0, 1), (1, 1)))],
        lambda: [layers.Cropping3D(((0, 1), (0, 0), (0, 0)))],
        lambda: [layers.Conv3D(8, 3, padding="same"), GroupNorm(4), layers.ReLU()],
        lambda: [layers.Conv3D(4, 3, padding="same"), GroupNorm(4), layers.LeakyReLU(0.1)],
        lambda: [layers.Conv3D(8, 3), layers.GroupNormalization(2, scale=False)],
        lambda: [layers.Conv3D(4, 3), layers.BatchNormalization(), layers.ReLU()],
        lambda: [layers.Conv3DTranspose(4, 2, strides=2, use_bias=False), layers.BatchNormalization(scale=False)],
        lambda: [layers.Conv3D(4, 3, activation="relu"), layers.BatchNormalization()],
        lambda: [layers.Conv3D(4, 3), layers.LayerNormalization()],
        lambda: [layers.Conv3D(4, 3), layers.PReLU(shared_axes=[1, 2, 3])],
        lambda: [layers.Conv3D(4, 3), layers.Dense(5, activation="tanh"), layers.Softmax()],
        lambda: [layers.Conv3D(4, 3), layers.GlobalAveragePooling3D(), layers.Dense(2)],
        lambda: [layers.Conv3D(4, 3), layers.GlobalMaxPooling3D()],
        lambda: [layers.Conv3D(4, 3), layers.GlobalMaxPooling3D(keepdims=True)],
        lambda: [layers.Conv3D(4, 3, strides=2), layers.Flatten(), layers.Dense(3)],
        lambda: [layers.Conv3D(4, 3), layers.SpatialDropout3D(0.5), layers.Conv3D(2, 1)],
    ],
)
def test_other_layers(stack):
    assert_equal(net(*stack()))


def test_a_batch_norm_goes_into_the_convolution_before_it():
    lowered = assert_equal(net(layers.Conv3D(4, 3, use_bias=False), layers.BatchNormalization(), layers.ReLU()))
    assert not any(isinstance(layer, layers.BatchNormalization) for layer in lowered.layers)


def test_a_batch_norm_behind_a_shared_tensor_stays():
    inputs = tf.keras.Input(SHAPE)
    x = layers.Conv3D(4, 3, padding="same")(inputs)
    lowered = assert_equal(shaken(tf.keras.Model(inputs, layers.Add()([x, layers.BatchNormalization()(x)]))))
    assert any(isinstance(layer, layers.BatchNormalization) for layer in lowered.layers)


def test_a_net_inside_a_net_and_a_layer_used_twice():
    inner_in = tf.keras.Input((*SHAPE[:3], 4))
    inner = tf.keras.Model(inner_in, layers.Conv3D(4, 3, padding="same")(inner_in), name="inner")
    inputs = tf.keras.Input(SHAPE)
    x = layers.Conv3D(4, 1, name="first")(inputs)
    assert_equal(shaken(tf.keras.Model(inputs, [layers.Concatenate(axis=4)([inner(inner(x)), x]), layers.Flatten()(x)])))


def spec(name, patch, classes=("background", "a", "b"), **model):
    return ModelSpec(
        task="segmentation", classes=classes, patch=patch, channels=2, preprocess=PreprocessConfig(),
        model=ModelConfig(name=name, **model), dataset_hash="0" * 64, run="r",
    )  # fmt: skip


@pytest.mark.parametrize(
    "made",
    [spec("unet3d", (8, 8, 12), filters=4, depth=3, norm=norm, dropout=0.1, deep_supervision=norm == "group") for norm in ("none", "instance", "group")]
    + [spec("cnn3d", (16, 16, 16), width=0.25, norm="group"), spec("vgg16", (1, 32, 32), width=0.05, norm="none", head="dense"),
       spec("vgg16", (1, 32, 32), width=0.05, norm="instance", head="average")],
)  # fmt: skip
def test_the_networks_of_the_package(made):
    model = models.inference_model(models.build(made))
    lowered = assert_equal(shaken(model), tolerance=2e-5)
    assert lowered.name == model.name
    # Lowering what is lowered already changes nothing.
    twice, x = lower(lowered), np.random.default_rng(3).random((1, *model.input_shape[1:]), np.float32)
    np.testing.assert_allclose(twice(x), lowered(x), rtol=0, atol=1e-6)


def test_it_can_be_saved_and_loaded():
    lowered = lower(net(layers.Conv3D(4, 3, strides=2, padding="same"), layers.Conv3DTranspose(2, 2, strides=2), layers.MaxPooling3D(2), GroupNorm(2)))
    again = tf.keras.Model.from_config(lowered.get_config())
    again.set_weights(lowered.get_weights())
    x = np.random.default_rng(0).random((2, *SHAPE), np.float32)
    np.testing.assert_array_equal(again(x), lowered(x))
    assert any(isinstance(layer, own.DepthPool) for layer in again.layers)


@pytest.mark.parametrize(
    ("stack", "why"),
    [
        (lambda: [layers.Conv3D(4, 3, name="ok"), layers.Lambda(lambda x: x * 2, name="mine")], "layer 'mine'.*Lambda"),
        (lambda: [layers.Conv3D(3, 3, groups=3, name="grouped")], "layer 'grouped'.*3 groups"),
        (lambda: [layers.Conv3DTranspose(3, 3, strides=2, output_padding=1, name="odd")], "layer 'odd'.*output_padding"),
        (lambda: [layers.Conv3D(3, 1), layers.PReLU(name="slopes")], "layer 'slopes'.*shared_axes"),
    ],
)
def test_what_has_no_2d_form_is_named(stack, why):
    with pytest.raises(RunError, match=why):
        lower(net(*stack()))


def test_a_subclassed_model_is_refused():
    class Mine(tf.keras.Model):
        def call(self, x):
            return x

    with pytest.raises(RunError, match="not a functional"):
        lower(Mine())
