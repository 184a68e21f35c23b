"""The update rule. Gradients arrive summed over all ranks, already divided by the true global batch."""

from __future__ import annotations

import tensorflow as tf

from ..config import TrainConfig

keras = tf.keras


def make_optimizer(config: TrainConfig) -> keras.optimizers.Optimizer:
    """Keras optimizer of ``config``; the loop assigns its learning rate at every step."""
    rate = config.learning_rate
    if config.optimizer == "sgd":
        optimizer = keras.optimizers.SGD(rate, momentum=config.momentum, nesterov=config.nesterov and config.momentum > 0)
    elif config.optimizer == "adam":
        optimizer = keras.optimizers.Adam(rate, epsilon=config.epsilon)
    else:
        optimizer = keras.optimizers.AdamW(rate, weight_decay=config.weight_decay, epsilon=config.epsilon)
    if config.mixed_precision == "float16":
        # The sum over ranks carries an overflow of any rank to all, so all skip the same steps.
        optimizer = keras.mixed_precision.LossScaleOptimizer(optimizer)
    return optimizer
