"""Integer exports on processors with fewer instruction sets than this one, seen through a CPUID that hides them (held_processor.c)."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hvd_imaging import processor
from hvd_imaging.config import ModelConfig, PreprocessConfig
from hvd_imaging.export import export_model
from hvd_imaging.models.spec import ModelSpec

PATCH = (8, 16, 16)
KINDS = ("tflite-int8", "tflite-dynamic", "onnx-int8")

# Answers of every export in a folder, and what the comparison with its golden patches says.
WORKER = """
import json, sys
import numpy as np
from pathlib import Path
from hvd_imaging.errors import RunError
from hvd_imaging.inference import golden
from hvd_imaging.inference.predictors import open_predictor
folder, out = Path(sys.argv[1]), Path(sys.argv[2])
patches, said = np.load(folder / "patches.npy"), {}
for place in sorted(path for path in folder.iterdir() if path.is_dir()):
    predictor = open_predictor(place, threads=1, edge=True)
    np.save(out / f"{place.name}.npy", predictor(patches))
    try:
        said[place.name] = golden.check_once(place, predictor, out / "cache")
    except RunError as error:
        said[place.name] = str(error)
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    """The environment of a program that sees a smaller processor; by level."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if sys.platform != "linux" or platform.machine() != "x86_64" or compiler is None:
        pytest.skip("needs Linux on x86-64 and a C compiler")
    library = tmp_path_factory.mktemp("held") / "held.so"
    source = Path(__file__).resolve().parents[1] / "held_processor.c"
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True, timeout=60)

    def environment(level):
        return os.environ | {"LD_PRELOAD": str(library), "HVD_HOLD_TO": level}

    seen = "from numpy._core._multiarray_umath import __cpu_features__ as f; print(f['AVX2'], f['AVX512F'])"
    done = subprocess.run([sys.executable, "-c", seen], env=environment("avx2"), capture_output=True, text=True, timeout=60, check=False)
    if done.stdout.split() != ["True", "False"]:
        pytest.skip("this kernel or processor cannot make CPUID trap")
    return environment


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """The integer formats of one network with large weights beside each other, and one export with 8-bit weights as a counter-example."""
    import tensorflow as tf
    from onnxruntime import quantization as tools

    from hvd_imaging.export import onnx

    layers = tf.keras.layers
    tf.keras.utils.set_random_seed(3)
    image = tf.keras.Input((*PATCH, 1))
    x = layers.Conv3D(8, 3, padding="same", activation="relu")(image)
    x = layers.Conv3D(8, 3, strides=2, padding="same", activation="relu", kernel_initializer="he_uniform")(x)
    x = layers.Conv3DTranspose(8, 2, strides=2, padding="same", activation="relu")(x)
    model = tf.keras.Model(image, layers.Conv3D(2, 1, kernel_initializer=tf.keras.initializers.RandomNormal(stddev=2.0, seed=1))(x))
    spec = ModelSpec(
        task="segmentation", classes=("background", "lesion"), patch=PATCH, channels=1, dataset_hash="0", run="run", overlap=0.25,
        preprocess=PreprocessConfig(intensity="window"), model=ModelConfig(name="small"),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("exports")
    patches = np.random.default_rng(0).random((4, *PATCH, 1), np.float32)
    np.save(folder / "patches.npy", patches)

    def export(name, kind):
        (folder / name).mkdir()
        assert export_model(model, spec, kind, folder / name, patches, "random", patches).passed

    for kind in KINDS:
        export(kind, kind)
    whole = tools.quantize_static
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tools, "quantize_static", lambda *given, **named: whole(*given, **(named | {"reduce_range": False})))
        patch.setattr(onnx, "_whole", lambda graph: {})
        patch.setattr(onnx, "check_products", lambda graph: None)
        export("eight-bit-weights", "onnx-int8")
    return folder


def answers(exports, out, environment=None):
    out.mkdir()
    command = [sys.executable, "-c", WORKER, str(exports), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
    return {path.stem: np.load(path) for path in out.glob("*.npy")}, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("level", ["avx2", "avx512", "vnni"])
def test_exports_answer_the_same_on_smaller_processors(held, exports, tmp_path, level):
    here, said = answers(exports, tmp_path / "here")
    assert set(here) == {*KINDS, "eight-bit-weights"} and not any(said.values())
    there, said = answers(exports, tmp_path / "there", held(level))
    for kind in KINDS:
        assert said[kind] == ""
        np.testing.assert_allclose(there[kind], here[kind], atol=2e-3, err_msg=kind)
    if level != "vnni" and processor.has_integers(processor.instruction_sets()):
        assert np.abs(there["eight-bit-weights"] - here["eight-bit-weights"]).max() > 0.02
        assert "this machine answers otherwise than at export: largest difference 0." in said["eight-bit-weights"]
