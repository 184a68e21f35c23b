"""`compress` from a run folder to released files: steps, resume, the gate's verdict, the card, and what is refused."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import tensorflow as tf
import yaml
from click.testing import CliRunner
from datasets import make_dataset
from runs import make_run

from hvd_imaging.cli.compress import command
from hvd_imaging.compression import measure, run, stages
from hvd_imaging.compression.recipe import Recipe
from hvd_imaging.compression.run import compress
from hvd_imaging.config import check
from hvd_imaging.errors import DatasetError, RunError
from hvd_imaging.inference.predictors import open_predictor
from hvd_imaging.parallel.horovod import Horovod
from hvd_imaging.training.run import load_run, load_trained

LOOSE = {"metric_loss": None, "faster": None, "smaller": 1.0}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    make_dataset(folder / "seg", samples=6)
    tf.keras.utils.set_random_seed(0)
    make_run(folder / "unet", folder / "seg", filters=8, norm="group")
    return folder


@pytest.fixture
def measured_at_once(monkeypatch):
    """Sizes are real; times are not what is tested here (test_compression_measure.py)."""

    def sizes_only(folders, repeats=1, progress=None):
        times = {"latency_ms": {"one": 1.0, "all": 1.0}, "spread_ms": {}, "runs": {"one": 1}, "threads": {"one": 1}, "instruction_sets": ["avx2"], "reason": ""}
        return {name: {**measure.sizes(folder), **times, "peak_bytes": 1} for name, folder in folders.items()}

    monkeypatch.setattr(run, "measure_models", sizes_only)


def recipe(*steps, formats=("tflite-int8",), **more):
    values = {"steps": list(steps), "formats": list(formats), "split": "val", "calibration": 4, "limits": LOOSE}
    return check(Recipe, values | more, "recipe")


FREEZE = {"do": "freeze_norms", "patches": 4, "epochs": 1}


def test_steps_lead_to_a_smaller_network_and_an_integer_file(runs, tmp_path, measured_at_once):
    wanted = recipe(
        FREEZE,
        {"do": "filters", "remove": 0.5, "measure": "parameters", "patches": 4, "epochs": 1, "rounds": 2},
        {"do": "weights", "sparsity": 0.5, "patches": 4, "epochs": 1},
        {"do": "quantize", "patches": 4, "epochs": 1},
    )
    out = tmp_path / "out"
    result = compress(runs / "unet", wanted, out, Horovod())
    assert [step["stage"] for step in result.steps] == [
        "01-freeze_norms", "02-filters-1", "03-filters-2", "04-weights", "05-quantize",
    ]  # fmt: skip
    before, after = result.reference, result.candidates[0]
    assert after.parameters < 0.6 * before.parameters and after.macs < before.macs
    # The logits' layer is not pruned, biases neither.
    assert after.zeros > 0.4 * after.parameters
    assert result.steps[3]["zeros"] <= after.zeros + 2  # training with rounding has kept them
    assert (out / "model/architecture.json").is_file()

    written = json.loads((out / "compress.json").read_text())
    assert written["formats"][0]["format"] == "tflite-int8" and written["reference"]["parameters"] == before.parameters
    released = out / result.place("tflite-int8")
    assert released.is_dir() and result.released == ["tflite-int8"]
    assert after.bytes < before.bytes / 3
    # The compressed network is a run folder like any other, and the export's source.
    network = load_trained(load_run(out / "model"))
    assert not any("norm" in layer.name for layer in network.layers)
    small, exported = open_predictor(out / "model"), open_predictor(released)
    image = np.random.default_rng(0).random((1, *small.spec.patch, 1), np.float32)
    assert np.abs(small(image) - exported(image)).mean() < 0.05

    # Once more: nothing is trained again, the limits may be others.
    strict = recipe(*[s.model_dump(mode="json") for s in wanted.steps], limits={"smaller": 1000, "metric_loss": None, "faster": None})
    with pytest.raises(RunError, match="--resume"):
        compress(runs / "unet", strict, out, Horovod())
    again = compress(runs / "unet", strict, out, Horovod(), resume=True)
    assert again.released == [] and "smaller" in again.judged["tflite-int8"][0]
    assert (out / "refused/tflite-int8").is_dir() and not (out / "released").exists()
    with pytest.raises(RunError, match="steps is another one"):
        compress(runs / "unet", recipe(FREEZE), out, Horovod(), resume=True)


def test_the_command_writes_a_card_and_says_what_was_missed(runs, tmp_path, measured_at_once):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({
        "steps": [FREEZE | {"epochs": 0}, {"do": "cluster", "clusters": 16, "epochs": 0}],
        "formats": ["tflite"], "split": "val", "limits": LOOSE | {"smaller": 50.0},
    }))  # fmt: skip
    arguments = [str(runs / "unet"), "--recipe", str(path), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert result.exit_code == 11, result.output
    assert "tflite: not released: smaller" in result.stdout and "released: nothing" in result.stdout
    card = (tmp_path / "out/MODEL_CARD.md").read_text()
    assert "Norms take the statistics" in card and "share 16 values" in card and "refused/tflite" in card
    assert (tmp_path / "out/model_card.html").is_file()
    network = load_trained(load_run(tmp_path / "out/model"))
    assert all(len(np.unique(kernel)) <= 16 for kernel in stages.kernels(network).values())
    result = CliRunner().invoke(
        command, [*arguments, "--resume", "--json", "--set", "limits.smaller=1"], catch_exceptions=False
    )
    assert result.exit_code in (0, 11) and json.loads(result.stdout)["recipe"]["limits"]["smaller"] == 1


def test_what_can_not_be_calibrated_is_refused_before_any_work(runs, tmp_path):
    with pytest.raises(DatasetError, match="no manifest.json"):
        compress(runs / "unet", recipe(FREEZE), tmp_path / "out", Horovod(), dataset=tmp_path / "nowhere")
    make_dataset(tmp_path / "nothing", samples=3, split=(1.0, 0.0))
    shutil.copytree(runs / "seg", tmp_path / "other")
    manifest = json.loads((tmp_path / "other/manifest.json").read_text())
    manifest["preprocess"]["spacing"] = [9, 9, 9]
    (tmp_path / "other/manifest.json").write_text(json.dumps(manifest))
    for name, fault in (("nothing", r"split|cases"), ("other", r"preprocess|manifest")):
        with pytest.raises(RunError, match="expected the dataset"):
            compress(runs / "unet", recipe(FREEZE), tmp_path / "out", Horovod(), dataset=tmp_path / name)
        # the same at the place where the run's dataset was
        run = tmp_path / "far" / name / "a/b/run"
        shutil.copytree(runs / "unet", run)
        values = yaml.safe_load((run / "run.yaml").read_text())
        values["data"]["dataset"] = str(tmp_path / name)
        (run / "run.yaml").write_text(yaml.safe_dump(values))
        with pytest.raises((DatasetError, RunError), match=fault):
            compress(run, recipe(FREEZE), tmp_path / "out", Horovod())
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_else_in_it_is_safe(runs, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(RunError, match="not a compression"):
        compress(runs / "unet", recipe(FREEZE), tmp_path, Horovod(), resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_unknown_layer_is_named_before_any_work(tmp_path, monkeypatch):
    from hvd_imaging import models

    def odd(spec):
        image = tf.keras.Input((*spec.patch, spec.channels))
        x = tf.keras.layers.Conv3D(4, 3, padding="same", name="first")(image)
        x = tf.keras.layers.Lambda(lambda v: v * 2.0, name="mine")(x)
        return tf.keras.Model(image, tf.keras.layers.Conv3D(len(spec.classes), 1, name="logits")(x), name="odd")

    monkeypatch.setitem(models.BUILDERS, "odd", odd)
    make_dataset(tmp_path / "seg", samples=5)
    make_run(tmp_path / "run", tmp_path / "seg", name="odd")
    with pytest.raises(RunError, match=r"mine.*Lambda"):
        compress(tmp_path / "run", recipe(), tmp_path / "out", Horovod())
    assert not (tmp_path / "out").exists()
