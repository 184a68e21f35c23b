"""The pictures: they exist, hold what was drawn, and outlines are exact."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from hvd_imaging.inference.evaluate import Overlay
from hvd_imaging.reporting import plots
from hvd_imaging.reporting.curves import loss_panels

# matplotlib on a newer pyparsing
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated - use.*:DeprecationWarning")


def pixels(path):
    from matplotlib.image import imread

    return imread(path)[..., :3]


def has_colour(image, hexadecimal):
    wanted = np.array([int(hexadecimal[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return bool((np.abs(image - wanted).max(-1) < 0.04).any())


def overlay(rank="worst", spacing=(1.0, 1.0), name="a" * 16):
    random = np.random.default_rng(0)
    y, x = np.mgrid[:60, :80]
    truth = ((y - 30) ** 2 + (x - 40) ** 2 < 200).astype(np.uint8)
    found = ((y - 33) ** 2 + (x - 45) ** 2 < 180).astype(np.uint8)
    image = (random.normal(70, 15, (60, 80)) + 90 * truth).clip(0, 255).astype(np.uint8)
    return Overlay(name, rank, "Dice 0.812", 7, image, truth, found, spacing)


def epochs(score="dice", count=8):
    return [
        {
            "event": "epoch",
            "epoch": e,
            "loss": 1.2 * 0.8**e + 0.1,
            "val_loss": 1.2 * 0.82**e + 0.2,
            f"val_{score}": 1 - 0.7**e,
            "learning_rate": 1e-3 * (1 + np.cos(np.pi * e / 8)) / 2,
            "best": e == 6,
        }
        for e in range(count)
    ]


TITLE = "soft Dice loss + cross-entropy"


def test_losses_of_two_kinds_never_share_a_plot():
    both = [event | {"loss_title": TITLE} for event in epochs()]
    ((title, lines),) = loss_panels(both)
    assert title == f"Loss: {TITLE}" and list(lines) == ["training (patches)", "validation (whole cases)"]
    # A run that does not say what its losses are: one plot each.
    plain = loss_panels(epochs())
    assert [(title, list(lines)) for title, lines in plain] == [
        ("Training loss", ["training (patches)"]), ("Cross-entropy of the validation", ["validation (whole cases)"]),
    ]  # fmt: skip
    # Resumed by a program that says it: each point stands where it belongs.
    mixed = dict(loss_panels(epochs()[:3] + both[3:]))
    assert len(mixed[f"Loss: {TITLE}"]["training (patches)"]) == 8 and len(mixed[f"Loss: {TITLE}"]["validation (whole cases)"]) == 5
    assert len(mixed["Cross-entropy of the validation"]["validation (whole cases)"]) == 3
    assert loss_panels([]) == loss_panels([{"epoch": 0, "loss": float("inf")}]) == []
    ((_, lines),) = loss_panels([event | {"loss_title": "cross-entropy"} for event in epochs("accuracy")])
    assert list(lines) == ["training", "validation"]


def test_learning_curves_of_both_tasks_and_of_gaps(tmp_path):
    for score in ("dice", "accuracy"):
        image = pixels(plots.learning_curves([e | {"loss_title": TITLE} for e in epochs(score)], tmp_path / f"{score}.png"))
        assert image.shape == (540, 1800, 3)
        assert has_colour(image, plots.TRAIN) and has_colour(image, plots.VAL)
    sparse = [{"epoch": 0, "loss": float("nan")}, {"epoch": 1, "loss": 1.0, "val_loss": None}]
    assert plots.learning_curves(sparse, tmp_path / "sparse.png").exists()


def test_roc_of_two_and_of_three_classes(tmp_path):
    random = np.random.default_rng(0)
    truth = random.integers(0, 2, 60)
    p = 1 / (1 + np.exp(-(random.normal(size=60) + 2 * truth - 1)))
    two = np.stack([1 - p, p], 1)
    auc = {"value": 0.9, "interval": [0.8, 0.96]}
    path = plots.roc(truth, two, ["no", "yes"], auc, tmp_path / "two.png")
    assert path is not None and has_colour(pixels(path), plots.VAL)
    truth = random.integers(0, 3, 60)
    raw = random.random((60, 3)) + np.eye(3)[truth] * 0.6
    three = raw / raw.sum(1, keepdims=True)
    path = plots.roc(truth, three, ["a", "b", "c"], {"value": 0.8, "interval": None}, tmp_path / "three.png")
    assert path is not None
    image = pixels(path)
    assert all(has_colour(image, colour) for colour in plots.CLASS_COLOURS[:3])
    assert plots.roc(np.ones(4, int), two[:4], ["no", "yes"], auc, tmp_path / "none.png") is None
    assert not (tmp_path / "none.png").exists()


def test_confusion_matrix_with_an_absent_class(tmp_path):
    matrix = np.array([[930000, 1200, 0], [300, 5200, 10], [0, 0, 0]])
    image = pixels(plots.confusion(matrix, ["background", "lesion", "edema"], tmp_path / "c.png", "voxels"))
    assert image.std() > 0.05


def test_overlays_show_both_outlines_in_true_proportion(tmp_path):
    two = [overlay("worst"), overlay("best", name="b" * 16)]
    image = pixels(plots.overlay_sheet(two, ["background", "lesion"], "segmentation", tmp_path / "o.png"))
    assert has_colour(image, plots.TRUTH) and has_colour(image, plots.PREDICTION)
    flat = [overlay("worst", spacing=(3.0, 1.0))]
    tall = pixels(plots.overlay_sheet(flat, ["background", "lesion"], "segmentation", tmp_path / "t.png"))
    assert tall.shape[0] > tall.shape[1]


def test_the_caption_names_slice_axis_and_class(tmp_path):
    chosen = replace(overlay(), slices=20, focus=1, why="'lesion', Dice 0.812: here 40 missing, 31 too many")
    assert plots.caption(chosen) == ["Worst: Dice 0.812", "case aaaaaaaa, slice 7 of 0 to 19 along D", "'lesion', Dice 0.812: here 40 missing, 31 too many"]
    assert plots.caption(overlay("best")) == ["Best: Dice 0.812", "case aaaaaaaa, its only slice"]
    # long names of classes are not cut
    lines = plots.caption(replace(chosen, why=f"'{'long ' * 20}' missed: 3 voxels here"))
    assert len(lines) == 5 and max(map(len, lines)) <= 58 and " ".join(lines).endswith("missed: 3 voxels here")
    image = plots.overlay_sheet([chosen], ["background", "lesion", "edema"], "segmentation", tmp_path / "o.png")
    assert has_colour(pixels(image), plots.TRUTH)


def test_outlines_are_the_exact_edges_of_the_pixels():
    mask = np.zeros((5, 6), bool)
    mask[1:3, 2:5] = True
    ((x, y),) = plots.outlines(mask)
    assert (x.min(), x.max(), y.min(), y.max()) == (1.5, 4.5, 0.5, 2.5)
    assert (x[0], y[0]) == (x[-1], y[-1])
    area = 0.5 * abs(np.sum(x[:-1] * y[1:] - x[1:] * y[:-1]))
    assert area == 6
    # a hole, a diagonal neighbour and the border: the signed areas of all lines add up to the mask's
    mask = np.random.default_rng(0).random((12, 9)) < 0.5
    signed = sum(0.5 * np.sum(x[:-1] * y[1:] - x[1:] * y[:-1]) for x, y in plots.outlines(mask))
    assert signed == mask.sum()
    assert plots.outlines(np.zeros((3, 3), bool)) == []


def test_an_evaluation_gets_all_its_pictures(tmp_path):
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in epochs("accuracy")))
    report = {
        "split": "test",
        "task": "classification",
        "classes": ["no", "yes"],
        "cases": [
            {"id": str(i), "label": i % 2, "predicted": i % 2, "probabilities": [0.6 - 0.2 * (i % 2), 0.4 + 0.2 * (i % 2)]}
            for i in range(6)
        ],
        "confusion": [[3, 0], [0, 3]],
        "mean": {"auc": {"value": 1.0, "interval": None}},
    }
    written = plots.draw_evaluation(tmp_path, report, [overlay()])
    names = {path.name for path in written}
    assert names == {"learning-curves.png", "confusion-test.png", "roc-test.png", "overlays-test.png"}
    assert {path.name for path in (tmp_path / "plots").iterdir()} == names
