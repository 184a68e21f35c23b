"""The page on a run: whole, of few files, of damaged ones, and compared."""

import json
import re
import shutil
import threading
import urllib.request
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner
from reported import make_reported

from hvd_imaging.cli.report import command
from hvd_imaging.config import check
from hvd_imaging.errors import RunError, SetupError
from hvd_imaging.planning.prices import Prices, run_cost
from hvd_imaging.reporting.charts import line_chart, number, stacked_bars, ticks
from hvd_imaging.reporting.report import gather, html, make_page
from hvd_imaging.reporting.serve import serve


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return make_reported(tmp_path_factory.mktemp("report"))


def test_one_file_holds_all_and_asks_for_nothing(runs):
    out = runs / "page.html"
    prices = runs / "prices.yaml"
    prices.write_text("currency: CHF\n")
    arguments = [str(runs / "two <b>ranks"), "--compare", str(runs / "alone"), "--out", str(out), "--prices", str(prices)]
    assert CliRunner().invoke(command, arguments, catch_exceptions=False).exit_code == 0
    text = out.read_text()
    for expected in ("Learning", "Compared", "Time", "Machines", "Energy and cost", "What happened", "Evaluation on the test split", "Where it comes from",
                     "Wh in all", "CHF", "rented instead", "goes on at step 15 with 2 ranks, job 17, start 2", "1.50 x the others&#39; time", "0.7000",
                     "abababababab", "prefers-color-scheme: dark", "@media print", "Scaling of these runs", "0.90", "epoch 4 of"):  # fmt: skip
        assert expected in text, expected
    # Nothing is fetched, nothing runs, and a name is text.
    assert not re.search(r"(?:src|href)=\"(?!data:)|<script|url\(|@import|http-equiv=\"refresh\"", text)
    assert "two &lt;b&gt;ranks" in text and "<b>ranks" not in text
    for svg in re.findall(r"<svg.*?</svg>", text):
        ElementTree.fromstring(svg)
    assert text.count("<svg") > 10


def test_figures_of_the_comparison(runs):
    result = CliRunner().invoke(command, [str(runs / "alone"), "--compare", str(runs / "two <b>ranks"), "--json"], catch_exceptions=False)
    sections = {section["title"]: section for section in json.loads(result.stdout)["sections"]}
    compared, scaling = sections["Compared"]["tables"]
    rows = {row[0]: row[1:] for row in compared["rows"]}
    assert rows["ranks"] == ["1", "2"] and rows["time in epochs"] == ["20 s", "20 s"] and rows["evaluation"][0] == "dice 0.7000 (0.6000 to 0.8000)"
    assert rows["energy, Wh"] == ["6 (estimate)", "12 (estimate)"]  # 120 W for 3 minutes, on each host
    assert scaling["rows"] == [["1", "4", "1.00", "1.00"], ["2", "7.2", "1.80", "0.90"]]


def test_a_run_with_few_or_damaged_files_gives_a_page_that_says_so(runs, tmp_path):
    run = tmp_path / "poor"
    shutil.copytree(runs / "alone", run)
    for name in ("events.jsonl", "evaluation-test.json", "ranks/monitor-00000.jsonl"):
        (run / name).unlink()
    (run / "run.json").write_text("{half")
    (run / "evaluation-val.json").write_text("[]")
    text = html(make_page(gather(run)))
    assert "events.jsonl: not there" in text and "run.json: damaged" in text and "monitor-*.jsonl: not there" in text and "Not in this page" in text
    (run / "events.jsonl").write_text('{"event": "epoch", "epoch": 0, "loss": NaN, "time": "2026-11-24T01:00:00+00:00"}\n{"event": "ranks"}\n[1]\n{"half')
    assert "Learning" in html(make_page(gather(run)))
    with pytest.raises(RunError, match="not a run folder"):
        gather(tmp_path)
    with pytest.raises(RunError, match="expected the JSON file of `hvd-imaging bench scaling"):
        CliRunner().invoke(command, [str(run), "--scaling", str(run / "run.json")], catch_exceptions=False)


def test_a_live_page_on_loopback(runs):
    addresses, pages, ready = [], iter(["<p>first", "<p>second"]), threading.Event()

    def said(address):
        addresses.append(address)
        ready.set()

    threading.Thread(target=lambda: serve(lambda: next(pages), 0, said), daemon=True).start()
    assert ready.wait(10)
    for expected in (b"<p>first", b"<p>second"):
        with urllib.request.urlopen(addresses[0], timeout=10) as answer:
            assert answer.read() == expected and answer.headers["Cache-Control"] == "no-store"
    with pytest.raises(SetupError, match="give another one, or 0 for any that is free"):
        serve(lambda: "", int(addresses[0].rsplit(":", 1)[1].strip("/")), said)
    assert 'http-equiv="refresh" content="5"' in html(make_page(gather(runs / "alone"), refresh_s=5))


def test_round_ticks():
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0] and ticks(0, 7) == [0, 2, 4, 6] and ticks(3, 3) == [3]
    assert [number(value) for value in (0, 0.5, 1234.5, 0.00002, 3e7)] == ["0", "0.5", "1,234", "2e-05", "3e+07"]


def test_charts_leave_out_what_is_no_number():
    nan = float("nan")
    assert line_chart({}, "x", "y") == line_chart({"a": [(0, nan)]}, "x", "y") == stacked_bars([("a", [0, 0])], ["p", "q"], "s") == ""
    chart = line_chart({"a": [(0, 1), (1, nan), (2, 3)], "b<": [(5, 5)]}, "x", "y", marks=[(1, "restart & more"), (99, "outside")])
    (svg,) = re.findall(r"<svg.*?</svg>", chart)
    tree = ElementTree.fromstring(svg)
    assert len(tree.findall("path")) == 2 and len(tree.findall("circle")) == 1 and svg.count('class="mark"') == 1 and "b&lt;" in chart
    bars = re.findall(r"<svg.*?</svg>", stacked_bars([("rank 0", [1, 2]), ("rank 1", [3, 0])], ["p", "q"], "s"))
    widths = [float(rect.attrib["width"]) for rect in ElementTree.fromstring(bars[0]).findall("rect")]
    assert widths[0] + widths[1] == pytest.approx(widths[2], abs=0.2) and widths[1] == pytest.approx(2 * widths[0], abs=0.2)


def test_what_a_run_costs_by_hand():
    prices = check(Prices, {"kwh": 0.3, "overhead": 1.5, "node": {"purchase": 43830, "busy_watts": 1, "idle_watts": 1, "years": 5, "rented_hour": 2}}, "t")
    # 2 kWh at 0.3 x 1.5; 10 hours of a machine that costs 1 an hour over 5 years of 8,766 hours.
    assert run_cost(prices, 2000, 36000) == {"electricity": pytest.approx(0.9), "machines": pytest.approx(10.0), "rented instead": 20.0}
