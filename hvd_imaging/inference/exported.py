"""What an exported model is on disk: which files, of which schema, with which hashes. No runtime is needed to know it.

::

    model.json      the model's contract (`models.spec`)
    export.json     schema, format, and contract, what it was measured on, and SHA-256 of every file
    parity.json     agreement with the network that it came from
    golden.npz      synthetic inputs and its answers, to be compared on other machines (`inference.golden`)
    model.keras | saved_model/ | model.tflite | model.onnx

The contract is also inside the model's own file, where its format has room for it, so that a file that was moved alone can
still be used.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import __version__, processor
from ..errors import RunError
from ..files import sha256_of_file, write_json
from ..models.spec import NAME as SPEC_NAME
from ..models.spec import ModelSpec
from ..texts import parse_json, read_json

NAME, GOLDEN = "export.json", "golden.npz"
SCHEMA = 1
INPUT, OUTPUT = "image", "probabilities"
SAVED_MODEL, TFLITE, ONNX, KERAS = "saved_model", "model.tflite", "model.onnx", "model.keras"

MODEL_FILE = {
    "keras": KERAS,
    "savedmodel": SAVED_MODEL,
    "tflite": TFLITE,
    "tflite-float16": TFLITE,
    "tflite-dynamic": TFLITE,
    "tflite-int8": TFLITE,
    "onnx": ONNX,
    "onnx-int8": ONNX,
}
"""Format -> its model's file (folder)."""

MEMBER = "hvd_imaging.json"
"""Name of the contract inside a ZIP (.keras, .tflite) or a SavedModel's ``assets.extra``; in ONNX `PROPERTY`."""
PROPERTY = "hvd_imaging"
"""Its key among ONNX' metadata_props."""


def metadata(spec: ModelSpec, kind: str) -> dict[str, Any]:
    """What is written into the model's file, and into ``export.json``."""
    return {"schema": SCHEMA, "format": kind, "hvd_imaging": __version__, "model": spec.model_dump(mode="json")}


def embed(path: Path, spec: ModelSpec, kind: str) -> None:
    """Put `metadata` into a finished model.

    A .tflite file gets a ZIP behind its flatbuffer, the way that TFLite's own metadata hold their files; a .keras file is a ZIP.
    """
    text = json.dumps(metadata(spec, kind), indent=1)
    if path.is_dir():
        (path / "assets.extra").mkdir(exist_ok=True)
        (path / "assets.extra" / MEMBER).write_text(text, encoding="utf-8")
    elif path.suffix == ".onnx":
        import onnx

        model = onnx.load(path)
        model.metadata_props.add(key=PROPERTY, value=text)
        onnx.save(model, path)
    else:
        with zipfile.ZipFile(path, "a") as archive:
            # A fixed date: the same model is the same file.
            archive.writestr(zipfile.ZipInfo(MEMBER), text)


def seal(folder: Path, spec: ModelSpec, kind: str, runtime: str = "") -> None:
    """Write ``folder/export.json`` over everything that lies there.

    Args:
        runtime: that ran it here, with its version; "": it has not been run yet.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / NAME)
    sums = {path.relative_to(folder).as_posix(): sha256_of_file(path) for path in files}
    here = {"architecture": processor.architecture(), "instruction_sets": list(processor.instruction_sets()), "runtime": runtime}
    write_json(folder / NAME, {**metadata(spec, kind), **({"measured_on": here} if runtime else {}), "files": sums})


def measured_on(folder: Path) -> dict[str, Any]:
    """``runtime`` and ``instruction_sets`` of the machine where parity and golden answers were measured; {} if it is not told."""
    found: Any = _listed(folder).get("measured_on")
    try:
        sets = [str(name) for name in found["instruction_sets"]]
        return {"architecture": str(found["architecture"]), "instruction_sets": sets, "runtime": str(found["runtime"])}
    except (KeyError, TypeError):
        return {}


def listed_sums(folder: Path) -> set[str]:
    """SHA-256 of the files that ``export.json`` lists; empty if it cannot be read."""
    files = _listed(folder).get("files")
    return {str(found) for found in files.values()} if isinstance(files, dict) else set()


def _listed(folder: Path) -> dict[str, Any]:
    try:
        values = read_json(folder / NAME)
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def check(folder: Path) -> str:
    """The format of an export whose files are all as they were written.

    Raises:
        RunError: damaged, incomplete, of another schema, or of an unknown format.
    """
    path = folder / NAME
    try:
        values = read_json(path)
        schema = values["schema"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path}: damaged ({first_line(error)}); export the run again") from error
    _check_schema(path, schema)
    try:
        kind, files = str(values["format"]), {str(name): str(found) for name, found in values["files"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path}: damaged ({type(error).__name__}: {error}); export the run again") from error
    if kind not in MODEL_FILE:
        raise RunError(f"{path}: format '{kind}', expected one of {', '.join(MODEL_FILE)}; export the run again")
    for name, expected in files.items():
        part = folder / name
        if not part.resolve().is_relative_to(folder.resolve()):
            raise RunError(f"{path}: names a file outside of its folder; export the run again")
        if not part.is_file():
            raise RunError(f"{part}: missing, but {NAME} lists it; copy the whole folder, or export the run again")
        found = sha256_of_file(part)
        if found != expected:
            raise RunError(
                f"{part}: damaged or changed since its export (SHA-256 expected {expected[:12]}..., found {found[:12]}...); "
                "copy it again, or export the run again"
            )
    # TensorFlow reads more of a SavedModel's folder than one file: all of it has to be what was exported.
    found_here = {item.relative_to(folder).as_posix() for item in (folder / MODEL_FILE[kind]).rglob("*") if not item.is_dir()}
    if found_here - files.keys():
        raise RunError(f"{folder / MODEL_FILE[kind]}: holds a file that {NAME} does not list; copy the export again, or export the run again")
    needed = (SPEC_NAME, MODEL_FILE[kind])
    for name in needed:
        if not any(listed == name or listed.startswith(f"{name}/") for listed in files):
            raise RunError(f"{path}: does not list {name}; export the run again")
    return kind


def read_metadata(path: Path) -> tuple[ModelSpec, str]:
    """(contract, format) from inside a single model file.

    Raises:
        RunError: it has none, or of another schema.
    """
    readers: dict[str, Callable[[Path], str]] = {".tflite": _from_zip, ".keras": _from_zip, ".onnx": _from_onnx}
    try:
        values = parse_json(readers[path.suffix](path))
        schema = values["schema"]
    except Exception as error:  # of many classes, for a damaged ZIP
        raise RunError(
            f"{path}: holds no contract of hvd_imaging, or is damaged; expected a model of `hvd-imaging export`; export the run again"
        ) from error
    _check_schema(path, schema)
    try:
        kind, spec = values["format"], ModelSpec.model_validate(values["model"])
    except (ValueError, KeyError) as error:
        raise RunError(f"{path}: damaged contract ({first_line(error)}); export the run again") from error
    if MODEL_FILE.get(kind, "").rpartition(".")[2] != path.suffix[1:]:
        raise RunError(f"{path}: says that it is of format '{kind}'; export the run again")
    return spec, kind


def _check_schema(path: Path, found: Any) -> None:
    if found != SCHEMA:
        raise RunError(
            f"{path}: schema {found!r}, expected {SCHEMA}: written by another release; open it with that one, or export the run again"
        )


_LARGEST = 16 << 20
"""Bytes of a contract."""


def _from_zip(path: Path) -> str:
    with zipfile.ZipFile(path) as archive, archive.open(MEMBER) as file:
        data = file.read(_LARGEST + 1)
    if len(data) > _LARGEST:
        raise ValueError(f"{MEMBER} is larger than {_LARGEST >> 20} MiB")
    return data.decode()


def _from_onnx(path: Path) -> str:
    return onnx_properties(path.read_bytes())[PROPERTY]


def onnx_properties(data: bytes) -> dict[str, str]:
    """metadata_props of an ONNX file, read without the package onnx: they are field 14 of the outermost message.

    Raises:
        ValueError: not a well-formed message.
    """
    found = {}
    for number, value in _fields(data):
        if number == 14 and isinstance(value, bytes):
            entry = dict(_fields(value))
            found[_text(entry.get(1))] = _text(entry.get(2))
    return found


def _text(value: int | bytes | None) -> str:
    return value.decode() if isinstance(value, bytes) else ""


def _fields(data: bytes) -> list[tuple[int, int | bytes]]:
    """Fields of a protobuf message: (number, integer or bytes)."""
    stream, found = io.BytesIO(data), []
    while stream.tell() < len(data):
        key = _varint(stream)
        number, kind = key >> 3, key & 7
        value: int | bytes
        if kind == 0:
            value = _varint(stream)
        elif kind in (1, 2, 5):
            size = {1: 8, 5: 4}.get(kind) or (_varint(stream) if kind == 2 else 0)
            value = stream.read(min(size, len(data)))
            if len(value) != size:
                raise ValueError("ends too early")
        else:
            raise ValueError(f"field of type {kind}")
        found.append((number, value))
    return found


def _varint(stream: io.BytesIO) -> int:
    value = shift = 0
    while True:
        byte = stream.read(1)
        if not byte or shift > 63:
            raise ValueError("ends too early")
        value |= (byte[0] & 127) << shift
        shift += 7
        if byte[0] < 128:
            return value


def first_line(error: Exception) -> str:
    """Of a library's message, which may have many."""
    return (str(error).splitlines() or [type(error).__name__])[0]
