"""The ONNX writer: every layer and option that it takes gives Keras' values in ONNX Runtime; what it does not know is named."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from hvd_imaging.config import ModelConfig, PreprocessConfig
from hvd_imaging.errors import RunError
from hvd_imaging.export import onnx_graph
from hvd_imaging.lowering.lower import lower
from hvd_imaging.models.blocks import Dropout, GroupNorm
from hvd_imaging.models.spec import ModelSpec

L = tf.keras.layers
SHAPE = (5, 6, 7, 3)


def spec_of(shape, task="segmentation"):
    return ModelSpec(
        task=task, classes=("a", "b"), patch=shape[:3], channels=shape[3], preprocess=PreprocessConfig(intensity="none"),
        model=ModelConfig(name="test"), dataset_hash="0", run="run",
    )  # fmt: skip


def network(build, shape=SHAPE):
    """``build`` between the input and logits; the same weights and statistics in each run, away from the initial values."""
    image = tf.keras.Input(shape)
    model = tf.keras.Model(image, build(image))
    random = np.random.default_rng(2)

    def drawn(initial):  # kernels anew, since Keras draws them from its own generator; scales stay positive
        values = random.normal(0, 0.4, initial.shape) if initial.ndim > 1 else initial + random.uniform(0.05, 0.4, initial.shape)
        return values.astype(np.float32)

    model.set_weights([drawn(w) for w in model.get_weights()])
    return model


def logits(x):
    return L.Dense(2)(x)


def compare(model, network_written=None):
    import onnxruntime

    shape = model.input_shape[1:]
    made = onnx_graph.make(network_written or model, spec_of(shape))
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    image = np.random.default_rng(1).normal(size=(1, *shape)).astype(np.float32)
    (found,) = session.run(["probabilities"], {"image": image})
    expected = tf.nn.softmax(model(image, training=False), -1).numpy()
    assert expected.std() > 1e-3  # not the same everywhere
    assert found.shape == expected.shape == tuple(session.get_outputs()[0].shape)
    np.testing.assert_allclose(found, expected, atol=2e-5)


BODIES = {
    "conv": lambda x: L.Conv3D(4, 3, padding="same", activation="relu")(x),
    "conv valid, uneven": lambda x: L.Conv3D(4, (2, 3, 1), activation="tanh")(x),
    "conv stride": lambda x: L.Conv3D(4, 3, strides=(1, 2, 2), padding="same", use_bias=False)(x),
    "conv stride 2, even size": lambda x: L.Conv3D(4, 2, strides=2, padding="same", activation="swish")(x),
    "conv dilation": lambda x: L.Conv3D(4, 2, dilation_rate=2, padding="same", activation="sigmoid")(x),
    "conv transpose": lambda x: L.Conv3DTranspose(4, 2, strides=2, padding="same")(x),
    "conv transpose 3 by 2": lambda x: L.Conv3DTranspose(4, 3, strides=2, padding="same", activation="relu")(x),
    "conv transpose valid": lambda x: L.Conv3DTranspose(4, 3, strides=(1, 2, 2))(x),
    "conv transpose, stride larger": lambda x: L.Conv3DTranspose(4, 2, strides=3, use_bias=False)(x),
    "max pool": lambda x: L.MaxPooling3D((2, 3, 2))(x),
    "max pool same": lambda x: L.MaxPooling3D(2, padding="same")(x),
    "average pool": lambda x: L.AveragePooling3D(2)(x),
    "average pool same": lambda x: L.AveragePooling3D((3, 2, 2), strides=2, padding="same")(x),
    "upsample": lambda x: L.UpSampling3D((2, 1, 3))(x),
    "pad, crop": lambda x: L.Cropping3D(((1, 0), (0, 2), (1, 1)))(L.ZeroPadding3D(((0, 2), (1, 0), (2, 1)))(x)),
    "group norm": lambda x: GroupNorm(2)(L.Conv3D(4, 1)(x)),
    "instance norm": lambda x: GroupNorm(4)(L.Conv3D(4, 1)(x)),
    "batch norm": lambda x: L.BatchNormalization()(x),
    "batch norm, no scale": lambda x: L.BatchNormalization(scale=False, center=False)(L.ReLU()(x)),
    "joins": lambda x: L.Concatenate()([L.Add()([x, x]), L.Multiply()([x, x]), L.Subtract()([x, L.ReLU()(x)]),
                                        L.Maximum()([x, L.Conv3D(3, 1)(x)]), L.Minimum()([x, L.Conv3D(3, 1)(x)])]),
    "concatenate planes": lambda x: L.Concatenate(axis=1)([x, L.Conv3D(3, 1)(x)]),
    "activations": lambda x: L.Concatenate()([L.LeakyReLU(0.2)(x), L.ReLU(max_value=1.5)(x), L.ReLU(negative_slope=0.3)(x),
                                              L.Activation("elu")(x), L.Activation("softplus")(x), L.Activation("softmax")(x),
                                              L.Softmax()(x), L.ELU(0.7)(x)]),
    "average": lambda x: L.Average()([x, L.Conv3D(3, 1)(x), L.GaussianNoise(0.1)(x)]),
    "dropout": lambda x: L.SpatialDropout3D(0.5)(Dropout(0.5)(L.Dropout(0.5)(x))),
}  # fmt: skip

HEADS = {
    "flatten": lambda x: logits(L.Flatten()(L.Conv3D(2, 2)(x))),
    "global average": lambda x: logits(L.GlobalAveragePooling3D()(x)),
    "global max": lambda x: logits(L.GlobalMaxPooling3D()(x)),
    "global, kept": lambda x: logits(L.Flatten()(L.GlobalAveragePooling3D(keepdims=True)(x))),
    "reshape": lambda x: logits(L.Flatten()(L.MaxPooling2D()(L.Conv2D(2, 3)(L.Reshape((6, 7, 15))(x))))),
    "dense norm": lambda x: logits(L.BatchNormalization()(L.Dense(5, activation="relu")(L.Flatten()(x)))),
}


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("lowered", [False, True], ids=["as it is", "lowered"])
def test_layers_of_volumes(name, lowered):
    model = network(lambda x: logits(BODIES[name](x)))
    compare(model, lower(model) if lowered else None)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("lowered", [False, True], ids=["as it is", "lowered"])
def test_layers_of_classes(name, lowered):
    model = network(HEADS[name])
    compare(model, lower(model) if lowered else None)


def test_a_layer_that_is_used_twice():
    conv = L.Conv3D(3, 3, padding="same")
    compare(network(lambda x: logits(conv(conv(x)))))


@pytest.mark.parametrize(
    "build, words",
    [
        (lambda x: L.ConvLSTM2D(2, 3)(x), "ConvLSTM2D is not known to the ONNX writer"),
        (lambda x: L.Dense(2, activation="gelu", name="odd")(x), "layer 'odd': the activation gelu is not known"),
        (lambda x: L.ReLU(threshold=0.5, name="odd")(x), "layer 'odd': a ReLU with a threshold"),
        (lambda x: L.Softmax(axis=1, name="odd")(x), r"layer 'odd': .*softmax of channels \(axis=-1\) only"),
        (lambda x: L.Conv3DTranspose(2, 3, 2, output_padding=1, name="odd")(x), "layer 'odd': dilation and output_padding"),
    ],
    ids=["layer", "activation", "threshold", "softmax", "output padding"],
)  # fmt: skip
def test_what_it_does_not_know_is_named(build, words):
    with pytest.raises(RunError, match=words):
        onnx_graph.make(network(build), spec_of(SHAPE))


def test_a_subclassed_network_is_refused():
    class Own(tf.keras.Model):
        def call(self, x):
            return x

    with pytest.raises(RunError, match="is not a functional Keras model"):
        onnx_graph.make(Own(), spec_of(SHAPE))
