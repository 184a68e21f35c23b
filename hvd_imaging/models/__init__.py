"""Networks. A network is a function ``(ModelSpec) -> tf_keras.Model`` that returns logits, and an entry in BUILDERS.

Importing this package is light: TensorFlow is loaded when a network is built.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from typing import Any

from ..errors import ConfigError
from .spec import ModelSpec

BUILDERS: dict[str, str | Callable[[ModelSpec], Any]] = {
    # name: "module:function" (loaded when used), or the function itself
    "vgg16": "hvd_imaging.models.vgg:vgg16",
    "cnn3d": "hvd_imaging.models.vgg:cnn3d",
    "unet3d": "hvd_imaging.models.unet3d:unet3d",
}


def builder(name: str) -> Callable[[ModelSpec], Any]:
    """The function behind ``model.name``; ``package.module:function`` names one outside the dict.

    Raises:
        ConfigError: unknown name, with the nearest valid ones.
    """
    entry = BUILDERS.get(name, name if ":" in name else None)
    if entry is None:
        near = difflib.get_close_matches(name, BUILDERS, n=3) or sorted(BUILDERS)
        raise ConfigError(f"model.name: unknown network '{name}'; nearest valid names: {', '.join(near)}")
    if callable(entry):
        return entry
    module, _, function = entry.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"model.name: '{name}' cannot be loaded ({error})") from error


def is_foreign(name: str) -> bool:
    """Whether ``model.name`` names code outside of `BUILDERS`. Pure."""
    return name not in BUILDERS and ":" in name


def build(spec: ModelSpec) -> Any:
    """The network of ``spec``, with fresh weights.

    Raises:
        ConfigError: unknown network, or a patch that it cannot take.
    """
    model = builder(spec.model.name)(spec)
    check_layers(model)
    return model


def check_layers(model: Any) -> None:
    """Refuse layers whose result depends on how a global batch is spread over ranks.

    Raises:
        ConfigError: naming the layer and what to take instead.
    """
    import tensorflow as tf

    layers = tf.keras.layers
    for layer in model.submodules:
        if isinstance(layer, layers.BatchNormalization) and layer.trainable:
            raise ConfigError(
                f"model.name: layer '{layer.name}' of '{model.name}' is a batch norm, whose statistics depend on how many "
                "ranks share a batch; take hvd_imaging.models.blocks.GroupNorm (model.norm=group or instance), or freeze it "
                "(layer.trainable = False)"
            )
        if isinstance(layer, layers.Dropout | layers.GaussianNoise | layers.GaussianDropout | layers.AlphaDropout):
            raise ConfigError(
                f"model.name: layer '{layer.name}' of '{model.name}' draws by rank and not by sample, so neither a resume "
                "nor another number of ranks would repeat it; take hvd_imaging.models.blocks.Dropout"
            )


def inference_model(model: Any) -> Any:
    """The network with its full-size output alone: what is left of deep supervision after training."""
    import tensorflow as tf

    return tf.keras.Model(model.inputs, model.outputs[0], name=model.name) if len(model.outputs) > 1 else model
