"""A program for `mpirun`: each layer alone, and whole networks, on slabs beside the unsplit ones. Prints JSON on rank 0.

Arguments: ranks of a spatial group; names of cases (all without).
"""

from __future__ import annotations

import json
import sys
from typing import Any

from hvd_imaging import bootstrap

bootstrap.prepare(1)
bootstrap.load_tensorflow()

import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

from hvd_imaging import models  # noqa: E402
from hvd_imaging.config import ModelConfig, PreprocessConfig  # noqa: E402
from hvd_imaging.models.blocks import Dropout, GroupNorm, draws  # noqa: E402
from hvd_imaging.models.losses import sample_losses  # noqa: E402
from hvd_imaging.models.spec import ModelSpec  # noqa: E402
from hvd_imaging.parallel.grid import Grid  # noqa: E402
from hvd_imaging.parallel.horovod import Horovod  # noqa: E402
from hvd_imaging.parallel.spatial import SlabModel  # noqa: E402
from hvd_imaging.world import world_from_environment  # noqa: E402

keras = tf.keras
layers = keras.layers


def _alone(depth: int, *made: Any, plane: tuple[int, int] = (6, 5), channels: int = 4) -> Any:
    inputs = keras.Input((depth, *plane, channels))
    # A convolution in front, so that the layer's own input has a gradient that somebody asks for.
    x = layers.Conv3D(channels, 1, name="front")(inputs)
    for layer in made:
        x = layer(x)
    return keras.Model(inputs, x)


def _joined(depth: int) -> Any:
    inputs = keras.Input((depth, 6, 5, 4))
    a = layers.Conv3D(4, 3, padding="same", activation="relu")(inputs)
    b = layers.Conv3D(4, (1, 3, 3), padding="same")(a)
    x = layers.Concatenate()([layers.Add()([a, b]), inputs, layers.Multiply()([a, b])])
    shared = layers.Conv3D(12, 3, padding="same", name="shared")
    return keras.Model(inputs, shared(shared(x)))


def _spec(patch: tuple[int, int, int], task: str = "segmentation", **model: Any) -> ModelSpec:
    return ModelSpec(
        task=task, classes=("background", "a", "b"), patch=patch, channels=1, preprocess=PreprocessConfig(),
        model=ModelConfig(**model), dataset_hash="0", run="r",
    )  # fmt: skip


def _unet(patch: tuple[int, int, int], **options: Any) -> Any:
    return models.build(_spec(patch, name="unet3d", **{"filters": 8, "depth": 3} | options))


CONV, UP = layers.Conv3D, layers.Conv3DTranspose
CASES: dict[str, Any] = {
    **{
        f"conv k{k} s{s} {padding} d{depth}": lambda k=k, s=s, padding=padding, depth=depth: _alone(
            depth, CONV(3, k, strides=s, padding=padding)
        )
        for k, s, padding, depth in [
            (3, 1, "same", 8), (3, 1, "same", 13), (1, 1, "same", 9), (5, 1, "same", 16), (3, 2, "same", 16), (3, 2, "same", 15),
            (2, 2, "same", 16), (2, 2, "valid", 16), (3, 1, "valid", 12), (5, 2, "same", 18), (4, 2, "same", 17), (3, 3, "same", 24),
        ]
    },
    "conv dilated": lambda: _alone(16, CONV(3, 3, dilation_rate=2, padding="same", use_bias=False)),
    "conv anisotropic": lambda: _alone(16, CONV(3, (3, 1, 5), strides=(1, 2, 1), padding="same", activation="relu")),
    **{
        f"transposed k{k} s{s} {padding}": lambda k=k, s=s, padding=padding: _alone(9, UP(3, k, strides=s, padding=padding))
        for k, s, padding in [(2, 2, "same"), (3, 2, "same"), (4, 2, "same"), (3, 1, "same"), (3, 2, "valid"), (2, 3, "same"), (2, 3, "valid")]
    },
    "max pool": lambda: _alone(16, layers.MaxPooling3D(2)),
    "max pool same": lambda: _alone(15, layers.MaxPooling3D(3, strides=2, padding="same")),
    "average pool": lambda: _alone(16, layers.AveragePooling3D(2)),
    "average pool same": lambda: _alone(15, layers.AveragePooling3D(3, strides=2, padding="same")),
    "up-sampling": lambda: _alone(7, layers.UpSampling3D((2, 1, 2)), CONV(2, 3, padding="same")),
    "group norm": lambda: _alone(9, GroupNorm(2), CONV(3, 3, padding="same")),
    "instance norm": lambda: _alone(9, GroupNorm(4), CONV(3, 3, padding="same")),
    "batch norm, frozen": lambda: _alone(9, layers.BatchNormalization(trainable=False), CONV(3, 3, padding="same")),
    "dropout by channel": lambda: _alone(9, Dropout(0.4, spatial=True, name="drop"), CONV(2, 3, padding="same")),
    "dropout by voxel": lambda: _alone(9, Dropout(0.4, name="drop"), CONV(2, 3, padding="same")),
    "global average": lambda: _alone(9, layers.GlobalAveragePooling3D(), layers.Dense(3)),
    "global maximum": lambda: _alone(9, layers.GlobalMaxPooling3D(), layers.Dense(3)),
    "softmax": lambda: _alone(9, layers.Softmax(), layers.LeakyReLU(), layers.Activation("softplus")),
    "joined and shared": lambda: _joined(13),
    "unet3d": lambda: _unet((16, 16, 16)),
    "unet3d uneven": lambda: _unet((28, 12, 8), norm="group", dropout=0.3),
    "unet3d deep": lambda: _unet((32, 16, 8), depth=4, deep_supervision=True),
    "unet3d no norm": lambda: _unet((20, 8, 8), norm="none"),
    "cnn3d": lambda: models.build(_spec((64, 20, 24), "classification", name="cnn3d", width=0.5)),
    "cnn3d odd": lambda: models.build(_spec((51, 20, 24), "classification", name="cnn3d", width=0.5, norm="group", dropout=0.2)),
}


def compare(case: str, hvd: Horovod) -> dict[str, float]:
    """Largest differences, output absolute and gradients relative, of one case; collective."""
    keras.backend.clear_session()
    keras.utils.set_random_seed(3)
    model = CASES[case]()
    for weight in model.trainable_weights:
        weight.assign(weight + 0.1 * tf.random.stateless_normal(weight.shape, (len(weight.name), 1)))
    data, index = hvd.grid.place(hvd.world.rank)
    source = model.inputs[0].shape
    # Every group has a sample of its own, one after another in the batch.
    image = tf.random.stateless_normal([hvd.grid.data, *source[1:]], (5, 6))
    outputs = tf.nest.flatten(model.outputs)
    classifies = len(outputs[0].shape) == 2
    classes, weights = int(outputs[0].shape[-1]), tf.constant(np.linspace(1, 2, int(outputs[0].shape[-1])), tf.float32)
    # Labels of the input's size only where a network has them; a layer alone has those of its own output.
    labels = tf.random.stateless_uniform([hvd.grid.data] if classifies else [hvd.grid.data, *outputs[0].shape[1:4]], (7, 8), 0, classes, tf.int32)
    seeds = tf.constant([[1, 2], [3, 4], [5, 6], [7, 8]][: hvd.grid.data], tf.int32)
    slabs = SlabModel(model, hvd.group)

    @tf.function
    def whole():
        with tf.GradientTape() as tape, draws(seeds):
            found = model(image, training=True)
            loss = tf.reduce_sum(sample_losses("dice_ce" if not classifies else "ce", labels, found, weights)) / hvd.grid.data
        return tf.nest.flatten(found), tape.gradient(loss, model.trainable_variables), loss

    bounds = slabs.bounds
    out = slabs.out_bounds[0]

    @tf.function
    def split():
        own = image[data : data + 1, bounds[index] : bounds[index + 1]]
        label = labels[data : data + 1] if out is None else labels[data : data + 1, out[index] : out[index + 1]]
        with tf.GradientTape() as tape, draws(seeds[data : data + 1]):
            found = slabs(own, training=True)
            losses = sample_losses("dice_ce" if not classifies else "ce", label, found, weights, slabs.parts())
            loss = tf.reduce_sum(losses) / hvd.grid.data / hvd.group.size
        grads = hvd.sum_tensors([tf.convert_to_tensor(g) for g in tape.gradient(loss, model.trainable_variables)], "gradients")
        return tf.nest.flatten(found), grads, loss

    expected, wanted, loss = whole()
    found, grads, part = split()
    differences = []
    for reference, value, place in zip(expected, found, slabs.out_bounds, strict=True):
        reference = reference[data : data + 1]
        if place is not None:
            reference = reference[:, place[index] : place[index + 1]]
        assert reference.shape == value.shape, (case, reference.shape, value.shape)
        differences.append(float(tf.reduce_max(tf.abs(reference - value))))
    scale = max(float(tf.norm(g)) for g in wanted)
    relative = max(float(tf.norm(a - b)) / max(float(tf.norm(b)), 1e-3 * scale) for a, b in zip(grads, wanted, strict=True))
    total = float(hvd.sum_array(np.array([float(part)]), f"loss.{case}")[0])
    return {"output": max(differences), "gradient": relative, "loss": abs(total - float(loss)) / abs(float(loss))}


def main() -> None:
    """Every case on all ranks; the worst rank counts."""
    spatial = int(sys.argv[1])
    hvd = Horovod(Grid(world_from_environment().size // spatial, spatial))
    found = {}
    for case in sys.argv[2:] or CASES:
        try:
            own = compare(case, hvd)
        except Exception as error:
            # The other ranks may be waiting for this one: there is nothing to gather any more.
            print(f"{case}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            hvd.abort(1)
        every = hvd.gather(own)
        found[case] = {key: max(one[key] for one in every) for key in own}
    if hvd.world.is_root:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
