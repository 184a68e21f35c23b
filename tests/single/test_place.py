"""A run finds its dataset from every folder, where it has moved to, and nothing that is another one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from datasets import make_dataset
from runs import make_run

from hvd_imaging.errors import DatasetError, RunError
from hvd_imaging.shards import manifest as manifests
from hvd_imaging.training import place
from hvd_imaging.training.run import load_run, located

# matplotlib on a newer pyparsing
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated - use.*:DeprecationWarning")


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project whose run was started with relative paths from its own folder."""
    folder = tmp_path / "project"
    (folder / "data").mkdir(parents=True)
    monkeypatch.chdir(folder)
    make_dataset(Path("data/lung"), samples=4)
    make_run(Path("runs/group/unet"), Path("data/lung"))
    return folder


def found(run) -> str:
    return located(load_run(run)).config.data.dataset


def as_typed(run: Path, dataset: str) -> None:
    """A run folder that holds the path as the user typed it."""
    values = yaml.safe_load((run / "run.yaml").read_text())
    values["data"]["dataset"] = dataset
    (run / "run.yaml").write_text(yaml.safe_dump(values))


def test_the_stored_path_means_the_same_from_every_folder(project, tmp_path, monkeypatch):
    run = project / "runs/group/unet"
    assert yaml.safe_load((run / "run.yaml").read_text())["data"]["dataset"] == str(project / "data/lung")
    monkeypatch.chdir(tmp_path)
    assert found("project/runs/group/unet") == str(project / "data/lung")


def test_a_relative_path_is_seen_from_the_run_too(project, tmp_path, monkeypatch):
    as_typed(project / "runs/group/unet", "data/lung")
    assert found("runs/group/unet") == str(project / "data/lung")
    monkeypatch.chdir(tmp_path)
    assert found("project/runs/group/unet") == str(project / "data/lung")
    # another dataset of that name, where the command is started
    make_dataset(Path("data/lung"), samples=3)
    assert found("project/runs/group/unet") == str(project / "data/lung")


@pytest.mark.parametrize("to", ["moved/data/lung", "runs/lung-v2", "lung", "runs/group/beside"])
def test_a_moved_dataset_is_found_by_its_hash(project, tmp_path, to):
    new = tmp_path / "elsewhere"
    if to == "moved/data/lung":
        # the whole project moved
        shutil.move(project, new)
        expected = new / "data/lung"
    else:
        shutil.move(project, new)
        shutil.move(new / "data/lung", new / to)
        expected = new / to
    make_dataset(new / "runs/another", samples=3)
    (new / "runs/damaged").mkdir()
    (new / "runs/damaged/manifest.json").write_text("{")
    make_run(new / "runs/group/second", expected)  # holds the same manifest, and no shards
    shutil.copytree(new / "runs/group/second", new / "runs/group/a-copy")
    (new / "runs/group/a-copy/run.yaml").unlink()
    assert found(new / "runs/group/unet") == str(expected)


def test_what_is_not_the_dataset_is_refused(project, tmp_path):
    run = project / "runs/group/unet"
    wanted = manifests.load(project / "data/lung").hash()
    other = make_dataset(tmp_path / "other", samples=3).hash()
    with pytest.raises(RunError, match=f"expected the dataset {wanted[:12]} .* found {other[:12]}"):
        located(load_run(run), tmp_path / "other")
    with pytest.raises(DatasetError, match="nowhere: no manifest.json"):
        located(load_run(run), tmp_path / "nowhere")
    assert located(load_run(run), project / "data/lung").config.data.dataset == str(project / "data/lung")
    shutil.rmtree(project / "data/lung")
    with pytest.raises(DatasetError, match=f"data/lung: the run's dataset is not there .*dataset {wanted[:12]} beside the run.*--dataset DIR"):
        located(load_run(run))
    # at its own place another one is for the caller to judge
    shutil.copytree(tmp_path / "other", project / "data/lung")
    assert found(run) == str(project / "data/lung")


def test_the_search_is_bounded(tmp_path, monkeypatch):
    make_dataset(tmp_path / "d000", samples=2)
    for number in range(1, place.MOST + 30):
        (tmp_path / f"d{number:03d}").mkdir()
        shutil.copy(tmp_path / "d000/manifest.json", tmp_path / f"d{number:03d}")
    read = []
    monkeypatch.setattr(manifests, "load", lambda folder, load=manifests.load: read.append(folder) or load(folder))
    with pytest.raises(DatasetError, match="is not there"):
        place.find_dataset(tmp_path / "run", "gone", "0" * 64)
    assert len(read) == place.MOST


def test_the_commands_find_it(project, tmp_path, monkeypatch):
    from hvd_imaging.cli import evaluate, export, train

    shutil.move(project / "data/lung", project / "runs/lung")
    monkeypatch.chdir(tmp_path)
    run = "project/runs/group/unet"
    result = CliRunner().invoke(evaluate.command, [run, "--split", "train", "--no-plots", "--json", "-"], catch_exceptions=False)
    assert json.loads(result.stdout)["cases"]
    result = CliRunner().invoke(evaluate.command, [run, "--split", "train", "--no-plots", "--dataset", "project/runs/lung"], catch_exceptions=False)
    assert result.exit_code == 0
    result = CliRunner().invoke(export.command, [run, "--format", "keras", "model", "--json"], catch_exceptions=False)
    assert json.loads(result.stdout)["inputs"] == "dataset"
    # --resume: the configuration still names the old place
    settings = train._with_dataset(load_run(run).config, Path(run), True, None)
    assert settings.data.dataset == str(project / "runs/lung")
    assert train._with_dataset(settings, Path(run), False, project / "runs/lung").data.dataset == str(project / "runs/lung")
    with pytest.raises(RunError, match="expected the dataset"):
        make_dataset(tmp_path / "other", samples=3)
        train._with_dataset(settings, Path(run), True, tmp_path / "other")
