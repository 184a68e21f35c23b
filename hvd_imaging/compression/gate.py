"""What a compressed model has to reach before it may be called released: decisions from measured figures, nothing else.

The metric is compared case by case: both models answer the same cases, so what differs between cases (hard ones, easy
ones) cancels, and the interval of the difference is much narrower than those of the two figures. It is the percentile
interval of a paired bootstrap: cases are drawn with replacement, both models keep their answers (Efron and Tibshirani,
1993).

**Judged is the point estimate, not the interval.** A test split of some dozen cases gives intervals of several points: a
limit on the lower bound would refuse every model of a small split, one on the upper bound would release any. Either way
the number of cases would decide, not the model. So the estimate is held against the limit, and the interval stands
beside it in every table and card for the reader, who decides whether the split was large enough.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from pydantic import Field

from ..config import Positive, PositiveFloat, Section
from ..errors import RunError
from ..inference import statistics as stats

SEED = 0
PRIMARY = {"segmentation": "dice", "classification": "accuracy"}
"""The figure without which nothing can be judged."""
JUDGED = {"segmentation": ("dice",), "classification": ("accuracy", "recall", "auc")}
"""What ``metric_loss`` holds for: a classifier that keeps its accuracy but finds fewer of the ill is not released."""
SHOWN = {"segmentation": ("dice", "hd95_mm"), "classification": ("accuracy", "recall", "auc")}
NAMES = {"dice": "Dice", "hd95_mm": "HD95 (mm)", "accuracy": "accuracy", "recall": "recall", "auc": "AUC"}
THREADS = {"one": "1 thread", "all": "all threads"}


class Limits(Section):
    """What a compressed model must reach to be released; null switches a limit off."""

    metric_loss: float | None = Field(
        0.5, ge=0, description="points (of 100) that mean Dice, or accuracy, recall and AUC, may be below the float model's"
    )
    faster: PositiveFloat | None = Field(
        1.0,
        description="times as fast as the float model, at least, on one thread and on all, on the processor that compresses; 1: faster at all",
    )
    smaller: PositiveFloat | None = Field(1.0, description="times as small on disk, at least; 1: smaller at all")
    max_latency_ms: PositiveFloat | None = Field(None, description="longest time for a patch on one thread, ms")
    max_bytes: Positive | None = Field(None, description="largest size on disk, bytes")
    max_peak_bytes: Positive | None = Field(None, description="most memory of the whole process, bytes")


@dataclass(frozen=True)
class Difference:
    """A candidate's figure against the float model's, over the cases that both can be compared on.

    Attributes:
        reference, candidate: the two figures on these cases, in their own unit (shares of 1, or mm); None without cases.
        value: candidate - reference: points for shares, mm for HD95.
        interval: 95% of ``value``, None if there is none (see ``note``).
        count: cases.
        note: why something is missing, or what the interval cannot say; "" otherwise.
    """

    reference: float | None
    candidate: float | None
    value: float | None
    interval: tuple[float, float] | None
    count: int
    note: str = ""


@dataclass(frozen=True)
class Measured:
    """All figures of one model. None: not measured, or not known for this format.

    Attributes:
        format: "run" for the float model, else an export's format.
        bytes, gzip_bytes: of its files, see `measure.sizes`.
        parameters, zeros, macs: weights, those of them that are 0, and multiply-accumulates of one patch.
        latency_ms: {"one": ..., "all": ...}: median time of a patch, by number of threads.
        peak_bytes: largest memory of the process that ran it, interpreter and libraries included.
        metrics: figure -> as in an evaluation report: {"value", "interval", "count", ...}.
        differences: figure -> against the float model; empty for itself.
        failures: "missed: CLASS" and "invented: CLASS" -> whole cases (segmentation); HD95 knows nothing of them.
        spread_ms: quartiles of ``latency_ms``, [low, high] by number of threads.
        reason: why figures are missing, "" if none is.
    """

    format: str
    bytes: int | None = None
    gzip_bytes: int | None = None
    parameters: int | None = None
    zeros: int | None = None
    macs: int | None = None
    latency_ms: Mapping[str, float | None] = field(default_factory=dict)
    peak_bytes: int | None = None
    metrics: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    differences: Mapping[str, Difference] = field(default_factory=dict)
    failures: Mapping[str, int] = field(default_factory=dict)
    spread_ms: Mapping[str, Sequence[float] | None] = field(default_factory=dict)
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def measured(
    format: str,
    row: Mapping[str, Any],
    report: Mapping[str, Any] | None = None,
    reference: Mapping[str, Any] | None = None,
    counts: Mapping[str, int | None] | None = None,
) -> Measured:
    """Put the figures of one model together.

    Args:
        format: its name in the table.
        row: of `measure.measure_models`.
        report: of `inference.evaluate.evaluate_with` for this model; None if it could not be evaluated.
        reference: the report of the float model on the same cases; None for the float model itself.
        counts: ``parameters``, ``zeros`` and ``macs``, as far as known.

    Raises:
        RunError: the two reports are not of the same cases.
    """
    report = report or {}
    return Measured(
        format,
        **{name: row.get(name) for name in ("bytes", "gzip_bytes", "peak_bytes")},
        **{name: (counts or {}).get(name) for name in ("parameters", "zeros", "macs")},
        latency_ms=dict(row.get("latency_ms", {})),
        metrics=_metrics(report) if report else {},
        differences=compare(reference, report) if report and reference else {},
        failures={
            of_class(kind, label): count
            for kind in ("missed", "invented")
            for label, count in report.get(kind, {}).items()
        },
        spread_ms=dict(row.get("spread_ms", {})),
        reason=row.get("reason", ""),
    )


def _metrics(report: Mapping[str, Any]) -> dict[str, Any]:
    """The shown figures of a report, and Dice of each class where there are several."""
    found = {}
    for name in SHOWN[report["task"]]:
        estimate = report["mean"][name]
        found[name] = {key: value for key, value in estimate.items() if key != "per_class"}
        if name == "dice" and len(estimate["per_class"]) > 1:
            found |= {of_class(name, label): dict(inner) for label, inner in estimate["per_class"].items()}
    return found


def of_class(figure: str, label: str) -> str:
    """The key of one class's figure."""
    return f"{figure}: {label}"


def figure_name(key: str) -> str:
    """How a figure is called in tables; of a class, by `of_class`, too."""
    figure, separator, label = key.partition(": ")
    return NAMES[figure] + separator + label


# --- the metric -----------------------------------------------------------------------------------------------------


def compare(reference: Mapping[str, Any], candidate: Mapping[str, Any]) -> dict[str, Difference]:
    """Differences of two evaluation reports (`inference.evaluate`) of the same cases; the same result for the same input.

    segmentation
        ``dice``: mean over the cases of the mean over classes. A class that is neither there nor found has no Dice; where
        only one model has none, it was right and the other one invented something: its answer counts as 1, so that
        inventions cost. Several classes: also each by itself, keyed by `of_class`. ``hd95_mm``: over the classes and cases in which both have a distance; others are noted.
    classification
        ``accuracy``; ``recall`` of class 1 of two, else the mean over classes; ``auc`` as in the report.

    Raises:
        RunError: other cases, classes or task.
    """
    for what in ("task", "classes"):
        if reference[what] != candidate[what]:
            raise RunError(
                f"the two evaluations cannot be compared: {what} is {candidate[what]}, expected {reference[what]}; "
                "evaluate both models on the same split"
            )
    theirs = {row["id"]: row for row in candidate["cases"]}
    if theirs.keys() != {row["id"] for row in reference["cases"]}:
        raise RunError(
            f"the two evaluations cannot be compared: {len(theirs)} cases, expected the same "
            f"{len(reference['cases'])} as of the float model; evaluate both models on the same split"
        )
    pairs = [(row, theirs[row["id"]]) for row in reference["cases"]]
    if reference["task"] == "segmentation":
        foreground = list(reference["classes"][1:])
        each = {of_class("dice", name): _dice(pairs, [name]) for name in foreground} if len(foreground) > 1 else {}
        return {"dice": _dice(pairs, foreground), "hd95_mm": _hd95(pairs, foreground), **each}
    return _classification(pairs, len(reference["classes"]))


Pair = tuple[Mapping[str, Any], Mapping[str, Any]]


def _dice(pairs: Sequence[Pair], classes: Sequence[str]) -> Difference:
    values = []
    for a, b in pairs:
        known = [
            (1.0 if x is None else x, 1.0 if y is None else y)
            for x, y in ((a["dice"][name], b["dice"][name]) for name in classes)
            if x is not None or y is not None
        ]
        values += [tuple(np.mean(known, axis=0))] if known else []
    return _paired_mean(values, 100.0, "no case holds or shows any class")


def _hd95(pairs: Sequence[Pair], classes: Sequence[str]) -> Difference:
    values, lost, won = [], 0, 0
    for a, b in pairs:
        both = [(a["hd95_mm"][name], b["hd95_mm"][name]) for name in classes]
        lost += sum(x is not None and y is None for x, y in both)
        won += sum(x is None and y is not None for x, y in both)
        known = [(x, y) for x, y in both if x is not None and y is not None]
        values += [tuple(np.mean(known, axis=0))] if known else []
    found = _paired_mean(values, 1.0, "no case has a distance from both models")
    notes = [found.note] if found.note else []
    notes += [f"{lost} without a distance that the float model has"] if lost else []
    notes += [f"{won} with a distance that the float model has not"] if won else []
    return Difference(found.reference, found.candidate, found.value, found.interval, found.count, "; ".join(notes))


def _paired_mean(values: Sequence[Sequence[float]], unit: float, missing: str) -> Difference:
    if not values:
        return Difference(None, None, None, None, 0, missing)
    table = np.array(values, np.float64)
    change = (table[:, 1] - table[:, 0]) * unit
    interval = stats.bootstrap(lambda index: float(change[index].mean()), len(change), SEED)
    note = ""
    if interval is None:
        note = "no interval, as there is one case"
    elif not change.any():
        interval, note = None, "no interval, as no case differs"
    return Difference(float(table[:, 0].mean()), float(table[:, 1].mean()), float(change.mean()), interval, len(change), note)


def _classification(pairs: Sequence[Pair], classes: int) -> dict[str, Difference]:
    truth = np.array([a["label"] for a, _ in pairs])
    predicted = [np.array([pair[k]["predicted"] for pair in pairs]) for k in (0, 1)]
    scores = [np.array([pair[k]["probabilities"] for pair in pairs], np.float64) for k in (0, 1)]

    def accuracy(index: np.ndarray, model: int) -> float | None:
        return float((truth[index] == predicted[model][index]).mean())

    def recall(index: np.ndarray, model: int) -> float | None:
        wanted = [1] if classes == 2 else range(classes)
        hit = truth[index] == predicted[model][index]
        found = [hit[truth[index] == k].mean() for k in wanted if (truth[index] == k).any()]
        return float(np.mean(found)) if found else None

    def auc(index: np.ndarray, model: int) -> float | None:
        wanted = [1] if classes == 2 else range(classes)
        found = [stats.auc(truth[index] == k, scores[model][index, k]) for k in wanted]
        known = [value for value in found if value is not None]
        return sum(known) / len(known) if known else None

    same_answers, same_scores = (bool((a == b).all()) for a, b in (predicted, scores))
    same = {"accuracy": same_answers, "recall": same_answers, "auc": same_scores}
    result = {}
    for name, figure in (("accuracy", accuracy), ("recall", recall), ("auc", auc)):
        whole = np.arange(len(pairs))
        a, b = figure(whole, 0), figure(whole, 1)
        if a is None or b is None:
            result[name] = Difference(a, b, None, None, len(pairs), "the cases are all of one class")
            continue

        def change(index: np.ndarray, figure: Any = figure) -> float | None:
            x, y = figure(index, 0), figure(index, 1)
            return None if x is None or y is None else (y - x) * 100

        interval, note = None, ""
        if same[name]:
            # None of n cases changed: the rule of three (Hanley and Lippman-Hand, 1983) says what may have gone unseen.
            count = len(pairs) if name == "accuracy" or classes > 2 else int((truth == 1).sum())
            note = "no interval, as no answer differs"
            if name != "auc" and count > 2:
                note += f" (in {count} cases a loss of up to {min(100.0, 300 / count):.1f} points can go unseen)"
        elif name == "auc" and a == b == 1:
            note = "no interval, as both models separate all cases"
        else:
            interval = stats.bootstrap(change, len(pairs), SEED)
            note = "" if interval is not None else "no interval, as there are too few cases"
        result[name] = Difference(a, b, (b - a) * 100, interval, len(pairs), note)
    return result


# --- the gate -------------------------------------------------------------------------------------------------------


def judge(reference: Measured, candidate: Measured, limits: Limits, task: str, measured_on: str = "") -> tuple[str, ...]:
    """The limits that ``candidate`` misses, each a sentence with what was found and expected; none: released.

    What was asked for and could not be measured is missed: nothing is released on trust.

    Args:
        reference: the float model; its ``latency_ms`` and ``bytes`` are what "faster" and "smaller" compare with.
        task: "segmentation" or "classification".
        measured_on: kind of processor (`processor.kind`) that the times are of: "faster" holds for it, and is told with it.
    """
    if candidate.reason and candidate.bytes is None and not candidate.latency_ms:
        return (f"could not be measured: {candidate.reason}",)
    missed = []
    if limits.metric_loss is not None:
        for name in JUDGED[task]:
            missed += _metric_missed(name, candidate, limits.metric_loss, must=name == PRIMARY[task])
    if limits.faster is not None:
        for key, threads in THREADS.items():
            times = (reference.latency_ms.get(key), candidate.latency_ms.get(key))
            where = f"{threads}, {measured_on}" if measured_on else threads
            missed += _ratio_missed(f"faster ({where})", times, limits.faster, "ms")
    if limits.smaller is not None:
        missed += _ratio_missed("smaller", (reference.bytes, candidate.bytes), limits.smaller, "bytes")
    for key, found, most, unit in (
        ("max_latency_ms", candidate.latency_ms.get("one"), limits.max_latency_ms, "ms on 1 thread"),
        ("max_bytes", candidate.bytes, limits.max_bytes, "bytes"),
        ("max_peak_bytes", candidate.peak_bytes, limits.max_peak_bytes, "bytes of memory"),
    ):
        if most is not None and found is None:
            missed.append(f"{key}: not measured, expected at most {_number(most)} {unit}")
        elif most is not None and found is not None and not found <= most:
            missed.append(f"{key}: {_number(found)} {unit}, expected at most {_number(most)}")
    if missed and candidate.reason:
        missed.append(f"measurement: {candidate.reason}")
    return tuple(missed)


def _metric_missed(name: str, candidate: Measured, most: float, must: bool) -> list[str]:
    found = candidate.differences.get(name)
    if found is None or found.value is None:
        # AUC of cases of one class does not exist for either model: nothing is lost. One that only the candidate lacks is.
        lost = found is not None and found.reference is not None
        return [f"metric_loss: {NAMES[name]} could not be compared with the float model's"] if must or lost else []
    # A hair of rounding is not a loss: 0.905 - 0.9 is not 0.5 points exactly.
    if found.value >= -most - 1e-9:
        return []
    return [
        f"metric_loss: {NAMES[name]} falls by {-found.value:.2f} points ({_percent(found.reference)} to "
        f"{_percent(found.candidate)}), expected at most {most:g}"
    ]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value * 100:.2f}"


def _ratio_missed(what: str, values: tuple[float | None, float | None], least: float, unit: str) -> list[str]:
    before, after = values
    key = what.split(" ")[0]
    wanted = f"at least {least:g} x" if least != 1 else f"{key} at all"
    if before is None or after is None:
        return [f"{what}: not measured, expected {wanted}"]
    ratio = before / after if after else float("inf")
    # As large as before is not smaller.
    if ratio >= least and (ratio > 1 or least < 1):
        return []
    return [f"{what}: {ratio:.2f} x ({_number(before)} to {_number(after)} {unit}), expected {wanted}"]


def verdicts(
    reference: Measured, candidates: Sequence[Measured], limits: Limits, task: str, measured_on: str = ""
) -> dict[str, tuple[str, ...]]:
    """`judge` of each candidate, keyed by format."""
    return {candidate.format: judge(reference, candidate, limits, task, measured_on) for candidate in candidates}


# --- the tables -----------------------------------------------------------------------------------------------------

COST_HEAD = (
    "format", "size", "gzip", "parameters", "zeros", "MACs", "1 thread", "all threads", "memory", "verdict",
)  # fmt: skip


def cost_rows(
    reference: Measured, candidates: Sequence[Measured], judged: Mapping[str, Sequence[str]]
) -> list[tuple[str, ...]]:
    """Cells under `COST_HEAD`, the float model first; what became smaller or faster says how many times.

    Args:
        judged: of `verdicts`.
    """
    rows = []
    for one in (reference, *candidates):
        own = one is reference
        rows.append(
            (
                one.format,
                _cell(one.bytes, reference.bytes, size_text, own),
                _cell(one.gzip_bytes, reference.gzip_bytes, size_text, own),
                _cell(one.parameters, reference.parameters, count_text, own),
                "-" if one.zeros is None or not one.parameters else f"{one.zeros / one.parameters:.1%}",
                _cell(one.macs, reference.macs, count_text, own),
                *(_cell(one.latency_ms.get(k), reference.latency_ms.get(k), time_text, own) for k in THREADS),
                "-" if one.peak_bytes is None else size_text(one.peak_bytes),
                "float model" if own else "released" if not judged[one.format] else "not released",
            )
        )
    return rows


METRIC_HEAD = ("format", "figure", "value", "95% interval", "difference", "95% interval", "cases")


def metric_rows(reference: Measured, candidates: Sequence[Measured]) -> list[tuple[str, ...]]:
    """Cells under `METRIC_HEAD`: the models below each other for each figure; differences are candidate - float model.

    Whole cases in which a class was missed or invented are rows where any model has such cases.
    """
    models = [one for one in (reference, *candidates) if one.metrics]
    keys = dict.fromkeys(key for one in models for key in one.metrics)
    rows = [_metric_row(one, key) for key in keys for one in models if key in one.metrics]
    for key in dict.fromkeys(key for one in models for key, count in one.failures.items() if count):
        kind, label = key.split(": ", 1)
        rows += [
            (one.format, f"cases with {label} {kind}", str(one.failures.get(key, 0)), "-", "-", "-", "-") for one in models
        ]
    return rows


def _metric_row(one: Measured, key: str) -> tuple[str, ...]:
    estimate = one.metrics[key]
    change = one.differences.get(key, Difference(None, None, None, None, 0))
    distance = key.startswith("hd95")
    value, interval = estimate["value"], estimate.get("interval")
    return (
        one.format,
        figure_name(key),
        _shown(value, distance),
        "-" if interval is None else f"{_shown(interval[0], distance)} to {_shown(interval[1], distance)}",
        "-" if change.value is None else f"{_signed(change.value)} {'mm' if distance else 'points'}",
        "-" if change.interval is None else " to ".join(map(_signed, change.interval)),
        str(estimate.get("count", "-")),
    )


def _shown(value: float | None, distance: bool) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if distance else f"{value:.4f}"


def _signed(value: float) -> str:
    text = f"{value:+.2f}"
    return "0.00" if text in ("+0.00", "-0.00") else text


def _cell(value: float | None, before: float | None, text: Any, own: bool) -> str:
    if value is None:
        return "-"
    if own or not before or not value:
        return text(value)
    return f"{text(value)} ({before / value:.1f} x)" if before >= value * 1.05 or value >= before * 1.05 else text(value)


def size_text(value: float) -> str:
    """Bytes for people: MB or GB of 10^6 and 10^9."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}" if value < 100 * size else f"{value / size:.0f} {unit}"
    return f"{value:.0f} B"


def count_text(value: float) -> str:
    """Counts for people: k, M, G."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}" if value < 100 * size else f"{value / size:.0f} {unit}"
    return f"{value:.0f}"


def time_text(value: float) -> str:
    """Milliseconds."""
    return f"{value:.1f} ms" if value < 100 else f"{value:.0f} ms"
