"""`hvd-imaging init` writes what the configuration's own models read back."""

import re

import pytest
import yaml
from click.testing import CliRunner

from hvd_imaging import config
from hvd_imaging.cli.init import STARTS, command, render
from hvd_imaging.config import RunConfig
from hvd_imaging.errors import ConfigError


def run(*args):
    return CliRunner().invoke(command, args)


@pytest.mark.parametrize("task", STARTS)
def test_the_file_loads_back_to_exactly_the_same_values(task, tmp_path):
    path = tmp_path / "run.yaml"
    assert run(task, "-o", str(path), "--dataset", "some folder/data: 1").exit_code == 0
    loaded = config.load(RunConfig, path)
    expected = {section: dict(values) for section, values in STARTS[task].items()}
    expected["data"]["dataset"] = "some folder/data: 1"
    assert loaded == config.check(RunConfig, expected, "test")


@pytest.mark.parametrize("task", STARTS)
def test_every_key_stands_there_with_its_comment(task):
    text = render(task)
    shown = re.findall(r"^ *([a-z_0-9]+):", text, re.MULTILINE)
    wanted = {part for key in config.keys(RunConfig) for part in key.split(".")}
    assert set(shown) == wanted
    bare = [line for line in text.splitlines() if line.strip() and "#" not in line]
    assert not bare, "keys without a comment"


def test_values_fit_the_task():
    segmentation, classification = (
        config.check(RunConfig, yaml.safe_load(render(task)), task) for task in ("segmentation", "classification")
    )
    assert segmentation.model.name == "unet3d" and segmentation.data.patch == (32, 48, 48)
    assert classification.model.name == "vgg16" and classification.data.patch == (1, 96, 96)
    assert classification.train.loss == "ce" and classification.model.norm == "group"
    assert classification.data.augment.flip == (False, False, True)


def test_without_a_file_it_goes_to_stdout():
    done = run("segmentation")
    assert done.exit_code == 0 and done.stdout == render("segmentation")


def test_an_existing_file_is_kept_unless_forced(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("mine")
    done = run("segmentation", "-o", str(path))
    assert isinstance(done.exception, ConfigError) and "--force" in str(done.exception)
    assert path.read_text() == "mine"
    assert run("segmentation", "-o", str(path), "--force").exit_code == 0
    assert path.read_text() == render("segmentation")


@pytest.mark.parametrize("name", ["a b", "scans: 2", "#1", "'", "null", "7", "däta", "a\\b"])
def test_any_folder_name_survives(name, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(render("segmentation", name), encoding="utf-8")
    assert config.load(RunConfig, path).data.dataset == name


def test_a_price_file_loads_back_and_says_that_it_is_made_up(tmp_path):
    from hvd_imaging.config import load
    from hvd_imaging.planning.prices import Prices

    path = tmp_path / "prices.yaml"
    assert CliRunner().invoke(command, ["prices", "-o", str(path)], catch_exceptions=False).exit_code == 0
    assert load(Prices, path) == Prices() and "INVENTED EXAMPLES" in path.read_text()
    with pytest.raises(ConfigError, match="a price file names no dataset"):
        CliRunner().invoke(command, ["prices", "--dataset", "d"], catch_exceptions=False)
