"""The edge: `predict --edge` with the light runtimes, where TensorFlow and Horovod cannot be imported at all.

`scripts/edge_check.sh` does the same in an environment made from nothing, and tells its size; that takes a minute.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hvd_imaging.config import ModelConfig, PreprocessConfig
from hvd_imaging.export import export_model
from hvd_imaging.inference.predictors import open_predictor
from hvd_imaging.inference.sliding import sliding_window
from hvd_imaging.models.spec import ModelSpec
from hvd_imaging.sources.nifti import read_nifti, write_nifti
from hvd_imaging.volume import Volume

PATCH = (16, 16, 16)

# The import system of a machine that has never seen them.
BLOCKED = """
import sys
class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("tensorflow", "tf_keras", "keras", "horovod", "mpi4py", "onnx", "numba", "sklearn"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Nothing())
from hvd_imaging.cli.main import main
main()
"""


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Both 8-bit formats of one small network, whose answer depends on its whole surrounding."""
    import tensorflow as tf

    layers = tf.keras.layers
    tf.keras.utils.set_random_seed(3)
    image = tf.keras.Input((*PATCH, 1))
    x = layers.Conv3D(4, 3, padding="same", activation="relu")(image)
    x = layers.Conv3D(4, 3, padding="same", activation="relu")(x)
    model = tf.keras.Model(image, layers.Conv3D(2, 1)(x))
    spec = ModelSpec(
        task="segmentation", classes=("background", "lesion"), patch=PATCH, channels=1, dataset_hash="0", run="run", overlap=0.25,
        preprocess=PreprocessConfig(intensity="none", orientation="source"), model=ModelConfig(name="small"),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("edge")
    patches = np.random.default_rng(0).random((4, *PATCH, 1), np.float32)
    for kind in ("tflite-int8", "onnx-int8", "savedmodel"):
        (folder / kind).mkdir()
        assert export_model(model, spec, kind, folder / kind, patches, "random", patches).passed
    return folder


def run(*arguments, **options):
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("TF_", "OMP_"))}
    command = [sys.executable, "-c", BLOCKED, "predict", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, **options)


def volume(folder: Path, shape) -> Path:
    path = folder / "case.nii.gz"
    write_nifti(path, Volume(np.random.default_rng(5).random(shape, np.float32), np.diag([2.0, 1.0, 1.0, 1.0])))
    return path


@pytest.mark.parametrize("kind", ["tflite-int8", "onnx-int8"])
@pytest.mark.parametrize("shape", [(20, 33, 40), (9, 40, 5)], ids=["larger", "smaller than the patch"])
def test_a_volume_without_tensorflow(exports, tmp_path, kind, shape):
    case = volume(tmp_path, shape)
    done = run("--edge", "--threads", "1", "--json", exports / kind, case, tmp_path / "mask.nii.gz")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["format"] == kind and 30 << 20 < answer["peak_bytes"] < 600 << 20
    predictor, image = open_predictor(exports / kind), read_nifti(case).array
    image = image if image.ndim == 4 else image[..., None]
    expected = sliding_window(predictor, image, PATCH, 2, overlap=0.25, mode="labels")
    assert 0 < expected.mean() < 1
    np.testing.assert_array_equal(np.squeeze(read_nifti(tmp_path / "mask.nii.gz").array), expected)


def test_what_would_need_tensorflow_is_refused_in_one_line(exports, tmp_path):
    case = volume(tmp_path, (4, 8, 8))
    done = run("--edge", exports / "savedmodel", case, tmp_path / "mask.nii.gz")
    assert done.returncode == 5 and "format savedmodel needs TensorFlow, which --edge leaves out" in done.stderr
    done = run(exports / "savedmodel", case, tmp_path / "mask.nii.gz")
    assert done.returncode == 6 and "pip install 'hvd_imaging[train]'" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "mask.nii.gz").exists()


@pytest.mark.parametrize("kind", ["tflite-int8"])
def test_a_large_volume_stays_in_its_budget(exports, tmp_path, kind):
    """192^3 voxels: 27 MiB of image, 54 MiB of logits that never exist together."""
    case = tmp_path / "case.nii"
    write_nifti(case, Volume(np.random.default_rng(5).random((192, 192, 192), np.float32), np.eye(4)))
    done = run("--edge", "--overlap", "0", "--json", "--memory-mb", "600", exports / kind, case, tmp_path / "mask.nii")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["peak_bytes"] < 600 << 20
    done = run("--edge", "--memory-mb", "90", exports / kind, case, tmp_path / "other.nii")
    assert done.returncode == 5 and "a memory budget of 90 MiB is too small: the process holds" in done.stderr
