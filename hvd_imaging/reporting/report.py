"""One page on a run, or on several side by side: from what `gather` read to what `html` writes. Pure but for pictures' bytes."""

from __future__ import annotations

import base64
import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from ..cluster.judge import clock
from ..monitoring.record import Use, summary
from ..planning.prices import Prices, run_cost
from .charts import bundle, line_chart, number, stacked_bars, timeline
from .compared import comparison, scaling_section
from .curves import loss_panels, loss_title
from .page import BROKEN, Page, Section, Table, figure_row, html
from .runfiles import RunFiles, flat, gather, read_scaling

__all__ = ["Page", "gather", "html", "make_page", "read_scaling"]

_SHOWN = 12
"""Ranks that charts and tables show by themselves; of more the ends are shown."""


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
    wanted: list[tuple[str, Callable[[], Section | None]]] = [
        ("learning", lambda: _learning(run)), ("comparison", lambda: comparison([run, *others]) if others else None),
        ("benchmark", lambda: scaling_section(scaling)), ("time", lambda: _time(run)), ("machines", lambda: _machines(run, use)),
        ("energy", lambda: _energy(run, use, prices)), ("what happened", lambda: _history(run)),
        *((f"evaluation-{split}.json", partial(_evaluation, split, report)) for split, report in run.evaluations.items()),
        ("pictures", lambda: _pictures(run)), ("model card", lambda: _compression(run)), ("run.json", lambda: _origin(run)),
    ]  # fmt: skip
    sections, missing = [], list(run.missing)
    for name, make in wanted:
        try:
            section = make()
        except BROKEN as error:
            missing.append(f"{name}: damaged ({type(error).__name__})")
        else:
            sections += [section] if section is not None else []
    sections += [Section("Not in this page", [f"{line}." for line in missing])] if missing else []
    tone = {"done": "good", "failed": "bad", "stalled": "bad", "silent": "bad"}.get(run.status.state, "busy")
    return Page(f"Run {run.directory.resolve().name}", run.status.state, tone, _lead(run), sections, refresh_s)


def _lead(run: RunFiles) -> list[str]:
    status, model = run.status, run.config.get("model")
    found = [status.why] if status.why else []
    hosts = sorted(set(map(str, status.hosts)))
    if status.ranks:
        found.append(
            f"{model.get('name') if isinstance(model, Mapping) else 'a network'} on {status.ranks} rank{'s' * (status.ranks != 1)} of {len(hosts)} host{'s' * (len(hosts) != 1)} "
            f"({', '.join(hosts[:4])}{', ...' * (len(hosts) > 4)})"
            + (f"; epoch {status.epoch} of {status.epochs}" if status.epoch and status.epochs else "")
            + (f", step {status.step}" + (f" of {status.steps}" if status.steps else "") if status.step is not None else "")
        )
    record = run.record
    facts = [f"dataset {str(record['dataset_hash'])[:12]}"] if record.get("dataset_hash") else []
    facts += [f"hvd_imaging {record['hvd_imaging']}" + (f", commit {str(record['code'])[:12]}" if record.get("code") else "")] if record.get("hvd_imaging") else []
    facts += [f"job {record['job_id']}"] if record.get("job_id") else []
    found += ["; ".join(facts)] if facts else []
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
    if loss_title(run.epochs) and any("val_dice" in event for event in run.epochs):
        text.append("Both losses are the same quantity, of different images: training's of patches as they were drawn, augmented; validation's of whole cases.")
    if starts:
        text.append("Dotted vertical lines: the run was started again.")
    charts = [
        *((title, line_chart(lines, "epoch", "loss", marks=starts, points=len(run.epochs) <= 30)) for title, lines in loss_panels(run.epochs)),
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
    parts = ("waiting for input", "computing", "exchange and waiting for others")
    rows = [
        (f"epoch {event['epoch'] + 1}", [float(event.get(f"{name}_seconds") or 0) for name in ("input", "compute", "exchange")])
        for event in run.epochs[-2 * _SHOWN :]
    ]
    spans, hosts = _spans(run.events)
    by_rank = {rank: [sum(span[2][part] for span in mine) for part in range(3)] for rank, mine in spans.items()}
    ranks, note = sorted(spans), ""
    shown = ranks
    if len(ranks) > 2 * _SHOWN:
        slowest = sorted(ranks, key=lambda rank: -by_rank[rank][1])
        shown = sorted([*slowest[:_SHOWN], *slowest[-_SHOWN:]])
        note = f"Shown are the {_SHOWN} ranks of {len(ranks)} that computed longest and the {_SHOWN} that computed shortest."
    names = {rank: f"{rank} {hosts[rank]}" for rank in shown}
    again = [(_unix(event), "start again") for event in run.events if event.get("event") == "resume" and event.get("time")]
    charts = [
        ("What each rank did when (blank: validation, checkpoints, starting)", timeline([(names[rank], _joined(spans[rank])) for rank in shown], parts, again)),
        ("Where each rank's time went, all epochs", stacked_bars([(names[rank], by_rank[rank]) for rank in shown], parts, "s")),
        (f"Where the time of each epoch went{' (the newest)' * (len(run.epochs) > len(rows))}", stacked_bars(rows, parts, "s")),
    ]
    charts = [chart for chart in charts if chart[1]]
    late: dict[Any, list[Mapping[str, Any]]] = {}
    for event in run.events:
        if event.get("event") == "straggler":
            late.setdefault((event.get("rank"), event.get("host")), []).append(event)
    slow = [
        f"rank {rank} on {host}: {float(found[-1].get('ratio') or 0):.2f} x the others' time for a sample in epoch {int(found[-1].get('epoch') or 0) + 1}"
        + f", slow in {len(found)} epochs" * (len(found) > 1)
        for (rank, host), found in sorted(late.items(), key=lambda item: -len(item[1]))[:_SHOWN]
    ]
    text = ["A rank that computes for longer makes the others wait: their exchange grows."] if len(ranks) > 1 else []
    return Section("Time", [*text, *filter(None, [note]), *(f"Slow: {line}." for line in slow)], charts) if charts else None


Span = tuple[float, float, Sequence[float]]
"""From, to (Unix time, s), and s of waiting for input, computing, exchange."""


def _spans(events: Sequence[Mapping[str, Any]]) -> tuple[dict[int, list[Span]], dict[int, str]]:
    """Spans of each rank, one an epoch, and the hosts by rank; pure. An event comes when the slowest rank has done its steps."""
    spans: dict[int, list[Span]] = {}
    hosts: dict[int, str] = {}
    for event in events:
        if event.get("event") == "ranks" and event.get("time"):
            values = list(zip(*(event.get(f"{name}_seconds") or () for name in ("input", "compute", "exchange")), strict=False))
            end = _unix(event)
            start = end - max((sum(value) for value in values), default=0.0)
            names = event.get("hosts") or ()
            for rank, value in enumerate(values):
                spans.setdefault(rank, []).append((start, end, value))
                hosts[rank] = str(names[rank]) if rank < len(names) else ""
    return spans, hosts


def _joined(spans: Sequence[Span], most: int = 80) -> list[Span]:
    """At most about ``most`` spans: neighbours become one, but not over a pause longer than they are (a restart)."""
    group = -(-len(spans) // most)
    found: list[Span] = []
    count = 0
    for start, end, values in spans:
        if found and count < group and start - found[-1][1] <= max(end - start, found[-1][1] - found[-1][0]):
            before = found[-1]
            found[-1] = (before[0], end, [a + b for a, b in zip(before[2], values, strict=True)])
            count += 1
        else:
            found.append((start, end, values))
            count = 1
    return found


def _unix(event: Mapping[str, Any]) -> float:
    return datetime.datetime.fromisoformat(event["time"]).timestamp()


def _machines(run: RunFiles, use: Use) -> Section | None:
    if not use.ranks:
        return None
    times = [datetime.datetime.fromisoformat(sample["time"]).timestamp() for sample in run.samples]
    label, unit = ("hours", 3600.0) if times[-1] - times[0] > 10800 else ("minutes", 60.0)
    names = {rank.rank: f"rank {rank.rank}" for rank in use.ranks}

    def series(key: str, scale: float, of_hosts: bool) -> dict[str, list[tuple[float, float]]]:
        found: dict[str, list[tuple[float, float]]] = {}
        for sample, when in zip(run.samples, times, strict=True):
            if (value := sample.get(key)) is not None:
                name = str(sample.get("host")) if of_hosts else names[sample["rank"]]
                found.setdefault(name, []).append(((when - times[0]) / unit, value * scale))
        # A line along zero says nothing: no network, no disk.
        return bundle(found) if any(y for values in found.values() for _, y in values) else {}

    charts = [
        ("Cores kept busy by each rank", line_chart(series("cpu", 1, False), label, "cores", True)),
        ("Memory of each rank", line_chart(series("rss_bytes", 2**-30, False), label, "GiB", True)),
        ("CPU of the hosts", line_chart(series("host_cpu", 100, True), label, "%", True)),
        ("Power of the hosts", line_chart(series("watts", 1, True), label, "W", True)),
        ("Network, received", line_chart(series("net_in_bps", 1e-6, True), label, "MB/s", True)),
    ]
    rows = [
        [str(rank.rank), rank.host, f"{rank.cpu:.2f}", f"{rank.peak_bytes / 2**30:.2f}", f"{rank.disk_read_bytes / 1e6:,.0f}",
         f"{rank.disk_write_bytes / 1e6:,.0f}", "-" if rank.gpu is None else f"{rank.gpu:.0%}"]
        for rank in use.ranks
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
            found.append(figure_row(name, entry))
            found += [figure_row(f"{name}: {label}", one) for label, one in (entry.get("per_class") or {}).items() if isinstance(one, Mapping)]
    rows = [row for row in found if row is not None]
    if not rows:
        return None
    confidence = report.get("confidence") or {}
    text = [f"{len(report.get('cases') or ())} cases; intervals of {confidence.get('level', 0.95):.0%} by bootstrap over cases."]
    return Section(f"Evaluation on the {split} split", text, (), [Table(["figure", "value", "interval", "cases"], rows)])


def _pictures(run: RunFiles) -> Section | None:
    found = []
    for path in run.pictures:
        kind, _, split = path.stem.partition("-")
        caption = {"overlays": "Worst and best cases", "confusion": "Confusion matrix", "roc": "ROC curve"}.get(kind, kind)
        try:
            data = base64.b64encode(path.read_bytes()).decode()
        except OSError:  # taken away meanwhile
            continue
        found.append((f"{caption}, {split} split" if split else caption, f"data:image/png;base64,{data}"))
    text = ["Slices of cases of the dataset: this page is as confidential as the dataset is."] if any(path.stem.startswith("overlays") for path in run.pictures) else []
    return Section("Cases", text, pictures=found) if found else None


def _compression(run: RunFiles) -> Section | None:
    """Of the model card that `compress` wrote: what was released, and what it is worth."""
    card = run.card
    if not card:
        return None
    found = [("trained network", card.get("reference"), "-"), *((str(one.get("format", "")), one, "yes" if one.get("released") else "no: " + "; ".join(map(str, one.get("missed") or ())))
             for one in card.get("formats") or () if isinstance(one, Mapping))]  # fmt: skip
    rows = []
    for name, one, released in found:
        if isinstance(one, Mapping):
            metrics, latency = one.get("metrics") or {}, one.get("latency_ms") or {}
            shown = next((line for key in ("dice", "accuracy") if isinstance(metrics.get(key), Mapping) and (line := figure_row(key, metrics[key]))), None)
            size = f"{one['bytes'] / 1e6:.2f}" if isinstance(one.get("bytes"), int | float) else "-"
            times = [f"{latency[key]:.1f}" if isinstance(latency.get(key), int | float) else "-" for key in ("one", "all")]
            rows.append([name, size, *times, f"{shown[0]} {shown[1]} ({shown[2]})" if shown else "-", released])
    head = ["format", "MB", "ms, one thread", "ms, all threads", f"on the {card.get('split', 'test')} split", "released"]
    limits = [str(line) for line in card.get("limitations") or ()]
    text = [str(card.get("summary") or ""), "Not a medical device. Not for decisions about patients.", *limits]
    return Section(f"Model card: {card.get('name', '')}", [line for line in text if line], (), [Table(head, rows)] if rows else ())


def _origin(run: RunFiles) -> Section:
    record = run.record
    facts = [
        ("dataset", f"{record.get('dataset_hash', '-')} (files {str(record.get('dataset_files_hash', '-'))[:12]})"),
        ("program", f"hvd_imaging {record.get('hvd_imaging', '-')}" + (f", commit {record['code']}" if record.get("code") else "")),
        ("hosts by rank", ", ".join(map(str, record.get("hosts") or ())) or "-"),
        ("job", str(record.get("job_id") or "-")), ("platform", str(record.get("platform", "-"))),
        ("libraries", ", ".join(f"{name} {version}" for name, version in (record.get("versions") or {}).items() if version) or "-"),
    ]  # fmt: skip
    settings = Table(["key", "value"], [[key, json.dumps(value)] for key, value in flat(run.config).items()], "Configuration")
    return Section("Where it comes from", (), (), [Table((), facts, facts=True), settings])
