"""Charts as inline SVG: small, sharp on paper, and in the colours of the page (its classes c0, c1, ... and CSS variables). Pure.

The eight colours are those of Okabe and Ito (2008), which people with colour blindness can tell apart; lines differ in their dashes as well.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 640, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 22, 34


def ticks(low: float, high: float, count: int = 5, whole: bool = False) -> list[float]:
    """About ``count`` round numbers from ``low`` to ``high``; ``whole``: integers only."""
    if not high > low:
        return [low]
    rough = max((high - low) / count, 1.0 if whole else 0.0)
    power = 10.0 ** math.floor(math.log10(rough))
    factors = (1, 2, 5, 10) if whole else (1, 2, 2.5, 5, 10)
    step = next(power * factor for factor in factors if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """Short, for an axis or a cell."""
    if value == 0:
        return "0"
    if abs(value) >= 1e6 or abs(value) < 1e-3:
        return f"{value:.2g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def thin(values: Sequence[tuple[float, float]], most: int = 400) -> list[tuple[float, float]]:
    """At most ``most`` points: means of neighbours."""
    group = -(-len(values) // most)
    if group <= 1:
        return list(values)
    pieces = [values[index : index + group] for index in range(0, len(values), group)]
    return [(statistics.fmean(x for x, _ in piece), statistics.fmean(y for _, y in piece)) for piece in pieces]


def bundle(series: Mapping[str, Sequence[tuple[float, float]]], most: int = 8, bins: int = 120) -> dict[str, list[tuple[float, float]]]:
    """As many lines as an eye can follow: of more than ``most`` the lowest, the median and the highest at each time."""
    if len(series) <= most:
        return {name: thin(values) for name, values in series.items()}
    xs = [x for values in series.values() for x, _ in values]
    low, width = min(xs, default=0.0), (max(xs, default=0.0) - min(xs, default=0.0)) / bins or 1.0
    cells: dict[int, dict[str, list[float]]] = {}
    for name, values in series.items():
        for x, y in values:
            cells.setdefault(min(int((x - low) / width), bins - 1), {}).setdefault(name, []).append(y)
    found: dict[str, list[tuple[float, float]]] = {f"highest of {len(series)}": [], "median": [], "lowest": []}
    for index, by_name in sorted(cells.items()):
        means = [statistics.fmean(values) for values in by_name.values()]
        for name, value in zip(found, (max(means), statistics.median(means), min(means)), strict=True):
            found[name].append((low + (index + 0.5) * width, value))
    return found


def line_chart(
    series: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str, y_from_zero: bool = False,
    marks: Sequence[tuple[float, str]] = (), points: bool = False, years: bool = False,
) -> str:  # fmt: skip
    """Lines over a number.

    Args:
        series: name -> (x, y) in order; values that are not finite are left out.
        marks: (x, text) of vertical lines, such as restarts.
        years: x is a year and its part.
        points: dots as well, for few values.

    Returns:
        ``<figure>`` with SVG and legend; "" without any value.
    """
    clean = {name: [(x, y) for x, y in values if math.isfinite(x) and math.isfinite(y)] for name, values in series.items()}
    clean = {name: values for name, values in clean.items() if values}
    if not clean:
        return ""
    xs = [x for values in clean.values() for x, _ in values]
    ys = [y for values in clean.values() for _, y in values]
    x0, x1 = min(xs), max(xs)
    y0, y1 = (0.0 if y_from_zero else min(ys)), max(ys)
    whole = years or all(float(x).is_integer() for x in xs)
    if x1 == x0:
        x0, x1 = x0 - 0.5, x1 + 0.5
    if y1 == y0:
        y0, y1 = (0.0, y1 or 1.0) if y1 >= 0 else (y1, 0.0)
    if not y_from_zero:
        y0, y1 = y0 - 0.04 * (y1 - y0), y1 + 0.04 * (y1 - y0)
    place_x, place_y = _scale(x0, x1, _LEFT, WIDTH - _RIGHT), _scale(y0, y1, HEIGHT - _BOTTOM, _TOP)
    parts = _frame(x0, x1, y0, y1, x_label, y_label, whole, years)
    for x, text in marks:
        if x0 <= x <= x1:
            at = place_x(x)
            parts.append(f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"><title>{escape(text)}</title></line>')
    for index, (name, values) in enumerate(clean.items()):
        path = " ".join(f"{'M' if first else 'L'}{place_x(x):.1f} {place_y(y):.1f}" for first, (x, y) in _first(values))
        parts.append(f'<path class="line c{index % 8} d{index % 4}" d="{path}"><title>{escape(name)}</title></path>')
        if points or len(values) == 1:
            parts += [
                f'<circle class="dot c{index % 8}" cx="{place_x(x):.1f}" cy="{place_y(y):.1f}" r="3"><title>{escape(name)}: {number(x)}, {number(y)}</title></circle>'
                for x, y in values
            ]
    return _figure(parts, HEIGHT, list(clean), f"{y_label} over {x_label}", lines=True)


def stacked_bars(rows: Sequence[tuple[str, Sequence[float]]], parts_of: Sequence[str], unit: str) -> str:
    """Horizontal bars, one a row, in parts, with their sums.

    A few bars that are far longer than the others (the first epoch compiles the graph) are cut, with an arrow before their sum.

    Args:
        rows: (name, value of each part).
        parts_of: names of the parts.
    """
    rows = [row for row in rows if any(row[1])]
    if not rows:
        return ""
    wide, left, right = 20, 118, 64
    height = _TOP + wide * len(rows) + _BOTTOM
    sums = [sum(values) for _, values in rows]
    usual = 2.5 * statistics.median(sums)
    most = min(max(sums), max(1.15 * max([value for value in sums if value <= usual], default=0.0), usual / 2.5))
    place = _scale(0, most, left, WIDTH - right)
    parts = []
    for value in ticks(0, most):
        at = place(value)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{height - _BOTTOM}"/>')
        parts.append(f'<text class="tick" text-anchor="middle" x="{at:.1f}" y="{height - _BOTTOM + 14}">{number(value)}</text>')
    parts.append(f'<text class="tick" text-anchor="end" x="{WIDTH - _RIGHT}" y="{height - 6}">{escape(unit)}</text>')
    for row, (name, values) in enumerate(rows):
        y, start = _TOP + wide * row, 0.0
        parts.append(f'<text class="tick" text-anchor="end" x="{left - 6}" y="{y + wide - 7}">{escape(name[:18])}</text>')
        for index, value in enumerate(values):
            x, end = place(min(start, most)), place(min(start + value, most))
            tip = f"{name}, {parts_of[index]}: {number(value)} {unit}"
            parts.append(f'<rect class="fill c{index % 8}" x="{x:.1f}" y="{y + 3}" width="{max(end - x, 0):.1f}" height="{wide - 6}"><title>{escape(tip)}</title></rect>')
            start += value
        cut = "\u2192 " * (start > most * 1.0001)
        parts.append(f'<text class="tick" x="{place(min(start, most)) + 6:.1f}" y="{y + wide - 7}">{cut}{number(start)}</text>')
    return _figure(parts, height, list(parts_of), f"{', '.join(parts_of)} in {unit}", lines=False)


def timeline(
    rows: Sequence[tuple[str, Sequence[tuple[float, float, Sequence[float]]]]], parts_of: Sequence[str], marks: Sequence[tuple[float, str]] = ()
) -> str:
    """What each row did when: spans of (start, end, seconds of each part) in s, on one axis of time.

    The parts of a span stand one after another, though they took turns in its steps; what they leave of it stays blank.
    """
    rows = [row for row in rows if row[1]]
    if not rows:
        return ""
    first = min(start for _, spans in rows for start, _, _ in spans)
    last = max(end for _, spans in rows for _, end, _ in spans)
    unit, size = next((pair for pair in (("hours", 3600.0), ("minutes", 60.0)) if last - first > 3 * pair[1]), ("seconds", 1.0))
    wide, left = 20, 118
    height = _TOP + wide * len(rows) + _BOTTOM
    place = _scale(0, (last - first) / size, left, 2 * WIDTH - _RIGHT)
    parts = []
    for value in ticks(0, (last - first) / size, 12):
        at = place(value)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{height - _BOTTOM}"/>')
        parts.append(f'<text class="tick" text-anchor="middle" x="{at:.1f}" y="{height - _BOTTOM + 14}">{number(value)}</text>')
    parts.append(f'<text class="tick" text-anchor="end" x="{2 * WIDTH - _RIGHT}" y="{height - 4}">{unit}</text>')
    for row, (name, spans) in enumerate(rows):
        y = _TOP + wide * row
        parts.append(f'<text class="tick" text-anchor="end" x="{left - 6}" y="{y + wide - 7}">{escape(name[:18])}</text>')
        for start, end, values in spans:
            at = start
            for index, value in enumerate(values):
                until = min(at + value, end)
                x, width = place((at - first) / size), place((until - first) / size) - place((at - first) / size)
                if width >= 0.05:
                    tip = f"{name}, {parts_of[index]}: {number(value)} s"
                    parts.append(f'<rect class="fill c{index % 8}" x="{x:.2f}" y="{y + 3}" width="{width:.2f}" height="{wide - 6}"><title>{escape(tip)}</title></rect>')
                at = until
    for when, text in marks:
        if first <= when <= last:
            at = place((when - first) / size)
            parts.append(f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP - 6}" y2="{height - _BOTTOM}"><title>{escape(text)}</title></line>')
    return _figure(parts, height, list(parts_of), f"{', '.join(parts_of)} over time", lines=False, wide=True)


def _first(values: Sequence[tuple[float, float]]) -> Sequence[tuple[bool, tuple[float, float]]]:
    return [(index == 0, value) for index, value in enumerate(values)]


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def _frame(x0: float, x1: float, y0: float, y1: float, x_label: str, y_label: str, whole: bool, years: bool) -> list[str]:
    place_x, place_y = _scale(x0, x1, _LEFT, WIDTH - _RIGHT), _scale(y0, y1, HEIGHT - _BOTTOM, _TOP)
    parts = []
    for value in ticks(y0, y1):
        at = place_y(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick" text-anchor="end" x="{_LEFT - 6}" y="{at + 4:.1f}">{number(value)}</text>')
    for value in ticks(x0, x1, 8, whole):
        anchor, at = ("end", WIDTH) if place_x(value) > WIDTH - 20 else ("middle", place_x(value))
        parts.append(f'<text class="tick" text-anchor="{anchor}" x="{at:.1f}" y="{HEIGHT - _BOTTOM + 15}">{f"{value:.0f}" if years else number(value)}</text>')
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{HEIGHT - _BOTTOM}" y2="{HEIGHT - _BOTTOM}"/>')
    parts.append(f'<text class="tick" text-anchor="end" x="{WIDTH - _RIGHT}" y="{HEIGHT - 4}">{escape(x_label)}</text>')
    parts.append(f'<text class="tick" x="0" y="12">{escape(y_label)}</text>')
    return parts


def _figure(parts: Sequence[str], height: float, names: Sequence[str], label: str, lines: bool, wide: bool = False) -> str:
    kind = "key" if lines else "box"
    legend = "".join(f'<span><i class="{kind} c{index % 8} d{index % 4}"></i>{escape(name)}</span>' for index, name in enumerate(names))
    return (
        f'<figure{" class=wide" * wide}><svg viewBox="0 0 {WIDTH * (1 + wide)} {height}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
        + (f'<figcaption class="legend">{legend}</figcaption>' if names else "")
        + "</figure>"
    )
