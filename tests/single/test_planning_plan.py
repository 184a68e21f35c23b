"""The plan against examples worked out by hand, and on made months whose future is known."""

import datetime
import json
import math
import os

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from reported import make_reported

from hvd_imaging.cli.plan import command
from hvd_imaging.config import check
from hvd_imaging.errors import ConfigError, RunError, SourceError
from hvd_imaging.planning import records
from hvd_imaging.planning.compute import MONTH_H, Load, machines, on_one, training_hours
from hvd_imaging.planning.cost import machine_kwh, machine_share, ways
from hvd_imaging.planning.forecast import cumulated, forecast
from hvd_imaging.planning.plan import Wishes, make_plan
from hvd_imaging.planning.prices import NodePrices, Prices
from hvd_imaging.planning.records import Month
from hvd_imaging.planning.scaling import Job, Link
from hvd_imaging.planning.storage import disks

JANUARY = 2024 * 12


def months(count, of=lambda step: 100e9, start=JANUARY):
    return [Month(start + step, of(step)) for step in range(count)]


# --- records ------------------------------------------------------------------------------------------------------------


def test_tables_of_several_kinds(tmp_path):
    path = tmp_path / "v.csv"
    path.write_text("\ufeffMonth;Studies;Gigabytes\n2026-02;10;1.5\n2026-01;;2\n2026-02;5;0.5\n;;\n")
    assert records.read_csv(path) == [Month(2026 * 12, 2e9, 0), Month(2026 * 12 + 1, 2e9, 15)]
    path.write_text("date,bytes\n2026-01-31,7\n2026-03-01,8\n")
    assert [(month.name, month.bytes) for month in records.read_csv(path)] == [("2026-01", 7), ("2026-03", 8)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"expected columns month \(2026-03\) or date, and gigabytes .*, found nothing"),
        ("week,gigabytes\n", "found week, gigabytes"),
        ("month,gigabytes\n2026-13,4\n", "line 2: expected a month such as 2026-03, and numbers from 0 on; found '2026-13, 4'"),
        ("month,gigabytes\n2026-01,4\n2026-02,much\n", "line 3: expected a month"),
        ("month,gigabytes\n2026-01,-4\n", "line 2: "), ("month,gigabytes\n2026-01\n", "line 2: "), ("month,gigabytes\n2026-01,nan\n", "line 2: "),
    ],
)  # fmt: skip
def test_a_table_that_can_not_be_read_is_told_by_line(tmp_path, text, message):
    (tmp_path / "v.csv").write_text(text)
    with pytest.raises(SourceError, match=message):
        records.read_csv(tmp_path / "v.csv")


def test_gaps_and_too_few_months():
    five = [month for month in months(9, lambda step: (step + 1) * 1e9) if month.index - JANUARY not in (3, 4)]
    found, notes = records.complete(five, "v.csv")
    assert [month.bytes / 1e9 for month in found] == pytest.approx(range(1, 10)) and [month.filled for month in found].count(True) == 2
    assert notes == ["2024-04, 2024-05 missing: taken from the line between 2024-03 and 2024-06"]
    with pytest.raises(ConfigError, match=r"v.csv: nothing between 2024-02 and 2024-06 \(3 months\)"):
        records.complete([*months(2), *months(8, start=JANUARY + 5)], "v.csv")
    for count in (0, 1, 5):
        with pytest.raises(ConfigError, match=f"a forecast wants 6 months at least .* found {count}"):
            records.complete(months(count), "v.csv")
    assert len(records.without_the_running_month(months(3), datetime.date(2024, 3, 30))) == 2


def test_an_archive_by_dates_and_sizes(tmp_path):
    for name, month, size in (("a/x.dcm", 1, 10), ("a/y.dcm", 1, 5), ("b/z.dcm", 3, 7)):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(size))
        when = datetime.datetime(2026, month, 5, tzinfo=datetime.timezone.utc).timestamp()
        os.utime(path, (when, when))
    assert [(month.name, month.bytes) for month in records.scan_archive(tmp_path)] == [("2026-01", 15), ("2026-03", 7)]
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="no files"):
        records.scan_archive(tmp_path / "empty")
    with pytest.raises(SourceError, match="no such folder"):
        records.scan_archive(tmp_path / "none")


# --- forecast -----------------------------------------------------------------------------------------------------------


def test_a_known_future_is_forecast():
    """1 % more every month, a season of 12 %, no noise: the next year within 5 %, and better than last year's months again."""

    def truth(step):
        return 100e9 * 1.01**step * (1 + 0.12 * math.sin(2 * math.pi * step / 12))

    found = forecast(months(36, truth), 12)
    assert found.seasonal and [point.index for point in found.points] == list(range(JANUARY + 36, JANUARY + 48))
    for step, point in enumerate(found.points, start=36):
        assert point.value == pytest.approx(truth(step), rel=0.05) and point.low <= point.value <= point.high
    assert found.test is not None and found.test.months == 9 and found.test.mape < 0.05 < found.test.naive_mape
    held = cumulated(found, 1e12)
    assert held[-1].value == pytest.approx(1e12 + sum(point.value for point in found.points))


def test_a_year_has_no_season_and_half_a_year_no_test():
    year = forecast(months(14, lambda step: 100e9 * (1 + 0.02 * (step % 3))), 6)
    assert not year.seasonal and year.test is not None and year.test.months == 3 and 0 <= year.test.covered <= 1
    half = forecast(months(6, lambda step: (90 + step % 2 * 20) * 1e9), 36)
    assert half.test is None and 50e9 < half.points[-1].value < 200e9
    same = forecast(months(12), 3)
    assert [point.value for point in same.points] == [100e9] * 3
    assert all(point.low >= 0 for point in forecast(months(8, lambda step: 0 if step == 4 else 1e9), 6).points)


# --- storage, machines, cost by hand ------------------------------------------------------------------------------------


def test_disks_by_hand():
    found = disks(80e12, 3, 0.8)
    assert found.usable_tb == pytest.approx(100) and found.raw_tb == pytest.approx(300)
    with pytest.raises(ConfigError, match="expected 1 or more copies"):
        disks(1, 0.5, 0.8)


def test_machines_by_hand():
    """Batch 8, 1 s a sample: 8 s a step on one rank, 2 + 0.1 s on four with 2 x 3/4 x 10 MB at 150 MB/s; 3,600 steps."""
    load = Load(Job(1.0, 8, 10e6), steps=3600, hours=3.0, trainings=100, busy=0.7, sample_bytes=5e6)
    link, nothing = Link(0.0, 150e6), Link(0.0, math.inf)
    assert training_hours(load, 1, link, nothing) == pytest.approx(8.0)
    assert training_hours(load, 4, link, nothing) == pytest.approx(2.1)
    found = machines(load, link, nothing)
    # 3 ranks have 3 samples at most: 3.09 h. 4 nodes: 2.1 h; a month's 100 take 840 node hours, two nodes at 70 %.
    assert (found.nodes, found.nodes_of_one) == (4, 4) and found.hours == pytest.approx(2.1) and found.node_hours == pytest.approx(840)
    assert found.efficiency == pytest.approx(8 / (4 * 2.1)) and found.limit == "the wanted time decides"
    assert found.read_bps == pytest.approx(8 * 5e6 / 2.1) and found.exchange_bps == pytest.approx(2 * 10e6 / 2.1)
    many = machines(Load(load.job, 3600, 3.0, 1000, busy=0.7), link, nothing)
    assert many.nodes == math.ceil(8400 / (MONTH_H * 0.7)) == 17 and "one takes 4, all of a month 17" in many.limit
    slow = machines(Load(load.job, 3600, 0.5, 1), link, nothing)
    assert slow.nodes is None and slow.nodes_of_one == 8 and "0.5 h are not reached with a batch of 8" in slow.limit
    alone = on_one(load, growth=2)
    assert alone.hours == pytest.approx(16) and alone.nodes_of_one == 1 and alone.node_hours == pytest.approx(1600)


def test_three_ways_by_hand():
    node = NodePrices(purchase=10_000, busy_watts=1000, idle_watts=100, years=5, rented_hour=2)
    prices = check(Prices, {
        "kwh": 0.2, "overhead": 1.5, "staff_year": 100_000, "staff_share": {"workstation": 0.1, "on-premises": 0.2, "rented": 0.3}, "network_port": 500,
        "egress_tb": 50, "workstation": {"purchase": 6000, "busy_watts": 500, "idle_watts": 50, "years": 3}, "node": node.model_dump(),
        "storage": {"disk_tb": 40, "watts_per_tb": 2, "rented_tb_month": 10},
    }, "t")  # fmt: skip
    assert machine_share(node, 3) == 6000 and machine_kwh(node, 2, 1000, 1) == pytest.approx((1000 * 1000 + (2 * 8766 - 1000) * 100) / 1000)
    load = Load(Job(1.0, 8, 10e6), steps=3600, hours=3.0, trainings=10)
    link = Link(0.0, 150e6)
    many, alone, disk = machines(load, link, Link(0.0, math.inf)), on_one(load), disks(40e12, 2, 0.8)
    station, own, rented = ways(prices, 1, [(disk, many, alone)], [40e12])
    # 100 raw TB; 10 trainings of 4 x 2.1 h a month are 1,008 node hours a year, on one machine 960.
    storage_kwh = 100 * 2 * 8766 / 1000
    own_kwh = storage_kwh + (1008 * 1000 + (4 * 8766 - 1008) * 100) / 1000
    assert own.parts == pytest.approx({"machines": 4 * 2000, "network": 5 * 500, "disks": 4000, "electricity": own_kwh * 1.5 * 0.2, "staff": 20_000})
    assert own.enough and own.kwh == pytest.approx(own_kwh * 1.5) and own.total == pytest.approx(sum(own.parts.values()))
    station_kwh = storage_kwh + (960 * 500 + (8766 - 960) * 50) / 1000
    assert station.parts == pytest.approx({"machines": 2000, "disks": 4000, "electricity": station_kwh * 1.5 * 0.2, "staff": 10_000})
    assert not station.enough and station.why_not == "a training takes 8.0 h"
    assert rented.parts == pytest.approx({"machines": 2016, "storage": 50 * 12 * 10, "leaving": 2000, "staff": 30_000}) and rented.enough


@settings(max_examples=20, deadline=None)
@given(st.floats(1e9, 1e13), st.floats(1, 4), st.floats(0.1, 1))
def test_more_is_never_less(volume, copies, fill):
    found, more = disks(volume, copies, fill), disks(2 * volume, copies, fill)
    assert found.raw_tb >= found.usable_tb >= volume / 1e12 and more.raw_tb == pytest.approx(2 * found.raw_tb)


# --- all of it ----------------------------------------------------------------------------------------------------------


def test_without_a_measured_run_there_are_disks_and_no_nodes():
    plan = make_plan(months(24, lambda step: (100 + step) * 1e9), ["a note"], Wishes(years=2, held_tb=10), Prices())
    assert [year.name for year in plan.years] == ["2026-12", "2027-12"] and plan.years[0].machines is None
    assert plan.years[1].new == pytest.approx(plan.years[1].held.value - plan.years[0].held.value)
    value = json.loads(json.dumps(plan.to_json(), allow_nan=False))
    assert value["held_today"] == 10e12 and value["cheapest"] == "workstation" and value["ways"][0]["total"] > 0


def test_the_command_writes_a_page_a_picture_and_json(tmp_path):
    runs = make_reported(tmp_path / "runs")
    table = tmp_path / "v.csv"
    rows = [f"{2024 + step // 12}-{step % 12 + 1:02d},{100 + step}" for step in range(24) if step != 7]
    table.write_text("month,gigabytes\n" + "\n".join(rows))
    arguments = [str(table), "--measured", str(runs / "alone"), "--epochs", "10000", "--train-hours", "100", "--batch", "8", "--out", str(tmp_path / "plan")]
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert result.exit_code == 0 and "cheapest of three ways" in result.stdout and "invented examples" in result.output
    assert "2024-08 missing: taken from the line" in result.output
    page = (tmp_path / "plan/plan.html").read_text()
    assert "How far to trust it" in page and "2024-08 missing" in page and page.count("<svg") == 2 and "http" not in page.replace("http-equiv", "")
    assert (tmp_path / "plan/plan.png").read_bytes().startswith(b"\x89PNG")
    value = json.loads((tmp_path / "plan/plan.json").read_text())
    assert value["years"][2]["machines"]["hours"] > 0 and len(value["held"]) == 36
    printed = json.loads(CliRunner().invoke(command, [*arguments, "--json"], catch_exceptions=False).output.splitlines()[-1])
    assert printed == value
    with pytest.raises(RunError, match="not a run folder"):
        CliRunner().invoke(command, [str(table), "--measured", str(tmp_path)], catch_exceptions=False)
    with pytest.raises(ConfigError, match="expected a table volume.csv, or --archive DIR, and not both"):
        CliRunner().invoke(command, [str(table), "--archive", str(tmp_path)], catch_exceptions=False)
    with pytest.raises(ConfigError, match="years"):
        CliRunner().invoke(command, [str(table), "--years", "0"], catch_exceptions=False)
