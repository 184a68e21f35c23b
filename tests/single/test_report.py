"""The page on a run: whole, of few files, of damaged ones, and compared."""

import http.client
import json
import random
import re
import shutil
import threading
import urllib.parse
import urllib.request
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner
from reported import make_reported

from hvd_imaging.cli.report import command
from hvd_imaging.config import check
from hvd_imaging.errors import RunError, SetupError
from hvd_imaging.planning.prices import Prices, run_cost
from hvd_imaging.reporting.charts import bundle, line_chart, number, stacked_bars, thin, ticks, timeline
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


BAD = (None, "x", -1, 1e308, float("nan"), float("inf"), [], {}, [1, "a"], {"a": 1}, True, "2026-13-99", "<script>", 10**30)


def spoil(value, draw, share):
    """The value with some of its parts gone, and some turned into other things."""
    if draw.random() < share:
        return draw.choice(BAD)
    if isinstance(value, dict):
        return {key: spoil(inner, draw, share) for key, inner in value.items() if draw.random() > share}
    return [spoil(inner, draw, share) for inner in value if draw.random() > share] if isinstance(value, list) else value


@pytest.mark.parametrize("seed", range(12))
def test_no_damage_keeps_the_rest_from_being_shown(runs, tmp_path, seed):
    run, draw = tmp_path / "run", random.Random(seed)
    shutil.copytree(runs / "two <b>ranks", run)
    (run / "model_card.json").write_text(json.dumps(CARD))
    share = (0.002, 0.02, 0.2)[seed % 3]
    for path in sorted([*run.rglob("*.json"), *run.rglob("*.jsonl")]):
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        text = "\n".join(json.dumps(spoil(json.loads(line), draw, share)) for line in lines)
        path.write_text(text[: draw.randrange(len(text))] if draw.random() < 0.1 else text)
    page = make_page(gather(run), [gather(runs / "alone")], Prices())
    text = html(page)
    assert "<script>" not in text and "Compared" in text, page.sections[-1]
    for svg in re.findall(r"<svg.*?</svg>", text):
        ElementTree.fromstring(svg)


def test_a_whole_run_misses_nothing(runs):
    assert "Not in this page" not in [section.title for section in make_page(gather(runs / "two <b>ranks"), [gather(runs / "alone")], Prices()).sections]


def test_a_damaged_file_costs_its_own_part(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs / "alone", run)
    (run / "evaluation-test.json").write_text('{"mean": 3}')
    (run / "slurm").mkdir(exist_ok=True)
    (run / "slurm/submit.json").write_text("half")
    page = make_page(gather(run))
    titles = [section.title for section in page.sections]
    assert "Learning" in titles and "Machines" in titles and "Evaluation on the test split" not in titles
    assert page.sections[-1].text == ["slurm/submit.json: damaged.", "evaluation-test.json: damaged (AttributeError)."]


CARD = {
    "name": "unet3d", "summary": "A network that marks balls.", "split": "test", "limitations": ["Few patients."],
    "reference": {"format": "run", "bytes": 1_360_000, "latency_ms": {"one": 51.1, "all": None}, "metrics": {"dice": {"value": 0.9, "interval": [0.8, 0.95], "count": 3}}},
    "formats": [
        {"format": "tflite", "bytes": 130_000, "latency_ms": {"one": 45.0, "all": 29.0}, "metrics": {}, "released": False, "missed": ["faster: 0.97 x"]},
        {"format": "tflite-int8", "bytes": 50_000, "latency_ms": {"one": 19.6, "all": 14.1}, "metrics": {"dice": {"value": 0.9, "interval": None, "count": 3}}, "released": True},
    ],
}  # fmt: skip


def test_the_model_card_of_a_compression(runs, tmp_path):
    (tmp_path / "model_card.json").write_text(json.dumps(CARD))
    for given in (tmp_path, tmp_path / "model_card.json"):
        section = {section.title: section for section in make_page(gather(runs / "alone", given)).sections}["Model card: unet3d"]
        assert section.tables[0].rows == [
            ["trained network", "1.36", "51.1", "-", "dice 0.9000 (0.8000 to 0.9500)", "-"], ["tflite", "0.13", "45.0", "29.0", "-", "no: faster: 0.97 x"],
            ["tflite-int8", "0.05", "19.6", "14.1", "dice 0.9000 (-)", "yes"],
        ]  # fmt: skip
        assert section.text[0] == "A network that marks balls." and "Few patients." in section.text
    with pytest.raises(RunError, match=r"no model_card\.json there; `hvd-imaging compress"):
        gather(runs / "alone", tmp_path / "elsewhere")


def test_figures_of_a_benchmark(runs, tmp_path):
    path = tmp_path / "scaling.json"
    path.write_text(json.dumps({
        "bench": "scaling", "rows": [{"case": "weak, 2", "system": "ours", "metric": "step time", "value": 12.5, "unit": "ms"}, {"value": None}],
        "figures": [{"name": "efficiency", "value": 0.98, "goal": 0.97, "better": "higher", "reached": True}, {"name": "wait", "value": None, "goal": 0.02, "better": "lower"}],
    }))  # fmt: skip
    result = CliRunner().invoke(command, [str(runs / "alone"), "--scaling", str(path), "--json"], catch_exceptions=False)
    goals, rows = {section["title"]: section for section in json.loads(result.stdout)["sections"]}["Measured: bench scaling"]["tables"]
    assert goals["rows"] == [["efficiency", "0.98", "at least 0.97", "reached"], ["wait", "-", "at most 0.02", "not measured"]]
    assert rows["rows"][0] == ["weak, 2", "ours", "step time", "12.5", "ms"] and rows["rows"][1][3] == "-"


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
    where = urllib.parse.urlsplit(addresses[0])
    # A site that has its own name point here gets nothing, nor does another user of the host, who does not know the token.
    for path, host, status in ((where.path, "other.example", 403), (where.path, "[", 403), ("/", "localhost", 404), ("/guess/", "localhost", 404)):
        connection = http.client.HTTPConnection("localhost", where.port, timeout=10)
        connection.request("GET", path, headers={"Host": host})
        assert connection.getresponse().status == status
        connection.close()
    assert len(where.path.strip("/")) >= 20
    with pytest.raises(SetupError, match="give another one, or 0 for any that is free"):
        serve(lambda: "", where.port, said)
    assert 'http-equiv="refresh" content="5"' in html(make_page(gather(runs / "alone"), refresh_s=5))


def test_of_many_lines_the_ends_and_the_middle_are_drawn():
    series = {f"rank {rank}": [(time, rank + time) for time in range(1000)] for rank in range(9)}
    bundled = bundle(series, bins=10)
    assert list(bundled) == ["highest of 9", "median", "lowest"]
    middles = [50 + 100 * index - 0.5 for index in range(10)]
    assert [y for _, y in bundled["median"]][:9] == pytest.approx([4 + middle for middle in middles][:9], abs=1)
    assert all(high - low == pytest.approx(8) for (_, high), (_, low) in zip(bundled["highest of 9"], bundled["lowest"], strict=True))
    assert list(bundle({"a": [(0, 1)]})) == ["a"]
    assert thin([(0, 1), (2, 3), (4, 5)], 2) == [(1, 2), (4, 5)] and thin([(0, 1)], 2) == [(0, 1)]


def test_a_timeline_shows_who_did_what_when():
    chart = timeline([("rank 0", [(0, 10, [2, 6, 2]), (20, 30, [0, 10, 0])]), ("rank 1", [(0, 10, [1, 5, 99])])], ["input", "compute", "exchange"], [(20, "again"), (99, "later")])
    (svg,) = re.findall(r"<svg.*?</svg>", chart)
    tree = ElementTree.fromstring(svg)
    bars = [(bar.attrib["class"], float(bar.attrib["x"]), float(bar.attrib["width"])) for bar in tree.findall("rect")]
    left, second = bars[0][1], bars[1][2] / 6
    assert [kind for kind, _, _ in bars] == ["fill c0", "fill c1", "fill c2", "fill c1", "fill c0", "fill c1", "fill c2"]
    starts = [(x - left) / second for _, x, _ in bars]
    assert starts == pytest.approx([0, 2, 8, 20, 0, 1, 6], abs=0.01) and bars[-1][2] / second == pytest.approx(4, abs=0.01)  # not beyond the span
    assert svg.count('class="mark"') == 1 and timeline([("a", [])], ["p"]) == ""


def test_a_bar_that_outgrows_all_others_is_cut():
    (svg,) = re.findall(r"<svg.*?</svg>", stacked_bars([("first", [90.0]), *((f"{row}", [1.0]) for row in range(4))], ["p"], "s"))
    widths = [float(bar.attrib["width"]) for bar in ElementTree.fromstring(svg).findall("rect")]
    assert widths[0] < 1.5 * widths[1] and "→ 90" in svg and svg.count("→") == 1
    (svg,) = re.findall(r"<svg.*?</svg>", stacked_bars([("a", [2.0]), ("b", [1.0])], ["p"], "s"))
    assert "→" not in svg


def test_round_ticks():
    assert ticks(1, 5, 8, whole=True) == [1, 2, 3, 4, 5] and ticks(1, 2, 8, whole=True) == [1, 2] and ticks(0, 25, 10, whole=True) == [0, 5, 10, 15, 20, 25]
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
