"""Runs side by side, and what a benchmark of scaling has measured. Pure."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ..cluster.judge import clock
from ..monitoring.record import summary
from .charts import line_chart, number
from .curves import loss_title, points
from .page import BROKEN, Section, Table, figure_row
from .runfiles import RunFiles, flat


def comparison(runs: Sequence[RunFiles]) -> Section:
    """Tables and curves of several runs, the first beside the others."""
    head = ["", *map(_name, runs)]

    def cell(value: Any, run: RunFiles) -> str:
        try:
            return str(value(run))
        except BROKEN:
            return "damaged"

    def row(name: str, value: Any) -> list[str]:
        return [name, *(cell(value, run) for run in runs)]

    def last(run: RunFiles, key: str) -> str:
        known = [event[key] for event in run.epochs if isinstance(event.get(key), int | float)]
        return number(float(known[-1])) if known else "-"

    def spent(run: RunFiles) -> str:
        return clock(sum(float(event.get("seconds") or 0) for event in run.epochs)) if run.epochs else "-"

    def weights(run: RunFiles) -> str:
        known = [event["weights_sha256"] for event in run.events if event.get("weights_sha256")]
        return known[-1][:12] if known else "-"

    def score(run: RunFiles) -> str:
        for report in run.evaluations.values():
            for name in ("dice", "accuracy"):
                mean = report.get("mean")
                entry = mean.get(name) if isinstance(mean, Mapping) else None
                if isinstance(entry, Mapping) and (line := figure_row(name, entry)) is not None:
                    return f"{name} {line[1]} ({line[2]})"
        return "-"

    def peak(run: RunFiles) -> str:
        known = [rank.peak_bytes for rank in summary(run.samples).ranks]
        return f"{max(known) / 2**30:.2f}" if known else "-"

    def energy(run: RunFiles) -> str:
        use = summary(run.samples)
        return f"{number(use.watt_hours)} ({', '.join(sorted({host.known for host in use.hosts}))})" if use.hosts else "-"

    rows = [
        row("state", lambda run: run.status.state), row("ranks", lambda run: run.status.ranks or "-"),
        row("steps", lambda run: "-" if run.status.step is None else run.status.step), row("time in epochs", spent),
        row("samples/s", lambda run: number(speed) if (speed := steady_speed(run)) else "-"),
        row("training loss, last epoch", lambda run: last(run, "loss")), row("validation Dice, last", lambda run: last(run, "val_dice")),
        row("validation accuracy, last", lambda run: last(run, "val_accuracy")), row("evaluation", score), row("energy, Wh", energy),
        row("peak memory of a rank, GiB", peak), row("restarts", lambda run: max(run.status.starts - 1, 0)),
        row("weights, SHA-256", weights), row("dataset", lambda run: str(run.record.get("dataset_hash", "-"))[:12]),
    ]  # fmt: skip
    tables = [Table(head, [line for line in rows if set(line[1:]) != {"-"}])]
    names = sorted({key for run in runs for key in flat(run.config)})
    unlike = [[key, *(json.dumps(flat(run.config).get(key)) for run in runs)] for key in names if len({json.dumps(flat(run.config).get(key)) for run in runs}) > 1]
    if unlike:
        tables.append(Table(["key", *head[1:]], unlike, "Settings that differ"))
    # Losses of different kinds say nothing beside each other.
    kinds = dict.fromkeys(loss_title(run.epochs) for run in runs)
    wanted = [(f"Training loss: {kind}" if kind else "Training loss", "loss", "loss", [run for run in runs if loss_title(run.epochs) == kind]) for kind in kinds]
    wanted += [("Validation", "val_dice", "Dice", [*runs]), ("Validation", "val_accuracy", "accuracy", [*runs])]
    charts = [(title, line_chart({_name(run): points(run.epochs, key) for run in some}, "epoch", label)) for title, key, label, some in wanted]
    chart, table = _speeds(runs)
    if table is not None:
        charts.append(("Speed over ranks", chart))
        tables.append(table)
    return Section("Compared", (), [chart for chart in charts if chart[1]], tables)


def steady_speed(run: RunFiles) -> float | None:
    """Samples/s of all ranks: the median of the epochs but the first, which compiles the graph; pure."""
    known = [float(event["samples_per_second"]) for event in run.epochs if event.get("samples_per_second")]
    return statistics.median(known[1:] or known) if known else None


def _speeds(runs: Sequence[RunFiles]) -> tuple[str, Table | None]:
    """Chart and table of the speeds, where runs differ in ranks. Efficiency is against the fewest ranks."""
    by_ranks: dict[int, list[float]] = {}
    for run in runs:
        if run.status.ranks and (speed := steady_speed(run)):
            by_ranks.setdefault(run.status.ranks, []).append(speed)
    if len(by_ranks) < 2:
        return "", None
    speeds = [(ranks, statistics.median(values)) for ranks, values in sorted(by_ranks.items())]
    each = speeds[0][1] / speeds[0][0]
    chart = line_chart(
        {"measured": speeds, "in proportion": [(ranks, each * ranks) for ranks, _ in speeds]}, "ranks", "samples/s", True, points=True
    )
    rows = [[str(ranks), number(speed), f"{speed / speeds[0][1]:.2f}", f"{speed / (each * ranks):.2f}"] for ranks, speed in speeds]
    return chart, Table(["ranks", "samples/s", "gain", "efficiency"], rows, "Scaling of these runs")


def _name(run: RunFiles) -> str:
    return run.directory.resolve().name


def scaling_section(result: Mapping[str, Any] | None) -> Section | None:
    """Figures and rows of a benchmark's JSON."""
    if not result:
        return None

    def verdict(reached: Any) -> str:
        return "not measured" if reached is None else "reached" if reached else "missed"

    def shown(value: Any) -> str:
        return number(float(value)) if isinstance(value, int | float) else "-"

    rows = [[str(row.get("case")), str(row.get("system")), str(row.get("metric")), shown(row.get("value")), str(row.get("unit", ""))]
            for row in result["rows"] if isinstance(row, Mapping)]  # fmt: skip
    goals = [[str(one.get("name")), shown(one.get("value")), f"at {'least' if one.get('better') == 'higher' else 'most'} {shown(one.get('goal'))}",
              verdict(one.get("reached"))]
             for one in result.get("figures") or () if isinstance(one, Mapping)]  # fmt: skip
    tables = [Table(["figure", "value", "goal", ""], goals)] if goals else []
    return Section(f"Measured: bench {result.get('bench', '')}", (), (), [*tables, Table(["case", "system", "metric", "median", "unit"], rows)])
