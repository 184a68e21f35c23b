"""The plan for people: a page for the head of department, rows of a table, a picture."""

from __future__ import annotations

from pathlib import Path

from ..files import atomic_path
from ..planning.plan import Plan, Year
from ..planning.storage import TB
from .charts import line_chart
from .report import Page, Section, Table


def plan_page(plan: Plan) -> Page:
    """The page's data; pure."""
    last, best = plan.years[-1], plan.cheapest
    lead = [
        f"From {plan.months[0].name} to {plan.months[-1].name} {sum(month.bytes for month in plan.months) / TB:,.2f} TB came in "
        f"({len(plan.months)} months); today {plan.held_today / TB:,.2f} TB are held.",
        f"In {plan.wishes.years} years it will be {last.held.value / TB:,.2f} TB ({last.held.low / TB:,.2f} to {last.held.high / TB:,.2f}), which wants "
        f"{last.disks.raw_tb:,.1f} TB of disks.",
    ]
    if last.machines is not None:
        nodes = last.machines.nodes
        lead.append(
            f"A training in {plan.wishes.train_hours:g} h and {plan.wishes.trainings:g} trainings a month then take "
            + (f"{nodes} node{'s' * (nodes != 1)}" if nodes is not None else f"more than can be had: {last.machines.limit}") + "."
        )  # fmt: skip
    if best is not None:
        lead.append(f"The cheapest of three ways that is enough: {best.name}, {plan.currency} {best.total:,.0f} in {plan.wishes.years} years.")
    sections = [_volume(plan), _needs(plan), _ways(plan), _trust(plan)]
    return Page(f"Storage and computing for {plan.wishes.years} years", "forecast", "busy", lead, sections)


def _volume(plan: Plan) -> Section:
    def year(index: int) -> float:
        return index / 12 + 1 / 24

    record = [(year(month.index), month.bytes / 1e9) for month in plan.months]
    points = plan.forecast.points
    month_chart = line_chart(
        {"recorded": record, "forecast": [(year(p.index), p.value / 1e9) for p in points], "low (90 %)": [(year(p.index), p.low / 1e9) for p in points],
         "high (90 %)": [(year(p.index), p.high / 1e9) for p in points]}, "year", "GB a month", True, years=True)  # fmt: skip
    held_chart = line_chart(
        {"held": [(year(plan.months[-1].index), plan.held_today / TB), *((year(p.index), p.value / TB) for p in plan.held)],
         "low (90 %)": [(year(p.index), p.low / TB) for p in plan.held],
         "high (90 %)": [(year(p.index), p.high / TB) for p in plan.held]}, "year", "TB", True, years=True)  # fmt: skip
    return Section("Images", plan.notes, [("New images by month", month_chart), ("Images held", held_chart)])


def year_rows(years: tuple[Year, ...]) -> list[list[str]]:
    """A row for each year, see `HEAD`."""
    rows = []
    for year in years:
        many, alone = year.machines, year.alone
        rows.append([
            year.name, f"{year.held.value / TB:,.2f}", f"{year.held.low / TB:,.2f} to {year.held.high / TB:,.2f}", f"{year.new / TB:,.2f}",
            f"{year.disks.usable_tb:,.1f}", f"{year.disks.raw_tb:,.1f}",
            "-" if many is None else str(many.nodes) if many.nodes is not None else "not reached",
            "-" if many is None else f"{many.hours:,.1f}", "-" if alone is None else f"{alone.hours:,.1f}",
            "-" if many is None else f"{many.efficiency:.2f}", "-" if many is None else f"{many.read_bps / 1e6:,.1f}",
        ])  # fmt: skip
    return rows


HEAD = ("end of", "held, TB", "90 % interval", "new, TB", "usable, TB", "disks, TB", "nodes", "training, h", "on one, h", "efficiency", "reading, MB/s")


def _needs(plan: Plan) -> Section:
    text = [f"Disks: filled to {plan.wishes.fill:.0%} at most, {plan.wishes.copies:g} bytes for each byte."]
    if plan.years[0].machines is not None:
        text += [f"{year.name}: {year.machines.limit}." for year in plan.years if year.machines is not None]
        exchange = max(year.machines.exchange_bps for year in plan.years if year.machines is not None)
        text.append(f"The network between nodes carries {exchange / 1e6:,.1f} MB/s on average for each; the plan takes {plan.wishes.link_mbit / 1000:g} Gbit/s.")
    else:
        text.append("Nothing was measured, so nodes are left out: give --measured RUN_DIR.")
    return Section("What is needed", text, (), [Table(HEAD, year_rows(plan.years))])


def _ways(plan: Plan) -> Section:
    names = list(dict.fromkeys(name for way in plan.ways for name in way.parts))
    rows = [[name, *(f"{way.parts[name]:,.0f}" if name in way.parts else "-" for way in plan.ways)] for name in names]
    rows.append(["all", *(f"{way.total:,.0f}" for way in plan.ways)])
    rows.append(["electricity, MWh", *(f"{way.kwh / 1000:,.1f}" for way in plan.ways)])
    rows.append(["enough?", *("yes" if way.enough else f"no: {way.why_not}" for way in plan.ways)])
    text = [f"{plan.currency}, over {plan.wishes.years} years, at the prices of the price file. Its numbers are yours to check: those that come with it are invented."]
    return Section("Three ways", text, (), [Table(["", *(way.name for way in plan.ways)], rows)])


def _trust(plan: Plan) -> Section:
    test = plan.forecast.test
    text = ["A season was fitted." if plan.forecast.seasonal else "Less than two years: trend only, no season.",
            "The trend is damped: growth does not go on for ever. Errors of months are added up as if they went together, so intervals are wide."]  # fmt: skip
    if test is None:
        text.append("Too few months to try it on some that were held out: take the interval as a guess.")
    else:
        text.append(
            f"Tried on the last {test.months} months, from those before: off by {test.mape:.0%} on average ({test.covered:.0%} of them inside the 90 % interval); "
            f"the simplest forecast, what was there before, is off by {test.naive_mape:.0%}."
        )
    return Section("How far to trust it", text)


def draw_plan(path: Path, plan: Plan) -> None:
    """A PNG: months and volume held, each with its interval.

    Raises:
        SetupError: matplotlib is not installed.
    """
    from ..errors import SetupError

    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        raise SetupError("plan: the picture needs matplotlib: pip install 'hvd_imaging[plan]'") from None
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    points, x = plan.forecast.points, [point.index / 12 for point in plan.forecast.points]
    left.bar([month.index / 12 for month in plan.months], [month.bytes / 1e9 for month in plan.months], width=0.07, color="#0072b2", label="recorded")
    left.plot(x, [point.value / 1e9 for point in points], color="#d55e00", label="forecast")
    left.fill_between(x, [point.low / 1e9 for point in points], [point.high / 1e9 for point in points], color="#d55e00", alpha=0.2, label="90 %")
    left.set(title="New images", ylabel="GB a month", xlabel="year", ylim=(0, None))
    left.legend()
    right.plot([plan.months[-1].index / 12, *x], [plan.held_today / TB, *(point.value / TB for point in plan.held)], color="#d55e00")
    right.fill_between(x, [point.low / TB for point in plan.held], [point.high / TB for point in plan.held], color="#d55e00", alpha=0.2)
    for year in plan.years:
        right.axhline(year.disks.usable_tb, color="#5f6873", linewidth=0.8, linestyle="--")
        right.annotate(f"usable for {year.name}: {year.disks.usable_tb:,.1f} TB", (x[0], year.disks.usable_tb), fontsize=8, va="bottom")
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.set(title="Images held", ylabel="TB", xlabel="year", ylim=(0, None))
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


