"""What an archive's annotations hold: volumes, agreement of annotators, review, doubts, and pictures to look at.

Cases are named by reference, annotators by number: nothing here says who or whose.
"""

from __future__ import annotations

import base64
import html
import io
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy.ndimage import distance_transform_edt

from ..errors import SetupError
from ..privacy.pseudonym import pseudonym
from ..sources import catalog as sources
from ..sources.catalog import Case, Catalog
from ..sources.labels.checks import doubts
from ..sources.labels.consensus import combine, dice, opinions
from ..sources.labels.layers import Layer, from_mask
from ..volume import Volume
from .plots import CLASS_COLOURS, MUTED, outlines

CONSENSUS = "in the dataset"
REVIEWS = ("APPROVED", "UNAPPROVED", "REJECTED")


@dataclass(frozen=True)
class Pair:
    """How far two opinions on one structure agree; ``dice`` is None if both are empty."""

    label: str
    first: str
    second: str
    dice: float | None


@dataclass(frozen=True)
class Examined:
    """One case.

    Attributes:
        name: reference of its first file.
        shape, spacing: of its image; spacing in mm.
        ml: structure -> volume, 0.0 if it was looked for and not found; NaN where the image has no size in the patient.
        pairs: agreement of each two annotators, and of each with what the dataset gets.
        review: of each file: one of `REVIEWS`, "" if none is told, else "other".
        notes: of the readers and the checks.
        picture: PNG, empty if none was drawn.
    """

    name: str
    modality: str
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    ml: Mapping[str, float]
    pairs: tuple[Pair, ...] = ()
    review: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    picture: bytes = b""


def annotator_names(catalog: Catalog, key: bytes) -> dict[str, str]:
    """Raw name -> "annotator 1", "annotator 2", ... in an order that the names do not tell."""
    raw = {file.annotator for case in catalog.cases for file in case.mask if file.annotator}
    order = sorted(raw, key=lambda name: pseudonym(key, "annotator", name))
    return {name: f"annotator {number}" for number, name in enumerate(order, start=1)}


def examine(
    case: Case, catalog: Catalog, name: str, annotators: Mapping[str, str], units: Literal["hu", "stored"] = "hu", draw: bool = True
) -> Examined:
    """Read a case of a segmentation archive, measure it and draw it.

    Args:
        name: reference of the case.
        annotators: of `annotator_names`.

    Raises:
        SourceError: it cannot be used; the text may name files of the archive.
        SetupError: what reads, agrees or draws it is not installed.
    """
    volume = sources.read_image(case, units)
    annotations = sources.annotations_of(case, volume, catalog)
    mask, notes = combine(annotations, catalog.classes, volume.shape, catalog.labels)
    unit = abs(float(np.linalg.det(volume.affine[:3, :3]))) / 1000 if volume.geometry == "patient" else float("nan")
    counts = np.bincount(mask.ravel(), minlength=len(catalog.classes))
    ml, pairs, shown = {}, [], []
    for value, label in enumerate(catalog.classes):
        found = opinions(label, annotations) if value else []
        if not found:
            continue
        ml[label] = float(counts[value]) * unit
        if len(found) > 1:
            named = [*_named(found, annotators), (CONSENSUS, from_mask(label, mask == value))]
            pairs += [Pair(label, a, b, dice(one, two)) for n, (a, one) in enumerate(named) for b, two in named[n + 1 :]]
            shown += [(value, layer) for _, layer in found]
    review = tuple(status if status in ("", *REVIEWS) else "other" for status in (file.review.strip().upper() for file in case.mask))
    picture = draw_case(volume, mask, shown) if draw else b""
    return Examined(
        name,
        case.modality,
        volume.shape,
        volume.spacing,
        ml,
        tuple(pairs),
        review,
        (*volume.notes, *notes, *doubts(mask, catalog.classes)),
        picture,
    )


def _named(found: Sequence[tuple[str, Layer]], annotators: Mapping[str, str]) -> list[tuple[str, Layer]]:
    named, unknown = [], 0
    for raw, layer in found:
        unknown += not raw
        named.append((annotators.get(raw, f"unnamed {unknown}"), layer))
    return named


def summarize(cases: Sequence[Examined], catalog: Catalog, problems: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """All figures as JSON has them. Pure.

    Args:
        problems: (reference, reason) of what was set aside.

    Returns:
        ``labels``: of each structure the cases in which it was looked for, those in which it is empty, and median, least and
        most ml of the others. ``agreement``: of each structure the annotators and, for each two of them, the mean Dice and the
        number of cases. ``review``: files by ApprovalStatus.
    """
    labels = {}
    for label in catalog.classes[1:]:
        volumes = [case.ml[label] for case in cases if label in case.ml]
        filled = [ml for ml in volumes if ml > 0]
        labels[label] = {
            "cases": len(volumes),
            "empty": sum(ml == 0 for ml in volumes),
            "ml": {"median": round(statistics.median(filled), 3), "min": round(min(filled), 3), "max": round(max(filled), 3)}
            if filled
            else None,
        }
    return {
        "cases": len(cases),
        "classes": list(catalog.classes),
        "consensus": catalog.labels.consensus,
        "labels": labels,
        "agreement": _agreement([pair for case in cases for pair in case.pairs]),
        "review": dict(sorted(Counter(status or "not told" for case in cases for status in case.review).items())),
        "notes": list(catalog.notes),
        "problems": [{"file": name, "reason": reason} for name, reason in problems],
        "per_case": [
            {
                "case": case.name,
                "modality": case.modality,
                "ml": {label: None if np.isnan(ml) else round(ml, 3) for label, ml in case.ml.items()},
                "notes": list(case.notes),
            }
            for case in cases
        ],
    }


def _agreement(pairs: Sequence[Pair]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for label in dict.fromkeys(pair.label for pair in pairs):
        mine = [pair for pair in pairs if pair.label == label and pair.dice is not None]
        # Annotators by number, then what the dataset gets.
        names = sorted({name for pair in mine for name in (pair.first, pair.second)}, key=_place)
        values: dict[tuple[str, str], list[float]] = {}
        for pair in mine:
            assert pair.dice is not None
            values.setdefault((pair.first, pair.second), []).append(pair.dice)
            values.setdefault((pair.second, pair.first), []).append(pair.dice)
        rows = [[values.get((a, b), []) for b in names] for a in names]
        found[label] = {
            "annotators": names,
            "dice": [[round(statistics.fmean(each), 4) if each else None for each in row] for row in rows],
            "cases": [[len(each) for each in row] for row in rows],
        }
    return found


def _place(name: str) -> tuple[int, str, int]:
    kind, _, number = name.rpartition(" ")
    return int(name == CONSENSUS), kind, int(number) if number.isdigit() else 0


def draw_case(volume: Volume, mask: np.ndarray, several: Sequence[tuple[int, Layer]] = ()) -> bytes:
    """PNG: the slice in which most is marked, and the two planes across it; structures outlined in their colours.

    Args:
        mask: uint8 ``(D, H, W)``.
        several: (value, opinion) of structures with several annotators: dashed.

    Raises:
        SetupError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SetupError("pictures need matplotlib: `pip install hvd_imaging[train]`, or leave --out away") from error

    image = volume.array if volume.array.ndim == 3 else volume.array[..., 0]
    places = _middle(mask)
    planes = (0, 1, 2) if volume.geometry == "patient" and volume.shape[0] > 1 else (0,)
    low, high = np.percentile(image[places[0]], (0.5, 99.8))
    sizes = np.array(volume.shape) * volume.spacing
    extents = [(sizes[2 if axis < 2 else 1], sizes[0 if axis else 1]) for axis in planes]  # across, down
    height = 2.9
    widths = [float(np.clip(height * across / down, 0.6, 9.0)) for across, down in extents]
    with matplotlib.rc_context({"font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 8}):
        figure = Figure(figsize=(sum(widths) + 0.1 * len(planes), height + 0.25), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, len(planes), squeeze=False, width_ratios=widths)[0]
        for ax, axis in zip(axes, planes, strict=True):
            down, across = (other for other in range(3) if other != axis)
            flip = axis != 0 and volume.affine[2, 0] > 0  # heads up
            cut = _Cut(axis, places[axis], flip)
            ax.imshow(
                cut.of(image), cmap="gray", vmin=low, vmax=max(high, low + 1), interpolation="nearest",
                aspect=volume.spacing[down] / volume.spacing[across],
            )  # fmt: skip
            for value, layer in several:
                for xs, ys in outlines(cut.of_layer(layer, volume.shape)):
                    ax.plot(xs, ys, color=colour(value), linewidth=0.8, linestyle=(0, (2, 1.5)))
            for value in np.unique(cut.of(mask)):
                if value:
                    for xs, ys in outlines(cut.of(mask) == value):
                        ax.plot(xs, ys, color=colour(int(value)), linewidth=1.4, solid_joinstyle="miter")
            ax.set(xlim=(-0.5, cut.of(mask).shape[1] - 0.5), ylim=(cut.of(mask).shape[0] - 0.5, -0.5))
            ax.set_axis_off()
            ax.set_title(f"{('slice', 'row', 'column')[axis]} {places[axis]}", color=MUTED, fontsize=8)
        data = io.BytesIO()
        figure.savefig(data, format="png", dpi=100, metadata={"Software": None})
    return data.getvalue()


@dataclass(frozen=True)
class _Cut:
    axis: int
    place: int
    flip: bool

    def of(self, array: np.ndarray) -> np.ndarray:
        plane = np.take(array, self.place, axis=self.axis)
        return plane[::-1] if self.flip else plane

    def of_layer(self, layer: Layer, shape: tuple[int, int, int]) -> np.ndarray:
        down, across = (other for other in range(3) if other != self.axis)
        plane = np.zeros((shape[down], shape[across]), bool)
        if layer.box[self.axis].start <= self.place < layer.box[self.axis].stop:
            part = np.take(layer.inside, self.place - layer.start[self.axis], axis=self.axis)
            plane[layer.box[down], layer.box[across]] = part
        return plane[::-1] if self.flip else plane


def _middle(mask: np.ndarray) -> tuple[int, int, int]:
    """The slice in which the structures, each counting the same, are largest, and the middle of what is marked there."""
    weights = np.zeros(mask.shape[0])
    for value in np.unique(mask):
        if value:
            counts = (mask == value).sum(axis=(1, 2))
            weights += counts / counts.sum()
    if not weights.any():
        return mask.shape[0] // 2, mask.shape[1] // 2, mask.shape[2] // 2
    d = int(weights.argmax())
    # Of the smallest structure there: it is what one wants to see.
    values, counts = np.unique(mask[d][mask[d] > 0], return_counts=True)
    depth = distance_transform_edt(np.pad(mask[d] == values[counts.argmin()], 1))[1:-1, 1:-1]
    h, w = np.unravel_index(int(depth.argmax()), depth.shape)
    return d, int(h), int(w)


def colour(value: int) -> str:
    """Of a class, as in all pictures."""
    return CLASS_COLOURS[value % len(CLASS_COLOURS)]


_CSS = """
body{font:15px/1.45 system-ui,sans-serif;color:#22262b;margin:0 auto;max-width:1100px;padding:24px}
h1{font-size:24px;margin:0 0 4px}h2{font-size:18px;margin:32px 0 8px}h3{font-size:15px;margin:16px 0 6px}
p{margin:4px 0}.muted{color:#6b7480}
table{border-collapse:collapse}th,td{padding:4px 14px 4px 0;text-align:right;border-bottom:1px solid #e3e6ea}
th:first-child,td:first-child{text-align:left}th{color:#6b7480;font-weight:600}
.swatch{display:inline-block;width:11px;height:11px;border-radius:2px;margin-right:7px}
.cases{display:grid;gap:18px}
.case{border:1px solid #e3e6ea;border-radius:6px;padding:12px}.case img{width:100%}
.case h3{margin:0 0 6px;font-family:ui-monospace,monospace}ul{margin:4px 0;padding-left:20px}
"""


def page(summary: Mapping[str, Any], cases: Sequence[Examined]) -> str:
    """The report as one HTML page that loads nothing from anywhere. Pure."""
    text = html.escape
    shades = {label: colour(value) for value, label in enumerate(summary["classes"]) if value}

    def swatch(label: str) -> str:
        return f'<span class="swatch" style="background:{shades.get(label, MUTED)}"></span>{text(label)}'

    parts = [
        "<!doctype html><html lang=en><head><meta charset=utf-8><title>Annotations</title>"
        '<meta name=viewport content="width=device-width">'
        "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        f"<style>{_CSS}</style></head><body><h1>Annotations</h1>",
        f"<p>{summary['cases']} cases, {len(shades)} structures, {len(summary['problems'])} inputs that cannot be used. "
        "Cases are named by references, annotators by numbers.</p>",
        "<h2>Structures</h2><table><tr><th>structure<th>cases<th>empty<th>median, ml<th>least<th>most</tr>",
    ]
    for label, row in summary["labels"].items():
        ml = row["ml"] or {}
        figures = "".join(f"<td>{_ml(ml.get(key))}" for key in ("median", "min", "max"))
        parts.append(f"<tr><td>{swatch(label)}<td>{row['cases']}<td>{row['empty']}{figures}</tr>")
    parts.append("</table>")
    if summary["agreement"]:
        parts.append(
            "<h2>Agreement</h2><p class=muted>Mean Dice over the cases (their number in brackets) in which both looked for the "
            f"structure and one found it. The dataset gets: {text(summary['consensus'])}.</p>"
        )
    for label, found in summary["agreement"].items():
        parts.append(f"<h3>{swatch(label)}</h3><table><tr><th>")
        parts += [f"<th>{text(name)}" for name in found["annotators"]]
        for name, row, counts in zip(found["annotators"], found["dice"], found["cases"], strict=True):
            cells = "".join("<td>-" if value is None else f"<td>{value:.3f} ({n})" for value, n in zip(row, counts, strict=True))
            parts.append(f"<tr><td>{text(name)}{cells}</tr>")
        parts.append("</table>")
    if summary["review"]:
        parts.append("<h2>Review</h2><table><tr><th>ApprovalStatus<th>files</tr>")
        parts += [f"<tr><td>{text(status)}<td>{count}</tr>" for status, count in summary["review"].items()]
        parts.append("</table>")
    if summary["notes"] or summary["problems"]:
        parts.append("<h2>To look at</h2><ul>")
        parts += [f"<li>{text(note)}" for note in summary["notes"]]
        parts += [f"<li>{text(item['file'])}: {text(item['reason'])}" for item in summary["problems"]]
        parts.append("</ul>")
    parts.append("<h2>Cases</h2><div class=cases>")
    for case in cases:
        size = f"{' x '.join(map(str, case.shape))} voxels of {' x '.join(f'{mm:.2f}' for mm in case.spacing)} mm"
        parts.append(f"<div class=case><h3>{text(case.name)}</h3>")
        if case.picture:
            data = base64.b64encode(case.picture).decode()
            parts.append(f'<img loading=lazy alt="{text(case.name)}" src="data:image/png;base64,{data}">')
        volumes = ", ".join(f"{swatch(label)} {_ml(ml)} ml" for label, ml in case.ml.items())
        parts.append(f"<p>{volumes}</p><p class=muted>{text(case.modality)} {size}</p>")
        agreement = [pair for pair in case.pairs if CONSENSUS not in (pair.first, pair.second)]
        lines = [f"{p.label}: {p.first} and {p.second}, Dice {'-' if p.dice is None else f'{p.dice:.3f}'}" for p in agreement]
        lines += case.notes
        parts.append("<ul>" + "".join(f"<li>{text(line)}" for line in lines) + "</ul></div>" if lines else "</div>")
    parts.append("</div></body></html>\n")
    return "\n".join(parts)


def _ml(value: float | None) -> str:
    return "-" if value is None or value != value else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def lines(summary: Mapping[str, Any], most: int = 20) -> list[str]:
    """The report as lines of text. Pure."""
    rows = [("structure", "cases", "empty", "median ml", "min", "max")]
    for label, row in summary["labels"].items():
        ml = row["ml"] or {}
        rows.append((label, str(row["cases"]), str(row["empty"]), *(_ml(ml.get(key)) for key in ("median", "min", "max"))))
    result = [f"{summary['cases']} cases", *_table(rows)]
    for label, found in summary["agreement"].items():
        result += ["", f"{label}: mean Dice (cases)"]
        table = [("", *found["annotators"])]
        for name, row, counts in zip(found["annotators"], found["dice"], found["cases"], strict=True):
            table.append((name, *("-" if value is None else f"{value:.3f} ({n})" for value, n in zip(row, counts, strict=True))))
        result += _table(table)
    if summary["review"]:
        result += ["", "review: " + ", ".join(f"{status} {count}" for status, count in summary["review"].items())]
    told = [*summary["notes"], *(f"{case['case']}: {note}" for case in summary["per_case"] for note in case["notes"])]
    for title, items in (("notes", told), ("set aside", [f"{item['file']}: {item['reason']}" for item in summary["problems"]])):
        if items:
            result += ["", f"{len(items)} {title}:", *(f"  {item}" for item in items[:most])]
            if len(items) > most:
                result.append(f"  and {len(items) - most} more (--json has all)")
    return result


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) if not n else cell.rjust(width) for n, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in rows
    ]
