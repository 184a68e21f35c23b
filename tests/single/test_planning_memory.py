"""Memory of a rank, told without TensorFlow: the parameters are Keras' own count."""

import pytest

from hvd_imaging import models
from hvd_imaging.config import RunConfig, check
from hvd_imaging.errors import ConfigError
from hvd_imaging.models.spec import ModelSpec
from hvd_imaging.parallel.grid import Grid
from hvd_imaging.planning.memory import fitting, grids, layers, parameters, rank_bytes


def config(patch=(16, 32, 32), batch=4, model=None, **train):
    return check(
        RunConfig, {"data": {"dataset": "d", "patch": list(patch)}, "model": model or {"name": "unet3d"}, "train": {"batch_size": batch} | train}, "t"
    )


@pytest.mark.parametrize(
    ("patch", "model"),
    [
        ((16, 32, 32), {"name": "unet3d"}),
        ((16, 32, 48), {"name": "unet3d", "filters": 8, "depth": 4, "norm": "none", "deep_supervision": True, "dropout": 0.1}),
        ((1, 64, 64), {"name": "vgg16", "width": 0.25, "norm": "group"}),
        ((1, 64, 96), {"name": "vgg16", "width": 0.125, "norm": "none", "head": "dense"}),
        ((9, 30, 31), {"name": "cnn3d", "width": 0.5}),
    ],
)
def test_parameters_are_those_of_the_network(patch, model):
    settings = config(patch, model=model)
    spec = ModelSpec(
        task="classification", classes=("a", "b", "c"), patch=patch, channels=2, preprocess={}, model=settings.model, dataset_hash="", run=""
    )
    network = models.build(spec)
    assert parameters(settings, 2, 3) == network.count_params()
    known = {layer.name: layer for layer in layers(settings, 2, 3)}
    for layer in network.layers:
        if layer.name in known and "conv" in layer.name and settings.model.norm == "none":
            assert known[layer.name].kept == layer.output.shape[1:].num_elements(), layer.name


def test_what_makes_a_rank_smaller():
    base = rank_bytes(config(batch=8), 1, 2, 1)
    assert rank_bytes(config(batch=8), 1, 2, 4).activations == base.activations / 4
    assert rank_bytes(config(batch=8, accumulate=2), 1, 2, 1).activations == base.activations / 2
    assert rank_bytes(config(batch=8, mixed_precision="bfloat16"), 1, 2, 1).activations == base.activations / 2
    assert rank_bytes(config((16, 32, 64), batch=8), 1, 2, 1).activations == 2 * base.activations
    assert rank_bytes(config(batch=8, optimizer="sgd"), 1, 2, 1).optimizer == base.optimizer / 2 == base.weights
    assert base.total == sum((base.weights, base.gradients, base.optimizer, base.copies, base.activations, base.batch, base.runtime))
    with pytest.raises(ConfigError, match="cannot be told from its configuration; measure one rank"):
        rank_bytes(config(model={"name": "my.module:net"}), 1, 2, 1)


def test_what_slabs_shared_columns_and_recomputing_save():
    base = rank_bytes(config((32, 32, 32), batch=1), 1, 2, 1)
    halves = [rank_bytes(config((32, 32, 32), batch=1), 1, 2, n, spatial=n) for n in (2, 4)]
    assert halves[0].activations == base.activations / 2 and halves[1].activations == base.activations / 4
    assert halves[0].weights == base.weights and halves[0].batch == base.batch / 2
    # 28 slices on two ranks are 12 and 16: the larger one counts.
    uneven = rank_bytes(config((28, 32, 32), batch=1), 1, 2, 2, spatial=2)
    assert uneven.activations == halves[0].activations
    assert rank_bytes(config((32, 32, 32), batch=1, recompute=True), 1, 2, 1).activations < 0.7 * base.activations

    def vgg(dense):
        values = {"data": {"dataset": "d", "patch": [1, 64, 64]}, "model": {"name": "vgg16", "head": "dense"}, "parallel": {"dense": dense}}
        return check(RunConfig, values, "t")

    whole, part = (rank_bytes(vgg(dense), 1, 2, 4) for dense in ("replicated", "sharded"))
    shared = sum(layer.parameters for layer in layers(vgg("sharded"), 1, 2) if layer.shared)
    assert part.weights == whole.weights - 4 * shared * 3 / 4 and part.copies == whole.copies
    assert parameters(vgg("sharded"), 1, 2) == parameters(vgg("replicated"), 1, 2) - shared


def test_the_grid_that_fits_has_as_few_ranks_to_a_volume_as_memory_permits():
    settings = check(RunConfig, {"data": {"dataset": "d", "patch": [32, 64, 64]}, "model": {"name": "unet3d"}, "train": {"batch_size": 4},
                                 "parallel": {"spatial": "auto"}}, "t")  # fmt: skip
    found = grids(settings, 1, 2, 4)
    assert [grid for grid, _ in found] == [Grid(4, 1), Grid(2, 2), Grid(1, 4)]
    # One volume a rank, halves of two, quarters of four: a batch of four takes about as much either way.
    small = check(RunConfig, settings.model_dump(mode="json") | {"train": {"batch_size": 1}}, "t")
    assert [grid.spatial for grid, _ in grids(small, 1, 2, 4)] == [4]
    totals = [rank_bytes(small, 1, 2, n, spatial=n).total for n in (1, 2, 4)]
    assert totals == sorted(totals, reverse=True)
    assert fitting(small, 1, 2, 4, 1e12).spatial == 4 and fitting(settings, 1, 2, 4, 1e12).spatial == 1
    assert rank_bytes(settings, 1, 2, 4) == min((estimate for _, estimate in found), key=lambda estimate: estimate.total)
    with pytest.raises(ConfigError, match=r"parallel.spatial=auto: no grid of 4 ranks fits into 0.1 GB a rank; the least"):
        fitting(settings, 1, 2, 4, 1e8)
