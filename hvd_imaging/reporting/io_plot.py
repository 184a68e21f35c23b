"""The picture of `bench io`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .plots import CLASS_COLOURS, INK, MUTED, TRAIN, VAL, _figure

MODES = (("aligned", TRAIN), ("random", VAL), ("whole", CLASS_COLOURS[2]))
_TITLES = {
    "aligned": "patches 64^3, aligned",
    "random": "patches 64^3, at random places",
    "whole": "whole volumes",
}


def best_rates(rows: Sequence[Mapping[str, Any]], warmth: str) -> dict[str, dict[str, float]]:
    """System to mode to MB/s at its best thread count and settings; pure.

    Args:
        rows: as in the benchmark's JSON.
        warmth: warm or cold.
    """
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        mode, _, rest = row["case"].partition(", ")
        place = rest.split(", ")
        if row["metric"] != "needed bytes" or row["value"] is None or place[0] != warmth or "thread" not in place[1]:
            continue
        rates = found.setdefault(row["system"].partition(" (")[0], {})
        rates[mode] = max(rates.get(mode, 0.0), row["value"])
    return found


def draw_io(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rates of all systems as bars on a logarithmic axis, warm beside cold.

    Args:
        path: of the PNG.
        rows: as in the benchmark's JSON; metric "needed bytes" in MB/s.
    """
    panels = [(warmth, rates) for warmth in ("warm", "cold") if (rates := best_rates(rows, warmth))]
    systems = list(dict.fromkeys(system for _, rates in panels for system in rates))
    thickness = 0.8 / len(MODES)
    with _figure(path, 7.4 * max(len(panels), 1), 1.4 + 0.62 * max(len(systems), 1)) as figure:
        for ax, (warmth, rates) in zip(figure.subplots(1, max(len(panels), 1), squeeze=False)[0], panels, strict=False):
            ax.set_xscale("log")
            ax.grid(visible=False, axis="y")
            values = [value for found in rates.values() for value in found.values()]
            ax.set_xlim(min(values) / 2, max(values) * 3)
            for place, system in enumerate(systems):
                for step, (mode, colour) in enumerate(MODES):
                    value = rates.get(system, {}).get(mode)
                    if value is None:
                        continue
                    y = place + (step - (len(MODES) - 1) / 2) * thickness
                    ax.barh(y, value, thickness * 0.92, color=colour, label=_TITLES[mode])
                    ax.text(value, y, f" {value:,.3g}" if value < 999.5 else f" {value:,.0f}", va="center", fontsize=7.5)
            ax.set_yticks(range(len(systems)), systems)
            for label in ax.get_yticklabels():
                ours = label.get_text().startswith("hvd_imaging")
                label.set_fontweight("bold" if ours else "normal")
                label.set_color(INK if ours else MUTED)
            ax.invert_yaxis()
            ax.set_xlabel("MB/s of needed bytes, best thread count (log scale)")
            ax.set_title("Warm page cache" if warmth == "warm" else "Cold: cache dropped by advice")
        handles = {label: handle for ax in figure.axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
        if handles:
            figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(MODES))
