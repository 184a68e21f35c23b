"""The layers of a functional Keras network in the order in which they are called."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..errors import RunError


def check_functional(model: Any) -> None:
    """Refuse a network whose layers cannot be seen.

    Raises:
        RunError: a subclassed model.
    """
    if not getattr(model, "_is_graph_network", False):
        raise RunError(
            f"network '{model.name}' is not a functional Keras model, so its layers cannot be seen; "
            "build it with keras.Model(inputs, outputs)"
        )


def nodes(model: Any) -> Iterator[Any]:
    """Calls of layers, each after those that it reads; inputs left out.

    Raises:
        RunError: a subclassed network, or one with networks inside.
    """
    import tensorflow as tf

    check_functional(model)
    for depth in sorted(model._nodes_by_depth, reverse=True):
        for node in model._nodes_by_depth[depth]:
            if not node.keras_inputs:
                continue
            if isinstance(node.layer, tf.keras.Model):
                raise RunError(
                    f"network '{model.name}': layer '{node.layer.name}' is a network itself; build it from its layers, so that "
                    "they can be seen"
                )
            yield node
