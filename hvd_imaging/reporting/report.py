"""One page on a run: from the files of run folders to the data of a page (`gather`, then pure), and the page.

The page is one HTML file without a network: charts are SVG, pictures are embedded, light and dark follow the reader's screen.
"""

from __future__ import annotations

import base64
import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..cluster.judge import clock
from ..cluster.status import Status, look
from ..errors import RunError
from ..monitoring.record import Use, read, summary
from ..planning.prices import Prices, run_cost
from ..training.events import epoch_records, read_events
from ..training.layout import CONFIG, RECORD
from .charts import line_chart, number, stacked_bars

_PICTURES = ("overlays", "confusion", "roc")
_SHOWN = 12
"""Ranks that charts and tables show by themselves; of more the ends are shown."""


@dataclass(frozen=True)
class RunFiles:
    """What a run folder holds; what is missing or damaged is empty, and named in ``missing``."""

    directory: Path
    status: Status
    config: Mapping[str, Any]
    record: Mapping[str, Any]
    events: Sequence[Mapping[str, Any]]
    epochs: Sequence[Mapping[str, Any]]
    samples: Sequence[Mapping[str, Any]]
    evaluations: Mapping[str, Mapping[str, Any]]
    pictures: Sequence[Path]
    card: Mapping[str, Any] | None
    missing: Sequence[str]


@dataclass(frozen=True)
class Section:
    """A part of the page: text, charts (SVG, already safe), tables, pictures."""

    title: str
    text: Sequence[str] = ()
    charts: Sequence[tuple[str, str]] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Table:
    """Rows under a head; ``facts``: two columns without a head."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    facts: bool = False


@dataclass(frozen=True)
class Page:
    """Everything that the template shows."""

    title: str
    state: str
    tone: str
    lead: Sequence[str]
    sections: Sequence[Section] = field(default_factory=tuple)
    refresh_s: int = 0


def gather(run_dir: Path) -> RunFiles:
    """Read a run folder.

    Raises:
        RunError: not a run folder.
    """
    status, missing = look(run_dir), []

    def parsed(path: Path, kind: Any) -> Any:
        try:
            value = kind(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            missing.append(f"{path.relative_to(run_dir)}: not there")
            return {}
        except (OSError, ValueError, yaml.YAMLError):
            value = None
        if not isinstance(value, dict):
            missing.append(f"{path.relative_to(run_dir)}: damaged")
            return {}
        return value

    config, record = parsed(run_dir / CONFIG, yaml.safe_load), parsed(run_dir / RECORD, json.loads)
    evaluations = {path.stem.removeprefix("evaluation-"): parsed(path, json.loads) for path in sorted(run_dir.glob("evaluation-*.json"))}
    cards = [path for path in (run_dir / "compressed" / "model_card.json", run_dir / "model_card.json") if path.exists()]
    events, samples = read_events(run_dir), read(run_dir)
    if not events:
        missing.append("events.jsonl: not there, so nothing is known of the training")
    if not samples:
        missing.append("ranks/monitor-*.jsonl: not there, so nothing is known of the machines (monitor.seconds=0?)")
    if not evaluations:
        missing.append(f"evaluation-*.json: not there; `hvd-imaging evaluate {run_dir}` makes it")
    pictures = [path for kind in _PICTURES for path in sorted((run_dir / "plots").glob(f"{kind}*.png"))]
    return RunFiles(
        run_dir, status, config, record, events,
        epoch_records(run_dir), samples, evaluations, pictures, parsed(cards[0], json.loads) if cards else None, missing,
    )  # fmt: skip


def make_page(run: RunFiles, others: Sequence[RunFiles] = (), prices: Prices | None = None, scaling: Mapping[str, Any] | None = None,
              refresh_s: int = 0) -> Page:  # fmt: skip
    """The page's data; pure but for the pictures' bytes.

    Args:
        others: runs to compare with.
        prices: for the cost; None: left out.
        scaling: JSON of `bench scaling`.
        refresh_s: of a live page.
    """
    use = summary(run.samples)
    parts = [
        _learning(run), _comparison([run, *others]) if others else None, _scaling(scaling), _time(run), _machines(run, use),
        _energy(run, use, prices), _history(run), *(_evaluation(split, report) for split, report in run.evaluations.items()),
        _pictures(run), _compression(run), _origin(run), _missing(run),
    ]  # fmt: skip
    tone = {"done": "good", "failed": "bad", "stalled": "bad", "silent": "bad"}.get(run.status.state, "busy")
    return Page(f"Run {run.directory.name}", run.status.state, tone, _lead(run), [part for part in parts if part is not None], refresh_s)


def html(page: Page) -> str:
    """The file."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hvd_imaging.reporting"), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    return environment.get_template("report.html.j2").render(page=page)


def _lead(run: RunFiles) -> list[str]:
    status, model = run.status, run.config.get("model", {})
    found = [status.why] if status.why else []
    hosts = sorted(set(status.hosts))
    if status.ranks:
        found.append(
            f"{model.get('name', 'a network')} on {status.ranks} rank{'s' * (status.ranks != 1)} of {len(hosts)} host{'s' * (len(hosts) != 1)} "
            f"({', '.join(hosts[:4])}{', ...' * (len(hosts) > 4)})"
            + (f"; epoch {status.epoch} of {status.epochs}" if status.epoch and status.epochs else "")
            + (f", step {status.step}" + (f" of {status.steps}" if status.steps else "") if status.step is not None else "")
        )
    times = [event["time"] for event in run.events if event.get("time")]
    if times:
        first, last = (datetime.datetime.fromisoformat(times[index]) for index in (0, -1))
        left = f"; about {clock(status.left_s)} left" if status.left_s else ""
        found.append(f"{first:%Y-%m-%d %H:%M} to {last:%Y-%m-%d %H:%M} UTC, {clock((last - first).total_seconds())}{left}")
    return found


def _learning(run: RunFiles) -> Section | None:
    if not run.epochs:
        return None

    def series(*names: str) -> dict[str, list[tuple[float, float]]]:
        return {name: [(e["epoch"] + 1, float(e[name])) for e in run.epochs if isinstance(e.get(name), int | float)] for name in names}

    starts = _restarts(run)
    best = [e for e in run.epochs if e.get("best")]
    text = []
    if best:
        name = next((name for name in ("val_dice", "val_accuracy", "val_loss") if name in best[-1]), "loss")
        text.append(f"Best epoch {best[-1]['epoch'] + 1}: {name} {number(float(best[-1][name]))}.")
    charts = [
        ("Loss", line_chart(series("loss", "val_loss"), "epoch", "loss", marks=starts, points=len(run.epochs) <= 30)),
        ("Validation", line_chart(series("accuracy", "val_dice", "val_accuracy"), "epoch", "share", marks=starts, points=len(run.epochs) <= 30)),
        ("Learning rate", line_chart(series("learning_rate"), "epoch", "rate", True)),
        ("Speed", line_chart(series("samples_per_second"), "epoch", "samples/s", True, starts)),
    ]
    return Section("Learning", text, [chart for chart in charts if chart[1]])


def _restarts(run: RunFiles) -> list[tuple[float, str]]:
    found, epoch = [], 0.5
    for event in run.events:
        if event.get("event") == "epoch":
            epoch = event["epoch"] + 1.5
        elif event.get("event") == "resume":
            found.append((epoch, f"start again at step {event.get('step')}, {event.get('world_size')} ranks"))
    return found


def _time(run: RunFiles) -> Section | None:
    parts = ("waiting for input", "computing", "exchange and waiting for others", "validation and the rest")
    rows = []
    for event in run.epochs[-40:]:
        known = [float(event.get(f"{name}_seconds", 0)) for name in ("input", "compute", "exchange")]
        rows.append((f"epoch {event['epoch'] + 1}", [*known, max(float(event.get("seconds", 0)) - sum(known), 0)]))
    by_rank: dict[int, list[float]] = {}
    hosts: dict[int, str] = {}
    for event in run.events:
        if event.get("event") == "ranks":
            lists = [event.get(f"{name}_seconds") or () for name in ("input", "compute", "exchange")]
            for rank, values in enumerate(zip(*lists, strict=False)):
                by_rank[rank] = [a + b for a, b in zip(by_rank.get(rank, [0.0] * 3), values, strict=True)]
                hosts[rank] = event["hosts"][rank] if rank < len(event.get("hosts", ())) else ""
    ranks = sorted(by_rank)
    shown = ranks if len(ranks) <= 2 * _SHOWN else [*ranks[:_SHOWN], *ranks[-_SHOWN:]]
    charts = [
        ("Where the time of each epoch went (mean of the ranks)", stacked_bars(rows, parts, "s")),
        ("Where each rank's time went, all epochs", stacked_bars([(f"{rank} {hosts[rank]}", by_rank[rank]) for rank in shown], parts[:3], "s")),
    ]
    charts = [chart for chart in charts if chart[1]]
    slow = [f"rank {e.get('rank')} on {e.get('host')}: {float(e.get('ratio', 0)):.2f} x the others' time for a sample in epoch {int(e.get('epoch', 0)) + 1}"
            for e in run.events if e.get("event") == "straggler"][-8:]  # fmt: skip
    text = ["A rank that computes for longer makes the others wait: their exchange grows."] if len(ranks) > 1 else []
    return Section("Time", [*text, *(f"Slow: {line}." for line in slow)], charts) if charts else None


def _machines(run: RunFiles, use: Use) -> Section | None:
    if not use.ranks:
        return None
    start = datetime.datetime.fromisoformat(run.samples[0]["time"])

    def series(key: str, scale: float, of_hosts: bool) -> dict[str, list[tuple[float, float]]]:
        found: dict[str, list[tuple[float, float]]] = {}
        for sample in run.samples:
            if isinstance(sample.get(key), int | float):
                name = str(sample.get("host")) if of_hosts else f"rank {sample['rank']}"
                minutes = (datetime.datetime.fromisoformat(sample["time"]) - start).total_seconds() / 60
                found.setdefault(name, []).append((minutes, sample[key] * scale))
        # A line along zero says nothing: no network, no disk.
        return {name: found[name] for name in sorted(found)[:8]} if any(y for values in found.values() for _, y in values) else {}

    charts = [
        ("Cores kept busy by each rank", line_chart(series("cpu", 1, False), "minutes", "cores", True)),
        ("Memory of each rank", line_chart(series("rss_bytes", 2**-30, False), "minutes", "GiB", True)),
        ("CPU of the hosts", line_chart(series("host_cpu", 100, True), "minutes", "%", True)),
        ("Power of the hosts", line_chart(series("watts", 1, True), "minutes", "W", True)),
        ("Network, received", line_chart(series("net_in_bps", 1e-6, True), "minutes", "MB/s", True)),
    ]
    rows = [
        [str(rank.rank), rank.host, f"{rank.cpu:.2f}", f"{rank.peak_bytes / 2**30:.2f}", f"{rank.disk_read_bytes / 1e6:,.0f}",
         f"{rank.disk_write_bytes / 1e6:,.0f}", "-" if rank.gpu is None else f"{rank.gpu:.0%}"]
        for rank in use.ranks[: 4 * _SHOWN]
    ]  # fmt: skip
    table = Table(["rank", "host", "cores busy", "peak memory, GiB", "disk read, MB", "disk written, MB", "GPU busy"], rows)
    return Section("Machines", (), [chart for chart in charts if chart[1]], [table])


def _energy(run: RunFiles, use: Use, prices: Prices | None) -> Section | None:
    if not use.hosts:
        return None
    rows = [
        [host.host, clock(host.seconds), f"{host.watt_hours / max(host.seconds / 3600, 1e-9):.0f}", f"{host.watt_hours:.2f}", host.known, f"{host.cpu:.0%}"]
        for host in use.hosts
    ]
    tables = [Table(["host", "watched", "mean W", "Wh", "known by", "CPU"], rows, f"{number(use.watt_hours)} Wh in all")]
    text = ["An estimate is idle power and a share for busy cores, not a measurement; docs/monitoring.md says how."] if any(
        host.known.startswith("estimate") for host in use.hosts
    ) else []  # fmt: skip
    if prices is not None:
        cost = run_cost(prices, use.watt_hours, sum(host.seconds for host in use.hosts))
        tables.append(Table(["", prices.currency], [[name, f"{value:,.4f}" if value < 1 else f"{value:,.2f}"] for name, value in cost.items()], "Cost"))
    return Section("Energy and cost", text, (), tables)


def _history(run: RunFiles) -> Section | None:
    rows = []
    for event in run.events:
        kind = event.get("event")
        text = {
            "start": lambda e: f"start with {e.get('world_size')} ranks" + (f", job {e['job_id']}" if e.get("job_id") else ""),
            "resume": lambda e: f"goes on at step {e.get('step')} with {e.get('world_size')} ranks"
            + (f", job {e['job_id']}, start {int(e.get('restart_count') or 0) + 1}" if e.get("job_id") else ""),
            "leave": lambda e: f"left as asked at step {e.get('step')}", "end": lambda e: f"done at step {e.get('step')}",
            "failure": lambda e: str(e.get("reason", "a rank failed")), "verdict": lambda e: str(e.get("reason", "")) if e.get("code") else "",
            "stall": lambda e: str(e.get("message", "a rank stood still")), "nonfinite": lambda e: f"not finite: {e.get('what')}",
            "balance": lambda e: f"the ranks now take {', '.join(map(str, e.get('shares', ())))} samples",
        }.get(str(kind))  # fmt: skip
        if text is not None and (shown := text(event)):
            rows.append([str(event.get("time", ""))[:19].replace("T", " "), shown])
    saved = sum(event.get("event") == "checkpoint" for event in run.events)
    if not rows:
        return None
    cut = rows if len(rows) <= 40 else [*rows[:20], ["", f"{len(rows) - 40} more"], *rows[-20:]]
    return Section("What happened", [f"{saved} checkpoints."] if saved else [], (), [Table(["UTC", "event"], cut)])


def _evaluation(split: str, report: Mapping[str, Any]) -> Section | None:
    found = []
    for name, entry in (report.get("mean") or {}).items():
        if isinstance(entry, Mapping):
            found.append(_figure_row(name, entry))
            found += [_figure_row(f"{name}: {label}", one) for label, one in (entry.get("per_class") or {}).items() if isinstance(one, Mapping)]
    rows = [row for row in found if row is not None]
    if not rows:
        return None
    confidence = report.get("confidence") or {}
    text = [f"{len(report.get('cases') or ())} cases; intervals of {confidence.get('level', 0.95):.0%} by bootstrap over cases."]
    return Section(f"Evaluation on the {split} split", text, (), [Table(["figure", "value", "interval", "cases"], rows)])


def _figure_row(name: str, entry: Mapping[str, Any]) -> list[str] | None:
    value, interval = entry.get("value"), entry.get("interval")
    if not isinstance(value, int | float):
        return None
    between = "-"
    if isinstance(interval, Sequence) and len(interval) == 2 and None not in interval:
        between = f"{interval[0]:.4f} to {interval[1]:.4f}"
    return [name.replace("_mm", " (mm)").replace("_", " "), f"{value:.4f}", between, str(entry.get("count", ""))]


def _pictures(run: RunFiles) -> Section | None:
    found = [(path.stem, "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()) for path in run.pictures]
    return Section("Cases", pictures=found) if found else None


def _compression(run: RunFiles) -> Section | None:
    if not run.card:
        return None
    rows = []
    for one in run.card.get("formats") or run.card.get("candidates") or ():
        if isinstance(one, Mapping):
            rows.append([str(one.get("format", "")), f"{float(one.get('bytes') or 0) / 1e6:.2f}", "yes" if one.get("released") else "no"])
    text = [str(run.card.get("summary") or "See the model card beside the exports (compressed/model_card.html).")]
    return Section("Compressed models", text, (), [Table(["format", "MB", "released"], rows)] if rows else ())


def _comparison(runs: Sequence[RunFiles]) -> Section:
    head = ["", *(run.directory.name for run in runs)]

    def row(name: str, value: Any) -> list[str]:
        return [name, *(str(value(run)) for run in runs)]

    def last(run: RunFiles, key: str) -> str:
        known = [event[key] for event in run.epochs if isinstance(event.get(key), int | float)]
        return number(float(known[-1])) if known else "-"

    def spent(run: RunFiles) -> str:
        return clock(sum(float(event.get("seconds", 0)) for event in run.epochs)) if run.epochs else "-"

    def weights(run: RunFiles) -> str:
        known = [event["weights_sha256"] for event in run.events if event.get("weights_sha256")]
        return known[-1][:12] if known else "-"

    def score(run: RunFiles) -> str:
        for report in run.evaluations.values():
            for name in ("dice", "accuracy"):
                entry = (report.get("mean") or {}).get(name)
                if isinstance(entry, Mapping) and (line := _figure_row(name, entry)) is not None:
                    return f"{name} {line[1]} ({line[2]})"
        return "-"

    def peak(run: RunFiles) -> str:
        known = [rank.peak_bytes for rank in summary(run.samples).ranks]
        return f"{max(known) / 2**30:.2f}" if known else "-"

    def energy(run: RunFiles) -> str:
        use = summary(run.samples)
        return f"{number(use.watt_hours)} ({', '.join(sorted({host.known for host in use.hosts}))})" if use.hosts else "-"

    rows = [
        row("state", lambda run: run.status.state), row("ranks", lambda run: run.status.ranks or "-"), row("steps", lambda run: run.status.step),
        row("time in epochs", spent), row("samples/s, last epoch", lambda run: last(run, "samples_per_second")),
        row("loss, last epoch", lambda run: last(run, "loss")), row("validation Dice, last", lambda run: last(run, "val_dice")),
        row("evaluation", score), row("energy, Wh", energy),
        row("peak memory of a rank, GiB", peak),
        row("weights, SHA-256", weights), row("dataset", lambda run: str(run.record.get("dataset_hash", "-"))[:12]),
    ]  # fmt: skip
    curves = {run.directory.name: [(e["epoch"] + 1, float(e["loss"])) for e in run.epochs if isinstance(e.get("loss"), int | float)] for run in runs}
    charts = [("Loss", line_chart(curves, "epoch", "loss"))]
    speeds = sorted({(run.status.ranks, float(run.epochs[-1]["samples_per_second"])) for run in runs
                     if run.status.ranks and run.epochs and run.epochs[-1].get("samples_per_second")})  # fmt: skip
    if len({ranks for ranks, _ in speeds}) > 1:
        one = speeds[0][1] / speeds[0][0]
        ideal = [(float(ranks), one * ranks) for ranks, _ in speeds]
        charts.append(("Speed over ranks", line_chart({"measured": speeds, "in proportion": ideal}, "ranks", "samples/s", True, points=True)))
        scale = [[str(ranks), number(speed), f"{speed / (one * ranks):.2f}"] for ranks, speed in speeds]
        tables = [Table(head, rows), Table(["ranks", "samples/s", "efficiency"], scale, "Scaling of these runs")]
    else:
        tables = [Table(head, rows)]
    return Section("Compared", (), [chart for chart in charts if chart[1]], tables)


def _scaling(result: Mapping[str, Any] | None) -> Section | None:
    if not result:
        return None
    rows = [[str(row.get("case")), str(row.get("system")), str(row.get("metric")), number(row["value"]) if isinstance(row.get("value"), int | float) else "-",
             str(row.get("unit", ""))] for row in result.get("rows") or () if isinstance(row, Mapping)]  # fmt: skip
    return Section(f"Measured: bench {result.get('bench', '')}", (), (), [Table(["case", "system", "metric", "median", "unit"], rows)])


def _origin(run: RunFiles) -> Section:
    record, flat = run.record, _flat(run.config)
    facts = [
        ("dataset", f"{record.get('dataset_hash', '-')} (files {str(record.get('dataset_files_hash', '-'))[:12]})"),
        ("program", f"hvd_imaging {record.get('hvd_imaging', '-')}" + (f", commit {record['code']}" if record.get("code") else "")),
        ("hosts by rank", ", ".join(map(str, record.get("hosts") or ())) or "-"),
        ("job", str(record.get("job_id") or "-")), ("platform", str(record.get("platform", "-"))),
        ("libraries", ", ".join(f"{name} {version}" for name, version in (record.get("versions") or {}).items() if version) or "-"),
    ]  # fmt: skip
    settings = Table(["key", "value"], [[key, json.dumps(value)] for key, value in flat.items()], "Configuration")
    return Section("Where it comes from", (), (), [Table((), facts, facts=True), settings])


def _missing(run: RunFiles) -> Section | None:
    return Section("Not in this page", [f"{line}." for line in run.missing]) if run.missing else None


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix: values}
    return {key: value for name, inner in values.items() for key, value in _flat(inner, f"{prefix}.{name}" if prefix else str(name)).items()}


def read_scaling(path: Path) -> dict[str, Any]:
    """JSON of a benchmark.

    Raises:
        RunError: not one.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        value = None
    if not isinstance(value, dict) or not isinstance(value.get("rows"), list):
        raise RunError(f"{path}: expected the JSON file of `hvd-imaging bench scaling --json FILE`")
    return value
