"""Whether a model file is arithmetic alone: its runtime would find neither operations that are programs nor other files named in it.

TFLite's interpreters run TensorFlow's operations too (``FlexWriteFile``) wherever TensorFlow is installed, and ONNX Runtime reads weights from
any path that the model names. No export of this program needs either, so both are refused, and need no trust to be lifted. Read here
are the formats themselves (FlatBuffers, Protocol Buffers), without a runtime.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path

from ..errors import RunError

# --- TFLite: tensorflow/lite/schema/schema.fbs ---------------------------------------------------------------------------

_CUSTOM = 32
"""BuiltinOperator.CUSTOM: an operation that is looked up by its name."""
_OPERATOR_CODES, _EXTERNAL_GROUPS, _EXTERNAL_BUFFERS = 1, 8, 9
_DEPRECATED_CODE, _CUSTOM_NAME, _CODE = 0, 1, 3
_MOST_OPERATIONS = 10_000


def check_tflite(path: Path) -> None:
    """Whether a TFLite model has built-in operations only, and its weights with it.

    Raises:
        RunError: it has not, or is damaged.
    """
    with open(path, "rb") as file:
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                foreign = _tflite(data)
        except (struct.error, ValueError, IndexError) as error:
            raise RunError(f"{path}: damaged TFLite model (no table of operations); export the run again") from error
    if foreign:
        raise _refused(path, foreign)


def _tflite(data: mmap.mmap) -> str:
    """What is not allowed in it; "" if nothing is."""
    root = _number(data, 0, "<I")
    for field in (_EXTERNAL_GROUPS, _EXTERNAL_BUFFERS):
        if _field(data, root, field):
            return "keeps weights in other files"
    vector = _target(data, _field(data, root, _OPERATOR_CODES))
    count = _number(data, vector, "<I")
    if count > _MOST_OPERATIONS:
        raise ValueError("too many operations")
    for number in range(count):
        code = _target(data, vector + 4 + 4 * number)
        old, new, name = (_field(data, code, field) for field in (_DEPRECATED_CODE, _CODE, _CUSTOM_NAME))
        # As the runtimes take it: the larger of the two.
        kind = max(_number(data, old, "<b") if old else 0, _number(data, new, "<i") if new else 0)
        if kind == _CUSTOM or name:
            return "has an operation that is not TFLite's own, which may be a program"
    return ""


def _number(data: mmap.mmap, at: int, form: str) -> int:
    if at < 0:
        raise ValueError("outside of the file")
    return struct.unpack_from(form, data, at)[0]


def _target(data: mmap.mmap, at: int) -> int:
    """Where the offset at ``at`` leads."""
    if not at:
        raise ValueError("missing")
    return at + _number(data, at, "<I")


def _field(data: mmap.mmap, table: int, number: int) -> int:
    """Where a table's field lies; 0 if it is not set."""
    layout = table - _number(data, table, "<i")
    at = 4 + 2 * number
    if at + 2 > _number(data, layout, "<H"):
        return 0
    offset = _number(data, layout + at, "<H")
    return table + offset if offset else 0


# --- ONNX: onnx/onnx.proto -----------------------------------------------------------------------------------------------

_TENSOR = "tensor"
_INSIDE = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: _TENSOR, 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: _TENSOR, 6: "graph", 10: _TENSOR, 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: _TENSOR, 2: _TENSOR},
    _TENSOR: {},
}
"""Message -> its fields in which a tensor may lie, by number."""
_EXTERNAL_DATA, _DATA_LOCATION = 13, 14
_DEEPEST = 64


def check_onnx(path: Path) -> None:
    """Whether all weights of an ONNX model are in its file.

    Raises:
        RunError: they are not, or it is damaged.
    """
    with open(path, "rb") as file:
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                elsewhere = _onnx(data)
        except (ValueError, IndexError) as error:
            raise RunError(f"{path}: damaged ONNX model (no well-formed message); export the run again") from error
    if elsewhere:
        raise _refused(path, "keeps weights in other files")


def _onnx(data: mmap.mmap) -> bool:
    """Whether a tensor says that its values lie elsewhere."""
    waiting = [("model", 0, len(data), 0)]
    while waiting:
        kind, start, end, depth = waiting.pop()
        if depth > _DEEPEST:
            raise ValueError("too deep")
        for number, first, last in _fields(data, start, end):
            if kind == _TENSOR and (number == _EXTERNAL_DATA or (number == _DATA_LOCATION and first != last)):
                return True
            if number in _INSIDE[kind]:
                waiting.append((_INSIDE[kind][number], first, last, depth + 1))
    return False


def _fields(data: mmap.mmap, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(number, start, end) of a message's fields, without reading what is in them; of the number 0 there is neither."""
    while at < end:
        key, at = _varint(data, at, end)
        kind = key & 7
        first = at
        if kind == 0:
            value, at = _varint(data, at, end)
            first = at if value == 0 else first
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        elif kind == 2:
            size, first = _varint(data, at, end)
            at = first + size
        else:
            raise ValueError("a field of unknown type")
        if at > end:
            raise ValueError("ends too early")
        yield key >> 3, first, at


def _varint(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at
    raise ValueError("ends too early")


def _refused(path: Path, what: str) -> RunError:
    return RunError(f"{path}: {what}; no export of hvd-imaging does, so it is not opened: get the model from its maker again, or export the run again")
