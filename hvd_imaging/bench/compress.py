"""`bench compress`: what compression gains for a 3D U-Net and a VGG16, beside what others make of the same networks.

Both learn from synthetic chests, are compressed by `hvd-imaging compress` as a user would, and every file is then timed in processes
of its own, all in turn, on one thread and on all. "The same net" of the peers is the trained U-Net whose norms were frozen: without
norms every runtime is at its fastest.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from ..errors import HvdImagingError
from .compress_peers import PEERS, make_peers
from .processes import clean_environment
from .report import Figure, Row, ratio

UNET, VGG = "3D U-Net, 48^3", "VGG16, 48 x 80"
ONE, ALL = "latency, 1 thread", "latency, all threads"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Work:
    """A compression to be measured.

    Attributes:
        case: rows are compared inside one case.
        name: folder.
        start: run folder that it begins from.
        steps: of the recipe.
        formats: format -> the system's name in the table.
    """

    case: str
    name: str
    start: str
    steps: Sequence[Mapping[str, Any]]
    formats: Mapping[str, str]


WORKS = (
    Work(UNET, "frozen", "runs/unet3d", [{"do": "freeze_norms", "epochs": 6}], {
        "tflite": "ours, float32", "tflite-dynamic": "ours, dynamic range", "tflite-int8": "ours, int8",
        "onnx": "ours, float32, ONNX", "onnx-int8": "ours, int8, ONNX",
    }),
    Work(UNET, "trained_int8", "frozen/model", [{"do": "quantize", "epochs": 2}], {"tflite-int8": "ours, int8, trained with rounding"}),
    Work(UNET, "zeros", "frozen/model", [{"do": "weights", "sparsity": 0.85, "epochs": 8}], {
        "tflite": "ours, 85% zeros", "tflite-int8": "ours, 85% zeros, int8",
    }),
    Work(UNET, "small", "frozen/model", [{"do": "filters", "remove": 0.65, "rounds": 3, "epochs": 8, "learning_rate": 1e-3}], {
        "tflite": "ours, fewer filters", "tflite-int8": "ours, fewer filters, int8", "onnx-int8": "ours, fewer filters, int8, ONNX",
    }),
    Work(VGG, "frozen_vgg", "runs/vgg16", [{"do": "freeze_norms", "epochs": 8}], {
        "tflite": "ours, float32", "tflite-int8": "ours, int8",
    }),
    Work(VGG, "small_vgg", "frozen_vgg/model", [{"do": "filters", "remove": 0.92, "measure": "parameters", "rounds": 4, "epochs": 16}], {
        "tflite": "ours, fewer filters", "tflite-int8": "ours, fewer filters, int8",
    }),
)  # fmt: skip

COMMANDS = (
    ("phantom archive --patients 120 --seed 1", "archive"),
    ("ingest archive segment --task segmentation --set preprocess.spacing=[5,4,4] --set preprocess.crop=body "
     "--set split.val=0.1 --set split.test=0.25", "segment"),
    ("ingest archive classify --task classification --labels archive/labels.csv --set preprocess.spacing=[4,3.25,3.25] "
     "--set preprocess.crop=body --set preprocess.projection=mip --set preprocess.projection_slab=[0.25,0.75] "
     "--set split.val=0.1 --set split.test=0.25", "classify"),
    ("init segmentation --dataset segment -o segment.yaml", "segment.yaml"),
    ("init classification --dataset classify -o classify.yaml", "classify.yaml"),
    ("train segment.yaml --run-dir runs/unet3d --set data.patch=[48,48,48] --set data.patches_per_volume=1 "
     "--set data.foreground=0.8 --set model.filters=16 --set model.depth=3 --set model.norm=group --set train.epochs=14 "
     "--set train.learning_rate=3e-3 --set output.tensorboard=false", "runs/unet3d"),
    ("train classify.yaml --run-dir runs/vgg16 --set data.patch=[1,48,80] --set data.augment.flip=[false,true,true] "
     "--set train.epochs=40 --set train.learning_rate=3e-4 --set train.validate_every=4 --set output.tensorboard=false",
     "runs/vgg16"),
)  # fmt: skip


@dataclass(frozen=True)
class Timed:
    """A file to be timed, and what else is known of it."""

    case: str
    system: str
    kind: str
    path: str
    known: Mapping[str, tuple[float, str]]
    reason: str = ""


def measure(quick: bool, say: Say, folder: Path | None = None) -> tuple[list[Row], list[Figure]]:
    """Make everything, time it, compare.

    Args:
        quick: an untrained U-Net, sizes and times only (under a minute).
        say: told what is being done.
        folder: where the work is kept, and gone on with; None: a temporary one.

    Raises:
        HvdImagingError: a command failed.
    """
    with ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hvd_imaging_bench.")))
        folder.mkdir(parents=True, exist_ok=True)
        if quick:
            timed = _quick(folder, say)
        else:
            timed = _full(folder, say)
        times = time_all(timed, [ONE] if quick else [ONE, ALL], 1 if quick else 3, 5 if quick else 15, say)
    rows = rows_of(timed, times)
    return rows, figures_of(rows)


def _full(folder: Path, say: Say) -> list[Timed]:
    for command, made in COMMANDS:
        if not (folder / made).exists() or (made.startswith("runs/") and not (folder / made / "best.npz").exists()):
            say(f"hvd-imaging {command.split(' --')[0]}")
            product(command.split(), folder)
    found = [Timed(UNET, "trained net in TensorFlow (oneDNN), float32", "run", str(folder / "runs/unet3d"), {})]
    for work in WORKS:
        say(f"hvd-imaging compress {work.start} ({', '.join(step['do'] for step in work.steps)})")
        found += compressed(folder, work)
    frozen = folder / "frozen/model"
    found.append(Timed(UNET, "TensorFlow (oneDNN), float32", "run", str(frozen), {}))
    spec = json.loads((frozen / "model.json").read_text(encoding="utf-8"))
    found.append(Timed(UNET, "PyTorch, float32", "torch", f"{len(spec['classes'])}x{spec['patch'][0]}", {}))
    say("peers: U-Net")
    found += peers(UNET, frozen, folder / "peers_unet", quick=False)
    say("peers: VGG16")
    return found + peers(VGG, folder / "frozen_vgg/model", folder / "peers_vgg", quick=False)


def _quick(folder: Path, say: Say) -> list[Timed]:
    from .compress_peers import untrained

    say("an untrained U-Net and its peers")
    run = untrained(folder)
    found = peers(UNET, run, folder / "peers", quick=True)
    found.append(Timed(UNET, "TensorFlow (oneDNN), float32", "run", str(run), {}))
    # No figure needs these two, and half a second a call is much of a minute.
    slow = ("TensorFlow Lite, dynamic range", "TensorFlow Lite, int8")
    found = [replace(one, reason=one.reason or "timed in the full run only") if one.system in slow else one for one in found]
    return [*found, Timed(UNET, "PyTorch, float32", "torch", "2x48", {})]


def compressed(folder: Path, work: Work) -> list[Timed]:
    """Run the product, and take its own figures of every format."""
    recipe, out = folder / f"{work.name}.yaml", folder / work.name
    recipe.write_text(yaml.safe_dump({"steps": list(work.steps), "formats": list(work.formats)}), encoding="utf-8")
    if not (out / "compress.json").exists():
        command = ["compress", work.start, "--recipe", str(recipe), "--out", work.name, "--resume", "--json"]
        product(command, folder, accepted=(0, 11))
    result = json.loads((out / "compress.json").read_text(encoding="utf-8"))
    reference = result["reference"]
    found = []
    for one in result["formats"]:
        system = work.formats[one["format"]]
        place = "refused" if result["missed"][one["format"]] else "released"
        paths = sorted((out / place / one["format"]).glob("model.*ite")) + sorted((out / place / one["format"]).glob("*.onnx"))
        if not paths:
            found.append(Timed(work.case, system, "tflite", "", {}, one["reason"]))
            continue
        known = {
            "size": (one["bytes"], "bytes"), "gzip": (one["gzip_bytes"], "bytes"),
            "parameters": (one["parameters"], ""), "zeros": (one["zeros"] / one["parameters"], ""),
            "multiply-accumulates": (one["macs"], ""), "peak memory": (one["peak_bytes"], "bytes"),
        }  # fmt: skip
        for name, estimate in one["metrics"].items():
            if estimate["value"] is not None:
                known[f"test {name}"] = (estimate["value"], "mm" if name.startswith("hd95") else "")
        for name, change in one["differences"].items():
            if change["value"] is not None and not name.startswith("hd95"):
                known[f"test {name}, change"] = (change["value"], "points")
        known["parameters of the start"] = (reference["parameters"], "")
        found.append(Timed(work.case, system, "onnx" if paths[0].suffix == ".onnx" else "tflite", str(paths[0]), known))
    return found


def peers(case: str, run: Path, out: Path, quick: bool) -> list[Timed]:
    """The peers' files of one network."""
    made = json.loads((out / PEERS).read_text(encoding="utf-8")) if (out / PEERS).exists() else make_peers(run, out, quick)
    found = []
    for system, one in made.items():
        known = {"size": (one["bytes"], "bytes"), "gzip": (one["gzip"], "bytes")} if "bytes" in one else {}
        if "metric" in one:
            known["test dice" if case == UNET else "test accuracy"] = (one["metric"], "")
        found.append(Timed(case, system, one.get("kind", ""), one.get("path", ""), known, one.get("reason", "")))
    return found


def product(arguments: Sequence[str], folder: Path, accepted: Sequence[int] = (0,)) -> None:
    """Run `hvd-imaging` in ``folder``.

    Raises:
        HvdImagingError: with its last line.
    """
    environ = {key: value for key, value in clean_environment(os.environ).items() if not key.startswith("HVD_IMAGING_")}
    here = str(Path(__file__).resolve().parents[2])
    environ["PYTHONPATH"] = os.pathsep.join([here, *filter(None, [environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "hvd_imaging.cli.main", *arguments]
    done = subprocess.run(command, cwd=folder, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode not in accepted:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise HvdImagingError(f"bench compress: `hvd-imaging {' '.join(arguments[:2])}` failed: {last}")


def time_all(
    timed: Sequence[Timed], metrics: Sequence[str], repeats: int, runs: int, say: Say
) -> dict[tuple[str, str, str], tuple[list[float], str]]:
    """(case, system, metric) -> medians of each process, and a reason; the systems take turns."""
    found: dict[tuple[str, str, str], tuple[list[float], str]] = {}
    for number in range(repeats):
        say(f"timing, round {number + 1} of {repeats}")
        for metric in metrics:
            for one in timed:
                values, reason = found.setdefault((one.case, one.system, metric), ([], one.reason))
                if reason:
                    continue
                answer = worker(one, 1 if metric == ONE else len(os.sched_getaffinity(0)), runs)
                if "reason" in answer:
                    found[one.case, one.system, metric] = (values, answer["reason"])
                else:
                    times = sorted(answer["times_ms"])
                    values.append(times[len(times) // 2])
    return found


def worker(one: Timed, threads: int, runs: int, timeout: float = 300) -> dict[str, Any]:
    """What one process printed."""
    command = [sys.executable, "-m", "hvd_imaging.bench.compress_worker", one.kind, one.path, str(threads), str(runs)]
    done = subprocess.run(
        command, env=clean_environment(os.environ), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout
    )
    line = next((line for line in reversed(done.stdout.splitlines()) if line.startswith("{")), None)
    if line is None:
        return {"reason": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:200]}
    answer: dict[str, Any] = json.loads(line)
    return answer


def rows_of(timed: Sequence[Timed], times: Mapping[tuple[str, str, str], tuple[list[float], str]]) -> list[Row]:
    """All figures of all systems."""
    rows = []
    for one in timed:
        for (case, system, metric), (values, reason) in times.items():
            if (case, system) == (one.case, one.system):
                rows.append(Row(case, system, metric, "ms", tuple(values), reason))
        rows += [Row(one.case, one.system, name, unit, (float(value),)) for name, (value, unit) in one.known.items()]
    return rows


def figures_of(rows: Sequence[Row]) -> list[Figure]:
    """The issue's figures, from the rows; pure."""
    found = {(row.case, row.system, row.metric): row for row in rows}

    def row(case: str, system: str, metric: str) -> Row:
        return found.get((case, system, metric), Row(case, system, metric, ""))

    def times(case: str, above: str, below: str, metric: str = ONE) -> float | None:
        return ratio(row(case, above, metric), row(case, below, metric))

    def loss(case: str, system: str, name: str) -> float | None:
        value = row(case, system, f"test {name}, change").value
        return None if value is None else -value

    plain, best, small = "TensorFlow Lite, float32", "ours, int8", "ours, fewer filters, int8"
    gone = {
        case: (lambda left, start: None if left is None or not start else 1 - left / start)(
            row(case, "ours, fewer filters", "parameters").value, row(case, "ours, fewer filters", "parameters of the start").value
        )
        for case in (UNET, VGG)
    }
    figures = [
        Figure("U-Net int8: times smaller than float32 TFLite", times(UNET, plain, best, "size"), 3.5, "higher"),
        Figure("U-Net int8: times faster than float32 TFLite", times(UNET, plain, best), 3.0, "higher"),
        Figure("U-Net int8: times as fast as PyTorch float32", times(UNET, "PyTorch, float32", best), 1.0, "higher"),
        Figure("U-Net int8: times as fast as ONNX Runtime float32", times(UNET, "ONNX Runtime, float32", best), 1.0, "higher"),
        Figure("U-Net int8: times as fast as TensorFlow (oneDNN) float32", times(UNET, "TensorFlow (oneDNN), float32", best), 1.0, "higher"),
        Figure("U-Net int8: Dice lost, points", loss(UNET, best, "dice"), 0.5, "lower"),
        Figure("U-Net, zeros: share of all weights", row(UNET, "ours, 85% zeros", "zeros").value, 0.8, "higher"),
        Figure("U-Net, zeros: gzip size of float32 TFLite's", times(UNET, "ours, 85% zeros", plain, "gzip"), 0.35, "lower"),
        Figure("U-Net, zeros: Dice lost, points", loss(UNET, "ours, 85% zeros", "dice"), 0.5, "lower"),
        Figure("U-Net, fewer filters: share of parameters gone", gone[UNET], 0.5, "higher"),
        Figure("U-Net, fewer filters: times faster than with all", times(UNET, "ours, float32", "ours, fewer filters"), 1.6, "higher"),
        Figure("U-Net, fewer filters: Dice lost, points", loss(UNET, "ours, fewer filters", "dice"), 0.5, "lower"),
        Figure("U-Net, fewer filters, int8: times faster than float32 TFLite", times(UNET, plain, small), 5.0, "higher"),
        Figure("U-Net, fewer filters, int8: times smaller than float32 TFLite", times(UNET, plain, small, "size"), 8.0, "higher"),
        Figure("U-Net, fewer filters, int8: Dice lost, points", loss(UNET, small, "dice"), 0.5, "lower"),
        Figure("VGG16, fewer filters: share of parameters gone", gone[VGG], 0.9, "higher"),
        Figure("VGG16, fewer filters: accuracy lost, points", loss(VGG, "ours, fewer filters", "accuracy"), 0.0, "lower"),
    ]  # fmt: skip
    return figures
