"""How good a run's best model is on one split of its dataset.

The cases are shared over the ranks; each case becomes one row of figures, and everything else is computed from the rows
of all ranks in manifest order. So any number of ranks gives the same report. Ranks exchange rows, never volumes.

What the report says (`evaluation-<split>.json`):

segmentation
    Each case: Dice, HD95 (mm), recall, specificity, precision of each foreground class, and voxel accuracy. ``mean``:
    their means over the cases that have a value, per class and over all classes, with a bootstrap interval over cases
    (voxels of one case are not independent, so no interval counts them). HD95 does not exist for a class that only one
    of truth and prediction holds; such cases are counted in ``missed`` and ``invented``.
classification
    Each case: probabilities, predicted class, label. ``mean``: accuracy, recall and specificity of each class with
    Wilson's interval, AUC with DeLong's (two classes) or bootstrap.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..communicator import Communicator, together
from ..errors import DatasetError, RunError
from ..files import write_json
from ..models.spec import ModelSpec
from ..shards import manifest as manifests
from ..shards.manifest import Manifest, Sample
from ..shards.reader import ShardReader
from . import statistics as stats
from .sliding import center_start, sliding_window

SEED = 0
SHOWN = 2
"""Cases shown of each end: the worst and the best."""
CASE_FIGURES = ("dice", "hd95_mm", "recall", "specificity", "precision")


@dataclass(frozen=True)
class Overlay:
    """One slice of one case, for a picture.

    Attributes:
        id: of the case.
        rank: "worst" or "best".
        title: figures of the case.
        slice: index along D, from 0.
        image: ``(H, W)`` uint8.
        truth, prediction: ``(H, W)`` uint8 class indices; all 0 for classification.
        spacing: mm along H, W.
        slices: of the case along D.
        focus: class index that the slice was chosen for, 0 for none.
        why: what the slice shows, "" where there is nothing to say.
    """

    id: str
    rank: Literal["worst", "best"]
    title: str
    slice: int
    image: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray
    spacing: tuple[float, float]
    slices: int = 1
    focus: int = 0
    why: str = ""


Predict = Callable[[np.ndarray], np.ndarray]
Draw = Callable[[Path, dict[str, Any], list[Overlay]], Any]


def evaluate(
    run_dir: str | Path,
    split: str,
    communicator: Communicator,
    progress: Callable[[int, int], None] | None = None,
    draw: Draw | None = None,
    dataset: str | Path | None = None,
) -> dict[str, Any]:
    """Evaluate the best weights of a run on one split of its dataset and write the report.

    Args:
        run_dir: a trained run.
        split: "train", "val" or "test".
        communicator: the ranks; all of them return the report, rank 0 writes ``RUN_DIR/evaluation-<split>.json``.
        progress: called with (cases done, cases in all) of this rank.
        draw: makes the pictures on rank 0: ``draw(run_dir, report, overlays)``.
        dataset: where the run's dataset is now; None: where it was, or beside the run.

    Raises:
        RunError, DatasetError: on all ranks alike.
    """
    from ..training.run import load_run, load_trained, located
    from .predictors import KerasPredictor

    directory = Path(run_dir)
    run = together(communicator, lambda: located(load_run(directory), dataset))
    place = Path(run.config.data.dataset)
    manifest = together(communicator, lambda: check_dataset(manifests.load(place), run.spec, place, split))
    predictor = together(communicator, lambda: KerasPredictor(run.spec, load_trained(run)))
    report, overlays = evaluate_with(
        predictor, run.spec, place, manifest, split, communicator, progress, pictures=draw is not None
    )

    def write() -> None:
        if communicator.world.is_root:
            write_json(directory / f"evaluation-{split}.json", report)
            if draw is not None:
                draw(directory, report, overlays)

    together(communicator, write)
    return report


def check_dataset(manifest: Manifest, spec: ModelSpec, dataset: Path, split: str) -> Manifest:
    """Refuse a dataset on which the model's figures would mean nothing.

    Raises:
        RunError: another task, other classes, channels or preprocessing.
        DatasetError: no cases in the split.
    """
    for what, found, expected in (
        ("task", manifest.task, spec.task),
        ("classes", list(manifest.classes), list(spec.classes)),
        ("channels", manifest.channels, spec.channels),
        ("preprocess", manifest.preprocess.model_dump(mode="json"), spec.preprocess.model_dump(mode="json")),
    ):
        if found != expected:
            raise RunError(
                f"{dataset}: {what} is {found}, expected {expected} as in the run; "
                "evaluate on the dataset that the run learned from, or one ingested in the same way"
            )
    if not manifest.of_split(split):
        counts = ", ".join(f"{name} {count}" for name, count in manifest.counts().items())
        raise DatasetError(
            f"{dataset}: no cases in the split '{split}' (found: {counts}); choose another --split, or "
            "`hvd-imaging dataset split` spreads the patients anew"
        )
    return manifest


def evaluate_with(
    predict: Predict,
    spec: ModelSpec,
    dataset: Path,
    manifest: Manifest,
    split: str,
    communicator: Communicator,
    progress: Callable[[int, int], None] | None = None,
    pictures: bool = True,
) -> tuple[dict[str, Any], list[Overlay]]:
    """`evaluate` for any callable (patches to probabilities); writes nothing. The overlays are whole on every rank."""
    world = communicator.world
    samples = manifest.of_split(split)
    mine = list(world.part(samples))
    slices: dict[str, dict[str, Any]] = {}

    def work() -> list[dict[str, Any]]:
        rows = []
        with ShardReader(dataset, manifest) as reader:
            for done, sample in enumerate(mine):
                row, shown = _case(predict, spec, reader, sample)
                rows.append(row)
                if pictures:
                    slices[sample.id] = shown
                if progress is not None:
                    progress(done + 1, len(mine))
        return rows

    rows = [row for part in communicator.gather(together(communicator, work)) for row in part]
    report = summarize(rows, spec, split, manifest.hash())
    chosen = extremes(rows, spec.task) if pictures else []
    # A second round: only now is it known whose slices are wanted.
    found = {
        name: packed
        for part in communicator.gather({name: slices[name][rank] for name, rank in chosen if name in slices})
        for name, packed in part.items()
    }
    by_id = {row["id"]: row for row in rows}
    overlays = [_overlay(by_id[name], rank, found[name], spec) for name, rank in chosen]
    return report, overlays


def _case(
    predict: Predict, spec: ModelSpec, reader: ShardReader, sample: Sample
) -> tuple[dict[str, Any], dict[str, Any]]:
    if spec.task == "classification":
        image, _ = reader.read(sample, center_start(sample.shape, spec.patch), spec.patch)
        probabilities = predict(image[None])[0].astype(np.float64)
        row: dict[str, Any] = {
            "id": sample.id,
            "label": sample.label,
            "predicted": int(probabilities.argmax()),
            "probabilities": [float(p) for p in probabilities],
        }
        plane = image.shape[0] // 2
        empty = np.zeros(image.shape[:3], np.uint8)
        shown = _pack(image, empty, empty, plane, sample)
        shown["slice"] = min(max(center_start(sample.shape, spec.patch)[0] + plane, 0), sample.shape[0] - 1)
        return row, {"worst": shown, "best": shown}
    image, truth = reader.read_whole(sample)
    if truth is None:
        raise DatasetError(f"{reader.dataset}: sample {sample.id} has no mask; ingest again with --task segmentation")
    labels = sliding_window(predict, image, spec.patch, len(spec.classes), mode="labels")
    row = {"id": sample.id, **segmentation_figures(truth, labels, sample.spacing, spec.classes)}
    focus = failing_class(truth, labels, list(row["dice"].values()))
    plane = failing_plane(truth, labels, focus)
    return row, {
        "worst": _pack(image, truth, labels, plane, sample, focus, why(truth, labels, plane, focus, spec.classes, row["dice"])),
        "best": _pack(image, truth, labels, best_plane(truth, labels), sample),
    }


def segmentation_figures(
    truth: np.ndarray, labels: np.ndarray, spacing: Sequence[float], classes: Sequence[str]
) -> dict[str, Any]:
    """One case's figures, keyed by foreground class: ``truth`` and ``labels`` (D, H, W) class indices, spacing in mm."""
    matrix = stats.confusion_matrix(truth, labels, len(classes))
    figures: dict[str, Any] = {name: {} for name in CASE_FIGURES}
    for index, name in enumerate(classes):
        if index == 0:
            continue
        a, b = truth == index, labels == index
        figures["dice"][name] = stats.dice(a, b)
        figures["hd95_mm"][name] = stats.hd95(a, b, spacing)
        figures["recall"][name] = stats.recall(matrix, index)
        figures["specificity"][name] = stats.specificity(matrix, index)
        figures["precision"][name] = stats.precision(matrix, index)
    figures["accuracy"] = stats.accuracy(matrix)
    figures["confusion"] = matrix.tolist()
    return figures


def best_plane(truth: np.ndarray, labels: np.ndarray) -> int:
    """The slice with the most truth; without any the one with the most prediction; else the middle."""
    for mask in (truth, labels):
        area = np.count_nonzero(mask, axis=(1, 2))
        if area.any():
            return int(area.argmax())
    return truth.shape[0] // 2


def failing_class(truth: np.ndarray, labels: np.ndarray, dice: Sequence[float | None]) -> int:
    """The class of the lowest Dice, of equals the one with the most wrong voxels; 0 if no class has a value.

    Args:
        truth, labels: ``(D, H, W)`` class indices.
        dice: of the classes 1, 2, ...; None where a class is in neither.
    """
    known = [(value, -_wrong(truth, labels, k).sum(), k) for k, value in enumerate(dice, 1) if value is not None]
    return min(known)[2] if known else 0


def failing_plane(truth: np.ndarray, labels: np.ndarray, focus: int) -> int:
    """The slice with the most voxels of class ``focus`` that are missing or too many; without any, `best_plane` of it."""
    area = _wrong(truth, labels, focus).sum((1, 2))
    if focus and area.any():
        return int(area.argmax())
    return best_plane(truth == focus, labels == focus) if focus else best_plane(truth, labels)


def why(
    truth: np.ndarray, labels: np.ndarray, plane: int, focus: int, classes: Sequence[str], dice: Mapping[str, float | None]
) -> str:
    """What a slice that `failing_plane` has chosen shows, for its caption."""
    value = dice[classes[focus]] if focus else None
    if value is None:
        return "nothing marked, nothing found"
    name, a, b = f"'{classes[focus]}'", truth == focus, labels == focus
    if value == 1:
        return f"{name}: no voxel is wrong"
    missing, extra = int((a & ~b)[plane].sum()), int((b & ~a)[plane].sum())
    if not b.any():
        return f"{name} missed: {missing} voxels here"
    if not a.any():
        return f"{name} invented: {extra} voxels here"
    return f"{name}, Dice {value:.3f}: here {missing} missing, {extra} too many"


def _wrong(truth: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    return np.asarray((truth == k) != (labels == k))


def summarize(rows: Sequence[dict[str, Any]], spec: ModelSpec, split: str, dataset_hash: str) -> dict[str, Any]:
    """The report from the rows of all cases."""
    summary = _segmentation_summary if spec.task == "segmentation" else _classification_summary
    return {
        "split": split,
        "task": spec.task,
        "run": spec.run,
        "dataset_hash": dataset_hash,
        "classes": list(spec.classes),
        "cases": list(rows),
        "confidence": {"level": stats.LEVEL, "bootstrap_draws": stats.DRAWS, "seed": SEED},
        **summary(rows, spec.classes),
    }


def _segmentation_summary(rows: Sequence[dict[str, Any]], classes: Sequence[str]) -> dict[str, Any]:
    foreground = list(classes[1:])
    mean: dict[str, Any] = {}
    for figure in CASE_FIGURES:
        per_class = {name: [row[figure][name] for row in rows] for name in foreground}
        of_case = [_mean_known([row[figure][name] for name in foreground]) for row in rows]
        mean[figure] = {
            **stats.mean(of_case, SEED).to_json(),
            "per_class": {name: stats.mean(values, SEED).to_json() for name, values in per_class.items()},
        }
    mean["accuracy"] = stats.mean([row["accuracy"] for row in rows], SEED).to_json()
    matrix = np.sum([row["confusion"] for row in rows], axis=0)
    presence = {
        name: [(sum(row["confusion"][k]) > 0, any(line[k] for line in row["confusion"])) for row in rows]
        for k, name in enumerate(classes)
        if k > 0
    }
    return {
        "mean": mean,
        "missed": {name: sum(a and not b for a, b in pairs) for name, pairs in presence.items()},
        "invented": {name: sum(b and not a for a, b in pairs) for name, pairs in presence.items()},
        "confusion": matrix.tolist(),
    }


def _classification_summary(rows: Sequence[dict[str, Any]], classes: Sequence[str]) -> dict[str, Any]:
    truth = np.array([row["label"] for row in rows])
    predicted = np.array([row["predicted"] for row in rows])
    matrix = stats.confusion_matrix(truth, predicted, len(classes))
    recalls, specificities = {}, {}
    for k, name in enumerate(classes):
        present = int(matrix[k].sum())
        others = int(matrix.sum()) - present
        recalls[name] = stats.proportion(int(matrix[k, k]), present)
        specificities[name] = stats.proportion(others - int(matrix[:, k].sum() - matrix[k, k]), others)
    # Of two classes the second is "positive"; of more there is none, and the mean over classes stands for all.
    mean: dict[str, Any] = {"accuracy": stats.proportion(int(np.trace(matrix)), len(rows)).to_json()}
    for figure, per_class in (("recall", recalls), ("specificity", specificities)):
        if len(classes) == 2:
            overall = per_class[classes[1]].to_json()
        else:
            value = _mean_known([estimate.value for estimate in per_class.values()])
            overall = stats.Estimate(
                value, None, len(rows), "none", "mean over classes: see the intervals of each class"
            ).to_json()
        mean[figure] = {**overall, "per_class": {name: e.to_json() for name, e in per_class.items()}}
    mean["auc"] = stats.auc_macro(truth, np.array([row["probabilities"] for row in rows]), SEED).to_json()
    return {"mean": mean, "confusion": matrix.tolist()}


def case_score(row: Mapping[str, Any], task: str) -> float | None:
    """What orders cases from worst to best: mean Dice, or the probability given to the true class."""
    if task == "classification":
        return row["probabilities"][row["label"]]
    return _mean_known(list(row["dice"].values()))


def extremes(
    rows: Sequence[dict[str, Any]], task: str, count: int = SHOWN
) -> list[tuple[str, Literal["worst", "best"]]]:
    """(id, rank) of the worst cases, worst first, and the best, best first; no case twice, ties by id."""
    scored = [(score, row["id"]) for row in rows if (score := case_score(row, task)) is not None]
    if not scored:  # nothing labelled and nothing found anywhere: still show what there is
        scored = [(0.0, row["id"]) for row in rows]
    scored.sort()
    half = min(count, (len(scored) + 1) // 2)
    worst: list[tuple[str, Literal["worst", "best"]]] = [(name, "worst") for _, name in scored[:half]]
    left = scored[half:]
    best: list[tuple[str, Literal["worst", "best"]]] = [(name, "best") for _, name in reversed(left[-count:])]
    return worst + best


def _mean_known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _pack(
    image: np.ndarray, truth: np.ndarray, labels: np.ndarray, plane: int, sample: Sample, focus: int = 0, why: str = ""
) -> dict[str, Any]:
    """One slice as what JSON can hold, so that it can travel between ranks."""
    grey = np.round(np.clip(image[plane, ..., 0], 0, 1) * 255).astype(np.uint8)
    stack = np.stack([grey, truth[plane].astype(np.uint8), labels[plane].astype(np.uint8)])
    return {
        "slice": plane,
        "slices": sample.shape[0],
        "focus": focus,
        "why": why,
        "shape": list(stack.shape),
        "spacing": list(sample.spacing[1:]),
        "data": base64.b64encode(stack.tobytes()).decode(),
    }


def _overlay(
    row: dict[str, Any], rank: Literal["worst", "best"], packed: dict[str, Any], spec: ModelSpec
) -> Overlay:
    stack = np.frombuffer(base64.b64decode(packed["data"]), np.uint8).reshape(packed["shape"])
    if spec.task == "classification":
        label, predicted = row["label"], row["predicted"]
        title = (
            f"{spec.classes[label]}, predicted {spec.classes[predicted]} (p = {row['probabilities'][predicted]:.2f})"
        )
    else:
        score = case_score(row, spec.task)
        title = "Dice -" if score is None else f"Dice {score:.3f}"
    h, w = packed["spacing"]
    return Overlay(
        row["id"], rank, title, packed["slice"], stack[0], stack[1], stack[2], (h, w), packed["slices"], packed["focus"], packed["why"]
    )
