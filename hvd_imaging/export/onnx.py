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
        RunError: a layer that the writer does not know, or that ONNX Runtime cannot quantize.
    """
    import onnx

    graph = onnx_graph.make(model, spec)
    if kind == "onnx-int8":
        if calibration is None:
            raise ValueError("int8 needs calibration patches")
        graph = quantize(graph, calibration)
        check_products(graph)
    onnx.save(graph, folder / ONNX)


def quantize(graph: Any, calibration: Sequence[np.ndarray] | np.ndarray) -> Any:
    """Static quantization by channel: activations unsigned, weights signed in 7 bit, those of the first, the last and transposed convolutions unsigned in 8.

    ONNX Runtime's x86 kernels for unsigned activations and signed weights add two products in 16 bit (VPMADDUBSW) where there is
    no VNNI, which saturates with weights of 8 bit; signed activations do not help, as it makes them unsigned first. For unsigned
    weights it widens before it multiplies, which is exact and takes about one and a half times as long. So those layers have
    them that lose most by the bit and compute little: the first and the last one (docs/edge.md has the figures). Transposed
    convolutions are computed in float32.

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
            whole = {"quant_type": tools.QuantType.QUInt8, "symmetric": True, "reduce_range": False}
            exact = {name: [{**whole, "axis": axis}] for name, axis in _whole(onnx.load(ready)).items()}
            tools.quantize_static(
                str(ready), str(path), Reader(), quant_format=tools.QuantFormat.QDQ, per_channel=True,
                activation_type=tools.QuantType.QUInt8, weight_type=tools.QuantType.QInt8, reduce_range=True,
                op_types_to_quantize=["Conv", "ConvTranspose", "Gemm", "MatMul", "Concat", "MaxPool", "Add", "Relu", "Pad", "Slice",
                                      "Reshape", "Transpose"],
                extra_options={"TensorQuantOverrides": exact},
            )  # fmt: skip
            return onnx.load(path)
        except Exception as error:  # its exceptions have no common base
            lines = str(error).splitlines() or [type(error).__name__]
            raise RunError(f"onnx-int8: ONNX Runtime cannot quantize the network ({lines[0][:300]}); export --format onnx") from error
        finally:
            logger.setLevel(level)


INT16 = 32767
MULTIPLY = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def _whole(graph: Any) -> dict[str, int]:
    """Weights that keep 8 bit -> the axis of their outputs: of the first and last node that multiplies, as far as they are
    convolutions, and of transposed convolutions, for which there are no integer kernels."""
    constants = {each.name for each in graph.graph.initializer}
    nodes = [node for node in graph.graph.node if node.op_type in MULTIPLY and node.input[1] in constants]
    found = {node.input[1]: 0 for node in (*nodes[:1], *nodes[-1:]) if node.op_type == "Conv"}
    return found | {node.input[1]: 1 for node in nodes if node.op_type == "ConvTranspose"}


def largest_products(graph: Any) -> dict[str, int]:
    """Node that multiplies by signed weights -> the largest sum of two products that any two of an output's weights can make.

    A kernel may put any two weights beside each other, and their unsigned activations are 255 at most: so the two largest
    weights of one sign count, of each output (the channel axis of the weights), or of the whole where there is one scale.
    Products with unsigned weights are added in 32 bit by all kernels.
    """
    from onnx import numpy_helper

    arrays = {each.name: each for each in graph.graph.initializer}
    weights = {}
    for node in graph.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in arrays:
            axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
            weights[node.output[0]] = numpy_helper.to_array(arrays[node.input[0]]), axis, numpy_helper.to_array(arrays[node.input[1]]).size
    found = {}
    for node in graph.graph.node:
        if node.op_type not in MULTIPLY or node.input[1] not in weights:
            continue
        values, axis, scales = weights[node.input[1]]
        if values.dtype != np.int8:
            continue
        rows = np.moveaxis(values, axis, 0).reshape(scales, -1) if scales > 1 else values.reshape(1, -1)
        ordered = np.sort(rows.astype(np.int64), axis=1)
        high, low = ordered[:, -2:].clip(min=0).sum(1).max(), ordered[:, :2].clip(max=0).sum(1).min()
        found[node.name or node.output[0]] = 255 * int(max(high, -low))
    return found


def check_products(graph: Any) -> None:
    """Whether every sum of two products fits in 16 bit, so that no processor's kernels can saturate.

    Raises:
        RunError: names the node.
    """
    for name, value in largest_products(graph).items():
        if value > INT16:
            raise RunError(
                f"onnx-int8: in '{name}' two products can sum up to {value}, expected at most {INT16}: processors without VNNI would "
                "saturate and answer otherwise; export --format tflite-int8 or onnx"
            )
