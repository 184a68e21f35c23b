"""One rank that sums gradients of several sizes through Horovod's door; rank 0 prints ``{"points": [[bytes, s], ...]}`` as JSON."""

from __future__ import annotations

import json
import statistics
import sys
import time

SIZES = (1 << 12, 1 << 20, 1 << 24, 1 << 26)


def main() -> None:
    """``link_worker ROUNDS``: medians; the slowest rank's time counts, as all wait for it."""
    rounds = int(sys.argv[1])
    from .. import bootstrap

    bootstrap.prepare(1)
    bootstrap.load_tensorflow()
    import tensorflow as tf

    from ..parallel.horovod import Horovod

    hvd = Horovod()
    points = []
    for size in SIZES:
        values = tf.ones(size // 4)
        run = tf.function(lambda values=values, size=size: hvd.sum_tensors([values], f"link.{size}")[0][:1])
        run()
        times = []
        for _ in range(rounds):
            hvd.barrier()
            began = time.perf_counter()
            run().numpy()
            times.append(time.perf_counter() - began)
        points.append([size, max(hvd.gather(statistics.median(times)))])
    if hvd.world.is_root:
        print(json.dumps({"points": points}))


if __name__ == "__main__":
    main()
