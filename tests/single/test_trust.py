"""Models of others: none runs anything without --trust, and those that need no trust are used as they are.

Each malicious model here writes the file ``marker`` when it runs.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import marshal
import os
import re
import shutil
import stat
import sys
import zipfile
from codecs import encode
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from datasets import make_dataset
from runs import make_run

from hvd_imaging.errors import HvdImagingError, RunError, SetupError
from hvd_imaging.export import export_run
from hvd_imaging.inference import exported
from hvd_imaging.inference.predictors import open_predictor
from hvd_imaging.models.spec import ModelSpec

KINDS = ("keras", "savedmodel", "tflite", "onnx")
SHAPE = (1, 8, 16, 16, 1)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run, and its exports, that this user made."""
    folder = tmp_path_factory.mktemp("made")
    make_dataset(folder / "seg", samples=5)
    make_run(folder / "run", folder / "seg", norm="group", dropout=0.1)
    for kind in KINDS:
        export_run(folder / "run", kind, folder / kind)
    return folder


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Another user's machine: nothing was made here."""
    monkeypatch.setenv("HVD_IMAGING_STATE", str(tmp_path / "nothing made"))


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "marker"


def refused(model, marker, words):
    """Opening and using it ends with one line that says what to do, and nothing ran."""
    error = None
    try:
        open_predictor(model)(np.zeros(SHAPE, np.float32))
    except (Exception, SystemExit) as found:
        error = found
    assert not marker.exists(), "it ran"
    assert isinstance(error, RunError) and error.exit_code == 5
    assert re.search(words, str(error)) and "\n" not in str(error), str(error)
    return str(error)


# --- what a foreign description of a network may do ------------------------------------------------------------------------


def layer(kind, settings, nodes, module="keras.layers"):
    settings = {"name": "evil", "trainable": True, "dtype": "float32", **settings}
    return {"module": module, "class_name": kind, "config": settings, "registered_name": None, "name": "evil", "inbound_nodes": nodes}


def function(module, name):
    return {"module": module, "class_name": "function", "config": name, "registered_name": name}


def lambda_with(kind, found, nodes):
    shape = {"output_shape": None, "output_shape_type": "raw", "output_shape_module": None}
    return layer("Lambda", {"function": found, "function_type": kind, "module": None, "arguments": {}, **shape}, nodes)


def byte_code(marker):
    code = compile(f"lambda x: (open({str(marker)!r}, 'w').close(), x)[1]", "evil", "eval").co_consts[0]
    return [encode(marshal.dumps(code), "base64").decode(), None, None]


EVIL = {
    "Lambda": lambda at: lambda_with("lambda", byte_code(at), [[["image", 0, 0, {}]]]),
    "a function of os": lambda at: lambda_with("function", function("os", "system"), [[["_CONSTANT_VALUE", -1, f"touch '{at}'", {}]]]),
    "an operation": lambda at: layer("TFOpLambda", {"function": "io.write_file"}, [["_CONSTANT_VALUE", -1, str(at), {"contents": "x"}]]),
    "a module": lambda at: lambda_with("function", function("evil_module", "build"), [[["image", 0, 0, {}]]]),
    "a layer of a module": lambda at: layer("Evil", {}, [[["image", 0, 0, {}]]], module="evil_module"),
}


@pytest.fixture
def evil_module(tmp_path, marker, monkeypatch):
    """A module on the user's path, such as a folder of a download: importing it is enough."""
    (tmp_path / "path").mkdir()
    (tmp_path / "path/evil_module.py").write_text(f"open({str(marker)!r}, 'w').close()\ndef build(spec): raise SystemExit\n")
    monkeypatch.syspath_prepend(str(tmp_path / "path"))
    yield "evil_module"
    sys.modules.pop("evil_module", None)


def keras_with(source, target, change):
    """An export with a changed description, and check sums that fit."""
    shutil.copytree(source, target)
    with zipfile.ZipFile(source / "model.keras") as old, zipfile.ZipFile(target / "model.keras", "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name == "config.json":
                values = json.loads(data)
                change(values)
                data = json.dumps(values).encode()
            new.writestr(name, data)
    exported.seal(target, ModelSpec.load(target), "keras")
    return target


@pytest.mark.parametrize("what", EVIL)
def test_a_keras_export_runs_nothing(made, tmp_path, marker, evil_module, elsewhere, what):
    evil = EVIL[what](marker)
    model = keras_with(made / "keras", tmp_path / "model", lambda values: values["config"]["layers"].append(evil))
    text = refused(model, marker, r"layer \d+ 'evil'.*may hold code.*--trust")
    assert "model.keras" in text
    refused(model / "model.keras", marker, "--trust")  # the file alone


def test_a_keras_export_that_is_no_functional_network_is_refused(made, tmp_path, marker, evil_module, elsewhere):
    model = keras_with(made / "keras", tmp_path / "model", lambda values: values.update(module="evil_module", class_name="Evil"))
    refused(model, marker, "--trust")


@pytest.mark.parametrize("what", EVIL)
def test_an_architecture_runs_nothing(made, tmp_path, marker, evil_module, elsewhere, what):
    from hvd_imaging.models import architecture, build

    shutil.copytree(made / "run", tmp_path / "run")
    architecture.save(build(ModelSpec.load(made / "run")), tmp_path / "run")
    path = tmp_path / "run/architecture.json"
    values = json.loads(path.read_text())
    values["network"]["layers"].append(EVIL[what](marker))
    path.write_text(json.dumps(values))
    shutil.rmtree(os.environ["HVD_IMAGING_STATE"], ignore_errors=True)
    refused(tmp_path / "run", marker, r"architecture.json: layer \d+ 'evil'.*--trust")


def test_a_savedmodel_is_a_program(made, tmp_path, marker, elsewhere, monkeypatch):
    import tensorflow as tf

    class Module(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec((None, *SHAPE[1:]), tf.float32, name="image")])
        def serve(self, image):
            tf.io.write_file(str(marker), "x")
            return {"probabilities": tf.concat([image, 1 - image], -1)}

    module, target = Module(), tmp_path / "model"
    shutil.copytree(made / "savedmodel", target)
    shutil.rmtree(target / "saved_model")
    tf.saved_model.save(module, str(target / "saved_model"), signatures={"serving_default": module.serve})
    exported.seal(target, ModelSpec.load(target), "savedmodel")
    refused(target, marker, "a SavedModel is a program, and it was not made by you on this machine; .*--trust .*tflite, onnx, keras")
    open_predictor(target, trusted=True)(np.zeros(SHAPE, np.float32))
    assert marker.exists()  # which shows that it would have run


def test_a_file_that_an_export_does_not_list_is_found(made, tmp_path):
    shutil.copytree(made / "savedmodel", tmp_path / "model")
    (tmp_path / "model/saved_model/assets").mkdir(exist_ok=True)
    (tmp_path / "model/saved_model/assets/more").write_text("x")
    with pytest.raises(RunError, match=r"a file that export\.json does not list"):
        open_predictor(tmp_path / "model")


def foreign_run(made, folder, name):
    """A run folder whose model.name is code."""
    shutil.copytree(made / "run", folder)
    values = json.loads((folder / "model.json").read_text())
    values["model"]["name"] = name
    (folder / "model.json").write_text(json.dumps(values))
    text = (folder / "run.yaml").read_text()
    assert "name: unet3d" in text
    (folder / "run.yaml").write_text(text.replace("name: unet3d", f"name: {name}"))
    return folder


def test_a_run_names_no_code_of_others(made, tmp_path, marker, evil_module, elsewhere):
    folder = foreign_run(made, tmp_path / "run", "evil_module:build")
    refused(folder, marker, r"model\.name is 'evil_module:build', code that is not of hvd_imaging.*--trust")


@pytest.mark.parametrize("command", ["evaluate", "export", "compress", "predict", "train"])
def test_no_command_runs_code_that_a_run_names(made, tmp_path, marker, evil_module, elsewhere, command):
    folder = foreign_run(made, tmp_path / "run", "evil_module:build")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("formats: [onnx]\nsplit: val\nsteps: [{do: weights, sparsity: 0.5, epochs: 0}]\n")
    arguments = {
        "evaluate": [folder, "--split", "val"],
        "export": [folder, "--format", "onnx", tmp_path / "out"],
        "compress": [folder, "--recipe", recipe, "--out", tmp_path / "out"],
        "predict": [folder, made / "seg", tmp_path / "out"],
        "train": [folder / "run.yaml", "--run-dir", tmp_path / "again"],
    }[command]
    module = importlib.import_module(f"hvd_imaging.cli.{command}")
    result = CliRunner().invoke(module.command, list(map(str, arguments)))
    assert not marker.exists()
    assert isinstance(result.exception, RunError) and "--trust" in str(result.exception), result
    # Code of one's own is named in a run.yaml of one's own: with --trust it is loaded, here to end the test.
    assert CliRunner().invoke(module.command, [*map(str, arguments), "--trust"]).exit_code is not None and marker.exists()


def test_a_run_yaml_of_ones_own_may_name_code(made, tmp_path, marker, evil_module, elsewhere):
    from hvd_imaging.cli.train import command

    folder = foreign_run(made, tmp_path / "run", "evil_module:build")
    shutil.copy(folder / "run.yaml", tmp_path / "mine.yaml")
    CliRunner().invoke(command, [str(tmp_path / "mine.yaml"), "--run-dir", str(tmp_path / "again")])
    assert marker.exists()


def test_tflite_has_no_operations_of_tensorflow(made, tmp_path, marker, elsewhere):
    """Both interpreters run them where TensorFlow is installed."""
    import tensorflow as tf

    @tf.function(input_signature=[tf.TensorSpec(SHAPE, tf.float32, name="image")])
    def serve(image):
        tf.io.write_file(str(marker), "x")
        return {"probabilities": tf.nn.softmax(tf.concat([image, 1 - image], -1))}

    converter = tf.lite.TFLiteConverter.from_concrete_functions([serve.get_concrete_function()], tf.Module())
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS, tf.lite.OpsSet.SELECT_TF_OPS]
    shutil.copytree(made / "tflite", tmp_path / "model")
    (tmp_path / "model/model.tflite").write_bytes(converter.convert())
    exported.seal(tmp_path / "model", ModelSpec.load(tmp_path / "model"), "tflite")
    refused(tmp_path / "model", marker, r"model\.tflite: has an operation that is not TFLite's own")


@pytest.mark.parametrize("place", ["weights.bin", "../weights.bin", "absolute"])
@pytest.mark.parametrize("where", ["initializer", "attribute", "branch", "function"])
def test_onnx_reads_no_other_files(made, tmp_path, elsewhere, place, where):
    import onnx
    from onnx import TensorProto, helper

    shutil.copytree(made / "onnx", tmp_path / "model")
    np.ones(1, np.float32).tofile(tmp_path / "weights.bin")
    np.ones(1, np.float32).tofile(tmp_path / "model/weights.bin")
    outside = TensorProto(name="outside", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    entry = outside.external_data.add()
    entry.key, entry.value = "location", str(tmp_path / "weights.bin") if place == "absolute" else place
    path = tmp_path / "model/model.onnx"
    model = onnx.load(path, load_external_data=False)
    constant = helper.make_node("Constant", [], ["outside"], value=outside)
    if where == "initializer":
        model.graph.initializer.append(outside)
    elif where == "attribute":
        model.graph.node.append(constant)
    elif where == "branch":
        inner = helper.make_graph([constant], "inner", [], [helper.make_tensor_value_info("outside", TensorProto.FLOAT, [1])])
        model.graph.node.append(helper.make_node("If", ["condition"], ["found"], then_branch=inner, else_branch=inner))
    else:
        model.functions.append(helper.make_function("own", "f", [], ["outside"], [constant], [helper.make_opsetid("", 17)]))
    path.write_bytes(model.SerializeToString())
    exported.seal(tmp_path / "model", ModelSpec.load(tmp_path / "model"), "onnx")
    with pytest.raises(RunError, match=r"model\.onnx: keeps weights in other files"):
        open_predictor(tmp_path / "model")


@pytest.mark.parametrize("how", ["soft link", "external link", "external", "virtual", "claims", "words", "twice"])
def test_keras_weights_are_numbers_of_their_own_file(made, tmp_path, elsewhere, how):
    import h5py

    other = tmp_path / "other.h5"
    with h5py.File(other, "w") as file:
        file["x"] = np.zeros(4, np.float32)
    with zipfile.ZipFile(made / "keras/model.keras") as archive:
        (tmp_path / "model.weights.h5").write_bytes(archive.read("model.weights.h5"))
    with h5py.File(tmp_path / "model.weights.h5", "r+") as file:
        found: list[str] = []
        file.visititems(lambda name, item: found.append(name) if isinstance(item, h5py.Dataset) else None)
        name, shape = found[0], file[found[0]].shape
        del file[name]
        if how == "soft link":
            file[name] = h5py.SoftLink(f"/{found[1]}")
        elif how == "external link":
            file[name] = h5py.ExternalLink(str(other), "x")
        elif how == "external":
            file.create_dataset(name, shape, np.float32, external=[(str(other), 0, h5py.h5f.UNLIMITED)])
        elif how == "virtual":
            layout = h5py.VirtualLayout((4,), np.float32)
            layout[:] = h5py.VirtualSource(str(other), "x", (4,))
            file.create_virtual_dataset(name, layout)
        elif how == "claims":
            file.create_dataset(name, (10**9, 10**9), np.float32, chunks=(1000, 1000))
        elif how == "words":
            file[name] = "words"
        else:
            file[name] = file[found[1]]
    target = tmp_path / "model"
    shutil.copytree(made / "keras", target)
    with zipfile.ZipFile(made / "keras/model.keras") as old, zipfile.ZipFile(target / "model.keras", "w") as new:
        for name in old.namelist():
            new.writestr(name, (tmp_path / name).read_bytes() if name.endswith(".h5") else old.read(name))
    exported.seal(target, ModelSpec.load(target), "keras")
    with pytest.raises(RunError, match=r"model\.keras: damaged Keras model"):
        open_predictor(target)


# --- the list ----------------------------------------------------------------------------------------------------------------


def networks():
    from hvd_imaging.config import ModelConfig, PreprocessConfig

    for name, patch, settings in (
        ("unet3d", (8, 16, 16), {"filters": 4, "depth": 3, "norm": "instance", "dropout": 0.1, "deep_supervision": True}),
        ("unet3d", (8, 16, 16), {"filters": 4, "depth": 2, "norm": "none"}),
        ("vgg16", (1, 32, 32), {"width": 0.0625, "norm": "group", "head": "dense", "dropout": 0.5}),
        ("cnn3d", (16, 16, 16), {"width": 0.25, "norm": "group"}),
    ):
        task = "segmentation" if name == "unet3d" else "classification"
        preprocess = PreprocessConfig(intensity="none")
        yield ModelSpec(
            task=task, classes=("a", "b"), patch=patch, channels=1, preprocess=preprocess, model=ModelConfig(name=name, **settings),
            dataset_hash="0", run="run",
        )  # fmt: skip


def test_all_networks_of_this_package_are_data():
    from hvd_imaging.compression.norms import _with_fixed
    from hvd_imaging.models import allowed, build

    for spec in networks():
        model = build(spec)
        allowed.check(json.loads(json.dumps(model.get_config())))
        allowed.check(json.loads(json.dumps(_with_fixed(model).get_config())))


def test_the_list_names_what_there_is():
    import tensorflow as tf

    from hvd_imaging.models import allowed, blocks

    assert [name for name in allowed.LAYERS if not issubclass(getattr(tf.keras.layers, name), tf.keras.layers.Layer)] == []
    assert not allowed.LAYERS & {"Lambda", "TimeDistributed", "Wrapper", "Bidirectional", "RNN", "StringLookup", "TextVectorization"}
    assert all(issubclass(getattr(blocks, name), tf.keras.layers.Layer) for name in allowed.OWN)
    for module, names in allowed._OBJECTS.values():
        assert all(isinstance(getattr(getattr(tf.keras, module.removeprefix("keras.")), name), type) for name in names)
    assert all(callable(tf.keras.activations.get(name)) for name in allowed._WORDS["activation"])


def places(value, path=()):
    """Every place of a JSON value."""
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


@contextlib.contextmanager
def put(value, path, payload):
    """The value with something else at a place, for a while."""
    at = value
    for key in path[:-1]:
        at = at[key]
    missing = isinstance(at, dict) and path[-1] not in at
    before = None if missing else at[path[-1]]
    at[path[-1]] = payload
    yield value
    if missing:
        del at[path[-1]]
    else:
        at[path[-1]] = before


PAYLOADS = {
    "function": function("os", "system"),
    "class": {"module": "subprocess", "class_name": "Popen", "config": {"args": "true"}, "registered_name": None},
    "keras' own": {"module": "keras.utils", "class_name": "function", "config": "get_file", "registered_name": "get_file"},
    "layer": {"module": "keras.layers", "class_name": "Lambda", "config": {}, "registered_name": None},
    "dotted": {"module": "keras.layers", "class_name": "Dense.from_config", "config": {}, "registered_name": None},
    "registered": {"module": "keras.initializers", "class_name": "Zeros", "config": {}, "registered_name": "mine>Zeros"},
    "lambda": {"class_name": "__lambda__", "config": {"value": "x"}},
    "typespec": {"class_name": "__typespec__", "spec_name": "Popen", "module": "subprocess", "registered_name": "x", "config": []},
    "numpy": {"class_name": "__numpy__", "config": {"value": [1], "dtype": "object"}},
    "tensor": {"class_name": "__tensor__", "config": {"value": [1], "dtype": "string"}},
    "inside": {"module": "keras.initializers", "class_name": "Constant", "config": {"value": function("os", "system")}, "registered_name": None},
    "word": "os.system",
}


@pytest.mark.parametrize("name", PAYLOADS)
def test_a_payload_is_found_in_every_place(name):
    """In the place of any value of a description, and under a further key of any object."""
    from hvd_imaging.models import allowed, build

    spec = next(networks())
    network = json.loads(json.dumps(build(spec).get_config()))
    # One layer of each class is enough, and those they read.
    kinds: dict[str, int] = {}
    for number, each in enumerate(network["layers"]):
        kinds.setdefault(each["class_name"], number)
    payload, tried = PAYLOADS[name], 0
    for path in list(places(network)):
        if not path or (path[0] == "layers" and len(path) > 1 and path[1] not in kinds.values()):
            continue
        at = network
        for key in path:
            at = at[key]
        changes = [] if path[-1] == "name" and isinstance(payload, str) else [path]  # a name may be any word
        if isinstance(at, dict):
            changes += [(*path, key) for key in ("more", "compile_config", "shared_object_id", "arguments", "function")]
        for change in changes:
            with put(network, change, payload), pytest.raises(allowed.Unknown) as caught:
                allowed.check(network)
            assert "\n" not in str(caught.value)
            tried += 1
    assert tried > 200
    allowed.check(network)


def test_numbers_and_words_of_the_list_are_no_payload():
    """The check above does not refuse everything."""
    from hvd_imaging.models import allowed, build

    network = json.loads(json.dumps(build(next(networks())).get_config()))
    conv = next(n for n, each in enumerate(network["layers"]) if each["class_name"] == "Conv3D")
    for key, value in (
        ("activation", "relu"), ("filters", 7), ("kernel_size", [1, 1, 1]), ("name", "os.system"), ("kernel_regularizer", None),
        ("kernel_constraint", {"module": "keras.constraints", "class_name": "MaxNorm", "config": {"max_value": 2, "axis": [0, 1]}, "registered_name": None}),
        ("dtype", {"module": "keras.mixed_precision", "class_name": "Policy", "config": {"name": "mixed_float16"}, "registered_name": None}),
    ):  # fmt: skip
        with put(network, ("layers", conv, "config", key), value):
            allowed.check(network)


# --- what needs no trust, and what is trusted ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["keras", "tflite", "onnx", "run"])
def test_data_of_others_needs_no_trust(made, tmp_path, monkeypatch, kind):
    batch = np.random.default_rng(1).random((2, *SHAPE[1:]), np.float32)
    before = open_predictor(made / kind)(batch)
    monkeypatch.setenv("HVD_IMAGING_STATE", str(tmp_path / "other"))
    shutil.copytree(made / kind, tmp_path / "downloaded")
    np.testing.assert_array_equal(open_predictor(tmp_path / "downloaded")(batch), before)
    trained = open_predictor(made / "run")(batch)
    np.testing.assert_allclose(before, trained, atol=1e-4)
    assert not (tmp_path / "other").exists()  # to open a model is not to make it


def test_what_this_user_made_is_trusted_wherever_it_lies(made, tmp_path, monkeypatch):
    batch = np.zeros(SHAPE, np.float32)
    shutil.copytree(made / "savedmodel", tmp_path / "moved")
    answer = open_predictor(tmp_path / "moved")(batch)
    folder = Path(os.environ["HVD_IMAGING_STATE"]) / "made"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and all(not path.read_bytes() for path in folder.iterdir())

    # Others may have put something there: what lies in it counts for nothing.
    folder.chmod(0o777)
    with pytest.raises(RunError, match="--trust"):
        open_predictor(tmp_path / "moved")
    folder.chmod(0o700)
    monkeypatch.setenv("HVD_IMAGING_STATE", str(tmp_path / "other"))
    with pytest.raises(RunError, match="--trust"):
        open_predictor(tmp_path / "moved")
    np.testing.assert_array_equal(open_predictor(tmp_path / "moved", trusted=True)(batch), answer)


def test_where_nothing_can_be_remembered_the_export_is_written_all_the_same(made, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HVD_IMAGING_STATE", str(tmp_path / "file"))
    assert export_run(made / "run", "savedmodel", tmp_path / "out").passed
    with pytest.raises(RunError, match="--trust"):
        open_predictor(tmp_path / "out")


OWN = """
import tensorflow as tf
@tf.keras.utils.register_keras_serializable("mine")
class Twice(tf.keras.layers.Layer):
    def call(self, x):
        return 2 * x
def net(spec):
    image = tf.keras.Input((*spec.patch, spec.channels), name="image")
    x = tf.keras.layers.Conv3D(len(spec.classes), 1, name="logits")(Twice(name="twice")(image))
    return tf.keras.Model(image, x, name="own")
"""


def test_a_network_of_ones_own_with_layers_of_its_own(made, tmp_path, monkeypatch):
    """As `docs/adding-a-model.md` has it: no word of trust for who trained it, and with --trust for others who have the code."""
    (tmp_path / "path").mkdir()
    (tmp_path / "path/own_nets.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path / "path"))
    batch = np.random.default_rng(1).random((2, *SHAPE[1:]), np.float32)
    try:
        make_run(tmp_path / "run", made / "seg", name="own_nets:net")
        trained = open_predictor(tmp_path / "run")(batch)
        for kind in ("keras", "savedmodel"):
            assert export_run(tmp_path / "run", kind, tmp_path / kind).passed
            np.testing.assert_allclose(open_predictor(tmp_path / kind)(batch), trained, atol=1e-5)
        monkeypatch.setenv("HVD_IMAGING_STATE", str(tmp_path / "other"))
        for kind in ("keras", "savedmodel", "run"):
            with pytest.raises(RunError, match="--trust"):
                open_predictor(tmp_path / kind)
            np.testing.assert_allclose(open_predictor(tmp_path / kind, trusted=True)(batch), trained, atol=1e-5)
    finally:
        sys.modules.pop("own_nets", None)


# --- signatures ------------------------------------------------------------------------------------------------------------------


def sign(model, key, *more):
    from hvd_imaging.cli.sign import command

    return CliRunner().invoke(command, [str(model), "--key-file", str(key), *more])


@pytest.mark.parametrize("kind", [*KINDS, "run"])
def test_a_signed_model(made, tmp_path, kind):
    from hvd_imaging.inference import signing

    model, key = tmp_path / "model", tmp_path / "keys/maker.pem"
    shutil.copytree(made / kind, model)
    public = tmp_path / "keys/maker.pem.pub"
    result = sign(model, key, "--new-key")
    assert result.exit_code == 0 and "maker.pem.pub" in result.output and "model.sig: signs" in result.output
    signing.check(model, public)
    assert open_predictor(model).kind == kind

    shutil.copytree(model, tmp_path / "other")
    changed = tmp_path / "other" / ("best.npz" if kind == "run" else "model.json")
    data = bytearray(changed.read_bytes())
    data[-1] ^= 1
    changed.write_bytes(data)
    if kind != "run":
        exported.seal(tmp_path / "other", ModelSpec.load(model), kind)  # a forger sets the check sums anew
    with pytest.raises(RunError, match="not as it was signed; get the model from its maker again"):
        signing.check(tmp_path / "other", public)
    assert sign(tmp_path / "other", tmp_path / "keys/other.pem", "--new-key").exit_code == 0
    with pytest.raises(RunError, match="another key"):
        signing.check(tmp_path / "other", public)


def test_a_signature_covers_what_a_run_is_added(made, tmp_path):
    """An architecture.json beside signed weights would be another network."""
    from hvd_imaging import keys
    from hvd_imaging.inference import signing
    from hvd_imaging.models import architecture, build

    shutil.copytree(made / "run", tmp_path / "run")
    public = keys.make_key(tmp_path / "maker.pem")
    signing.sign(tmp_path / "run", tmp_path / "maker.pem")
    (tmp_path / "run/events.jsonl").write_text("")  # what answers do not depend on may change
    signing.check(tmp_path / "run", public)
    architecture.save(build(ModelSpec.load(tmp_path / "run")), tmp_path / "run")
    with pytest.raises(RunError, match=r"architecture\.json: is not as it was signed"):
        signing.check(tmp_path / "run", public)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda model: (model / "model.sig").unlink(), "is not signed"),
        (lambda model: (model / "model.sig").write_text("{"), "cannot be read as a signature"),
        (lambda model: (model / "model.sig").write_text('{"signature": "AA==", "files": 3}'), "cannot be read as a signature"),
        (lambda model: (model / "model.sig").write_text('{"signature": "AA==", "files": {}}'), "another key"),
        (lambda model: (model / "model.onnx").write_bytes(b"x"), "damaged or changed"),
    ],
)
def test_the_commands_ask_for_the_signature(made, tmp_path, harm, words):
    from hvd_imaging.cli.predict import command

    model = tmp_path / "model"
    shutil.copytree(made / "onnx", model)
    assert sign(model, tmp_path / "maker.pem", "--new-key").exit_code == 0
    arguments = [str(model), str(made / "seg"), str(tmp_path / "out"), "--public-key", str(tmp_path / "maker.pem.pub")]
    assert CliRunner().invoke(command, arguments, catch_exceptions=False).exit_code == 0
    harm(model)
    result = CliRunner().invoke(command, [*arguments, "--force"])
    assert isinstance(result.exception, RunError) and words in str(result.exception)


def test_a_signature_is_not_trust(made, tmp_path, elsewhere):
    """It tells who made the model; that it may run is another question."""
    from hvd_imaging.cli.predict import command

    model = tmp_path / "model"
    shutil.copytree(made / "savedmodel", model)
    sign(model, tmp_path / "maker.pem", "--new-key")
    arguments = [str(model), str(made / "seg"), str(tmp_path / "out"), "--public-key", str(tmp_path / "maker.pem.pub")]
    assert "--trust" in str(CliRunner().invoke(command, arguments).exception)
    assert CliRunner().invoke(command, [*arguments, "--trust"], catch_exceptions=False).exit_code == 0


def test_what_can_not_be_signed(made, tmp_path):
    result = sign(tmp_path, tmp_path.parent / "maker.pem", "--new-key")
    assert isinstance(result.exception, RunError) and "neither a run folder" in str(result.exception)
    shutil.copytree(made / "onnx", tmp_path / "model")
    result = sign(tmp_path / "model", tmp_path / "model/maker.pem", "--new-key")
    assert "must not lie in the model" in str(result.exception) and not (tmp_path / "model/maker.pem").exists()
    result = sign(tmp_path / "model", tmp_path / "nothing.pem")
    assert isinstance(result.exception, SetupError) and isinstance(result.exception, HvdImagingError)
