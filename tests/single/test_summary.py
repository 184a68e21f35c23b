"""The table at the end of the quickstart."""

import json

import pytest

from hvd_imaging.errors import RunError
from hvd_imaging.reporting import summary


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "unet3d"
    folder.mkdir()
    mean = {"dice": {"value": 0.8765, "low": 0.8, "high": 0.9}, "accuracy": {"value": 0.99}, "recall": {"value": None}}
    (folder / "evaluation-test.json").write_text(json.dumps({"task": "segmentation", "mean": mean, "cases": []}))
    (folder / "model.json").write_text(json.dumps({"model": {"name": "unet3d"}}))
    events = [
        {"event": "start"},
        *({"event": "epoch", "epoch": n, "samples_per_second": speed} for n, speed in enumerate([1.0, 9.0, 10.0, 11.0])),
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + '{"half')
    return folder


def test_figures_of_a_run(run_dir):
    row = summary.summarize(run_dir)
    assert (row["dice"], row["accuracy"], row["recall"], row["auc"]) == (0.8765, 0.99, None, None)
    assert row["samples_per_second"] == 10.0, "the first epoch compiles and does not count"


def test_the_table(run_dir, capsys, tmp_path):
    assert summary.main([str(run_dir), "--files", str(tmp_path), str(run_dir / "model.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["run", "model", "Dice", "accuracy", "recall", "AUC", "samples/s"]
    assert lines[2].split() == ["unet3d", "unet3d", "0.876", "0.990", "-", "-", "10.0"]
    assert any("3 files" in line for line in lines) and any("1 file " in line for line in lines)


def test_a_run_that_was_not_evaluated(tmp_path, capsys):
    with pytest.raises(RunError, match="hvd-imaging evaluate"):
        summary.summarize(tmp_path)
    assert summary.main([str(tmp_path)]) == RunError.exit_code
    assert capsys.readouterr().err.startswith("hvd-imaging: error: ")
