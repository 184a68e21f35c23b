"""One process of `bench step`: times training steps of one system and prints them as JSON."""

from __future__ import annotations

import json
import os
import sys
import time

SHAPE, BATCH, CLASSES = (48, 48, 48), 2, 2


def ours():
    """The step that `hvd-imaging train` runs."""
    import tensorflow as tf

    from ..config import ModelConfig, PreprocessConfig, TrainConfig
    from ..models import build
    from ..models.spec import ModelSpec
    from ..parallel.exchange import Sum
    from ..parallel.horovod import Horovod
    from ..training.optimizer import make_optimizer
    from ..training.step import Step

    spec = ModelSpec(
        task="segmentation", classes=("a", "b"), patch=SHAPE, channels=1, preprocess=PreprocessConfig(),
        model=ModelConfig(name="unet3d", filters=16, depth=3, norm="none"), dataset_hash="", run="bench",
    )  # fmt: skip
    config = TrainConfig(loss="ce", clip_norm=0)
    model, optimizer = build(spec), make_optimizer(config)
    optimizer.build(model.trainable_variables)
    step = Step(model, optimizer, tf.ones(CLASSES), config, Sum(Horovod()))
    weight, draw = tf.ones(BATCH), tf.zeros((BATCH, 2), tf.int32)
    return lambda x, y: step.run(iter([(x, y, weight, draw)]), BATCH, 1e-3)


def keras():
    """The same network and loss, as one would write them by hand."""
    import tensorflow as tf

    layers = tf.keras.layers

    def conv(x, filters, strides=1):
        return layers.Conv3D(filters, 3, strides=strides, padding="same", activation="relu")(x)

    inputs = tf.keras.Input((*SHAPE, 1))
    a = conv(conv(inputs, 16), 16)
    b = conv(conv(a, 32, 2), 32)
    c = conv(conv(b, 64, 2), 64)
    b = conv(conv(layers.Concatenate()([layers.Conv3DTranspose(32, 2, strides=2)(c), b]), 32), 32)
    a = conv(conv(layers.Concatenate()([layers.Conv3DTranspose(16, 2, strides=2)(b), a]), 16), 16)
    model = tf.keras.Model(inputs, layers.Conv3D(CLASSES, 1)(a))
    optimizer = tf.keras.optimizers.Adam(1e-3)

    @tf.function
    def step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(y, model(x, training=True)))
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss

    return lambda x, y: step(x, y).numpy()


def main() -> None:
    """``step_worker SYSTEM STEPS``."""
    system, steps = sys.argv[1], int(sys.argv[2])
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    os.environ["TF_USE_LEGACY_KERAS"] = "1"
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    if system == "ours":
        from .. import bootstrap

        bootstrap.prepare()
    import tensorflow as tf

    step = ours() if system == "ours" else keras()
    x = tf.random.stateless_uniform((BATCH, *SHAPE, 1), (0, 1))
    y = tf.cast(x[..., 0] > 0.5, tf.int32)
    for _ in range(2):
        step(x, y)
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        step(x, y)
        times.append(time.perf_counter() - began)
    print(json.dumps(times))


if __name__ == "__main__":
    main()
