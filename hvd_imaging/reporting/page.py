"""What a page is made of, and the page: one HTML file without a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

BROKEN = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
"""What calculating with damaged values raises: JSON, but not what was written there. The rest is still worth showing."""


@dataclass(frozen=True)
class Table:
    """Rows under a head; ``facts``: two columns without a head."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    facts: bool = False


@dataclass(frozen=True)
class Section:
    """A part of the page: text, charts (SVG, already safe), tables, pictures."""

    title: str
    text: Sequence[str] = ()
    charts: Sequence[tuple[str, str]] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Page:
    """Everything that the template shows."""

    title: str
    state: str
    tone: str
    lead: Sequence[str]
    sections: Sequence[Section] = field(default_factory=tuple)
    refresh_s: int = 0


def html(page: Page) -> str:
    """The file."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hvd_imaging.reporting"), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    return environment.get_template("report.html.j2").render(page=page)


def figure_row(name: str, entry: Mapping[str, Any]) -> list[str] | None:
    """A figure of an evaluation as (name, value, interval, cases); None if it is none; pure."""
    value, interval = entry.get("value"), entry.get("interval")
    if not isinstance(value, int | float):
        return None
    between = "-"
    if isinstance(interval, Sequence) and len(interval) == 2 and None not in interval:
        between = f"{interval[0]:.4f} to {interval[1]:.4f}"
    return [name.replace("_mm", " (mm)").replace("_", " "), f"{value:.4f}", between, str(entry.get("count", ""))]
