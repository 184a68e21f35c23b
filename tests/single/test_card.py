"""The model card: three files that say the same, honest, self-contained, and without identifiers."""

from __future__ import annotations

import base64
import importlib.resources
import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from datasets import make_dataset

pytest.importorskip("matplotlib")

from hvd_imaging.compression import gate
from hvd_imaging.compression.gate import Difference, Limits, Measured
from hvd_imaging.config import PreprocessConfig, RunConfig, check
from hvd_imaging.errors import SetupError
from hvd_imaging.files import sha256_of_file
from hvd_imaging.inference.evaluate import Overlay
from hvd_imaging.models.spec import ModelSpec
from hvd_imaging.reporting import card as cards
from hvd_imaging.reporting.card import Card

# matplotlib on a newer pyparsing
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated - use.*:DeprecationWarning")

CASE = "0123456789abcdef"
EVIL = "<script>alert(1)</script> | `x` & [y](z)"


def overlay(rank="worst"):
    random = np.random.default_rng(0)
    mask = np.zeros((24, 24), np.uint8)
    mask[8:16, 8:16] = 1
    return Overlay(CASE, rank, "Dice 0.812", 7, random.integers(0, 255, (24, 24)).astype(np.uint8), mask, mask, (1.0, 1.0))


def estimate(value, interval=None, count=12):
    return {"value": value, "interval": interval, "count": count, "method": "bootstrap"}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data") / "dataset", samples=8)


@pytest.fixture(scope="module")
def card(manifest):
    spec = ModelSpec(
        task="segmentation", classes=("background", "ball"), patch=(8, 16, 16), channels=1,
        preprocess=PreprocessConfig(intensity="none"), model={"name": "unet3d", "filters": 4},
        dataset_hash=manifest.hash(), run="balls",
    )  # fmt: skip
    config = check(RunConfig, {"data": {"dataset": "d"}, "model": {"name": "unet3d", "filters": 4}}, "test")
    reference = Measured(
        "float", 1200, 1000, 300, 0, 2_000_000, {"one": 100.0, "all": 60.0}, 500_000_000,
        {"dice": estimate(0.91, [0.88, 0.93])}, spread_ms={"one": [95.0, 110.0], "all": None},
    )  # fmt: skip
    small = Measured(
        "tflite-int8", 300, 250, 150, 70, 1_000_000, {"one": 25.0, "all": 15.0}, 80_000_000,
        {"dice": estimate(0.908, [0.88, 0.93])}, {"dice": Difference(0.91, 0.908, -0.2, (-0.4, 0.1), 12)},
    )  # fmt: skip
    bad = replace(small, format="onnx-int8", differences={"dice": Difference(0.91, 0.89, -2.0, (-3.0, -1.0), 12)})
    limits = Limits()
    return Card(
        spec=spec, created="2026-01-31", data=cards.data_facts(manifest), training=cards.training_facts(config),
        steps=[{"do": "freeze_norms", "patches": 64, "epochs": 1}, {"do": "shrink", "by": 2, "outcome": "It is half as large."}],
        split="test", reference=reference, candidates=[small, bad], limits=limits,
        judged=gate.verdicts(reference, [small, bad], limits, "segmentation"),
        parity={"tflite-int8": {"max_abs_difference": 0.006, "same_answer": 0.9991, "patches": 4, "inputs": "dataset"}},
        files={"tflite-int8/model.tflite": "a" * 64}, versions={"tensorflow": "2.x", "horovod": None},
        machine={"cpu": "a processor", "cores": 2}, measured={"runs": {"one": 30, "all": 30}, "threads": {"one": 1, "all": 2}},
        commands=[("A NIfTI file:", "hvd-imaging predict tflite-int8 case.nii.gz mask.nii.gz")],
        overlays=[overlay(), overlay("best")], pictured="tflite-int8",
    )  # fmt: skip


@pytest.fixture(scope="module")
def written(card, tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    cards.write_card(folder, card)
    return {name: (folder / name).read_text(encoding="utf-8") for name in (cards.HTML, cards.MARKDOWN, cards.JSON)}


class Tags(HTMLParser):
    """Which tags and attributes a page has, and its text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


def test_the_three_files_say_the_same(written):
    facts = json.loads(written[cards.JSON])
    assert facts["schema"] == cards.SCHEMA and facts["medical_device"] is False
    verdicts = {one["format"]: one["released"] for one in facts["formats"]}
    assert verdicts == {"tflite-int8": True, "onnx-int8": False}
    assert facts["formats"][0]["parity"]["max_abs_difference"] == 0.006
    assert facts["formats"][0]["differences"]["dice"]["interval"] == [-0.4, 0.1]
    assert facts["formats"][1]["missed"] == ["metric_loss: Dice falls by 2.00 points (91.00 to 89.00), expected at most 0.5"]
    page = re.sub(r"\s+", " ", Tags(written[cards.HTML]).text)
    note = written[cards.MARKDOWN]
    for words in (
        "Released: tflite-int8. Not released: onnx-int8.", "Not a medical device", "Dice falls by 2.00 points",
        "-0.40 to +0.10", "300 B (4.0 x)", "25.0 ms (4.0 x)", "46.7%", "6.0e-03", "shrink: by 2. It is half as large.",
        "Norms take the statistics of 64 training patches and go into the convolutions before them. Then trained on for 1 epoch.",
        "a processor, 2 cores", "over 30 runs in fresh processes that take turns, and the middle half of them lies within 10% of it;", "a" * 64, "tensorflow 2.x", "hvd-imaging predict tflite-int8 case.nii.gz mask.nii.gz", "2026-01-31",
        facts["data"]["dataset_hash"], "8 x 16 x 16 voxels",
    ):  # fmt: skip
        assert words in page, words
        assert words in note, words
    assert "horovod" not in page


VNNI, AVX2 = ["avx2", "avx512f", "avx512bw", "avx512_vnni"], ["fma", "avx2"]


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (VNNI, "The times of tflite-int8 were measured on AVX-512 VNNI and hold for such processors only: on AVX2 without VNNI"),
        (AVX2, "measured on AVX2 without VNNI and hold for such processors only. That the answers are the same"),
    ],
)
def test_times_are_said_to_hold_for_the_processor_that_they_were_measured_on(card, sets, words):
    told = replace(card, measured={**card.measured, "instruction_sets": sets})
    note = cards.markdown(told, cards.sections(told)).replace("\\", "")
    assert words in note and f"({' '.join(sets)})" in note
    assert f"faster than the float model, on one thread and on all, on {'AVX-512 VNNI' if sets is VNNI else 'AVX2 without VNNI'}" in note
    float_only = replace(told, judged=dict.fromkeys(told.judged, ("faster",)))
    assert not cards.processor_notes(float_only) and not cards.processor_notes(card)


def test_the_page_stands_alone(written):
    found = Tags(written[cards.HTML])
    assert not {"script", "link", "iframe", "object"} & set(found.tags)
    pictures = [value for name, value in found.attributes if name == "src"]
    assert len(pictures) == 2 == found.tags.count("img")
    for picture in pictures:
        head, data = picture.split(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(data, validate=True).startswith(b"\x89PNG")
    assert "http:" not in written[cards.HTML] and "https:" not in written[cards.HTML]
    assert all(value for name, value in found.attributes if name == "alt")


def test_nothing_names_a_case_or_a_patient(written, manifest):
    names = {CASE, CASE[:8]} | {name for s in manifest.samples for name in (s.id, s.patient)}
    for name, text in written.items():
        assert [identifier for identifier in names if identifier in text] == [], name


def test_the_pictures_number_the_cases(card, monkeypatch):
    from hvd_imaging.reporting import plots

    seen = []

    def draw(overlays, classes, task, path):
        seen.extend(o.id for o in overlays)
        path.write_bytes(b"png")
        return path

    monkeypatch.setattr(plots, "overlay_sheet", draw)
    found = cards.pictures(card)
    assert seen == ["1", "2"]
    assert "tflite-int8" in found[-1]["caption"] and found[-1]["png"] == base64.b64encode(b"png").decode()
    assert len(cards.pictures(replace(card, overlays=()))) == 1


def test_names_from_outside_make_no_markup(card, tmp_path):
    spec = card.spec.model_copy(update={"classes": ("background", EVIL), "run": EVIL})
    cards.write_card(tmp_path, replace(card, spec=spec, notes=[EVIL], commands=[(EVIL, EVIL)], overlays=(), intended_use=EVIL))
    page = (tmp_path / cards.HTML).read_text()
    assert "<script" not in page and "alert(1)" in page
    note = (tmp_path / cards.MARKDOWN).read_text()
    outside_code = "\n".join(line for line in note.splitlines() if not line.startswith("    "))
    assert "<script" not in outside_code and "| `x`" not in outside_code and "[y](z)" not in outside_code
    assert json.loads((tmp_path / cards.JSON).read_text())["name"] == EVIL


def test_the_tables_of_the_markdown_are_whole(written):
    tables = re.findall(r"(?:^\|.*\n)+", written[cards.MARKDOWN], re.MULTILINE)
    assert len(tables) == 6
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_a_second_card_replaces_the_first(card, tmp_path):
    cards.write_card(tmp_path, replace(card, overlays=()))
    before = (tmp_path / cards.JSON).read_bytes()
    paths = cards.write_card(tmp_path, replace(card, overlays=()))
    assert (tmp_path / cards.JSON).read_bytes() == before
    assert sorted(path.name for path in paths) == sorted(path.name for path in tmp_path.iterdir())


def test_a_missing_package_is_named(card, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(SetupError, match=r"needs jinja2.*hvd_imaging\[train\]"):
        cards.write_card(tmp_path, card)
    assert list(tmp_path.iterdir()) == []


def test_the_template_is_part_of_the_package():
    from setuptools.config.setupcfg import read_configuration

    template = importlib.resources.files("hvd_imaging.reporting") / "templates/card.html.j2"
    assert template.is_file()
    with importlib.resources.as_file(template) as path:
        setup = path.parents[3] / "setup.cfg"
        patterns = read_configuration(str(setup))["options"]["package_data"]["hvd_imaging.reporting"]
        assert path in [found for pattern in patterns for found in path.parents[1].glob(pattern)]


# --- facts ----------------------------------------------------------------------------------------------------------


def test_data_are_counted(manifest):
    found = cards.data_facts(manifest)
    assert sum(found["cases"].values()) == 8 == sum(found["patients"].values())
    assert found["cases"] == manifest.counts() == found["with_class"]["ball"]
    assert found["modalities"] == {"CT": 8} and found["sites_in_all"] == 0
    assert found["spacing_mm"] == [[2.0, 1.0, 1.0]] * 2 and found["shape"] == [[16, 24, 24]] * 2
    json.dumps(found)


def test_sites_and_patients_are_counted_once(manifest):
    samples = [
        s.model_copy(update={"patient": "p", "site": "x" if i else "", "split": "test", "modality": "" if i else "MR"})
        for i, s in enumerate(manifest.samples)
    ]
    found = cards.data_facts(manifest.model_copy(update={"samples": tuple(samples)}))
    assert found["patients"] == {"train": 0, "val": 0, "test": 1}
    assert found["sites"]["test"] == found["sites_in_all"] == 1
    assert found["modalities"] == {"MR": 1, "unknown": 7}


def test_classes_of_a_classification_are_counted(tmp_path):
    found = cards.data_facts(make_dataset(tmp_path / "d", "classification", samples=6, shape=(1, 24, 24)))
    assert sum(found["with_class"]["empty"].values()) == sum(found["with_class"]["ball"].values()) == 3


def test_hashes_are_of_all_files_but_the_card(tmp_path):
    (tmp_path / "tflite").mkdir()
    (tmp_path / "tflite/model.tflite").write_bytes(b"model")
    (tmp_path / cards.HTML).write_text("card")
    assert cards.file_hashes(tmp_path) == {"tflite/model.tflite": sha256_of_file(tmp_path / "tflite/model.tflite")}


# --- honesty --------------------------------------------------------------------------------------------------------


def test_few_patients_and_one_site_are_said(card):
    found = " ".join(cards.limitations(card))
    cases = card.data["cases"]["test"]
    assert f"{cases} case{'s' * (cases != 1)} of" in found and "institution of the cases is not recorded" in found
    many = {**card.data, "patients": {"test": 50}, "cases": {"test": 50}, "sites_in_all": 1}
    found = " ".join(cards.limitations(replace(card, data=many, split="test", notes=["Own words."])))
    assert "rest on" not in found and "from one institution" in found and "Own words." in found
    assert "institution" not in " ".join(cards.limitations(replace(card, data={**many, "sites_in_all": 2})))
    assert "chose the best epoch" in " ".join(cards.limitations(replace(card, split="val")))


def test_what_the_float_model_does_badly_is_said(card):
    assert cards.weaknesses(card) == []
    weak = replace(card, reference=replace(card.reference, metrics={"dice": estimate(0.31)}))
    assert len(cards.weaknesses(weak)) == 1 and "finds ball badly (mean Dice 0.31)" in cards.weaknesses(weak)[0]
    two = replace(
        card,
        spec=card.spec.model_copy(update={"classes": ("background", "ball", "dot")}),
        reference=replace(
            card.reference, metrics={"dice": estimate(0.6), "dice: ball": estimate(0.9), "dice: dot": estimate(0.3)}
        ),
    )
    assert ["dot" in text and "ball" not in text for text in cards.weaknesses(two)] == [True]
    guess = replace(
        card,
        spec=card.spec.model_copy(update={"task": "classification"}),
        reference=replace(card.reference, metrics={"auc": estimate(0.55, [0.42, 0.68])}),
    )
    assert "not shown to be better than guessing" in cards.weaknesses(guess)[0]
    sure = replace(guess, reference=replace(card.reference, metrics={"auc": estimate(0.95, [0.9, 0.98])}))
    assert cards.weaknesses(sure) == []
    assert cards.weaknesses(replace(sure, reference=replace(card.reference, metrics={"auc": estimate(1.0)}))) == []


def test_losses_outside_of_the_limits_are_said(card):
    kept = card.candidates[0]
    worse = {
        **kept.differences,
        "dice: ball": Difference(0.9, 0.87, -3.0, (-4.0, -2.0), 12),
        "dice: dot": Difference(0.9, 0.9, 0.0, None, 12),
        "hd95_mm": Difference(4.0, 9.0, 5.0, (1.0, 8.0), 12),
    }
    found = cards.hidden_losses(replace(card, candidates=[replace(kept, differences=worse), card.candidates[1]]))
    assert len(found) == 2
    assert "Dice: ball alone falls by 3.00 points" in found[0] and "HD95 is larger by 5.00 mm" in found[1]
    assert cards.hidden_losses(card) == []


def test_nothing_released_is_the_first_sentence(card):
    refused = replace(card, judged=dict.fromkeys(card.judged, ("missed",)))
    assert refused.released == [] and "none is released" in cards.summary(refused)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"intensity": "window", "window": [-100, 300]}, "-100 to 300 become 0 to 1"),
        ({"intensity": "percentile"}, "quantiles 0.005 to 0.995"),
        ({"intensity": "zscore"}, "mean +- 4 standard deviations"),
        ({"spacing": [5, 4, 4]}, "to 5 x 4 x 4 mm"),
        ({"crop": "body"}, "to the body (above -500 HU), with 5 mm"),
        ({"projection": "mip", "projection_slab": [0.25, 0.75]}, "maximum intensity over the depth from 0.25 to 0.75"),
        ({"units": "stored"}, "stored values"),
    ],
)
def test_preprocessing_is_told_in_words(card, settings, words):
    spec = card.spec.model_copy(update={"preprocess": check(PreprocessConfig, settings, "test")})
    assert words in " ".join(text for _, text in cards.preprocessing_rows(spec))


def test_steps_are_told_in_words():
    pattern = {"do": "weights", "sparsity": 0.8, "pattern": [2, 4], "epochs": 3}
    assert cards.describe_step(pattern) == (
        "The smallest weights become zeros: 2 in every 4 neighbouring input channels. Then trained on for 3 epochs."
    )
    assert cards.describe_step({**pattern, "pattern": None}).startswith("The smallest weights become zeros, 80% of them;")
    filters = {"do": "filters", "remove": 0.5, "measure": "macs", "patches": 8, "epochs": 1, "rounds": 2}
    assert cards.describe_step(filters).endswith("on 8 training patches. Then trained on for 1 epoch, in 2 rounds of both.")
    assert cards.describe_step({"do": "filters", "outcome": "Done."}) == "filters. Done."
    assert cards.describe_step({"do": "shrink", "by": 2}) == "shrink: by 2."
