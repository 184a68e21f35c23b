"""Recipes: what they may say, and the folders that they become."""

from __future__ import annotations

import math

import pytest
import yaml

from hvd_imaging.compression.recipe import TEMPLATES, Recipe
from hvd_imaging.config import check, load
from hvd_imaging.errors import ConfigError


def recipe(*steps, **more):
    return check(Recipe, {"steps": list(steps), **more}, "recipe.yaml")


@pytest.mark.parametrize("task", TEMPLATES)
def test_the_templates_are_recipes(task, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(TEMPLATES[task])
    found = load(Recipe, path)
    assert [step.do for step in found.steps] and found.split == "test"
    assert found == check(Recipe, found.model_dump(mode="json"), "again")


@pytest.mark.parametrize(
    ("steps", "why"),
    [
        ([{"do": "quantize"}, {"do": "weights"}], "quantize has to be the last one"),
        ([{"do": "cluster"}, {"do": "quantize"}], "cluster has to be the last one"),
        ([{"do": "weights"}, {"do": "filters"}], "filters come before weights"),
        ([{"do": "prune"}], "steps"),
        ([{"do": "weights", "sparsity": 1.0}], "sparsity"),
        ([{"do": "weights", "pattern": [4, 4]}], "expected m below n"),
        ([{"do": "filters", "remove": 0.5, "sparsity": 0.5}], "sparsity"),
        ([{"do": "cluster", "clusters": 1}], "clusters"),
    ],
)
def test_what_can_not_be_carried_out_is_refused(steps, why):
    with pytest.raises(ConfigError, match=why):
        recipe(*steps)


def test_an_unknown_format_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(ConfigError, match="tflite-int8"):
        recipe(formats=["coreml"])
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"formats": []}))
    with pytest.raises(ConfigError, match="formats"):
        load(Recipe, path)


def test_rounds_are_folders_that_together_remove_what_is_wanted():
    from hvd_imaging.compression.stages import stages

    found = stages(recipe({"do": "freeze_norms"}, {"do": "filters", "remove": 0.6, "rounds": 3}, {"do": "quantize"}))
    assert [stage.name for stage in found] == ["01-freeze_norms", "02-filters-1", "03-filters-2", "04-filters-3", "05-quantize"]
    left = math.prod(1 - stage.share for stage in found)
    assert left == pytest.approx(0.4)


def test_zeros_stay_in_the_steps_after_the_one_that_made_them():
    from hvd_imaging.compression.stages import stages

    found = stages(recipe({"do": "freeze_norms"}, {"do": "weights"}, {"do": "cluster"}))
    assert [stage.zeros for stage in found] == [False, False, True]
