"""The gate: paired differences, limits and verdicts, from figures alone."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_imaging.compression import gate
from hvd_imaging.compression.gate import Difference, Limits, Measured
from hvd_imaging.config import PreprocessConfig, check
from hvd_imaging.errors import ConfigError, RunError
from hvd_imaging.inference import statistics as stats
from hvd_imaging.inference.evaluate import summarize
from hvd_imaging.models.spec import ModelSpec


@pytest.fixture(autouse=True, scope="module")
def few_draws():
    """A tenth of the bootstrap's draws: the same intervals, roughly, in a tenth of the time."""
    patch = pytest.MonkeyPatch()
    patch.setattr(stats, "bootstrap", functools.partial(stats.bootstrap, draws=200))
    yield
    patch.undo()


def spec(task="segmentation", classes=("background", "a", "b")):
    return ModelSpec(
        task=task, classes=classes, patch=(8, 8, 8), channels=1, preprocess=PreprocessConfig(),
        model={"name": "unet3d"}, dataset_hash="0", run="r",
    )  # fmt: skip


def segmented(*cases):
    """A report of cases of (Dice of a, Dice of b, HD95 of a, HD95 of b)."""
    rows = []
    for number, (dice_a, dice_b, far_a, far_b) in enumerate(cases):
        row = {name: {"a": 0.5, "b": 0.5} for name in ("recall", "specificity", "precision")}
        row |= {"id": f"c{number}", "dice": {"a": dice_a, "b": dice_b}, "hd95_mm": {"a": far_a, "b": far_b}}
        rows.append(row | {"accuracy": 0.9, "confusion": [[9, 0, 0], [0, 1, 0], [0, 0, 1]]})
    return summarize(rows, spec(), "test", "hash")


def classified(labels, probabilities):
    """A report of two classes from the probability of the second one."""
    rows = [
        {"id": f"c{i}", "label": label, "predicted": int(p > 0.5), "probabilities": [1 - p, p]}
        for i, (label, p) in enumerate(zip(labels, probabilities, strict=True))
    ]
    return summarize(rows, spec("classification", ("well", "ill")), "test", "hash")


def lost(value, name="dice"):
    return {name: Difference(0.9, 0.9 + value / 100, value, (value - 1, value + 1), 20)}


FLOAT = Measured("float", bytes=1000, latency_ms={"one": 100.0, "all": 60.0}, peak_bytes=500)
GOOD = Measured("good", bytes=250, latency_ms={"one": 30.0, "all": 20.0}, peak_bytes=300, differences=lost(-0.3))


def changed(**values):
    return Measured(**{name: getattr(GOOD, name) for name in GOOD.__dataclass_fields__} | values)


# --- limits ---------------------------------------------------------------------------------------------------------


def test_what_keeps_all_limits_is_released():
    assert gate.judge(FLOAT, GOOD, Limits(), "segmentation") == ()
    assert gate.judge(FLOAT, GOOD, Limits(faster=3, smaller=4, max_bytes=250, max_latency_ms=30, max_peak_bytes=300), "segmentation") == ()


@pytest.mark.parametrize(
    ("values", "limits", "words"),
    [
        ({"differences": lost(-0.51)}, {}, ["metric_loss: Dice falls by 0.51 points (90.00 to 89.49), expected at most 0.5"]),
        ({"latency_ms": {"one": 100.0, "all": 20.0}}, {}, ["faster (1 thread): 1.00 x (100 to 100 ms), expected faster at all"]),
        ({"latency_ms": {"one": 30.0, "all": 61.0}}, {}, ["faster (all threads): 0.98 x"]),
        ({}, {"faster": 3.2}, ["faster (all threads): 3.00 x (60 to 20 ms), expected at least 3.2 x"]),
        ({"bytes": 1000}, {}, ["smaller: 1.00 x (1,000 to 1,000 bytes), expected smaller at all"]),
        ({}, {"smaller": 5}, ["smaller: 4.00 x"]),
        ({}, {"max_bytes": 249}, ["max_bytes: 250 bytes, expected at most 249"]),
        ({}, {"max_latency_ms": 29}, ["max_latency_ms: 30 ms on 1 thread, expected at most 29"]),
        ({}, {"max_peak_bytes": 299}, ["max_peak_bytes: 300 bytes of memory"]),
        ({"peak_bytes": None}, {"max_peak_bytes": 299}, ["max_peak_bytes: not measured"]),
        ({"bytes": 2000, "differences": lost(-2.0)}, {}, ["metric_loss", "smaller"]),
        ({"differences": {}}, {}, ["metric_loss: Dice could not be compared"]),
        ({"differences": lost(float("nan"))}, {}, ["metric_loss: Dice falls by nan"]),
        ({"latency_ms": {"one": 30.0}}, {}, ["faster (all threads): not measured"]),
        ({"reason": "no memory", "latency_ms": {}, "bytes": None}, {}, ["could not be measured: no memory"]),
    ],
)
def test_every_missed_limit_is_a_sentence(values, limits, words):
    missed = gate.judge(FLOAT, changed(**values), Limits(**limits), "segmentation")
    assert len(missed) == len(words)
    assert all(sentence.startswith(word) for sentence, word in zip(missed, words, strict=True)), missed


def test_limits_that_are_off_do_not_count():
    bad = changed(bytes=5000, latency_ms={"one": 900.0, "all": 900.0}, differences=lost(-30.0))
    assert len(gate.judge(FLOAT, bad, Limits(), "segmentation")) == 4
    assert gate.judge(FLOAT, bad, Limits(metric_loss=None, faster=None, smaller=None), "segmentation") == ()


def test_a_share_below_one_allows_to_be_slower():
    slow = changed(latency_ms={"one": 120.0, "all": 70.0})
    assert gate.judge(FLOAT, slow, Limits(faster=0.8), "segmentation") == ()
    assert gate.judge(FLOAT, slow, Limits(faster=0.9), "segmentation")


def test_a_loss_of_exactly_the_limit_is_kept_despite_rounding():
    value = (0.9 - 0.905) * 100
    assert value < -0.5  # floating point
    assert gate.judge(FLOAT, changed(differences=lost(value)), Limits(), "segmentation") == ()


def test_a_classifier_may_lose_in_no_figure():
    def of(**values):
        return changed(differences={name: Difference(0.9, 0.9, value, None, 9) for name, value in values.items()})

    assert gate.judge(FLOAT, of(accuracy=0.0, recall=0.0, auc=-0.4), Limits(), "classification") == ()
    for name in ("accuracy", "recall", "auc"):
        values = {"accuracy": 0.0, "recall": 0.0, "auc": 0.0} | {name: -1.0}
        assert [gate.NAMES[name] in text for text in gate.judge(FLOAT, of(**values), Limits(), "classification")] == [True]
    # Cases of one class: no AUC for either model, and nothing lost.
    both = {"accuracy": Difference(1.0, 1.0, 0.0, None, 9), "auc": Difference(None, None, None, None, 9)}
    assert gate.judge(FLOAT, changed(differences=both), Limits(), "classification") == ()


def test_a_missed_speed_names_the_processor():
    slow = changed(latency_ms={"one": 108.7, "all": 20.0})
    [found] = gate.judge(FLOAT, slow, Limits(), "segmentation", "AVX2 without VNNI")
    assert found == "faster (1 thread, AVX2 without VNNI): 0.92 x (100 to 108.7 ms), expected faster at all"


@given(st.floats(-5, 5), st.floats(0.1, 10), st.floats(0.1, 10))
def test_stricter_limits_never_release_more(loss, faster, smaller):
    one = changed(differences=lost(loss), latency_ms={"one": 100 / faster, "all": 60 / faster}, bytes=round(1000 / smaller))
    loose = gate.judge(FLOAT, one, Limits(metric_loss=1, faster=1, smaller=1), "segmentation")
    strict = gate.judge(FLOAT, one, Limits(metric_loss=0.5, faster=2, smaller=3), "segmentation")
    assert len(strict) >= len(loose)


def test_limits_are_a_section_of_the_recipe():
    assert check(Limits, {"faster": 2, "metric_loss": 0}, "recipe.yaml") == Limits(faster=2, metric_loss=0)
    for wrong in ({"metric_loss": -1}, {"faster": 0}, {"max_bytes": 1.5}, {"fastr": 2}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            check(Limits, wrong, "recipe.yaml")


# --- differences ----------------------------------------------------------------------------------------------------


def test_dice_is_paired_case_by_case():
    before = segmented((0.9, 0.7, 1, 2), (0.5, 0.3, 3, 4), (0.8, 0.8, 2, 2))
    after = segmented((0.89, 0.7, 1, 3), (0.49, 0.3, 3, 4), (0.80, 0.78, 2, 2))
    found = gate.compare(before, after)
    assert found["dice"].value == pytest.approx((-0.5 - 0.5 - 1.0) / 3)
    assert found["dice"].reference == pytest.approx(before["mean"]["dice"]["value"])
    assert found["dice"].candidate == pytest.approx(after["mean"]["dice"]["value"])
    assert found["dice"].count == 3
    low, high = found["dice"].interval
    assert low < found["dice"].value < high <= -0.49
    # Far narrower than the interval of either figure: what cases differ in cancels.
    assert (high - low) / 100 < 0.1 * np.ptp(before["mean"]["dice"]["interval"])
    assert found["dice: a"].value == pytest.approx(-2 / 3) and found["dice: b"].value == pytest.approx(-2 / 3)
    assert found["hd95_mm"].value == pytest.approx(0.5 / 3)
    assert found == gate.compare(before, after)


def test_the_order_of_the_cases_does_not_matter():
    before = segmented((0.9, 0.7, 1, 2), (0.5, 0.3, 3, 4), (0.8, 0.8, 2, 2))
    after = segmented((0.8, 0.7, 1, 2), (0.5, 0.2, 3, 4), (0.8, 0.8, 2, 9))
    shuffled = after | {"cases": after["cases"][::-1]}
    assert gate.compare(before, shuffled) == gate.compare(before, after)


def test_inventing_a_structure_costs_and_missing_one_too():
    # Class a is nowhere in the case; the float model shows none, the candidate does.
    before = segmented((None, 0.8, None, 1), (0.9, 0.8, 1, 1))
    after = segmented((0.0, 0.8, None, 1), (0.9, 0.8, 1, 1))
    assert gate.compare(before, after)["dice"].value == pytest.approx(-25)
    assert gate.compare(after, before)["dice"].value == pytest.approx(25)
    # HD95 has no figure for a missed structure: it says so instead of looking unchanged.
    missed = segmented((None, 0.8, None, 1), (0.0, 0.8, None, 1))
    found = gate.compare(before, missed)
    assert found["dice"].value == pytest.approx(-22.5)
    assert found["hd95_mm"].value == 0 and "1 without a distance that the float model has" in found["hd95_mm"].note
    assert "1 with a distance that the float model has not" in gate.compare(missed, before)["hd95_mm"].note


def test_nothing_to_compare_is_said():
    empty = segmented((None, None, None, None))
    found = gate.compare(empty, empty)
    assert found["dice"] == Difference(None, None, None, None, 0, "no case holds or shows any class")
    one = segmented((0.9, 0.9, 1, 1))
    assert gate.compare(one, segmented((0.8, 0.9, 1, 1)))["dice"].note == "no interval, as there is one case"
    two = segmented((0.9, 0.9, 1, 1), (0.8, 0.8, 1, 1))
    assert gate.compare(two, two)["dice"] == Difference(
        pytest.approx(0.85), pytest.approx(0.85), 0.0, None, 2, "no interval, as no case differs"
    )


def test_a_classifiers_figures_are_paired():
    random = np.random.default_rng(0)
    labels = [i % 2 for i in range(60)]
    sure = np.clip(0.5 + (np.array(labels) - 0.5) * 0.5 + random.normal(0, 0.2, 60), 0.01, 0.99)
    worse = sure.copy()
    flipped = [i for i in range(60) if labels[i] == 1 and sure[i] > 0.5][:6]
    worse[flipped] = 0.3
    before, after = classified(labels, sure), classified(labels, worse)
    found = gate.compare(before, after)
    assert found["accuracy"].value == pytest.approx(-10)
    assert found["recall"].value == pytest.approx(-20)
    for name in ("accuracy", "recall", "auc"):
        assert found[name].reference == pytest.approx(before["mean"][name]["value"])
        assert found[name].candidate == pytest.approx(after["mean"][name]["value"])
        assert found[name].interval[0] < found[name].value < found[name].interval[1] < 0.01
    assert found["auc"].value == pytest.approx(
        100 * (stats.auc(np.array(labels) == 1, worse) - stats.auc(np.array(labels) == 1, sure))
    )


def test_no_changed_answer_is_not_called_certain():
    labels = [0, 1] * 10
    before = classified(labels, [0.2, 0.8] * 10)
    after = classified(labels, [0.3, 0.7] * 10)
    found = gate.compare(before, after)
    assert found["accuracy"].value == 0 and found["accuracy"].interval is None
    assert "up to 15.0 points" in found["accuracy"].note  # 3 / 20
    assert "up to 30.0 points" in found["recall"].note  # 3 / 10 positives
    assert found["auc"].value == 0 and found["auc"].interval is None and "both models separate" in found["auc"].note
    one_class = gate.compare(classified([1, 1, 1], [0.9, 0.8, 0.2]), classified([1, 1, 1], [0.9, 0.8, 0.3]))
    assert one_class["auc"].value is None and "one class" in one_class["auc"].note


def test_three_classes_use_the_mean_over_classes():
    def report(predicted):
        rows = [
            {"id": f"c{i}", "label": i % 3, "predicted": p, "probabilities": [0.8 if k == p else 0.1 for k in range(3)]}
            for i, p in enumerate(predicted)
        ]
        return summarize(rows, spec("classification", ("a", "b", "c")), "test", "hash")

    right = [0, 1, 2] * 5
    wrong = [1, *right[1:]]
    found = gate.compare(report(right), report(wrong))
    assert found["accuracy"].value == pytest.approx(-100 / 15)
    assert found["recall"].value == pytest.approx(-100 / 15)  # one fifth of one of three classes
    assert found["recall"].candidate == pytest.approx(report(wrong)["mean"]["recall"]["value"])
    assert found["auc"].candidate == pytest.approx(report(wrong)["mean"]["auc"]["value"])


def test_the_difference_is_antisymmetric():
    a, b = segmented((0.9, 0.7, 1, 2), (None, 0.3, None, 4)), segmented((0.6, 0.75, 1, 3), (0.0, 0.35, 2, 4))
    there, back = gate.compare(a, b), gate.compare(b, a)
    assert {name: d.value for name, d in there.items()} == {name: pytest.approx(-d.value) for name, d in back.items()}


def test_other_cases_and_other_classes_are_refused():
    two, one = segmented((0.9, 0.9, 1, 1), (0.8, 0.8, 1, 1)), segmented((0.9, 0.9, 1, 1))
    with pytest.raises(RunError, match="1 cases, expected the same 2"):
        gate.compare(two, one)
    with pytest.raises(RunError, match="task is classification, expected segmentation"):
        gate.compare(one, classified([0], [0.1]))
    with pytest.raises(RunError, match="classes is"):
        gate.compare(one, one | {"classes": ["background", "other"]})


# --- tables ---------------------------------------------------------------------------------------------------------


def measured():
    before = segmented((0.9, 0.7, 1, 2), (0.5, 0.3, 3, 4), (0.8, 0.8, 2, 2))
    after = segmented((0.89, 0.7, 1, 3), (0.49, 0.3, 3, 4), (0.80, 0.78, 2, 2)) | {"missed": {"a": 1, "b": 0}}
    row = {"bytes": 1_200_000, "gzip_bytes": 1_100_000, "latency_ms": {"one": 183.0, "all": 90.0}, "peak_bytes": 400_000_000}
    small = {"bytes": 300_000, "gzip_bytes": 110_000, "latency_ms": {"one": 25.04, "all": 30.0}, "peak_bytes": 90_000_000}
    return (
        gate.measured("float", row, before, counts={"parameters": 300_000, "zeros": 0, "macs": 2_000_000_000}),
        gate.measured("int8", small, after, before, counts={"parameters": 150_000, "zeros": 75_000, "macs": None}),
        gate.measured("onnx", {"reason": "not installed"}),
    )


def test_the_tables_say_what_was_measured():
    reference, *candidates = measured()
    judged = gate.verdicts(reference, candidates, Limits(), "segmentation")
    assert [bool(missed) for missed in judged.values()] == [True, True]
    rows = gate.cost_rows(reference, candidates, judged)
    assert all(len(row) == len(gate.COST_HEAD) for row in rows)
    assert rows[0] == ("float", "1.2 MB", "1.1 MB", "300 k", "0.0%", "2 G", "183 ms", "90.0 ms", "400 MB", "float model")
    assert rows[1] == (
        "int8", "300 kB (4.0 x)", "110 kB (10.0 x)", "150 k (2.0 x)", "50.0%", "-", "25.0 ms (7.3 x)", "30.0 ms (3.0 x)",
        "90 MB", "not released",
    )  # fmt: skip
    assert rows[2] == ("onnx", *["-"] * 8, "not released")
    metrics = gate.metric_rows(reference, candidates)
    assert all(len(row) == len(gate.METRIC_HEAD) for row in metrics)
    by_key = {(row[0], row[1]): row for row in metrics}
    assert by_key["int8", "Dice"][4] == "-0.67 points"
    assert by_key["int8", "HD95 (mm)"][4] == "+0.17 mm"
    assert by_key["float", "Dice: b"][2] == "0.6000"
    assert by_key["int8", "cases with a missed"][2] == "1" and by_key["float", "cases with a missed"][2] == "0"
    assert not any("b missed" in row[1] or row[0] == "onnx" for row in metrics)


def test_figures_go_into_json():
    for one in measured():
        assert json.loads(json.dumps(one.to_json(), allow_nan=False))["format"] == one.format


def test_a_tiny_loss_is_not_written_with_a_sign():
    before, after = segmented((0.9, 0.7, 1, 2), (0.5, 0.3, 3, 4)), segmented((0.89999, 0.7, 1, 2), (0.5, 0.3, 3, 4))
    rows = gate.metric_rows(gate.measured("f", {}, before), [gate.measured("c", {}, after, before)])
    assert [row[4] for row in rows if row[:2] == ("c", "Dice")] == ["0.00 points"]
