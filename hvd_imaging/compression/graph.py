"""A functional Keras network as a graph: who reads which channels of whom, and how to build it again with changed layers.

A *channel space* is a set of channels that can only leave together: what a convolution puts out, what its norm scales, what an
addition adds to it, and what every reader reads. (Li et al., 2017, section 3.3; Fang et al., 2023.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import tensorflow as tf

from ..models.blocks import Dropout, GroupNorm
from ..models.graph import check_functional, nodes

keras = tf.keras
layers = keras.layers

CONVOLUTIONS = (layers.Conv1D, layers.Conv2D, layers.Conv3D)
TRANSPOSED = (layers.Conv2DTranspose, layers.Conv3DTranspose)
_DEPTHWISE = (layers.DepthwiseConv2D, layers.SeparableConv2D)
# Channels go through as they are.
_KEEP = (
    GroupNorm, Dropout, layers.BatchNormalization, layers.ReLU, layers.LeakyReLU, layers.Activation, layers.Dropout,
    layers.MaxPooling1D, layers.MaxPooling2D, layers.MaxPooling3D, layers.AveragePooling2D, layers.AveragePooling3D,
    layers.UpSampling2D, layers.UpSampling3D, layers.ZeroPadding2D, layers.ZeroPadding3D, layers.Cropping2D, layers.Cropping3D,
    layers.GlobalAveragePooling2D, layers.GlobalAveragePooling3D, layers.GlobalMaxPooling2D, layers.GlobalMaxPooling3D,
    layers.SpatialDropout2D, layers.SpatialDropout3D,
)  # fmt: skip
_JOIN = (layers.Add, layers.Subtract, layers.Multiply, layers.Maximum, layers.Average)


def rebuild(model: Any, change: Callable[[Any], Any]) -> Any:
    """A new network with the connections of ``model``; the weights of its layers are fresh, but those that `change` set.

    Args:
        change: layer -> the layer to take instead, or None where its input goes on as it is. Called once for each layer.
    """
    made: dict[int, Any] = {}
    inputs = [keras.Input(t.shape[1:], dtype=t.dtype, name=t._keras_history.layer.name) for t in model.inputs]
    values = {id(old): new for old, new in zip(model.inputs, inputs, strict=True)}
    for node in nodes(model):
        layer = node.layer
        if id(layer) not in made:
            made[id(layer)] = change(layer)
        given = [values[id(t)] for t in node.keras_inputs]
        (output,) = tf.nest.flatten(node.outputs)
        new = made[id(layer)]
        values[id(output)] = given[0] if new is None else new(given if len(given) > 1 else given[0])
    outputs = [values[id(t)] for t in model.outputs]
    return keras.Model(inputs, outputs if len(outputs) > 1 else outputs[0], name=model.name)


def copy(layer: Any, **changes: Any) -> Any:
    """A layer of the same configuration, but for ``changes``; not built."""
    return type(layer).from_config({**layer.get_config(), **changes})


@dataclass
class Space:
    """Channels that can only leave together.

    Attributes:
        size: channels.
        openers: names of the layers that put them out.
        groups: of norms over them, which have to stay equally large; 1 without.
        pinned: why nothing of it may leave; "" if it may.
    """

    size: int
    openers: list[str] = field(default_factory=list)
    groups: int = 1
    pinned: str = ""


@dataclass(frozen=True)
class Lane:
    """The channels of a tensor: segments one after another, the whole repeated (a flattened volume).

    Attributes:
        segments: numbers of spaces.
        repeat: times.
    """

    segments: tuple[int, ...]
    repeat: int = 1


@dataclass(frozen=True)
class Channels:
    """What `describe` found.

    Attributes:
        spaces: by number.
        given: layer name -> lane that it reads; of layers with weights.
        made: layer name -> lane that it puts out.
    """

    spaces: dict[int, Space]
    given: dict[str, Lane]
    made: dict[str, Lane]


def describe(model: Any) -> Channels:
    """Channel spaces of a network.

    What a layer that is not known here reads stays whole (pinned, with the layer's name): nothing is removed on a guess.
    """
    return _Walk().run(model)


class _Walk:
    def __init__(self) -> None:
        self.spaces: list[Space] = []
        self.parent: list[int] = []

    def run(self, model: Any) -> Channels:
        lanes: dict[int, Lane] = {}
        given: dict[str, Lane] = {}
        made: dict[str, Lane] = {}
        check_functional(model)
        for tensor in model.inputs:
            lanes[id(tensor)] = Lane((self.new(int(tensor.shape[-1]), "input of the network"),))
        for node in nodes(model):
            (output,) = tf.nest.flatten(node.outputs)
            before = [lanes[id(t)] for t in node.keras_inputs]
            lanes[id(output)] = self.one(node.layer, before, [t.shape for t in node.keras_inputs], output.shape)
            if node.layer.name in made:  # a layer that is used twice reads and writes the same channels each time
                self.join(given[node.layer.name], before[0], node.layer.name)
                self.join(made[node.layer.name], lanes[id(output)], node.layer.name)
            given[node.layer.name], made[node.layer.name] = before[0], lanes[id(output)]
        for tensor in model.outputs:
            self.pin(lanes[id(tensor)], "output of the network")

        def found(lane: Lane) -> Lane:
            return Lane(tuple(self.find(s) for s in lane.segments), lane.repeat)

        return Channels(
            {number: self.spaces[number] for number in range(len(self.spaces)) if self.find(number) == number},
            {name: found(lane) for name, lane in given.items()},
            {name: found(lane) for name, lane in made.items()},
        )

    def one(self, layer: Any, given: list[Lane], shapes: list[Any], shape: Any) -> Lane:
        last = getattr(layer, "data_format", "channels_last") == "channels_last"
        if not last or isinstance(layer, _DEPTHWISE) or (getattr(layer, "groups", 1) != 1 and not isinstance(layer, GroupNorm)):
            return self.unknown(layer, given, shape)
        if isinstance(layer, CONVOLUTIONS + TRANSPOSED + (layers.Dense,)):
            if isinstance(layer, layers.Dense) and len(shape) > 2 and given[0].repeat > 1:
                return self.unknown(layer, given, shape)
            return Lane((self.new(int(shape[-1]), opener=layer.name),))
        if isinstance(layer, layers.Concatenate):
            axis = layer.axis if layer.axis >= 0 else layer.axis + len(shape)
            if axis == len(shape) - 1 and all(lane.repeat == 1 for lane in given):
                return Lane(tuple(segment for lane in given for segment in lane.segments))
            if axis != len(shape) - 1:
                for other in given[1:]:
                    self.join(given[0], other, layer.name)
                return given[0]
            return self.unknown(layer, given, shape)
        if isinstance(layer, _JOIN):
            for other in given[1:]:
                self.join(given[0], other, layer.name)
            return given[0]
        if isinstance(layer, layers.Flatten) or (isinstance(layer, layers.Reshape) and len(shape) == 2):
            count = 1
            for side in shapes[0][1:-1]:
                count *= int(side)
            return Lane(given[0].segments, given[0].repeat * count)
        if isinstance(layer, layers.Reshape) and shape[-1] == shapes[0][-1]:
            return given[0]
        if isinstance(layer, _KEEP):
            if isinstance(layer, GroupNorm) and layer.groups != int(shape[-1]):
                self.grouped(given[0], layer)
            return given[0]
        return self.unknown(layer, given, shape)

    def new(self, size: int, pinned: str = "", opener: str = "") -> int:
        self.spaces.append(Space(size, [opener] if opener else [], pinned=pinned))
        self.parent.append(len(self.parent))
        return len(self.parent) - 1

    def find(self, number: int) -> int:
        while self.parent[number] != number:
            number = self.parent[number]
        return number

    def join(self, a: Lane, b: Lane, name: str) -> None:
        sizes = [[self.spaces[self.find(s)].size for s in lane.segments] for lane in (a, b)]
        if sizes[0] != sizes[1] or a.repeat != b.repeat:
            for lane in (a, b):
                self.pin(lane, f"layer '{name}' joins channels that are cut in different ways")
            return
        for one, other in zip(a.segments, b.segments, strict=True):
            x, y = self.find(one), self.find(other)
            if x != y:
                first, second = self.spaces[x], self.spaces[y]
                first.openers += second.openers
                first.pinned = first.pinned or second.pinned
                self._groups(first, second.groups, name)
                self.parent[y] = x

    def grouped(self, lane: Lane, layer: Any) -> None:
        if len(lane.segments) > 1:
            self.pin(lane, f"the groups of layer '{layer.name}' reach over several convolutions")
            return
        self._groups(self.spaces[self.find(lane.segments[0])], layer.groups, layer.name)

    @staticmethod
    def _groups(space: Space, groups: int, name: str) -> None:
        if 1 in (space.groups, groups):
            space.groups = max(space.groups, groups)
        elif space.groups != groups:
            space.pinned = space.pinned or f"layer '{name}' cuts its channels in other groups than another norm"

    def pin(self, lane: Lane, why: str) -> None:
        for segment in lane.segments:
            space = self.spaces[self.find(segment)]
            space.pinned = space.pinned or why

    def unknown(self, layer: Any, given: list[Lane], shape: Any) -> Lane:
        why = f"layer '{layer.name}' ({type(layer).__name__}) is not known to filter removal"
        for lane in given:
            self.pin(lane, why)
        return Lane((self.new(int(shape[-1]), why),))
