"""Golden patches: synthetic inputs that travel with an export, and what it answered to them where it was made.

Another processor or another release of a runtime can answer otherwise without a word. So the first time that a model is used on
a machine, it answers its golden patches again, and is refused if the answers are not those of the exporting machine.

The patches are drawn, not taken from images: an export leaves the hospital. ``golden.npz`` (NumPy, no pickle) holds them so that
any other program can compare too:

===================  ====================  ==================================================================
``inputs``           uint8 (N, D, H, W, C)  what goes in is ``low + (high - low) * inputs / 255``, float32
``low, high``        float32
``points``           int64 (N, P)          voxels looked at, indices into D * H * W; 0 for classification
``answers``          float32 (N, P, K)     probabilities there, of the export on the machine that made it
``trained``          float32 (N, P, K)     probabilities there, of the float network
``allowed``          float32               largest difference from ``answers`` that is taken for rounding
===================  ====================  ==================================================================
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from .. import npz, processor
from ..doctor import Finding
from ..errors import RunError
from ..files import atomic_path, sha256_of_file, write_json
from ..models.spec import ModelSpec
from ..texts import read_json
from . import exported
from .predictors import RUN_CONFIG, Predictor

PATCHES, CANDIDATES = 2, 6
VALUES = 2048
"""Probabilities kept of each patch, about."""
BLOCKS = 4096
"""Values that a patch is made of, about: it stays small in the file."""
ALLOWED = {"tflite-float16": 2e-2, "tflite-dynamic": 2e-2, "tflite-int8": 2e-2, "onnx-int8": 2e-2}
FLOAT_ALLOWED = 1e-3
CACHE_SCHEMA = 1

Model = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Golden:
    """The content of a ``golden.npz``, see the module."""

    inputs: np.ndarray
    low: np.ndarray
    high: np.ndarray
    points: np.ndarray
    answers: np.ndarray
    trained: np.ndarray
    allowed: np.ndarray

    def patches(self) -> np.ndarray:
        """What goes into the model: float32 ``(N, D, H, W, C)``."""
        return _scaled(self.inputs, self.low, self.high)

    def difference(self, model: Model) -> float:
        """The largest difference of a probability from ``answers``; infinite if one is not finite or of another shape."""
        found = np.stack([_at(model(patch[None])[0], points) for patch, points in zip(self.patches(), self.points, strict=True)])
        if found.shape != self.answers.shape or not np.isfinite(found).all():
            return float("inf")
        return float(np.abs(found - self.answers).max())


def _scaled(inputs: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return low + (high - low) * (inputs.astype(np.float32) / np.float32(255))


# --- made at export ---------------------------------------------------------------------------------------------------


def candidates(spec: ModelSpec, count: int = CANDIDATES) -> np.ndarray:
    """Seeded patches, uint8 ``(count, D, H, W, C)``: coarse fields of low to high contrast with finer blocks on them."""
    draw = np.random.default_rng(0)
    shape = (*spec.patch, spec.channels)
    side = max(1, int(np.ceil((np.prod(shape) / BLOCKS) ** (1 / max(1, sum(n > 1 for n in spec.patch))))))
    found = []
    for number in range(count):
        share = number / max(1, count - 1)
        coarse, fine = _field(draw, shape, 6 * side), _field(draw, shape, side)
        found.append(np.clip(255 * ((1 - share) * coarse + share * fine), 0, 255).astype(np.uint8))
    return np.stack(found)


def _field(draw: np.random.Generator, shape: Sequence[int], side: int) -> np.ndarray:
    field = draw.random([-(-n // side) for n in shape[:3]] + [shape[3]])
    for axis in range(3):
        field = np.repeat(field, side, axis)
    return field[: shape[0], : shape[1], : shape[2]]


def make(spec: ModelSpec, kind: str, trained: Model, export: Model, low: float = 0.0, high: float = 1.0) -> Golden:
    """Golden patches of a new export.

    Args:
        spec: the model's contract.
        kind: the export's format.
        trained: the float network, ``(N, D, H, W, C)`` to probabilities.
        export: the export, opened again.
        low, high: range of the model's inputs.

    Of some candidates those are kept on which the network is least sure, and of them its least sure voxels beside evenly spread
    ones: where a probability is 0 or 1 a sum that is a little wrong would not show.
    """
    drawn = candidates(spec)
    limits = np.array(low, np.float32), np.array(high if high > low else low + 1, np.float32)
    answers = [trained(_scaled(patch[None], *limits))[0] for patch in drawn]
    doubt = [_doubt(answer).mean() for answer in answers]
    chosen = sorted(np.argsort(doubt, kind="stable")[::-1][:PATCHES].tolist())
    points = np.stack([_points(answers[n], spec) for n in chosen])
    empty = np.zeros(0, np.float32)
    golden = Golden(drawn[chosen], *limits, points, empty, np.stack([_at(answers[n], points[i]) for i, n in enumerate(chosen)]), empty)
    found = np.stack([_at(export(patch[None])[0], where) for patch, where in zip(golden.patches(), points, strict=True)])
    return Golden(golden.inputs, *limits, points, found, golden.trained, np.array(allowed(kind, float(np.abs(found - golden.trained).max())), np.float32))


def allowed(kind: str, own: float) -> float:
    """The largest difference in probability that is taken for another order of rounding. Pure.

    Args:
        kind: the format.
        own: how far the export lies from its float network on the same voxels. What rounds much by itself may change by a part of
            that where a value falls on the other side of a step.
    """
    return max(ALLOWED[kind], own / 2) if kind in ALLOWED else FLOAT_ALLOWED


def _doubt(answer: np.ndarray) -> np.ndarray:
    return 1 - answer.max(-1)


def _points(answer: np.ndarray, spec: ModelSpec) -> np.ndarray:
    if spec.task == "classification":
        return np.zeros(1, np.int64)
    doubt = _doubt(answer).ravel()
    half = max(32, VALUES // answer.shape[-1] // 2)
    spread = np.linspace(0, doubt.size - 1, min(half, doubt.size)).astype(np.int64)
    return np.sort(np.concatenate([np.argsort(doubt, kind="stable")[::-1][:half], spread]))


def _at(answer: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(P, K) of probabilities ``(D, H, W, K)`` or ``(K,)``."""
    return np.asarray(answer, np.float32).reshape(-1, answer.shape[-1])[points]


def save(golden: Golden, folder: Path) -> None:
    """Write ``golden.npz``; the same content is the same file."""
    with atomic_path(folder / exported.GOLDEN) as temporary:
        np.savez_compressed(temporary, **asdict(golden))


def load(path: Path) -> Golden:
    """Read a ``golden.npz``.

    Raises:
        RunError: damaged.
    """
    try:
        held = npz.read(path)
        golden = Golden(**{each.name: held[each.name] for each in fields(Golden)})
        count = len(golden.inputs)
        if golden.inputs.ndim != 5 or golden.points.ndim != 2 or golden.answers.ndim != 3 or not count == len(golden.points) == len(golden.answers):
            raise ValueError("arrays that do not belong together")
    except (OSError, ValueError, KeyError) as error:
        raise RunError(f"{path}: damaged golden patches ({exported.first_line(error)}); copy the export again, or export the run again") from error
    return golden


# --- compared on each machine -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """What comparing has shown.

    Attributes:
        difference: largest of a probability; None: nothing to compare with.
        allowed: that ``difference`` must not exceed.
        runtime, sets: of this machine.
        theirs: ``measured_on`` of the export, {} if it does not say.
        known: taken from the cache.
    """

    difference: float | None
    allowed: float
    runtime: str
    sets: Sequence[str]
    theirs: Mapping[str, Any]
    known: bool = False

    @property
    def passed(self) -> bool:
        """False also for NaN; True where nothing could be compared."""
        return self.difference is None or self.difference <= self.allowed


def check_once(path: str | Path, predictor: Predictor, cache: Path | None = None, sets: Sequence[str] | None = None) -> str:
    """Refuse an export that answers otherwise here than where it was made. Compared once for each model, runtime and processor.

    Args:
        path: as `open_predictor` was given it; a run folder answers in the framework that trained it, and is not looked at.
        predictor: the opened model.
        cache: folder that remembers what was compared; None: the user's. One that cannot be written is done without.
        sets: instruction sets; None: this machine's.

    Returns:
        a sentence to tell the user, once, where nothing could be compared; "" otherwise.

    Raises:
        RunError: it answers otherwise; names the difference.
    """
    if (Path(path) / RUN_CONFIG).is_file():
        return ""
    found = compare(path, predictor, cache, sets)
    if not found.passed:
        raise RunError(refusal(path, found))
    if found.difference is None and not found.known:
        return (
            f"{path}: holds no golden patches, so whether it answers on this processor as where it was exported was not looked at; export "
            "the run again to have them"
        )
    return ""


def compare(
    path: str | Path, predictor: Predictor, cache: Path | None = None, sets: Sequence[str] | None = None, anew: bool = False
) -> Comparison:
    """`Comparison` of an export with its golden patches, from the cache if it was good before.

    Args:
        anew: compute in any case.

    Raises:
        RunError: the golden patches are damaged.
    """
    sets = processor.instruction_sets() if sets is None else sets
    folder, digest = _place(Path(path))
    runtime = getattr(predictor, "runtime", "")
    remembered = _cache_file(cache, digest, predictor.kind, runtime, sets)
    theirs = exported.measured_on(folder) if folder is not None else {}
    known = None if anew else _recall(remembered)
    if known is not None:
        return Comparison(known["difference"], known["allowed"], runtime, sets, theirs, known=True)
    if folder is None or not (folder / exported.GOLDEN).is_file():
        found = Comparison(None, 0.0, runtime, sets, theirs)
    else:
        golden = load(folder / exported.GOLDEN)
        found = Comparison(golden.difference(predictor), float(golden.allowed), runtime, sets, theirs)
    if found.passed:
        _remember(remembered, {"schema": CACHE_SCHEMA, "difference": found.difference, "allowed": found.allowed})
    return found


def refusal(path: str | Path, found: Comparison) -> str:
    """What is told of an export that answers otherwise. Pure."""
    here = f"{found.runtime} on {processor.kind(found.sets)}"
    there = f", exported with {found.theirs['runtime']} on {processor.kind(found.theirs['instruction_sets'])}" if found.theirs else ""
    return (
        f"{path}: this machine answers otherwise than at export: largest difference {found.difference:.2g} in probability on its golden "
        f"patches, allowed {found.allowed:.2g} ({here}{there}); export the run again in another format (onnx, tflite), or install the "
        "runtime's version that it was exported with; `predict --unchecked` computes all the same"
    )


def findings(path: str | Path, predictor: Predictor, found: Comparison) -> Iterator[Finding]:
    """What the doctor says of a model. Pure."""
    here = f"{found.runtime} on {processor.kind(found.sets)}"
    if found.difference is None:
        mend = "export the run again to have them"
        yield Finding("model", "warning", f"{path} ({predictor.kind}): holds no golden patches, nothing to compare with ({here})", mend)
    elif not found.passed:
        text, _, mend = refusal(path, found).partition("; ")
        yield Finding("model", "error", text, mend)
    else:
        text = f"{path} ({predictor.kind}): answers as at export, largest difference {found.difference:.1e}, allowed {found.allowed:.2g} ({here})"
        yield Finding("model", "ok", text)
    theirs = found.theirs.get("instruction_sets", ())
    if theirs and processor.kind(theirs) != processor.kind(found.sets):
        text = f"figures of time beside it were measured on {processor.kind(theirs)}, this is {processor.kind(found.sets)}"
        yield Finding("model's speed", "ok", f"{text}: measure here, see docs/compression.md")


def _place(path: Path) -> tuple[Path | None, str]:
    """(folder of the export, what identifies its content). A file alone has no folder, unless it lies in its own."""
    folder = path if path.is_dir() else path.parent
    listed = folder / exported.NAME
    if path.is_dir():
        return folder, sha256_of_file(listed)
    own = sha256_of_file(path)
    return (folder, sha256_of_file(listed)) if listed.is_file() and own in exported.listed_sums(folder) else (None, own)


def cache_folder(environ: Mapping[str, str] | None = None) -> Path:
    """``$HVD_IMAGING_CACHE/golden``, by default ``hvd_imaging`` below ``$XDG_CACHE_HOME`` or ``~/.cache``. Pure."""
    environ = os.environ if environ is None else environ
    base = environ.get("XDG_CACHE_HOME") or str(Path(environ.get("HOME") or os.path.expanduser("~")) / ".cache")
    return Path(environ.get("HVD_IMAGING_CACHE") or Path(base) / "hvd_imaging") / "golden"


def _cache_file(cache: Path | None, digest: str, kind: str, runtime: str, sets: Sequence[str]) -> Path:
    key = json.dumps([CACHE_SCHEMA, digest, kind, runtime, processor.architecture(), list(sets)])
    return (cache_folder() if cache is None else cache) / f"{hashlib.sha256(key.encode()).hexdigest()[:40]}.json"


def _recall(path: Path) -> dict[str, Any] | None:
    try:
        values = read_json(path)
        difference, limit = values["difference"], float(values["allowed"])
        if values["schema"] != CACHE_SCHEMA or not (difference is None or 0 <= float(difference) <= limit):
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return {"difference": difference, "allowed": limit}


def _remember(path: Path, values: Mapping[str, Any]) -> None:
    with contextlib.suppress(OSError):  # a home that is read-only: compared again next time
        write_json(path, dict(values))
