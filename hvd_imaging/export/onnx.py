"""ONNX: batch 1, probabilities out; float32, or 8-bit integers by ONNX Runtime's static quantization (QDQ)."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import RunError
from ..inference.exported import INPUT, ONNX
from ..models.spec import ModelSpec
from . import onnx_graph


def write(
    model: Any, spec: ModelSpec, folder: Path, kind: str = "onnx", calibration: Sequence[np.ndarray] | np.ndarray | None = None
) -> None:
    """Write ``folder/model.onnx``: input and output float32, ``(1, D, H, W, C)``.

    Args:
        model: network of logits, lowered where it has 3D layers.
        kind: "onnx" or "onnx-int8".
        calibration: float32 ``(n, D, H, W, C)``, for int8.

    Raises:
        RunError: a layer that the writer does not know, or that ONNX Runtime can not quantize.
    """
    import onnx

    graph = onnx_graph.make(model, spec)
    if kind == "onnx-int8":
        if calibration is None:
            raise ValueError("int8 needs calibration patches")
        graph = quantize(graph, calibration)
    onnx.save(graph, folder / ONNX)


def quantize(graph: Any, calibration: Sequence[np.ndarray] | np.ndarray) -> Any:
    """Static quantization: activations unsigned, weights signed and by channel, of convolutions and what moves their values.

    Raises:
        RunError: ONNX Runtime refuses the network.
    """
    import onnx
    from onnxruntime import quantization as tools
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(tools.CalibrationDataReader):
        def __init__(self) -> None:
            self.images: Iterator[np.ndarray] = iter(calibration)

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.images, None)
            return None if image is None else {INPUT: np.asarray(image, np.float32)[None]}

    logger = logging.getLogger()
    level = logger.level
    with tempfile.TemporaryDirectory(prefix="hvd_imaging.") as name:
        raw, ready, path = (Path(name) / f"{word}.onnx" for word in ("raw", "ready", "quantized"))
        onnx.save(graph, raw)
        try:
            logger.setLevel(logging.ERROR)  # it recommends what is done here already
            quant_pre_process(str(raw), str(ready), skip_symbolic_shape=True)
            tools.quantize_static(
                str(ready), str(path), Reader(), quant_format=tools.QuantFormat.QDQ, per_channel=True,
                activation_type=tools.QuantType.QUInt8, weight_type=tools.QuantType.QInt8,
                op_types_to_quantize=["Conv", "ConvTranspose", "Gemm", "MatMul", "Concat", "MaxPool", "Add", "Relu", "Pad", "Slice",
                                      "Reshape", "Transpose"],
            )  # fmt: skip
            return onnx.load(path)
        except Exception as error:  # its exceptions have no common base
            lines = str(error).splitlines() or [type(error).__name__]
            raise RunError(f"onnx-int8: ONNX Runtime can not quantize the network ({lines[0][:300]}); export --format onnx") from error
        finally:
            logger.setLevel(level)
