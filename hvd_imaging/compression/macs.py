"""What a network costs: parameters, zeros and multiply-accumulates of every layer, for one patch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from .graph import CONVOLUTIONS, TRANSPOSED, nodes

layers = tf.keras.layers


@dataclass(frozen=True)
class Cost:
    """Of a layer, or of all.

    Attributes:
        name: of the layer; "" of all.
        parameters: values that a file holds.
        zeros: those of them that are 0.
        macs: multiply-accumulates of convolutions and dense layers for one patch, what pads counted too; other layers' work is
            small beside them and not counted.
    """

    name: str
    parameters: int
    zeros: int
    macs: int


def table(model: Any) -> list[Cost]:
    """One row for each layer with weights, in the order of the network."""
    rows: dict[str, Cost] = {}
    for node in nodes(model):
        layer = node.layer
        weights = layer.get_weights()
        if not weights:
            continue
        (output,) = tf.nest.flatten(node.outputs)
        kernel = getattr(layer, "kernel", None)
        work = 0
        if kernel is not None and isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED, layers.Dense)):
            # A transposed convolution uses its whole kernel for each voxel that it reads.
            places = node.keras_inputs[0].shape if isinstance(layer, TRANSPOSED) else output.shape
            work = int(np.prod([int(side) for side in places[1:-1]])) * int(np.prod(kernel.shape))
        before = rows.get(layer.name)  # a layer that is used twice works twice and is stored once
        rows[layer.name] = Cost(
            layer.name,
            sum(w.size for w in weights),
            sum(int((w == 0).sum()) for w in weights),
            work + (before.macs if before is not None else 0),
        )
    return list(rows.values())


def totals(model: Any) -> Cost:
    """The sum of `table`."""
    rows = table(model)
    return Cost("", sum(row.parameters for row in rows), sum(row.zeros for row in rows), sum(row.macs for row in rows))
