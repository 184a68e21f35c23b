"""The peer of our ranks: TensorFlow's own MultiWorkerMirroredStrategy, as one who knows it well would use it.

The same network, loss, optimizer and synthetic batch as ours; :func:`measure` starts the workers, one core each.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from .processes import clean_environment, run_at_once


@dataclass(frozen=True)
class Task:
    """What every worker trains.

    Attributes:
        batch: samples of each worker in a step.
        side: of the cubic patch, voxels.
        filters, depth, norm: of the 3D U-Net.
        warmup: steps that are not timed.
        steps: timed ones.
        pack: bytes of gradients that are summed at once; 0 sums all at once.
        interop: operations at the same time.
    """

    batch: int = 2
    side: int = 48
    filters: int = 16
    depth: int = 3
    norm: str = "none"
    warmup: int = 3
    steps: int = 10
    # A link of 1 Gbit/s makes the difference: packs travel while the rest is computed, which takes a second thread.
    pack: int = 1_000_000
    interop: int = 2


def measure(
    task: Task, workers: int, prefixes: Sequence[Sequence[str]] = (), hosts: Sequence[str] = (), timeout: float = 600
) -> list[float]:
    """Train with this many workers on this machine.

    Args:
        prefixes: words before each worker's command, such as `Link.enter(index)`.
        hosts: address of each worker; this machine's loopback if empty.
        timeout: seconds for all of it.

    Returns:
        Seconds of each timed step on the slowest worker.

    Raises:
        HvdImagingError: a worker failed or the time is over.
    """
    hosts = hosts or ["127.0.0.1"] * workers
    cluster = ",".join(f"{host}:{port}" for host, port in zip(hosts, free_ports(workers), strict=True))
    options = [f"--{name}={value}" for name, value in asdict(task).items()]
    commands = [
        [*prefix, sys.executable, "-m", "hvd_imaging.bench.mirrored_worker", str(index), cluster, *options]
        for index, prefix in enumerate(prefixes or [()] * workers)
    ]
    found = run_at_once(commands, clean_environment(os.environ), timeout)
    return slowest([json.loads(text.splitlines()[-1]) for text in found])


def slowest(times: Sequence[list[float]]) -> list[float]:
    """The times with the largest median; pure."""
    return max(times, key=statistics.median)


def free_ports(count: int) -> list[int]:
    """Different ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def train(task: Task, workers: int) -> list[float]:
    """Seconds of each timed step of this worker."""
    import tensorflow as tf

    from ..config import ModelConfig, PreprocessConfig
    from ..models import build
    from ..models.losses import sample_losses
    from ..models.spec import ModelSpec

    ring = tf.distribute.experimental.CommunicationImplementation.RING
    options = tf.distribute.experimental.CommunicationOptions(bytes_per_pack=task.pack, implementation=ring)
    strategy = tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)
    shape, total = (task.side,) * 3, float(task.batch * workers)
    spec = ModelSpec(
        task="segmentation", classes=("a", "b"), patch=shape, channels=1, preprocess=PreprocessConfig(),
        model=ModelConfig(name="unet3d", filters=task.filters, depth=task.depth, norm=task.norm), dataset_hash="",
        run="bench",
    )  # fmt: skip
    with strategy.scope():
        model = build(spec)
        optimizer = tf.keras.optimizers.Adam(1e-3)
        optimizer.build(model.trainable_variables)

    def batches(_):
        x = tf.random.stateless_uniform((task.batch, *shape, 1), (0, 1))
        y = tf.cast(x[..., 0] > 0.5, tf.int32)
        # Without an end: else the workers ask each other before every step whether all have data.
        return tf.data.Dataset.from_tensors((x, y)).cache().repeat().prefetch(2)

    def replica(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(sample_losses("ce", y, model(x, training=True), tf.ones(2))) / total
        gradients = tape.gradient(loss, model.trainable_variables)
        # Sums over all workers.
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss

    @tf.function
    def step(x, y):
        return strategy.run(replica, args=(x, y))

    data, times = iter(strategy.distribute_datasets_from_function(batches)), []
    for _ in range(task.warmup + task.steps):
        began = time.perf_counter()
        step(*next(data)).numpy()
        times.append(time.perf_counter() - began)
    return times[task.warmup :]


def main() -> None:
    """``mirrored_worker INDEX HOST:PORT,HOST:PORT,... [--batch N ...]``: prints the seconds of each step as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("index", type=int)
    parser.add_argument("cluster")
    for name, default in asdict(Task()).items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    values = vars(parser.parse_args())
    index, cluster = values.pop("index"), values.pop("cluster").split(",")
    allowed = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {allowed[index % len(allowed)]})
    os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": cluster}, "task": {"type": "worker", "index": index}})
    from .. import bootstrap
    from ..world import World

    task = Task(**values)
    os.environ["TF_NUM_INTEROP_THREADS"] = str(task.interop)
    # A world of one: the core is chosen already.
    bootstrap.prepare(world=World())
    print(json.dumps(train(task, len(cluster))))


if __name__ == "__main__":
    main()
