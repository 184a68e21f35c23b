"""Exports: they agree with the network, stand alone, and leave nothing behind when refused."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from datasets import make_dataset
from runs import make_run

from hvd_imaging.errors import RunError
from hvd_imaging.export import export_run, parity
from hvd_imaging.inference.predictors import open_predictor
from hvd_imaging.models.spec import ModelSpec


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    make_dataset(folder / "seg", samples=5)
    make_dataset(folder / "cls", "classification", 10, (1, 32, 32))
    make_run(folder / "unet", folder / "seg")
    make_run(folder / "deep", folder / "seg", depth=3, norm="group", deep_supervision=True)
    make_run(folder / "vgg", folder / "cls", "classification")
    return folder


@pytest.mark.parametrize(
    "name, kind",
    [("unet", "savedmodel"), ("unet", "onnx"), ("deep", "keras"), ("deep", "tflite"), ("deep", "onnx"), ("vgg", "savedmodel"),
     ("vgg", "tflite"), ("vgg", "onnx")],
)  # fmt: skip
def test_an_export_agrees_with_the_network_and_stands_alone(runs, tmp_path, name, kind):
    result = export_run(runs / name, kind, tmp_path / "out")
    assert result.passed and result.inputs == "dataset" and result.patches >= 4
    assert result.same_answer > 0.999
    recorded = json.loads((tmp_path / "out/parity.json").read_text())
    assert recorded["max_abs_difference"] == result.max_abs_difference
    model = {"keras": "model.keras", "savedmodel": "saved_model", "tflite": "model.tflite", "onnx": "model.onnx"}[kind]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.json", "parity.json", "golden.npz", "export.json", model}
    assert not list(tmp_path.glob(".out*"))

    shutil.move(tmp_path / "out", tmp_path / "moved")
    exported, trained = open_predictor(tmp_path / "moved"), open_predictor(runs / name)
    assert exported.spec == ModelSpec.load(runs / name) and exported.kind == kind
    batch = np.random.default_rng(3).random((3, *trained.spec.patch, 1), np.float32)
    a, b = trained(batch), exported(batch)
    assert a.dtype == b.dtype == np.float32 and a.shape == b.shape
    np.testing.assert_allclose(a, b, atol=1e-4)
    np.testing.assert_allclose(b.sum(-1), 1, atol=1e-5)


def test_without_its_dataset_a_run_is_compared_on_noise(runs, tmp_path):
    spec = ModelSpec.load(runs / "unet")
    patches, inputs = parity.parity_patches(spec, tmp_path / "gone")
    assert inputs == "random" and patches.shape == (4, 8, 16, 16, 1)
    np.testing.assert_array_equal(patches, parity.parity_patches(spec, tmp_path / "gone")[0])


def test_an_export_that_disagrees_is_refused_and_removed(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(
        parity, "compare", lambda *arguments: parity.Parity(0.25, 0.5, 4, "dataset")
    )
    with pytest.raises(RunError, match=r"differs from the trained one by 2\.50e-01.*nothing was written"):
        export_run(runs / "unet", "savedmodel", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_not_a_number_never_passes():
    patches = np.zeros((2, 1, 2, 2, 1), np.float32)
    found = parity.compare(lambda x: x, lambda x: x * np.nan, patches, "random")
    assert not found.passed
    assert parity.compare(lambda x: x, lambda x: x + 1e-5, patches, "random").passed
    assert not parity.compare(lambda x: x, lambda x: x + 1e-3, patches, "random").passed


def test_existing_folders_are_safe(runs, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    export_run(runs / "unet", "onnx", out)  # empty: fine
    before = (out / "model.onnx").read_bytes()
    with pytest.raises(RunError, match="--force"):
        export_run(runs / "unet", "onnx", out)
    export_run(runs / "deep", "savedmodel", out, force=True)
    assert before and not (out / "model.onnx").exists() and (out / "saved_model").is_dir()
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter.txt").write_text("mine")
    with pytest.raises(RunError, match="not an earlier export"):
        export_run(runs / "unet", "onnx", other, force=True)
    assert (other / "chapter.txt").read_text() == "mine"
    with pytest.raises(RunError, match="is not a folder"):
        export_run(runs / "unet", "onnx", other / "chapter.txt", force=True)


def test_what_is_no_model_is_refused_with_what_was_expected(runs, tmp_path):
    with pytest.raises(RunError, match=r"no such model; expected a run folder \(run.yaml and best.npz\)"):
        open_predictor(tmp_path / "nowhere")
    with pytest.raises(RunError, match=r"not a model; expected .*model.tflite"):
        open_predictor(tmp_path)
    export_run(runs / "unet", "savedmodel", tmp_path / "saved")
    (tmp_path / "saved/saved_model/saved_model.pb").write_bytes(b"x")
    with pytest.raises(RunError, match="saved_model.pb: damaged or changed"):
        open_predictor(tmp_path / "saved")
    shutil.copytree(runs / "unet", tmp_path / "unfinished")
    (tmp_path / "unfinished/best.npz").unlink()
    with pytest.raises(RunError, match=r"no best\.npz"):
        open_predictor(tmp_path / "unfinished")


def test_the_command(runs, tmp_path):
    from hvd_imaging.cli.export import command

    arguments = [str(runs / "unet"), "--format", "onnx", str(tmp_path / "out")]
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert result.exit_code == 0 and "differs from the trained network" in result.stdout
    result = CliRunner().invoke(command, [*arguments, "--force", "--json"], catch_exceptions=False)
    assert json.loads(result.stdout)["inputs"] == "dataset"
    assert CliRunner().invoke(command, [str(runs), "--format", "onnx3", "x"]).exit_code == 2


def test_a_network_without_built_in_operations_is_refused(tmp_path):
    """MaxPool3D has none."""
    import tensorflow as tf

    from hvd_imaging.config import ModelConfig, PreprocessConfig
    from hvd_imaging.export import tflite

    spec = ModelSpec(
        task="classification",
        classes=("a", "b"),
        patch=(4, 4, 4),
        channels=1,
        preprocess=PreprocessConfig(intensity="none"),
        model=ModelConfig(name="pooled"),
        dataset_hash="0",
        run="run",
    )
    inputs = tf.keras.Input((4, 4, 4, 1))
    pooled = tf.keras.layers.Flatten()(tf.keras.layers.MaxPool3D()(inputs))
    model = tf.keras.Model(inputs, tf.keras.layers.Dense(2)(pooled))
    with pytest.raises(RunError, match="pooled: cannot be converted with TFLite's built-in operations"):
        tflite.write(model, spec, tmp_path)
    assert not list(tmp_path.iterdir())
