"""Golden patches: made of nothing real, compared once for each machine, and what a difference leads to."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from datasets import make_dataset
from runs import make_run

from hvd_imaging.config import ModelConfig, PreprocessConfig
from hvd_imaging.errors import RunError
from hvd_imaging.export import export_model, export_run
from hvd_imaging.inference import exported, golden
from hvd_imaging.inference.predictors import open_predictor
from hvd_imaging.models.spec import ModelSpec

AVX2, VNNI = ("fma", "avx2"), ("fma", "avx2", "avx512f", "avx512bw", "avx512_vnni")


def spec_of(patch=(8, 16, 16), task="segmentation", channels=1, classes=("background", "lesion"), intensity="window"):
    return ModelSpec(
        task=task, classes=classes, patch=patch, channels=channels, preprocess=PreprocessConfig(intensity=intensity),
        model=ModelConfig(name="test"), dataset_hash="abc", run="run", overlap=0.5,
    )  # fmt: skip


class Fake:
    """A model of one weight, whose answer is another by ``off``."""

    kind, runtime, calls = "onnx-int8", "onnxruntime 1.0", 0

    def __init__(self, spec, off=0.0):
        self.spec, self.off = spec, off

    def __call__(self, batch):
        self.calls += 1
        lesion = 0.5 + 0.5 * np.tanh(4 * (batch.mean(-1) - 0.5))
        if self.spec.task == "classification":
            lesion = lesion.mean((1, 2, 3))
        lesion = np.clip(lesion + self.off, 0, 1)
        rest = [np.zeros_like(lesion)] * (len(self.spec.classes) - 2)
        return np.stack([1 - lesion, lesion, *rest], -1).astype(np.float32)


def export_of(folder, spec, off=0.0, kind="onnx-int8"):
    """A folder as an export leaves it, and its predictor."""
    folder.mkdir()
    model = Fake(spec, off)
    (folder / exported.MODEL_FILE[kind]).write_bytes(b"weights")
    spec.save(folder)
    golden.save(golden.make(spec, kind, Fake(spec), model), folder)
    exported.seal(folder, spec, kind, model.runtime)
    return model


@pytest.mark.parametrize("patch", [(8, 16, 16), (1, 64, 64), (48, 48, 48), (5, 7, 9), (1, 1, 1)])
@pytest.mark.parametrize("task, classes, channels", [("segmentation", 2, 1), ("classification", 3, 2), ("segmentation", 40, 1)])
def test_they_are_small_the_same_each_time_and_hit_where_the_network_is_unsure(tmp_path, patch, task, classes, channels):
    spec = spec_of(patch, task, channels, tuple(f"c{k}" for k in range(classes)))
    made = [golden.make(spec, "onnx-int8", Fake(spec), Fake(spec, 0.001)) for _ in range(2)]
    for number, one in enumerate(made):
        (tmp_path / str(number)).mkdir()
        golden.save(one, tmp_path / str(number))
    first, second = ((tmp_path / str(n) / exported.GOLDEN).read_bytes() for n in range(2))
    assert first == second and len(first) < 100_000
    found = golden.load(tmp_path / "0" / exported.GOLDEN)
    assert found.patches().shape == (golden.PATCHES, *patch, channels) and found.patches().dtype == np.float32
    assert found.patches().min() >= 0 and found.patches().max() <= 1
    assert found.difference(Fake(spec, 0.001)) == 0
    if task == "segmentation" and np.prod(patch) > 100:
        assert (found.trained.max(-1) < 0.9).any() and found.inputs.std() > 5


def test_inputs_have_the_range_of_the_data_where_preprocessing_leaves_it():
    spec = spec_of(intensity="none")
    found = golden.make(spec, "onnx", Fake(spec), Fake(spec), -1000, 400).patches()
    assert -1000 <= found.min() < -500 and 100 < found.max() <= 400


@pytest.mark.parametrize(
    "kind, own, expected", [("onnx-int8", 0.001, 0.02), ("tflite-int8", 0.3, 0.15), ("tflite-float16", 0.0, 0.02), ("onnx", 0.5, 1e-3)]
)
def test_what_is_taken_for_rounding(kind, own, expected):
    assert golden.allowed(kind, own) == pytest.approx(expected)


@pytest.mark.parametrize("task", ["segmentation", "classification"])
def test_another_answer_is_refused_and_the_difference_named(tmp_path, task):
    spec, cache = spec_of(task=task), tmp_path / "cache"
    export_of(tmp_path / "export", spec)
    with pytest.raises(RunError, match=(
        r"export: this machine answers otherwise than at export: largest difference 0\.26 in probability on its golden patches, allowed 0\.02 "
        r"\(onnxruntime 1\.0 on AVX2 without VNNI, exported with onnxruntime 1\.0 on .*\); export the run again in another format .*--unchecked"
    )):  # fmt: skip
        golden.check_once(tmp_path / "export", Fake(spec, 0.26), cache, AVX2)
    assert not cache.exists()  # only what was good is remembered
    assert golden.check_once(tmp_path / "export", Fake(spec, 0.015), cache, AVX2) == ""
    with pytest.raises(RunError, match="difference inf"):
        golden.check_once(tmp_path / "export", lambda_of(spec, np.nan), cache, VNNI)


def lambda_of(spec, value):
    class Broken(Fake):
        def __call__(self, batch):
            return np.full_like(super().__call__(batch), value)

    return Broken(spec)


def test_it_is_compared_once_for_each_model_runtime_and_processor(tmp_path):
    spec, cache = spec_of(), tmp_path / "cache"
    export_of(tmp_path / "one", spec)
    export_of(tmp_path / "two", spec, 0.01)
    model = Fake(spec)

    def calls(place="one", sets=AVX2, runtime="onnxruntime 1.0"):
        before = model.calls
        model.runtime = runtime
        assert golden.check_once(tmp_path / place, model, cache, sets) == ""
        return model.calls - before

    assert calls() == golden.PATCHES and calls() == 0
    assert calls(sets=VNNI) == golden.PATCHES and calls(runtime="onnxruntime 1.1") == golden.PATCHES and calls("two") == golden.PATCHES
    assert calls() == calls(sets=VNNI) == calls("two") == 0
    shutil.copytree(tmp_path / "one", tmp_path / "moved")
    assert calls("moved") == 0  # the same content elsewhere
    for path in cache.iterdir():
        path.write_text("{")  # damaged: compared again
    assert calls() == golden.PATCHES and calls() == 0
    for path in cache.iterdir():
        path.write_text(json.dumps({"schema": 1, "difference": 0.5, "allowed": 0.02}))
    assert calls() == golden.PATCHES


def test_a_cache_that_can_not_be_written_is_done_without(tmp_path):
    spec = spec_of()
    export_of(tmp_path / "export", spec)
    (tmp_path / "file").write_text("")
    for _ in range(2):
        model = Fake(spec)
        assert golden.check_once(tmp_path / "export", model, tmp_path / "file" / "cache", AVX2) == "" and model.calls == golden.PATCHES


@pytest.mark.parametrize(
    "environ, folder",
    [({"HOME": "/h"}, "/h/.cache/hvd_imaging/golden"), ({"HOME": "/h", "XDG_CACHE_HOME": "/x"}, "/x/hvd_imaging/golden"),
     ({"HOME": "/h", "XDG_CACHE_HOME": "/x", "HVD_IMAGING_CACHE": "/own"}, "/own/golden")],
)  # fmt: skip
def test_place_of_the_cache(environ, folder):
    assert str(golden.cache_folder(environ)) == folder


def test_without_golden_patches_it_is_said_once_and_nothing_refused(tmp_path):
    spec, cache = spec_of(), tmp_path / "cache"
    export_of(tmp_path / "export", spec)
    (tmp_path / "export" / exported.GOLDEN).unlink()
    exported.seal(tmp_path / "export", spec, "onnx-int8")
    note = golden.check_once(tmp_path / "export", Fake(spec, 0.5), cache, AVX2)
    assert "holds no golden patches" in note and "export the run again" in note
    assert golden.check_once(tmp_path / "export", Fake(spec, 0.5), cache, AVX2) == ""


def test_a_file_of_an_export_finds_the_patches_beside_it(tmp_path):
    spec, cache = spec_of(), tmp_path / "cache"
    export_of(tmp_path / "export", spec)
    path = tmp_path / "export" / "model.onnx"
    with pytest.raises(RunError, match=r"largest difference 0\.3 "):
        golden.check_once(path, Fake(spec, 0.3), cache, AVX2)
    shutil.copy(path, tmp_path / "model.onnx")
    assert "no golden patches" in golden.check_once(tmp_path / "model.onnx", Fake(spec, 0.3), cache, AVX2)
    path.write_bytes(b"another model")  # then they are not its own
    assert "no golden patches" in golden.check_once(path, Fake(spec, 0.3), cache, AVX2)


def test_damaged_golden_patches(tmp_path):
    spec = spec_of()
    export_of(tmp_path / "export", spec)
    path = tmp_path / "export" / exported.GOLDEN
    whole = path.read_bytes()
    with np.load(path) as held:
        arrays = dict(held)
    for content in (b"", b"PK", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(RunError, match=r"golden\.npz: damaged golden patches .*export the run again"):
            golden.load(path)
    for change in ({"points": arrays["points"][:1]}, {"inputs": np.array([object()])}):
        np.savez(path, **(arrays | change))
        with pytest.raises(RunError, match="damaged golden patches"):
            golden.load(path)


def test_what_the_doctor_says(tmp_path):
    spec = spec_of()
    path = tmp_path / "export"
    export_of(path, spec)

    def said(sets, off=0.0, theirs=None):
        found = golden.compare(path, Fake(spec, off), tmp_path / "cache", sets, anew=True)
        found = found if theirs is None else golden.Comparison(found.difference, found.allowed, found.runtime, sets, theirs)
        return {one.name: one for one in golden.findings(path, Fake(spec), found)}

    theirs = {"runtime": "onnxruntime 1.0", "instruction_sets": list(VNNI)}
    good = said(VNNI, theirs=theirs)
    assert set(good) == {"model"} and good["model"].level == "ok" and "answers as at export" in good["model"].found
    other = said(AVX2, theirs=theirs)
    assert "measured on AVX-512 VNNI, this is AVX2 without VNNI" in other["model's speed"].found
    bad = said(AVX2, 0.4)["model"]
    assert bad.level == "error" and "largest difference 0.4" in bad.found and "another format" in bad.mend
    (path / exported.GOLDEN).unlink()
    assert said(AVX2)["model"].level == "warning"


# --- with real runtimes -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    make_dataset(folder / "seg", samples=5)
    return make_run(folder / "unet", folder / "seg", norm="none")


@pytest.mark.parametrize("kind", ["keras", "savedmodel", "tflite", "tflite-int8", "tflite-dynamic", "onnx", "onnx-int8"])
def test_every_format_answers_its_golden_patches_and_says_where_it_was_measured(run, tmp_path, kind):
    export_run(run, kind, tmp_path / "out")
    values = json.loads((tmp_path / "out" / exported.NAME).read_text())
    here = values["measured_on"]
    runtime = {"onnx": "onnxruntime ", "tfli": "ai-edge-litert "}.get(kind[:4], "tensorflow ")
    assert here["runtime"].startswith(runtime) and here["runtime"][-1].isdigit() and here["architecture"]
    assert isinstance(here["instruction_sets"], list) and exported.GOLDEN in values["files"]
    predictor = open_predictor(tmp_path / "out", 1)
    found = golden.compare(tmp_path / "out", predictor, tmp_path / "cache", anew=True)
    assert found.difference is not None and found.passed and found.difference < 1e-3
    held = golden.load(tmp_path / "out" / exported.GOLDEN)
    assert np.abs(held.answers - held.trained).max() < (0.5 if "8" in kind or "dynamic" in kind else 1e-3)


def test_predict_and_doctor_refuse_a_model_that_answers_otherwise(run, tmp_path):
    from hvd_imaging.cli import doctor, predict

    export_run(run, "onnx-int8", tmp_path / "out")
    place = tmp_path / "out" / exported.GOLDEN
    with np.load(place) as held:
        arrays = dict(held)
    arrays["answers"] = np.clip(arrays["answers"] + 0.3, 0, 1)  # as another processor would have answered
    np.savez_compressed(place, **arrays)
    exported.seal(tmp_path / "out", ModelSpec.load(run), "onnx-int8", "onnxruntime 0.9")
    arguments = [str(tmp_path / "out"), str(run.parent / "seg"), str(tmp_path / "masks")]
    with pytest.raises(RunError, match=r"largest difference 0\.\d+ .*exported with onnxruntime 0\.9"):
        CliRunner().invoke(predict.command, arguments, catch_exceptions=False)
    assert not (tmp_path / "masks").exists()
    done = CliRunner().invoke(predict.command, [*arguments, "--unchecked"], catch_exceptions=False)
    assert done.exit_code == 0 and len(list((tmp_path / "masks").iterdir())) == 5
    [found] = doctor._of_model(tmp_path / "out")
    assert found.level == "error" and "answers otherwise" in found.found
    assert doctor._of_model(run)[0].level == "warning" and doctor._of_model(tmp_path / "gone")[0].level == "error"


def test_an_export_of_before_is_used_and_that_is_said_once(run, tmp_path):
    from hvd_imaging.cli.predict import command

    export_run(run, "tflite", tmp_path / "out")
    (tmp_path / "out" / exported.GOLDEN).unlink()
    values = json.loads((tmp_path / "out" / exported.NAME).read_text())
    del values["measured_on"], values["files"][exported.GOLDEN]
    (tmp_path / "out" / exported.NAME).write_text(json.dumps(values))
    said = [
        CliRunner().invoke(command, [str(tmp_path / "out"), str(run.parent / "seg"), str(tmp_path / name)], catch_exceptions=False).output
        for name in ("a", "b")
    ]
    assert "note: " in said[0] and "holds no golden patches" in said[0] and "golden" not in said[1]


# --- no processor may saturate ---------------------------------------------------------------------------------------------


def extreme():
    """Convolutions whose neighbouring weights are all as large as they can be, on activations that are as well, and a small one beside."""
    import tensorflow as tf

    layers = tf.keras.layers
    image = tf.keras.Input((4, 8, 8, 4))
    x = layers.Conv3D(4, 3, padding="same", activation="relu", name="large")(image)
    x = layers.Conv3D(4, 1, activation="relu", name="mixed")(x)
    model = tf.keras.Model(image, layers.Conv3D(2, 1, name="logits")(x))
    draw = np.random.default_rng(0)
    for name in ("large", "mixed"):
        layer = model.get_layer(name)
        kernel = np.full(layer.kernel.shape, 0.05 if name == "large" else 0.25, np.float32)
        kernel[..., 1] *= -1
        kernel[..., 2:] *= draw.choice([-1, 1], kernel[..., 2:].shape)
        layer.kernel.assign(kernel)
    model.get_layer("logits").kernel.assign(np.array([[[[[0.4, -0.4], [0.1, 0.1], [-0.2, 0.2], [0.3, -0.3]]]]], np.float32))
    return model


@pytest.mark.parametrize("kind", ["tflite-int8", "tflite-dynamic", "onnx-int8"])
def test_the_largest_weights_on_the_largest_activations_agree_on_any_processor(tmp_path, kind):
    draw = np.random.default_rng(1)
    patches = np.concatenate([np.ones((1, 4, 8, 8, 4)), 1 - 0.3 * draw.random((3, 4, 8, 8, 4))]).astype(np.float32)
    spec = spec_of((4, 8, 8), channels=4)
    found = export_model(extreme(), spec, kind, tmp_path, patches, "random", patches)
    assert found.max_abs_difference < 0.02


def test_weights_of_eight_bit_are_found_and_refused(tmp_path, monkeypatch):
    from onnxruntime import quantization as tools

    from hvd_imaging.export import onnx

    patches = np.random.default_rng(1).random((3, 4, 8, 8, 4), np.float32)
    export_model(extreme(), spec_of((4, 8, 8), channels=4), "onnx-int8", tmp_path, patches, "random", patches)
    import onnx as package

    found = onnx.largest_products(package.load(tmp_path / "model.onnx"))
    assert len(found) == 1 and 0.9 * onnx.INT16 < max(found.values()) <= onnx.INT16  # the outermost two are unsigned
    whole = tools.quantize_static
    monkeypatch.setattr(tools, "quantize_static", lambda *given, **named: whole(*given, **(named | {"reduce_range": False})))
    (tmp_path / "again").mkdir()
    with pytest.raises(RunError, match=r"onnx-int8: in '.*' two products can sum up to 64770, expected at most 32767.*tflite-int8"):
        export_model(extreme(), spec_of((4, 8, 8), channels=4), "onnx-int8", tmp_path / "again", patches, "random", patches)
