"""Every format: 8 bit and ONNX of the lowered network, contracts inside the files, and what is refused with which words."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
import zipfile

import numpy as np
import pytest
from click.testing import CliRunner
from datasets import make_dataset
from runs import make_run

from hvd_imaging.config import ModelConfig, PreprocessConfig
from hvd_imaging.errors import DatasetError, RunError, SetupError
from hvd_imaging.export import FORMATS, check_format, export_model, export_run
from hvd_imaging.export.calibration import calibration_patches
from hvd_imaging.export.parity import Parity, expected
from hvd_imaging.inference import exported
from hvd_imaging.inference.predictors import EDGE_FORMATS, check_runtime, open_predictor
from hvd_imaging.models.spec import ModelSpec


def spec_of(patch=(4, 8, 8), task="segmentation", channels=1, **preprocess):
    return ModelSpec(
        task=task,
        classes=("background", "lesion"),
        patch=patch,
        channels=channels,
        preprocess=PreprocessConfig(**({"intensity": "none"} | preprocess)),
        model=ModelConfig(name="test"),
        dataset_hash="abc",
        run="run",
        overlap=0.25,
    )


def network(patch=(4, 8, 8), norm=False, extra=None, channels=1):
    """A small U-shaped network of logits with every kind of layer that moves planes."""
    import tensorflow as tf

    from hvd_imaging.models.blocks import GroupNorm

    layers = tf.keras.layers
    tf.keras.utils.set_random_seed(1)
    image = tf.keras.Input((*patch, channels))
    skip = layers.Conv3D(4, 3, padding="same", activation="relu", name="first")(image)
    x = layers.Conv3D(6, 3, strides=2, padding="same", name="down")(skip)
    x = GroupNorm(3, name="norm")(x) if norm else x
    x = layers.ReLU(name="relu")(x)
    x = layers.Conv3DTranspose(4, 2, strides=2, padding="same", name="up")(x)
    x = layers.Concatenate(name="join")([x, skip])
    x = extra(x) if extra else x
    return tf.keras.Model(image, layers.Conv3D(2, 1, name="logits", kernel_initializer="glorot_normal")(x), name="small")


@pytest.fixture(scope="module")
def patches():
    return np.random.default_rng(0).random((6, 4, 8, 8, 1), np.float32)


@pytest.fixture(scope="module")
def exports(tmp_path_factory, patches):
    """Format -> (folder, parity) of one network with a norm; made once."""
    model, folder = network(norm=True), tmp_path_factory.mktemp("exports")
    found = {}
    for kind in FORMATS:
        (folder / kind).mkdir()
        found[kind] = folder / kind, export_model(model, spec_of(), kind, folder / kind, patches[:2], "random", patches)
    return found


def operations(path, kind):
    """Names of a TFLite model's operations whose result is of type ``kind``."""
    import tensorflow as tf

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        interpreter = tf.lite.Interpreter(model_path=str(path))
        found = {t["index"]: t["dtype"] for t in interpreter.get_tensor_details()}
        return {op["op_name"] for op in interpreter._get_ops_details() if found.get(op["outputs"][0]) == kind} - {"DELEGATE"}


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_agrees_and_says_what_it_is(exports, kind):
    folder, result = exports[kind]
    assert result.passed and result.same_answer > 0.9
    assert result.max_abs_difference < (0.2 if "8" in kind or "dynamic" in kind else 2e-2 if "16" in kind else 1e-5)
    if "int8" in kind or kind in ("tflite-dynamic", "tflite-float16"):
        assert result.max_abs_difference > 1e-7  # it was rounded indeed
    predictor = open_predictor(folder, threads=1)
    assert predictor.kind == kind and predictor.spec == spec_of()
    batch = np.random.default_rng(1).random((3, 4, 8, 8, 1), np.float32)
    found = predictor(batch)
    assert found.shape == (3, 4, 8, 8, 2) and found.dtype == np.float32
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-5)
    values = json.loads((folder / exported.NAME).read_text())
    assert values["format"] == kind and values["schema"] == 1 and values["model"]["overlap"] == 0.25
    assert {"model.json", "parity.json"} < set(values["files"])


def test_eight_bit_are_smaller(exports):
    def size(kind):
        return (exports[kind][0] / exported.MODEL_FILE[kind]).stat().st_size

    assert size("tflite-float16") < size("tflite")
    with zipfile.ZipFile(exports["tflite-int8"][0] / "model.tflite") as archive:
        assert archive.namelist() == [exported.MEMBER]


def test_norms_and_probabilities_stay_float_in_eight_bit_tflite(exports):
    path = exports["tflite-int8"][0] / "model.tflite"
    assert {"SOFTMAX", "MEAN", "RSQRT"} <= operations(path, np.float32)
    assert {"CONV_2D", "CONCATENATION", "TRANSPOSE_CONV"} <= operations(path, np.int8)
    assert not {"CONV_2D", "CONV_3D", "TRANSPOSE_CONV"} & operations(path, np.float32)


@pytest.mark.parametrize("kind", ["tflite-int8", "onnx-int8", "keras"])
def test_a_model_file_alone_is_enough(exports, tmp_path, kind):
    name = exported.MODEL_FILE[kind]
    shutil.copy(exports[kind][0] / name, tmp_path / name)
    predictor = open_predictor(tmp_path / name)
    assert predictor.kind == kind and predictor.spec == spec_of()
    batch = np.random.default_rng(1).random((1, 4, 8, 8, 1), np.float32)
    np.testing.assert_array_equal(predictor(batch), open_predictor(exports[kind][0])(batch))


def test_onnx_properties_are_read_as_the_package_reads_them(exports):
    import onnx

    path = exports["onnx"][0] / "model.onnx"
    wanted = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert exported.onnx_properties(path.read_bytes()) == wanted and json.loads(wanted["hvd_imaging"])["format"] == "onnx"


@pytest.mark.parametrize("name", ["deep", "wide"])
def test_classification_in_eight_bit(tmp_path, name):
    """A dense head on planes, and the class of most cases."""
    import tensorflow as tf

    layers = tf.keras.layers
    tf.keras.utils.set_random_seed(2)
    image = tf.keras.Input((2, 8, 8, 1))
    x = layers.Conv3D(4, 3, padding="same", activation="relu")(image)
    x = layers.MaxPooling3D((2, 2, 2) if name == "deep" else (1, 2, 2))(x)
    x = layers.Flatten()(x) if name == "deep" else layers.GlobalAveragePooling3D()(x)
    model = tf.keras.Model(image, layers.Dense(2)(layers.Dense(5, activation="relu")(x)))
    spec = spec_of((2, 8, 8), "classification")
    images = np.random.default_rng(0).random((8, 2, 8, 8, 1), np.float32)
    for kind in ("tflite-int8", "onnx", "onnx-int8"):
        (tmp_path / kind).mkdir()
        result = export_model(model, spec, kind, tmp_path / kind, images, "random", images)
        assert result.max_abs_difference < (1e-5 if kind == "onnx" else 0.05), kind
        assert open_predictor(tmp_path / kind)(images).shape == (8, 2)


# --- quantization-aware networks --------------------------------------------------------------------------------------


def test_a_network_that_brings_its_ranges_needs_no_calibration(tmp_path, patches):
    from hvd_imaging.compression import quantize

    model = network()
    # Twice: Keras names the second one's layers otherwise.
    first, quantized = (quantize.prepare(model, [patch[None] for patch in patches]) for _ in range(2))
    for one, other in zip(first.weights, quantized.weights, strict=True):
        np.testing.assert_array_equal(one, other, one.name)
    found = tmp_path / "with"
    found.mkdir()
    result = export_model(model, spec_of(), "tflite-int8", found, patches[:2], "random", lowered=quantized)
    assert result.max_abs_difference < 0.1 and result.same_answer > 0.9
    assert "CONV_2D" in operations(found / "model.tflite", np.int8)
    without = tmp_path / "without"
    without.mkdir()
    with pytest.raises(RunError, match="8 bit need calibration patches of the training split, found none"):
        export_model(model, spec_of(), "tflite-int8", without, patches[:2], "random")
    with pytest.raises(RunError, match="8 bit need calibration"):
        export_model(model, spec_of(), "onnx-int8", without, patches[:2], "random")
    assert not list(without.iterdir())


# --- bad input --------------------------------------------------------------------------------------------------------


def test_an_unknown_layer_is_named_where_a_format_needs_to_know_it(tmp_path, patches):
    import tensorflow as tf

    class Strange(tf.keras.layers.Layer):
        def call(self, x):
            return x * 1.5

    model = network(extra=Strange(name="strange"))
    for kind in ("tflite-int8", "onnx", "onnx-int8"):
        with pytest.raises(RunError, match=r"layer 'strange': Strange .*--format savedmodel"):
            export_model(model, spec_of(), kind, tmp_path, patches[:1], "random", patches)
    for kind in ("savedmodel", "tflite"):
        (tmp_path / kind).mkdir()
        assert export_model(model, spec_of(), kind, tmp_path / kind, patches[:1], "random").passed


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    make_dataset(folder / "seg", samples=5)
    return make_run(folder / "unet", folder / "seg", norm="none")


def test_a_run_in_eight_bit_by_the_command(run, tmp_path):
    from hvd_imaging.cli.export import command

    moved = tmp_path / "elsewhere"
    shutil.copytree(run.parent / "seg", moved)
    arguments = [str(run), "--format", "tflite-int8", str(tmp_path / "out"), "--dataset", str(moved), "--json"]
    found = json.loads(CliRunner().invoke(command, arguments, catch_exceptions=False).stdout)
    assert found["inputs"] == "dataset" and found["same_answer"] >= found["least_same"] > 0.5
    assert open_predictor(tmp_path / "out", edge=True).kind == "tflite-int8"


def test_the_command_offers_every_format():
    from hvd_imaging.cli import export

    assert export.FORMATS == FORMATS


def test_calibration_is_of_the_training_split_and_seeded(run):
    spec = ModelSpec.load(run)
    found = calibration_patches(run.parent / "seg", spec, 5)
    assert found.shape == (5, *spec.patch, 1) and found.dtype == np.float32
    np.testing.assert_array_equal(found, calibration_patches(run.parent / "seg", spec, 5))
    assert len({patch.tobytes() for patch in found}) == 5


def test_calibration_data_that_does_not_fit_is_refused(run, tmp_path):
    spec, dataset = ModelSpec.load(run), run.parent / "seg"
    with pytest.raises(DatasetError, match=r"gone: the run's dataset is not there .*--dataset FOLDER"):
        calibration_patches(tmp_path / "gone", spec)
    with pytest.raises(DatasetError, match="gone: no manifest.json in this folder"):
        export_run(run, "tflite-int8", tmp_path / "out", dataset=tmp_path / "gone")
    other = spec.model_copy(update={"preprocess": PreprocessConfig(intensity="zscore")})
    with pytest.raises(RunError, match=r"preprocess is .*'none'.*expected .*'zscore'.*ingest it with the run's settings"):
        calibration_patches(dataset, other)
    with pytest.raises(RunError, match="channels is 1, expected 3"):
        calibration_patches(dataset, spec.model_copy(update={"channels": 3}))
    with pytest.raises(DatasetError, match="no sample in split 'nowhere' to calibrate on; `hvd-imaging dataset split`"):
        calibration_patches(dataset, spec, split="nowhere")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind, package, extra", [("onnx", "onnxruntime", "edge"), ("tflite", "ai_edge_litert or tensorflow", "edge"),
                                                  ("keras", "tensorflow", "train")])  # fmt: skip
def test_a_missing_runtime_is_named_with_its_extra(exports, monkeypatch, kind, package, extra):
    monkeypatch.setattr("hvd_imaging.inference.predictors.installed", lambda name: False)
    with pytest.raises(SetupError, match=rf"format {kind} runs on {package}, which is not installed: pip install 'hvd_imaging\[{extra}\]'"):
        check_runtime(kind)
    with pytest.raises(SetupError, match=r"pip install 'hvd_imaging\["):
        open_predictor(exports[kind][0])
    with pytest.raises(SetupError, match=r"pip install 'hvd_imaging\["):
        check_format(kind)


def test_edge_takes_no_other_interpreter_than_the_light_one(exports, monkeypatch):
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", None)
    with pytest.raises(SetupError, match=r"--edge runs TFLite models on ai_edge_litert.*hvd_imaging\[edge\]"):
        open_predictor(exports["tflite-int8"][0], edge=True)
    batch = np.zeros((1, 4, 8, 8, 1), np.float32)
    assert open_predictor(exports["tflite"][0])(batch).shape == (1, 4, 8, 8, 2)  # in TensorFlow's own copy


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind not in EDGE_FORMATS])
def test_edge_refuses_what_needs_tensorflow(exports, kind):
    with pytest.raises(RunError, match=rf"format {kind} needs TensorFlow, which --edge leaves out; expected .*tflite-int8"):
        open_predictor(exports[kind][0], edge=True)


def damaged(source, target, change):
    shutil.copytree(source, target)
    change(target)
    return target


def rewrite(folder, **values):
    path = folder / exported.NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda f: cut(f / "model.onnx"), r"model\.onnx: damaged or changed since its export \(SHA-256 expected"),
        (lambda f: (f / "model.json").write_text("{}"), r"model\.json: damaged or changed"),
        (lambda f: (f / "model.onnx").unlink(), r"model\.onnx: missing, but export\.json lists it; copy the whole folder"),
        (lambda f: cut(f / "export.json"), r"export\.json: damaged .*export the run again"),
        (lambda f: (f / "export.json").unlink(), r"has no export\.json with the files' hashes"),
        (lambda f: rewrite(f, schema=2), r"export\.json: schema 2, expected 1: written by another release"),
        (lambda f: rewrite(f, schema=None), r"export\.json: schema None, expected 1"),
        (lambda f: rewrite(f, format="coreml"), r"format 'coreml', expected one of keras"),
        (lambda f: rewrite(f, files=[]), r"export\.json: damaged"),
        (lambda f: rewrite(f, files={}), r"does not list model\.json"),
        (lambda f: rewrite(f, files={"../secret": "0"}), r"names a file outside of its folder"),
        (lambda f: (f / "export.json").write_text("[]"), r"export\.json: damaged"),
    ],
)  # fmt: skip
def test_damaged_and_foreign_exports_are_refused(exports, tmp_path, change, words):
    with pytest.raises(RunError, match=words):
        open_predictor(damaged(exports["onnx"][0], tmp_path / "export", change))


@pytest.mark.parametrize("kind", ["tflite", "onnx", "keras"])
def test_a_damaged_or_foreign_file_alone_is_refused(exports, tmp_path, kind):
    name = exported.MODEL_FILE[kind]
    good = (exports[kind][0] / name).read_bytes()
    for number, content in enumerate((b"", b"no model at all", good[: len(good) // 2])):
        path = tmp_path / f"{number}{name[5:]}"
        path.write_bytes(content)
        with pytest.raises(RunError, match=r"holds no contract of hvd_imaging, or is damaged|damaged"):
            open_predictor(path)
    with pytest.raises(RunError, match="not a model; expected a run folder"):
        (tmp_path / "notes.txt").write_text("x")
        open_predictor(tmp_path / "notes.txt")


def test_a_file_with_a_good_contract_and_a_damaged_network(exports, tmp_path):
    """The hashes are not beside a file that was sent alone; the runtime's refusal is put in words."""
    path = tmp_path / "model.tflite"
    path.write_bytes(b"\0" * 400)
    exported.embed(path, spec_of(), "tflite")
    with pytest.raises(RunError, match="damaged TFLite model"):
        open_predictor(path)
    other = tmp_path / "other.tflite"
    data = (exports["tflite"][0] / "model.tflite").read_bytes()
    other.write_bytes(data[: data.rindex(b"PK\x03\x04")])
    exported.embed(other, spec_of((8, 8, 8)), "tflite")
    with pytest.raises(RunError, match=r"takes an input of \(1, 4, 8, 8, 1\), expected \(1, 8, 8, 8, 1\).*do not belong together"):
        open_predictor(other)


def test_what_a_format_may_lose():
    assert expected("onnx", "segmentation") == expected("keras", "classification") == (1e-4, 0.0)
    assert expected("tflite-float16", "segmentation")[0] == 2e-2
    broken = Parity(0.9, 0.5, 4, "dataset", *expected("tflite-int8", "segmentation"))
    assert not broken.passed and Parity(0.9, 0.99, 4, "dataset", *expected("tflite-int8", "segmentation")).passed
