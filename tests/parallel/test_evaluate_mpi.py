"""Evaluation under `mpirun`: the ranks share the cases and say the same as one alone."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import make_dataset
from mpi_tools import mpirun
from runs import make_run

pytestmark = pytest.mark.mpi

SEVERAL = Path(__file__).with_name("several.py")
COMMAND = [sys.executable, "-m", "hvd_imaging.cli.main", "evaluate"]


def numbers(value, path=""):
    """All leaves of a report: path -> value."""
    if isinstance(value, dict):
        return {k: v for name, inner in value.items() for k, v in numbers(inner, f"{path}/{name}").items()}
    if isinstance(value, list):
        return {k: v for at, inner in enumerate(value) for k, v in numbers(inner, f"{path}/{at}").items()}
    return {path: value}


def test_two_ranks_report_what_one_reports(tmp_path):
    runs = []
    for task, shape in (("segmentation", (16, 24, 24)), ("classification", (1, 32, 32))):
        make_dataset(tmp_path / f"{task}-data", task, 9, shape, split=(0.1, 0.6))
        runs.append(make_run(tmp_path / task, tmp_path / f"{task}-data", task))
    commands = json.dumps([["evaluate", str(run), "--json", "-"] for run in runs])
    reports = []
    for size in (1, 2):
        found = mpirun(size, [sys.executable, SEVERAL, commands])
        assert found.returncode == 0, found.stderr
        printed = several_values(found.stdout)  # rank 0 alone prints
        assert printed == [json.loads((run / "evaluation-test.json").read_text()) for run in runs]
        for run in runs:
            (run / "evaluation-test.json").unlink()
            assert (run / "plots/overlays-test.png").exists()
            shutil.rmtree(run / "plots")
        reports.append(numbers(printed))
    one, two = reports
    assert one.keys() == two.keys()
    for path, value in one.items():
        assert two[path] == (pytest.approx(value, abs=1e-6) if isinstance(value, float) else value), path


def several_values(text):
    """The JSON values that stand one after another in a text."""
    values = []
    while text := text.lstrip():
        value, end = json.JSONDecoder().raw_decode(text)
        values.append(value)
        text = text[end:]
    return values


def test_a_missing_shard_stops_all_ranks_with_one_message(tmp_path):
    manifest = make_dataset(tmp_path / "data", samples=6, split=(0.2, 0.5))
    run = make_run(tmp_path / "run", tmp_path / "data")
    (tmp_path / "data" / manifest.of_split("test")[-1].shard).unlink()
    found = mpirun(2, [*COMMAND, str(run)])
    assert found.returncode == 4, found.stderr
    errors = [line for line in found.stderr.splitlines() if line.startswith("hvd-imaging: error:")]
    assert len(errors) == 1 and "the shard is missing" in errors[0]
    assert not (run / "evaluation-test.json").exists()


def test_two_ranks_compress_what_one_would(tmp_path):
    """Statistics, importance, training on, evaluation: all shared; exports and timing on rank 0 while the other waits."""
    make_dataset(tmp_path / "data", samples=6)
    run = make_run(tmp_path / "run", tmp_path / "data", norm="group")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({
        "steps": [
            {"do": "freeze_norms", "patches": 4, "epochs": 0},
            {"do": "filters", "remove": 0.4, "patches": 4, "epochs": 1},
        ],
        "formats": ["tflite"], "split": "val", "repeats": 1,
        "limits": {"metric_loss": None, "faster": None, "smaller": None},
    }))  # fmt: skip
    out = tmp_path / "out"
    command = [sys.executable, "-m", "hvd_imaging.cli.main", "compress"]
    found = mpirun(2, [*command, str(run), "--recipe", str(recipe), "--out", str(out), "--json"])
    assert found.returncode == 0, found.stderr
    result = json.loads(found.stdout)
    assert list(result["released"]) == ["tflite"] and result["formats"][0]["latency_ms"]["one"] > 0
    assert result["formats"][0]["parameters"] < 0.65 * result["reference"]["parameters"]
    log = [json.loads(line) for line in (out / "steps/02-filters/training/events.jsonl").read_text().splitlines()]
    assert log[0]["world_size"] == 2

    from hvd_imaging import bootstrap

    bootstrap.prepare()
    from hvd_imaging.compression import norms
    from hvd_imaging.compression.patches import training_batches
    from hvd_imaging.training import checkpoint
    from hvd_imaging.training.run import load_run, load_trained
    from hvd_imaging.world import World

    trained = load_run(run)
    alone = norms.freeze(load_trained(trained), lambda: (x for x, _ in training_batches(trained.config, World(), 4)))
    shared = checkpoint.load(out / "steps/01-freeze_norms/network.npz").weights
    for a, b in zip(alone.get_weights(), shared, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)  # the ranks' batches are of other sizes: float32 rounding
