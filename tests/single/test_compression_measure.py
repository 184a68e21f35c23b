"""Sizes, and figures from fresh processes: what they print, and what becomes of those that fail."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from datasets import make_dataset
from runs import make_run

from hvd_imaging.compression import measure


def program(folder, text):
    """A program in place of Python."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


# --- sizes ----------------------------------------------------------------------------------------------------------


def test_gzip_size_is_that_of_gzip(tmp_path):
    random = np.random.default_rng(0)
    data = random.bytes(200_000) + bytes(1_500_000) + random.bytes(200_000)  # more than one piece
    path = tmp_path / "m.bin"
    path.write_bytes(data)
    assert measure.gzip_size(path) == len(gzip.compress(data, 9, mtime=0))
    before = measure.gzip_size(path)
    os.utime(path, (1, 1))
    assert measure.gzip_size(path) == before < 450_000
    (tmp_path / "empty").touch()
    assert measure.gzip_size(tmp_path / "empty") == len(gzip.compress(b"", 9, mtime=0))


def test_what_describes_a_model_is_not_its_size(tmp_path):
    (tmp_path / "saved_model/variables").mkdir(parents=True)
    for name, size in (("saved_model/saved_model.pb", 10), ("saved_model/variables/data.json", 20), ("model.json", 500),
                       ("parity.json", 500), ("MODEL_CARD.md", 500), ("model_card.html", 500)):  # fmt: skip
        (tmp_path / name).write_bytes(b"x" * size)
    assert measure.sizes(tmp_path)["bytes"] == 30
    assert [path.name for path in measure.model_files(tmp_path)] == ["saved_model.pb", "data.json"]


def test_of_a_run_folder_the_weights_count(tmp_path):
    for name, size in (("run.yaml", 9), ("best.npz", 70), ("events.jsonl", 5000)):
        (tmp_path / name).write_bytes(b"x" * size)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/step.npz").write_bytes(b"x" * 9999)
    assert measure.sizes(tmp_path)["bytes"] == 70


def test_no_model_has_no_size(tmp_path):
    nothing = {"bytes": None, "gzip_bytes": None}
    assert measure.sizes(tmp_path) == nothing  # an empty folder is not a model of 0 bytes
    assert measure.sizes(tmp_path / "missing") == nothing
    (tmp_path / "run.yaml").touch()
    assert measure.sizes(tmp_path) == nothing


# --- processes ------------------------------------------------------------------------------------------------------


def test_a_model_is_measured_and_a_broken_one_is_a_row(tmp_path):
    make_dataset(tmp_path / "dataset", samples=4)
    run = make_run(tmp_path / "run", tmp_path / "dataset")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "model.json").write_text("{")
    calls = []
    found = measure.measure_models(
        {"run": run, "broken": broken}, {"one": 1}, repeats=1, runs=3, progress=lambda *at: calls.append(at)
    )
    row = found["run"]
    assert row["reason"] == "" and row["kind"] == "run"
    assert row["runs"] == {"one": 3} and row["threads"] == {"one": 1}
    assert 0 < row["latency_ms"]["one"] < row["load_ms"]
    low, high = row["spread_ms"]["one"]
    assert low <= row["latency_ms"]["one"] <= high
    assert row["peak_bytes"] > 100e6  # TensorFlow is in it
    assert row["bytes"] == (run / "best.npz").stat().st_size
    assert found["broken"]["latency_ms"] == {"one": None} and found["broken"]["peak_bytes"] is None
    assert "broken" in found["broken"]["reason"] and "(1 thread)" in found["broken"]["reason"]
    assert calls == [(1, 2), (2, 2)]
    json.dumps(found, allow_nan=False)


def test_a_missing_model_is_a_reason(tmp_path):
    answer = measure.run_worker(tmp_path / "nothing", 1, 1)
    assert list(answer) == ["reason"] and "no such model" in answer["reason"]


def test_a_slow_process_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", program(tmp_path, "exec sleep 60"))
    assert measure.run_worker(tmp_path, 1, 1, timeout=0.2) == {"reason": "no answer within 0.2 s"}


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("kill -9 $$", "signal 9"),
        ("echo one >&2; echo the cause >&2; exit 3", "its process failed: the cause"),
        ("exit 3", "exit code 3"),
        ("echo 17", "its process failed"),
        ("echo '{\"reason\": \"no runtime\"}'", "no runtime"),
    ],
)
def test_a_process_that_fails_says_why(tmp_path, monkeypatch, script, reason):
    monkeypatch.setattr(sys, "executable", program(tmp_path, script))
    assert reason in measure.run_worker(tmp_path, 1, 1)["reason"]


def test_notes_before_the_figures_do_no_harm(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", program(tmp_path, "echo a note of some library; echo '{\"kind\": \"x\"}'"))
    assert measure.run_worker(tmp_path, 1, 1) == {"kind": "x"}


def test_models_take_turns_and_a_failed_one_is_not_asked_again(tmp_path, monkeypatch):
    asked = []

    def worker(folder, threads, runs, timeout):
        asked.append((folder.name, threads))
        if folder.name == "c":
            return {"reason": "broken"}
        time = {"a": 10.0, "b": 20.0}[folder.name] + len(asked)
        return {"kind": "k", "load_ms": 5.0, "times_ms": [time, time + 100], "peak_bytes": len(asked)}

    monkeypatch.setattr(measure, "run_worker", worker)
    folders = {name: tmp_path / name for name in "abc"}
    found = measure.measure_models(folders, {"one": 1, "all": 2}, repeats=2, runs=2)
    assert asked == [
        ("a", 1), ("b", 1), ("c", 1), ("a", 2), ("b", 2), ("a", 1), ("b", 1), ("a", 2), ("b", 2),
    ]  # fmt: skip
    assert found["a"]["runs"] == {"one": 4, "all": 4}
    assert found["a"]["latency_ms"]["one"] == np.median([11, 111, 16, 116])
    assert found["b"]["peak_bytes"] == 9
    assert found["c"]["reason"] == "broken (1 thread)" and found["c"]["runs"] == {"one": 0, "all": 0}


def test_a_launchers_settings_do_not_reach_the_worker():
    kept = measure.clean_environment(
        {"PATH": "/bin", "OMP_NUM_THREADS": "7", "OMPI_COMM_WORLD_RANK": "1", "TF_NUM_INTRAOP_THREADS": "7",
         "SLURM_PROCID": "3", "LD_LIBRARY_PATH": "/lib", "PYTHONPATH": "/mine"}
    )  # fmt: skip
    assert set(kept) == {"PATH", "LD_LIBRARY_PATH", "PYTHONPATH"}
    assert kept["PYTHONPATH"].endswith(os.pathsep + "/mine")


def test_peak_memory_is_the_processs_own():
    large = np.ones(60_000_000)  # 480 MB in this process
    script = "from hvd_imaging.compression.measure_worker import peak_bytes\na = bytearray(60_000_000)\nprint(peak_bytes())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 60e6 < int(done.stdout) < 300e6 < large.nbytes
