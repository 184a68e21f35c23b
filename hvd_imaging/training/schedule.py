"""Learning rate as a pure function of the step."""

from __future__ import annotations

import math

from ..config import TrainConfig


def base_rate(config: TrainConfig) -> float:
    """``learning_rate`` scaled with the global batch (Goyal et al., 2017: linear; Krizhevsky, 2014: sqrt)."""
    ratio = config.batch_size / config.base_batch_size
    return config.learning_rate * {"linear": ratio, "sqrt": math.sqrt(ratio), "none": 1.0}[config.scale_learning_rate]


def rate(step: int, steps_per_epoch: int, config: TrainConfig) -> float:
    """The learning rate of global step ``step`` (from 0).

    Linear warm-up over ``warmup_epochs``, never 0 in its first step; then the schedule over what is left of
    ``epochs``. ``max_steps`` does not shorten the schedule: a trial run makes the first steps of the whole one.
    """
    top = base_rate(config)
    total = config.epochs * steps_per_epoch
    warmup = min(round(config.warmup_epochs * steps_per_epoch), total)
    if step < warmup:
        return top * (step + 1) / warmup
    done = min((step - warmup) / max(total - warmup, 1), 1.0)
    if config.schedule == "cosine":
        return top * 0.5 * (1 + math.cos(math.pi * done))
    if config.schedule == "poly":
        return top * (1 - done) ** config.poly_power
    return top
