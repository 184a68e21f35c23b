"""`parallel.compression: auto`: which exchange of gradients is worth its rounding on this network, by a short trial."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import tensorflow as tf

from ..config import RunConfig
from .exchange import LOSSLESS, make_exchange
from .horovod import Horovod

# From no loss to most; and the gain in a whole step below which less loss is better.
ORDER = (LOSSLESS, "fp16", "powersgd")
WORTH = 1.1


def trial(config: RunConfig, hvd: Horovod, shapes: Sequence[tuple[int, ...]], rounds: int = 3) -> dict[str, float]:
    """Seconds of each allowed exchange for gradients of these shapes: the slowest rank's, the median of ``rounds``."""
    random = np.random.default_rng(hvd.world.rank)
    gradients = [tf.constant(random.normal(0, 1e-3, shape), tf.float32) for shape in shapes]
    times: dict[str, float] = {}
    for name in sorted(set(config.parallel.auto_among), key=ORDER.index):
        exchange = make_exchange(config, hvd, shapes, name)
        run = tf.function(lambda exchange=exchange: tf.stack(
            [tf.reduce_max(g) for g in exchange.sum(gradients, tf.constant(True), tf.constant(False))]
        ))  # fmt: skip
        run()
        measured = []
        for _ in range(rounds):
            hvd.barrier()
            began = time.perf_counter()
            run().numpy()
            measured.append(time.perf_counter() - began)
        times[name] = max(hvd.gather(float(np.median(measured))))
    return times


def choose(times: Mapping[str, float], compute_s: float) -> tuple[str, str]:
    """The exchange with the least loss whose step is at most ``WORTH`` x the fastest step, and why; pure.

    Args:
        times: s of each exchange.
        compute_s: s of a step without exchange.
    """
    steps = {name: compute_s + seconds for name, seconds in times.items()}
    limit = WORTH * min(steps.values())
    chosen = min((name for name in steps if steps[name] <= limit), key=ORDER.index)
    told = ", ".join(f"{name} {1e3 * times[name]:.1f}" for name in sorted(times, key=ORDER.index))
    reason = (
        f"exchange of the gradients in ms: {told}; computing takes {1e3 * compute_s:.1f}; {chosen} rounds least among the "
        f"steps within {WORTH:g} x the fastest"
    )
    return chosen, reason


def settle(
    config: RunConfig, hvd: Horovod, shapes: Sequence[tuple[int, ...]], compute: Callable[[], float]
) -> tuple[str, str]:
    """What ``parallel.compression`` means on these ranks, and why; the same on all.

    Args:
        compute: measures the s of a step's gradients on this rank; called for ``auto`` only.
    """
    parallel = config.parallel
    if parallel.compression != "auto":
        return parallel.compression, "as configured"
    if hvd.world.size == 1 or config.train.reproducible == "exact" or parallel.reduction == "adasum":
        return LOSSLESS, "one rank, exact bits and Adasum take no compression"
    times = trial(config, hvd, shapes)
    return hvd.broadcast(list(choose(times, max(hvd.gather(compute())))))
