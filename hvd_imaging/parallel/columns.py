"""Dense layers whose columns are shared out: each rank holds some of them for the rows of all ranks, and their gradients never travel.

The features do, which are far fewer numbers than the gradients of a VGG's dense layers (Krizhevsky, 2014, "One weird trick for
parallelizing convolutional neural networks"). A layer takes this rank's rows and gives this rank's rows, so what stands around it is as it was.

Its weights and their optimizer's state exist in parts, one on each rank; files hold them whole: see :class:`Columns`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from ..errors import ConfigError, RunError
from ..world import bounds
from .horovod import Horovod

keras = tf.keras


class ColumnDense(keras.layers.Layer):
    """``keras.layers.Dense`` of ``(rows, inputs)`` with this rank's columns of kernel ``(inputs, own)`` and bias ``(own,)``.

    All ranks must call it with equally many rows.
    """

    def __init__(self, whole: keras.layers.Dense, hvd: Horovod) -> None:
        super().__init__(name=whole.name, dtype=whole.dtype_policy)
        self.units, self.activation, self.use_bias, self.hvd = whole.units, whole.activation, whole.use_bias, hvd
        self.cuts = [bounds(whole.units, hvd.world.size, rank) for rank in range(hvd.world.size)]

    def build(self, input_shape: Any) -> None:
        """Zeros: :meth:`Columns.deal` fills them."""
        start, stop = self.cuts[self.hvd.world.rank]
        self.kernel = self.add_weight("kernel", (int(input_shape[-1]), stop - start), initializer="zeros")
        self.bias = self.add_weight("bias", (stop - start,), initializer="zeros") if self.use_bias else tf.zeros(stop - start)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """As of the whole layer."""
        return (*input_shape[:-1], self.units)

    def call(self, x: Any) -> Any:
        """``(rows, inputs)`` to ``(rows, units)``."""
        hvd, size, name = self.hvd, self.hvd.world.size, f"columns.{self.name}"
        widths = [stop - start for start, stop in self.cuts]
        inputs, own = int(x.shape[-1]), widths[hvd.world.rank]

        @tf.custom_gradient
        def run(x, kernel, bias):
            rows = tf.shape(x)[0]
            everyone = hvd.gather_tensor(x, f"{name}.rows")
            everyone.set_shape([None, inputs])
            # All rows of the own columns; then each rank's rows to that rank.
            found = tf.reshape(everyone @ kernel + bias, [-1])
            sizes = [rows * width for width in widths]
            pieces = tf.split(hvd.exchange_pieces(found, [rows * own] * size, f"{name}.out"), sizes)
            y = tf.concat([tf.reshape(piece, [-1, width]) for piece, width in zip(pieces, widths, strict=True)], 1)

            def back(dy):
                flat = tf.concat([tf.reshape(piece, [-1]) for piece in tf.split(dy, widths, 1)], 0)
                own_dy = tf.reshape(hvd.exchange_pieces(flat, sizes, f"{name}.back"), [-1, own])
                # Of all rows, but of these columns alone: the ranks' parts add up.
                parts = hvd.exchange_tensor(tf.matmul(own_dy, kernel, transpose_b=True), f"{name}.parts")
                dx = tf.reduce_sum(tf.reshape(parts, [size, -1, inputs]), 0)
                return dx, tf.matmul(everyone, own_dy, transpose_a=True), tf.reduce_sum(own_dy, 0)

            return y, back

        y = run(x, tf.convert_to_tensor(self.kernel), tf.convert_to_tensor(self.bias))
        y.set_shape([x.shape[0], self.units])
        return self.activation(y) if self.activation is not None else y


def shard_dense(model: Any, hvd: Horovod) -> Any:
    """The network with every dense layer but its last shared out over all ranks, and rank 0's weights; a collective call.

    Raises:
        ConfigError: there is no such layer.
    """
    layers = to_share(model, hvd.world.size)
    made = keras.models.clone_model(
        model, clone_function=lambda layer: ColumnDense(layer, hvd) if layer.name in layers else type(layer).from_config(layer.get_config())
    )
    Columns(hvd, made).deal(list(enumerate(made.weights)), model.get_weights())
    return made


def to_share(model: Any, size: int) -> list[str]:
    """Names of the dense layers that can be shared out over ``size`` ranks: those of plain rows, but for the one that puts out the logits.

    Raises:
        ConfigError: there are none.
    """
    last = {id(output) for output in model.outputs}
    names = [
        layer.name for layer in model.layers
        if type(layer) is keras.layers.Dense and len(layer.input.shape) == 2 and layer.units >= size and id(layer.output) not in last
    ]  # fmt: skip
    if not names:
        raise ConfigError(
            f"parallel.dense=sharded: network '{model.name}' has no dense layer besides its last; take model.head=dense, or "
            "parallel.dense=replicated"
        )
    return names


class Columns:
    """Which variables exist in parts, and the way between a part and the whole.

    Args:
        hvd: the ranks.
        model: whose :class:`ColumnDense` layers count; without any, every variable is whole on each rank.
    """

    def __init__(self, hvd: Horovod, model: Any) -> None:
        self._hvd = hvd
        self._cuts = {
            _bare(variable): (tuple(variable.shape), layer.cuts)
            for layer in model.layers if isinstance(layer, ColumnDense) for variable in layer.weights
        }  # fmt: skip

    def of(self, variable: Any) -> list[tuple[int, int]] | None:
        """The ranks' intervals of the variable's last axis; None if it is whole. An optimizer's state goes with its weight."""
        name = _bare(variable)
        for owner, (shape, cuts) in self._cuts.items():
            if (name == owner or name.endswith(f"/{owner}")) and tuple(variable.shape) == shape:
                return cuts
        return None

    def common(self, variables: Sequence[Any]) -> list[Any]:
        """Those that all ranks hold alike."""
        return [v for v in variables if self.of(v) is None]

    def whole(self, variables: Sequence[Any]) -> list[np.ndarray]:
        """Copies of the variables, parts joined; a collective call where there are parts."""
        return [v.numpy() if self.of(v) is None else self._join(v) for v in variables]

    def _join(self, variable: Any) -> np.ndarray:
        # Horovod joins along the first axis.
        return np.moveaxis(self._hvd.gather_array(np.moveaxis(variable.numpy(), -1, 0), "columns.whole"), 0, -1)

    def cut(self, variables: Sequence[Any], arrays: Sequence[np.ndarray], where: str) -> list[np.ndarray]:
        """This rank's parts of whole arrays.

        Raises:
            RunError: an array of another width.
        """
        found = []
        for variable, array in zip(variables, arrays, strict=False):
            cuts = self.of(variable)
            if cuts is not None:
                if array.shape[-1:] != (cuts[-1][1],):
                    raise RunError(f"{where}: {variable.name} is {array.shape}, expected {cuts[-1][1]} columns: made by another configuration")
                start, stop = cuts[self._hvd.world.rank]
                array = array[..., start:stop]
            found.append(array)
        return [*found, *arrays[len(found) :]]

    def __bool__(self) -> bool:
        return bool(self._cuts)

    def deal(self, variables: Sequence[tuple[int, Any]], arrays: Sequence[np.ndarray] | None) -> None:
        """Give every rank its part, or all, of rank 0's whole arrays; a collective call.

        Args:
            variables: with their places in ``arrays``.
            arrays: of rank 0; None elsewhere.
        """
        for at, variable in variables:
            cuts = self.of(variable)
            shape = tuple(variable.shape) if cuts is None else (*variable.shape[:-1], cuts[-1][1])
            array = np.zeros(shape, variable.dtype.as_numpy_dtype) if arrays is None else arrays[at]
            array = self._hvd.broadcast_array(array, "columns.deal")
            if cuts is not None:
                start, stop = cuts[self._hvd.world.rank]
                array = array[..., start:stop]
            variable.assign(array)


def _bare(variable: Any) -> str:
    return variable.name.split(":")[0]
