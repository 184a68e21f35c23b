"""The pictures of a run, as PNG: learning curves, ROC, confusion matrix, overlays of the worst and best cases.

All functions draw from plain values and write atomically. One colour means one thing in every picture.
"""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..files import atomic_path
from ..inference import statistics as stats
from .curves import loss_panels, points

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..inference.evaluate import Overlay

TRAIN, VAL = "#4c78a8", "#e4572e"
INK, MUTED, GRID = "#22262b", "#6b7480", "#e3e6ea"
TRUTH, PREDICTION = "#2fd44a", "#ff3df2"
CLASS_COLOURS = ("#4c78a8", "#e4572e", "#3a9d5d", "#a05195", "#d9a404", "#3ca3b8", "#8c6d4f", "#7f7f7f")
FOLDER = "plots"
_THIN = 0.6
_LETTERS = 58
"""That fit above a picture."""

_STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.xmargin": 0.02,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "lines.linewidth": 2,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "white",
    "savefig.dpi": 150,
}


@contextlib.contextmanager
def _figure(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure of inches that is written to ``path`` when the block ends. No global pyplot state, no display."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png")


def draw_evaluation(run_dir: Path, report: Mapping[str, Any], overlays: Sequence[Overlay]) -> list[Path]:
    """All pictures of an evaluation into ``run_dir/plots``: the paths that were written.

    ``report`` as `inference.evaluate` makes it; learning curves come from the run's events.
    """
    from ..training.events import epoch_records

    folder = run_dir / FOLDER
    split, classes = report["split"], report["classes"]
    written = []
    epochs = epoch_records(run_dir)
    if epochs:
        written.append(learning_curves(epochs, folder / "learning-curves.png"))
    written.append(
        confusion(
            np.array(report["confusion"]),
            classes,
            folder / f"confusion-{split}.png",
            "voxels" if report["task"] == "segmentation" else "cases",
        )
    )
    if report["task"] == "classification":
        truth = np.array([row["label"] for row in report["cases"]])
        probabilities = np.array([row["probabilities"] for row in report["cases"]])
        drawn = roc(truth, probabilities, classes, report["mean"]["auc"], folder / f"roc-{split}.png")
        written += [drawn] if drawn else []
    if overlays:
        written.append(overlay_sheet(overlays, classes, report["task"], folder / f"overlays-{split}.png"))
    return written


def learning_curves(epochs: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Loss, validation score and learning rate over epochs; ``epochs`` are the "epoch" events, ordered."""
    score = "dice" if any("val_dice" in event for event in epochs) else "accuracy"
    scores = {"training": points(epochs, score), "validation": points(epochs, f"val_{score}")}
    losses = loss_panels(epochs) or [("Loss", {})]
    panels = [
        *losses,
        ("Dice" if score == "dice" else "Accuracy", {name: values for name, values in scores.items() if values}),
        ("Learning rate", {"": points(epochs, "learning_rate")}),
    ]
    with _figure(path, 4 * len(panels), 3.6) as figure:
        axes = figure.subplots(1, len(panels))
        for ax, (title, lines) in zip(axes, panels, strict=True):
            for name, values in lines.items():
                colour = VAL if name.startswith("validation") else TRAIN if name else MUTED
                # Few points, or points with gaps between them, are marked: a line alone would hide them.
                marker = "o" if len(values) <= 30 else ""
                if values:
                    ax.plot(*zip(*values, strict=True), color=colour, label=name, marker=marker, markersize=4)
            ax.set_title(title)
            ax.set_xlabel("epoch")
            ax.xaxis.get_major_locator().set_params(integer=True)
            if any(lines):
                ax.legend()
        scored = axes[len(losses)]
        scored.set_ylim(-0.02, 1.02)
        axes[-1].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes[-1].set_ylim(bottom=0)
        best = [e["epoch"] + 1 for e in epochs if e.get("best")]
        if best:
            scored.axvline(best[-1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
            scored.annotate(
                f"best: epoch {best[-1]}",
                (best[-1], 0.02),
                xytext=(-6 if best[-1] > len(epochs) / 2 else 6, 0),
                textcoords="offset points",
                ha="right" if best[-1] > len(epochs) / 2 else "left",
                color=MUTED,
                fontsize=9,
            )
    return path


def roc(
    truth: np.ndarray, probabilities: np.ndarray, classes: Sequence[str], auc: Mapping[str, Any], path: Path
) -> Path | None:
    """ROC curves: ``truth`` (N,) class indices, ``probabilities`` (N, K), ``auc`` as in the report.

    Two classes give one curve, of class 1; more give one curve each against the rest. None if no curve exists.
    """
    wanted = [1] if len(classes) == 2 else list(range(len(classes)))
    drawable = [k for k in wanted if 0 < int((truth == k).sum()) < truth.size]
    if not drawable:
        return None
    with _figure(path, 5.6, 5.4) as figure:
        ax = figure.subplots()
        ax.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        for k in drawable:
            positive = truth == k
            fpr, tpr = stats.roc_curve(positive, probabilities[:, k])
            value = stats.auc(positive, probabilities[:, k])
            colour = VAL if len(classes) == 2 else CLASS_COLOURS[k % len(CLASS_COLOURS)]
            ax.plot(fpr, tpr, color=colour, label=f"{classes[k]}: AUC {value:.3f}", clip_on=False, zorder=3)
            if len(drawable) == 1:
                ax.fill_between(fpr, tpr, color=colour, alpha=0.08, linewidth=0)
        interval = auc.get("interval")
        name = "AUC" if len(classes) == 2 else "macro AUC"
        text = f"ROC, {truth.size} cases"
        if auc.get("value") is not None:
            text += f"\n{name} {auc['value']:.3f}"
            text += f" (95% interval {interval[0]:.3f} to {interval[1]:.3f})" if interval else " (no interval)"
        ax.set_title(text)
        ax.set_xlabel("false positive rate (1 - specificity)")
        ax.set_ylabel("true positive rate (recall)")
        ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        ax.legend(loc="lower right")
    return path


def confusion(matrix: np.ndarray, classes: Sequence[str], path: Path, unit: str) -> Path:
    """Confusion matrix (K, K), rows truth: coloured by the share of the row, labelled with share and count."""
    total = matrix.sum(1, keepdims=True)
    share = np.divide(matrix, total, out=np.zeros(matrix.shape), where=total > 0)
    count = len(classes)
    side = max(4.2, 1.1 * count + 2.2)
    with _figure(path, side + 0.8, side) as figure:
        ax = figure.subplots()
        picture = ax.imshow(share, cmap="Blues", vmin=0, vmax=1)
        for row in range(count):
            for column in range(count):
                dark = share[row, column] > 0.55
                shown = f"{share[row, column]:.1%}" if total[row, 0] else "-"
                ax.text(
                    column,
                    row,
                    f"{shown}\n{int(matrix[row, column]):,}",
                    ha="center",
                    va="center",
                    color="white" if dark else INK,
                    fontsize=9,
                )
        ax.set_xticks(range(count), classes, rotation=30 if count > 3 else 0, ha="right" if count > 3 else "center")
        ax.set_yticks(range(count), classes)
        ax.set_xlabel("predicted")
        ax.set_ylabel("truth")
        ax.set_title(f"Confusion matrix, {int(matrix.sum()):,} {unit}")
        ax.grid(False)
        ax.tick_params(length=0)
        ax.set_frame_on(False)
        bar = figure.colorbar(picture, ax=ax, fraction=0.046, pad=0.03, format=lambda x, _: f"{x:.0%}")
        bar.set_label("share of the true class")
        bar.outline.set_visible(False)  # type: ignore[operator]  # matplotlib's stubs are wrong here
    return path


def overlay_sheet(overlays: Sequence[Overlay], classes: Sequence[str], task: str, path: Path) -> Path:
    """The worst cases above the best: image in grey, truth outlined green, prediction magenta (and dashed).

    Pixels are shown in their true proportion in mm. Outlines of several classes share the two colours; where a slice was chosen
    for one class, the others are thin.
    """
    rows = [part for rank in ("worst", "best") if (part := [o for o in overlays if o.rank == rank])]
    columns = max(map(len, rows))
    extents = [(o.image.shape[0] * o.spacing[0], o.image.shape[1] * o.spacing[1]) for o in overlays]
    ratio = float(np.median([h / w for h, w in extents]))
    width = 4.2
    height = float(np.clip(width * ratio, 1.8, 7.5)) + 0.4 + 0.175 * max(len(caption(overlay)) for overlay in overlays)
    with _figure(path, max(width * columns, 5.2), height * len(rows) + 0.35) as figure:
        grid = figure.subplots(len(rows), columns, squeeze=False)
        for line, group in zip(grid, rows, strict=True):
            for ax in line:
                ax.set_axis_off()
            for ax, overlay in zip(line, group, strict=False):
                _overlay(ax, overlay)
        if task == "segmentation":
            from matplotlib.lines import Line2D

            handles = [
                Line2D([], [], color=TRUTH, linewidth=2.5, label="truth"),
                Line2D([], [], color=PREDICTION, linewidth=2.5, linestyle=(0, (3, 1.5)), label="prediction"),
            ]
            if len(classes) > 2 and any(overlay.focus for overlay in overlays):
                handles.append(Line2D([], [], color=MUTED, linewidth=_THIN, label="thin: classes that the caption does not name"))
            figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return path


def _overlay(ax: Any, overlay: Overlay) -> None:
    aspect = overlay.spacing[0] / overlay.spacing[1]
    low, high = np.percentile(overlay.image, (0.5, 99.8))
    ax.imshow(overlay.image, cmap="gray", vmin=low, vmax=max(high, low + 1), aspect=aspect, interpolation="nearest")
    ax.grid(False)
    masks = ((overlay.truth, TRUTH, "solid", 1.8), (overlay.prediction, PREDICTION, (0, (3, 1.5)), 1.4))
    for mask, colour, style, line in masks:
        for k in np.unique(mask[mask > 0]):
            thick = line if overlay.focus in (0, k) else _THIN
            for xs, ys in outlines(mask == k):
                ax.plot(xs, ys, color=colour, linewidth=thick, linestyle=style, solid_joinstyle="miter")
    height, width = overlay.image.shape
    ax.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    ax.set_title("\n".join(caption(overlay)), fontsize=9.5, fontweight="normal")


def caption(overlay: Overlay) -> list[str]:
    """The lines above a picture: figures, case, which slice along which axis, and the class that it was chosen for."""
    place = "its only slice" if overlay.slices == 1 else f"slice {overlay.slice} of 0 to {overlay.slices - 1} along D"
    texts = (f"{overlay.rank.capitalize()}: {overlay.title}", f"case {overlay.id[:8]}, {place}", overlay.why)
    return [line for text in texts for line in textwrap.wrap(text, _LETTERS)]


def outlines(mask: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """The pixel edges around a boolean mask (H, W) as closed lines: (x, y) in pixel coordinates, centres are integers.

    Edges and not a smoothed contour: what is drawn is exactly what was predicted.
    """
    padded = np.pad(mask, 1)
    following: dict[tuple[int, int], list[tuple[int, int]]] = {}
    # Each edge between in and out, directed so that the inside lies on its right (y grows downwards).
    for dy, dx, start, end in (
        (-1, 0, (0, 0), (0, 1)),
        (0, 1, (0, 1), (1, 1)),
        (1, 0, (1, 1), (1, 0)),
        (0, -1, (1, 0), (0, 0)),
    ):
        edge = mask & ~padded[1 + dy : 1 + dy + mask.shape[0], 1 + dx : 1 + dx + mask.shape[1]]
        for y, x in np.argwhere(edge):
            following.setdefault((y + start[0], x + start[1]), []).append((y + end[0], x + end[1]))
    lines = []
    while following:
        first = next(iter(following))
        line, at = [first], first
        while at in following:
            ends = following[at]
            to = ends.pop()
            if not ends:
                del following[at]
            line.append(to)
            at = to
        corners = np.array(line, float) - 0.5
        lines.append((corners[:, 1], corners[:, 0]))
    return lines


def draw_scaling(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Where the time of a training step goes, as bars: one for each case and system of `bench scaling`.

    Args:
        path: of the PNG.
        rows: as in the benchmark's JSON; metrics "step time", "input wait", "compute" and "exchange" in ms.
    """
    values = {(row["case"], row["system"], row["metric"]): row["value"] for row in rows}
    bars = list(dict.fromkeys((case, system) for case, system, _ in values))
    parts = (("compute", TRAIN), ("exchange", VAL), ("input wait", CLASS_COLOURS[2]))
    with _figure(path, 9, 1.2 + 0.42 * len(bars)) as figure:
        axes = figure.subplots()
        axes.grid(visible=False, axis="y")
        for place, (case, system) in enumerate(bars):
            total, left = values[case, system, "step time"], 0.0
            for name, colour in parts:
                width = values.get((case, system, name))
                if width is not None:
                    axes.barh(place, width, left=left, color=colour, label=name)
                    left += width
            if total is not None:
                # What is left: the loop itself, or all of it where a system tells no parts.
                axes.barh(place, max(total - left, 0), left=left, color=GRID, label="not split further")
                axes.text(max(total, left), place, f" {total:.0f} ms", va="center")
        axes.set_yticks(range(len(bars)), [f"{case}: {system}" for case, system in bars])
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlabel("ms a step (median)")
        axes.set_title("Where the time of a training step goes")
        handles, labels = axes.get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        figure.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=4)


def draw_differences(
    path: Path, rows: Sequence[tuple[str, float, tuple[float, float] | None]], figure_name: str, limit: float | None
) -> Path:
    """Differences in points with their intervals, one line each, and the limit of the loss.

    Args:
        path: of the PNG.
        rows: (label, difference in points, 95% interval or None), drawn from the top.
        figure_name: what differs, for the axis.
        limit: points that may be lost, None for no limit.
    """
    with _figure(path, 8, 1.1 + 0.36 * len(rows)) as figure:
        axes = figure.subplots()
        axes.grid(visible=False, axis="y")
        axes.axvline(0, color=MUTED, linewidth=1)
        if limit is not None:
            axes.axvline(-limit, color=VAL, linewidth=1.2, linestyle=(0, (4, 3)))
        for place, (_, value, interval) in enumerate(rows):
            if interval is not None:
                axes.plot(interval, (place, place), color=TRAIN, linewidth=2.2)
            axes.plot(value, place, marker="o", color=TRAIN, markersize=6)
        axes.set_yticks(range(len(rows)), [label for label, _, _ in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        # Not a magnifying glass: differences far below the limit look small.
        reach = max(abs(number) for number in axes.get_xlim())
        axes.set_xlim(-max(reach, 2 * (limit or 0.5)), max(reach, limit or 0.5))
        axes.set_xlabel(f"{figure_name}: difference in points (left: worse than the float model)")
    return path
