"""Evaluation: figures by hand on known predictions, any number of ranks alike, a whole run end to end."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest
from click.testing import CliRunner
from datasets import make_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import PATCH, make_run

from hvd_imaging.communicator import Alone
from hvd_imaging.config import ModelConfig, PreprocessConfig
from hvd_imaging.errors import DatasetError, RunError
from hvd_imaging.inference.evaluate import (
    best_plane,
    check_dataset,
    evaluate_with,
    extremes,
    failing_class,
    failing_plane,
    segmentation_figures,
    summarize,
    why,
)
from hvd_imaging.models.spec import ModelSpec
from hvd_imaging.shards import manifest as manifests
from hvd_imaging.world import World

# matplotlib on a newer pyparsing
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated - use.*:DeprecationWarning")


def spec_of(manifest, patch=PATCH):
    return ModelSpec(
        task=manifest.task,
        classes=manifest.classes,
        patch=patch,
        channels=1,
        preprocess=manifest.preprocess,
        model=ModelConfig(name="fake"),
        dataset_hash=manifest.hash(),
        run="fake",
    )


def threshold(batch):
    """The balls of `make_dataset` are at 0.7 on 0.2."""
    p = 1 / (1 + np.exp(-40 * (batch - 0.45)))
    return np.concatenate([1 - p, p], -1).astype(np.float32)


class Threads:
    """Ranks as threads, exchanging only what JSON can hold."""

    def __init__(self, size):
        self.barrier = threading.Barrier(size, timeout=60)
        self.slots = [None] * size

    def rank(self, rank):
        outer = self

        class Rank:
            world = World(rank, len(outer.slots))

            def gather(self, value):
                outer.slots[rank] = json.dumps(value)
                outer.barrier.wait()
                found = [json.loads(text) for text in outer.slots]
                outer.barrier.wait()
                return found

        return Rank()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_dataset(folder / "seg", samples=8, split=(0.2, 0.6))
    make_dataset(folder / "cls", "classification", 12, (1, 32, 32), split=(0.2, 0.5))
    return folder


def test_a_right_model_scores_high_on_known_balls(data):
    manifest = manifests.load(data / "seg")
    report, overlays = evaluate_with(threshold, spec_of(manifest), data / "seg", manifest, "test", Alone())
    assert [case["id"] for case in report["cases"]] == [s.id for s in manifest.of_split("test")]
    assert report["mean"]["dice"]["value"] > 0.98
    assert report["mean"]["hd95_mm"]["value"] < 2.1
    assert report["mean"]["accuracy"]["value"] > 0.99
    assert report["missed"] == {"ball": 0} and report["invented"] == {"ball": 0}
    assert np.sum(report["confusion"]) == 16 * 24 * 24 * len(report["cases"])
    assert [o.rank for o in overlays].count("worst") == 2
    for overlay in overlays:
        assert overlay.image.shape == (24, 24) and overlay.truth.any() and overlay.spacing == (1.0, 1.0)
    json.dumps(report, allow_nan=False)


@pytest.mark.parametrize("task", ["seg", "cls"])
@pytest.mark.parametrize("size", [2, 3, 7])
def test_any_number_of_ranks_gives_the_same_report(data, task, size):
    manifest = manifests.load(data / task)
    patch = PATCH if task == "seg" else (1, 32, 32)

    def predict(batch):
        p = threshold(batch)
        if task == "seg":
            return p
        share = p[..., 1].mean(axis=(1, 2, 3))
        return np.stack([1 - share, share], -1)

    arguments = (predict, spec_of(manifest, patch), data / task, manifest, "test")
    alone, overlays = evaluate_with(*arguments, Alone())
    threads = Threads(size)
    found: dict[int, tuple] = {}

    def run(rank):
        found[rank] = evaluate_with(*arguments, threads.rank(rank))

    workers = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    [worker.start() for worker in workers]
    [worker.join() for worker in workers]
    assert len(found) == size
    for report, shown in found.values():
        assert report == alone
        assert [(o.id, o.rank, o.title) for o in shown] == [(o.id, o.rank, o.title) for o in overlays]
        for a, b in zip(shown, overlays, strict=True):
            np.testing.assert_array_equal(a.prediction, b.prediction)


def test_figures_of_one_case_by_hand():
    truth = np.zeros((2, 4, 4), np.uint8)
    truth[0, 1:3, 1:3] = 1  # 4 voxels
    found = np.zeros_like(truth)
    found[0, 1:3, 2:4] = 1  # 4 voxels, 2 shared
    found[1, 0, 0] = 2
    figures = segmentation_figures(truth, found, (5, 1, 1), ["background", "a", "b", "c"])
    assert figures["dice"] == {"a": 0.5, "b": 0.0, "c": None}
    assert figures["recall"]["a"] == 0.5 and figures["precision"]["a"] == 0.5
    assert figures["specificity"]["a"] == pytest.approx(26 / 28)
    assert figures["hd95_mm"] == {"a": 1.0, "b": None, "c": None}
    assert figures["accuracy"] == pytest.approx(27 / 32)


def test_missing_values_are_left_out_of_means_and_counted(data):
    manifest = manifests.load(data / "seg")
    spec = spec_of(manifest)
    empty, full = np.zeros((2, 4, 4), np.uint8), np.ones((2, 4, 4), np.uint8)
    half = full.copy()
    half[0] = 0
    pairs = [(empty, empty), (empty, half), (half, empty), (full, half)]
    rows = [{"id": str(i), **segmentation_figures(a, b, (1, 1, 1), spec.classes)} for i, (a, b) in enumerate(pairs)]
    report = summarize(rows, spec, "test", "0")
    dice = report["mean"]["dice"]
    assert dice["count"] == 3 and dice["value"] == pytest.approx((0 + 0 + 2 / 3) / 3)
    assert report["mean"]["hd95_mm"]["count"] == 1
    assert report["missed"] == {"ball": 1} and report["invented"] == {"ball": 1}
    json.dumps(report, allow_nan=False)


def test_classification_figures_by_hand(data):
    spec = spec_of(manifests.load(data / "cls"), (1, 32, 32))
    rows = [
        {"id": str(i), "label": label, "predicted": int(p > 0.5), "probabilities": [1 - p, p]}
        for i, (label, p) in enumerate([(1, 0.9), (1, 0.8), (1, 0.4), (0, 0.5), (0, 0.3), (0, 0.1)])
    ]
    mean = summarize(rows, spec, "test", "0")["mean"]
    assert mean["accuracy"]["value"] == pytest.approx(5 / 6)
    assert mean["recall"]["value"] == pytest.approx(2 / 3)
    assert mean["specificity"]["value"] == 1
    assert mean["auc"]["value"] == pytest.approx(8 / 9) and mean["auc"]["method"] == "delong"
    assert mean["recall"]["interval"] == pytest.approx([0.2077, 0.9385], abs=1e-4)  # Wilson, 2 of 3


def test_the_slice_shown_holds_the_most_truth():
    truth, found = np.zeros((2, 5, 4, 4), np.uint8)
    assert best_plane(truth, found) == 2
    found[4, 0, 0] = 1
    assert best_plane(truth, found) == 4
    truth[1, :2] = 1
    assert best_plane(truth, found) == 1


CLASSES = ("background", "a", "b", "c")


def _told(truth, found):
    """(class, slice, caption) of the slice that stands for a failure."""
    dice = segmentation_figures(truth, found, (1.0, 1.0, 1.0), CLASSES)["dice"]
    focus = failing_class(truth, found, list(dice.values()))
    plane = failing_plane(truth, found, focus)
    return focus, plane, why(truth, found, plane, focus, CLASSES, dice)


def test_the_slice_of_a_bad_case_shows_the_class_that_fails():
    truth, found = np.zeros((2, 6, 8, 8), np.uint8)
    assert _told(truth, found) == (0, 3, "nothing marked, nothing found")
    truth[1], found[1] = 1, 1  # large, and right
    assert _told(truth, found) == (1, 1, "'a': no voxel is wrong")
    truth[4, :2, :2] = 2
    assert _told(truth, found) == (2, 4, "'b' missed: 4 voxels here")
    found[5, :3, :3] = 3  # as bad, and more of it
    assert _told(truth, found) == (3, 5, "'c' invented: 9 voxels here")
    truth[0, :4, :4] = truth[5, :1, :1] = 3
    assert _told(truth, found) == (2, 4, "'b' missed: 4 voxels here")
    found[4, :2, 1:3] = 2
    focus, plane, caption = _told(truth, found)
    assert (focus, plane) == (3, 0) and caption == "'c', Dice 0.077: here 16 missing, 0 too many"
    # one slice
    assert _told(truth[4:5], found[4:5]) == (2, 0, "'b', Dice 0.500: here 2 missing, 2 too many")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5)))
def test_whatever_fails_is_in_the_slice_that_is_shown(seed, foreground, shape):
    random = np.random.default_rng(seed)
    truth, found = (random.integers(0, foreground + 1, shape).astype(np.uint8) * (random.random(shape) < random.random()) for _ in range(2))
    dice = list(segmentation_figures(truth, found, (3.0, 1.0, 1.0), CLASSES[: foreground + 1])["dice"].values())
    focus = failing_class(truth, found, dice)
    plane = failing_plane(truth, found, focus)
    known = [value for value in dice if value is not None]
    assert (focus == 0) == (not known)
    if known and min(known) < 1:
        assert dice[focus - 1] == min(known)
        wrong = ((truth == focus) != (found == focus)).sum((1, 2))
        assert wrong[plane] == wrong.max() > 0


def test_no_case_is_both_worst_and_best():
    def rows(*dice):
        return [{"id": str(i), "dice": {"a": d}} for i, d in enumerate(dice)]

    assert extremes(rows(0.5), "segmentation") == [("0", "worst")]
    assert extremes(rows(0.5, 0.9, 0.1), "segmentation") == [("2", "worst"), ("0", "worst"), ("1", "best")]
    five = extremes(rows(0.5, 0.9, 0.1, None, 0.7, 0.6), "segmentation")
    assert five == [("2", "worst"), ("0", "worst"), ("1", "best"), ("4", "best")]
    assert extremes(rows(None), "segmentation") == [("0", "worst")]


def test_another_dataset_is_refused(data):
    manifest = manifests.load(data / "seg")
    spec = spec_of(manifest)
    assert check_dataset(manifest, spec, data / "seg", "test") is manifest
    other = spec.model_copy(update={"classes": ("background", "liver")})
    with pytest.raises(RunError, match=r"classes is .*ball.*expected .*liver"):
        check_dataset(manifest, other, data / "seg", "test")
    other = spec.model_copy(update={"preprocess": PreprocessConfig(spacing=(1, 1, 1))})
    with pytest.raises(RunError, match=r"preprocess"):
        check_dataset(manifest, other, data / "seg", "test")


def test_a_split_without_cases_is_refused(tmp_path):
    manifest = make_dataset(tmp_path / "d", samples=4, split=(0.25, 0))
    with pytest.raises(DatasetError, match=r"no cases in the split 'test' \(found: train 3, val 1, test 0\)"):
        check_dataset(manifest, spec_of(manifest), tmp_path / "d", "test")


def test_the_command_writes_report_table_and_pictures(data, tmp_path):
    from hvd_imaging.cli.evaluate import command

    run = make_run(tmp_path / "run", data / "seg")
    result = CliRunner().invoke(command, [str(run), "--json", str(tmp_path / "copy.json")], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "Dice" in result.stdout and "95% interval" in result.stdout
    report = json.loads((run / "evaluation-test.json").read_text())
    assert json.loads((tmp_path / "copy.json").read_text()) == report
    assert report["task"] == "segmentation" and report["split"] == "test"
    pictures = {"learning-curves.png", "confusion-test.png", "overlays-test.png"}
    assert {path.name for path in (run / "plots").iterdir()} == pictures

    result = CliRunner().invoke(command, [str(run), "--split", "val", "--no-plots", "--json", "-"])
    assert json.loads(result.stdout)["split"] == "val"
    assert {path.name for path in (run / "plots").iterdir()} == pictures


def test_the_command_evaluates_a_classifier(data, tmp_path):
    from hvd_imaging.cli.evaluate import command

    run = make_run(tmp_path / "run", data / "cls", "classification")
    result = CliRunner().invoke(command, [str(run)], catch_exceptions=False)
    assert result.exit_code == 0 and "AUC" in result.stdout
    case = json.loads((run / "evaluation-test.json").read_text())["cases"][0]
    assert set(case) == {"id", "label", "predicted", "probabilities"}
    assert sum(case["probabilities"]) == pytest.approx(1)
    assert (run / "plots/roc-test.png").exists() and (run / "plots/overlays-test.png").exists()


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    from hvd_imaging.inference.evaluate import evaluate

    with pytest.raises(RunError, match="not a run folder"):
        evaluate(tmp_path, "test", Alone())
