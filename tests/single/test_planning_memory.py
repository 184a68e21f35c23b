"""Memory of a rank, told without TensorFlow: the parameters are Keras' own count."""

import pytest

from hvd_imaging import models
from hvd_imaging.config import RunConfig, check
from hvd_imaging.errors import ConfigError
from hvd_imaging.models.spec import ModelSpec
from hvd_imaging.planning.memory import layers, parameters, rank_bytes


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
    with pytest.raises(ConfigError, match="can not be told from its configuration; measure one rank"):
        rank_bytes(config(model={"name": "my.module:net"}), 1, 2, 1)
