"""One process of `bench compress`: answers one patch again and again in one runtime, and prints the times as JSON.

``python -m hvd_imaging.bench.compress_worker KIND PATH THREADS RUNS``. All runtimes are called in their own plainest way, ours too:
what is compared are the files, not what is around them.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

WARM_UP = 3


def tflite(path: str, threads: int) -> Callable[[], Any]:
    """A ``.tflite`` file in TensorFlow's own interpreter (XNNPACK)."""
    import numpy as np
    import tensorflow as tf

    interpreter = tf.lite.Interpreter(model_path=path, num_threads=threads)
    interpreter.allocate_tensors()
    given, found = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    image = np.random.default_rng(0).random(given["shape"]).astype(given["dtype"])

    def call() -> Any:
        interpreter.set_tensor(given["index"], image)
        interpreter.invoke()
        return interpreter.get_tensor(found["index"])

    return call


def onnx(path: str, threads: int) -> Callable[[], Any]:
    """An ``.onnx`` file in ONNX Runtime."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    given = session.get_inputs()[0]
    image = np.random.default_rng(0).random(given.shape, np.float32)
    return lambda: session.run(None, {given.name: image})


def run(path: str, threads: int) -> Callable[[], Any]:
    """A run folder in TensorFlow with oneDNN."""
    import numpy as np

    from ..inference.predictors import open_predictor

    predict = open_predictor(path)
    image = np.random.default_rng(0).random((1, *predict.spec.patch, predict.spec.channels), np.float32)
    return lambda: predict(image)


def torch(path: str, threads: int) -> Callable[[], Any]:
    """The design page's U-Net in PyTorch; ``path`` is "CLASSESxSIDE": what the weights are does not change the time."""
    import torch
    from torch import nn

    classes, side = map(int, path.split("x"))
    torch.set_num_threads(threads)

    class Net(nn.Module):
        def __init__(self, filters: int = 16, depth: int = 3) -> None:
            super().__init__()

            def two(inner: int, outer: int, stride: int = 1) -> nn.Module:
                first, second = nn.Conv3d(inner, outer, 3, stride, 1), nn.Conv3d(outer, outer, 3, 1, 1)
                return nn.Sequential(first, nn.ReLU(inplace=True), second, nn.ReLU(inplace=True))

            sizes = [filters * 2**level for level in range(depth)]
            self.down = nn.ModuleList(two(1 if n == 0 else sizes[n - 1], size, 1 if n == 0 else 2) for n, size in enumerate(sizes))
            self.up = nn.ModuleList(nn.ConvTranspose3d(2 * size, size, 2, 2) for size in sizes[-2::-1])
            self.join = nn.ModuleList(two(2 * size, size) for size in sizes[-2::-1])
            self.logits = nn.Conv3d(filters, classes, 1)

        def forward(self, x: Any) -> Any:
            skips = []
            for down in self.down:
                x = down(x)
                skips.append(x)
            for up, join, skip in zip(self.up, self.join, skips[-2::-1], strict=True):
                x = join(torch.cat([up(x), skip], 1))
            return torch.softmax(self.logits(x), 1)

    net = Net().eval()
    image = torch.rand(1, 1, side, side, side)

    def call() -> Any:
        with torch.inference_mode():
            return net(image)

    return call


def main() -> None:
    """Print the times in ms, or why there are none."""
    kind, path, threads, runs = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    from .. import bootstrap

    bootstrap.prepare(threads)
    try:
        call = {"tflite": tflite, "onnx": onnx, "run": run, "torch": torch}[kind](path, threads)
        for _ in range(WARM_UP):
            call()
        times = []
        for _ in range(runs):
            began = time.perf_counter()
            call()
            times.append((time.perf_counter() - began) * 1e3)
        print(json.dumps({"times_ms": times}))
    except ImportError as error:
        print(json.dumps({"reason": f"{error.name} is not installed"}))


if __name__ == "__main__":
    main()
