"""One rank of `bench spatial`: training steps of a 3D U-Net on one volume that all ranks share; rank 0 prints what they took as JSON."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Sequence
from typing import Any

from .memory_limit import join

CLASSES = 2


def main() -> None:
    """``spatial_worker SIDE SPATIAL STEPS AGAIN [LIMIT]``: edge of the volume, ranks to a volume, timed steps, 1 to compute activations
    again, bytes that each rank may hold.

    Prints ``{"steps": s, "peak": bytes, "sent": bytes, "calls": n, "loss": last}``; memory and traffic of the rank with
    the most.
    """
    side, spatial, steps, again = map(int, sys.argv[1:5])
    if len(sys.argv) > 5:
        join(int(sys.argv[5]))
    from .. import bootstrap

    bootstrap.prepare(1)
    bootstrap.load_tensorflow()
    import tensorflow as tf

    from ..config import ModelConfig, PreprocessConfig, TrainConfig
    from ..models import build
    from ..models.spec import ModelSpec
    from ..parallel.exchange import Sum
    from ..parallel.grid import Grid
    from ..parallel.horovod import Horovod
    from ..parallel.spatial import SlabModel
    from ..training.optimizer import make_optimizer
    from ..training.step import Step

    hvd = Horovod(Grid(1, spatial))
    traffic: dict[str, int] = {}
    group = _watched(hvd.group, traffic)
    spec = ModelSpec(
        task="segmentation", classes=("a", "b"), patch=(side,) * 3, channels=1, preprocess=PreprocessConfig(),
        model=ModelConfig(name="unet3d", filters=16, depth=3), dataset_hash="", run="bench",
    )  # fmt: skip
    config = TrainConfig()
    tf.keras.utils.set_random_seed(0)
    model, optimizer = build(spec), make_optimizer(config)
    optimizer.build(model.trainable_variables)
    net, slab = model, (0, side)
    if group.size > 1 or again:
        net = SlabModel(model, group, bool(again))
        slab = net.bounds[group.index], net.bounds[group.index + 1]
    step = Step(net, optimizer, tf.ones(CLASSES), config, Sum(hvd))
    image, label = volume(side, slab)
    batch = tf.constant(image), tf.constant(label), tf.ones(1), tf.zeros((1, 2), tf.int32)
    times, loss = [], 0.0
    for _ in range(steps + 1):
        hvd.barrier()
        began = time.perf_counter()
        loss = float(step.run(iter([batch]), 1, 1e-3).sums[0])
        times.append(time.perf_counter() - began)
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = hvd.gather([times[1:], peak, sum(traffic.values()), len(traffic)])
    if hvd.world.is_root:
        steps_, *most = ([row[i] for row in found] for i in range(4))
        print(json.dumps({
            "steps": [max(each) for each in zip(*steps_, strict=True)], "loss": loss,
            **{name: max(values) for name, values in zip(("peak", "sent", "calls"), most, strict=True)},
        }))  # fmt: skip


def volume(side: int, slab: Sequence[int]) -> tuple[Any, Any]:
    """A slab of a ball in noise: ``(1, d, side, side, 1)`` float32, and its labels ``(1, d, side, side)`` int32."""
    import numpy as np

    axes = np.ogrid[slab[0] : slab[1], 0:side, 0:side]
    label = (sum((axis - side / 2) ** 2 for axis in axes) < (side / 4) ** 2).astype(np.int32)[None]
    noise = [np.random.default_rng(slice_).normal(0, 0.1, (side, side)) for slice_ in range(*slab)]
    return (0.3 + 0.4 * label + np.asarray(noise)).astype(np.float32)[..., None], label


def _watched(group: Any, traffic: dict[str, int]) -> Any:
    """The group, noting while a graph is made what each of its calls gives away: bytes by name, so that a graph made twice counts once."""
    size, index = group.size, group.index

    def noted(call: Any, share: Any) -> Any:
        def run(tensor: Any, *args: Any) -> Any:
            elements = 1
            for dimension in tensor.shape:
                elements *= dimension or 1  # the batch, which is 1 here
            traffic[args[-1]] = round(elements * tensor.dtype.size * share(args))
            return call(tensor, *args)

        return run

    group.exchange = noted(group.exchange, lambda args: 1 - args[0][index] / max(sum(args[0]), 1))
    group.gather = noted(group.gather, lambda args: size - 1)
    group.sum = noted(group.sum, lambda args: 2 * (size - 1) / size)  # a ring
    return group


if __name__ == "__main__":
    main()
