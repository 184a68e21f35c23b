"""Which descriptions of networks are data: a list of layers that hold no code, and of values that name none.

Keras builds whatever its JSON names: any importable class or function (CVE-2025-1550), its own functions that fetch and write files
(CVE-2025-8747) or switch its safe mode off (CVE-2025-9906), marshalled byte code (`Lambda`), and it takes names of functions as activations, and
as arguments of a call. So a description is read before Keras sees it, and what does not stand in the lists below is not built: classes by
name, module and registered name; of their values numbers, and those words that a layer of the list knows. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


LAYERS = _words(
    "InputLayer Conv1D Conv2D Conv3D Conv2DTranspose Conv3DTranspose DepthwiseConv2D SeparableConv2D Dense "
    "Activation ReLU LeakyReLU PReLU ELU Softmax ThresholdedReLU "
    "MaxPooling1D MaxPooling2D MaxPooling3D AveragePooling1D AveragePooling2D AveragePooling3D "
    "GlobalAveragePooling1D GlobalAveragePooling2D GlobalAveragePooling3D GlobalMaxPooling1D GlobalMaxPooling2D GlobalMaxPooling3D "
    "UpSampling1D UpSampling2D UpSampling3D ZeroPadding1D ZeroPadding2D ZeroPadding3D Cropping1D Cropping2D Cropping3D "
    "Add Subtract Multiply Maximum Minimum Average Concatenate Dot Flatten Reshape Permute RepeatVector "
    "BatchNormalization LayerNormalization GroupNormalization UnitNormalization "
    "Dropout SpatialDropout1D SpatialDropout2D SpatialDropout3D GaussianNoise GaussianDropout AlphaDropout"
)
"""Keras' own, module ``keras.layers``."""

OWN_MODULE = "hvd_imaging.models.blocks"
OWN = frozenset({"GroupNorm", "Dropout"})
"""This package's, registered as ``hvd_imaging>NAME``."""

_INITIALIZERS = _words(
    "Zeros Ones Constant GlorotNormal GlorotUniform HeNormal HeUniform LecunNormal LecunUniform RandomNormal RandomUniform "
    "TruncatedNormal VarianceScaling Orthogonal Identity"
)
_WORDS = {
    "activation": _words("linear relu relu6 leaky_relu elu selu gelu softplus softsign swish silu mish tanh sigmoid hard_sigmoid exponential softmax"),
    "dtype": _words("float16 bfloat16 float32 float64 uint8 int8 int16 int32 int64 bool mixed_float16 mixed_bfloat16"),
    "padding": frozenset({"valid", "same", "causal"}),
    "data_format": frozenset({"channels_last", "channels_first"}),
    "interpolation": frozenset({"nearest", "bilinear", "bicubic", "area", "lanczos3", "lanczos5", "gaussian", "mitchellcubic"}),
    "mode": frozenset({"fan_in", "fan_out", "fan_avg"}),
    "distribution": frozenset({"normal", "uniform", "truncated_normal", "untruncated_normal"}),
}
"""Key -> the words that may stand there. Any other key has numbers only."""

_OBJECTS = {
    "_initializer": ("keras.initializers", _INITIALIZERS),
    "_regularizer": ("keras.regularizers", frozenset({"L1", "L2", "L1L2"})),
    "_constraint": ("keras.constraints", frozenset({"MaxNorm", "MinMaxNorm", "NonNeg", "UnitNorm"})),
    "dtype": ("keras.mixed_precision", frozenset({"Policy"})),
}
"""End of a key -> module and classes of the object that may stand there."""

_NETWORK = frozenset({"name", "trainable", "layers", "input_layers", "output_layers"})
_LAYER = frozenset({"module", "class_name", "config", "registered_name", "build_config", "name", "inbound_nodes"})
_OBJECT = frozenset({"module", "class_name", "config", "registered_name"})
_NAME_LENGTH = 200


class Unknown(ValueError):
    """A description that holds something that is not in the lists; the message says where and what."""


def check(network: Any) -> None:
    """Whether a functional network's configuration, as `Model.get_config` gives it, is data.

    Raises:
        Unknown: it names something else than layers, words and numbers of the lists, or is of another form.
    """
    _keys(network, _NETWORK, "network")
    _name(network.get("name"), "name")
    _plain(network.get("trainable"), "trainable")
    layers = network.get("layers")
    if not isinstance(layers, list):
        raise Unknown(f"layers: expected a list, found {_shown(layers)}")
    names = {str(layer["name"]) for layer in layers if isinstance(layer, dict) and isinstance(layer.get("name"), str)}
    for number, layer in enumerate(layers):
        _layer(layer, f"layer {number}", names)
    for key in ("input_layers", "output_layers"):
        _ends(network.get(key), key, names)


def _layer(layer: Any, where: str, names: set[str]) -> None:
    _keys(layer, _LAYER, where)
    _name(layer.get("name"), f"{where}, name")
    where = f"{where} '{layer['name']}'"
    module, kind, registered = layer.get("module"), layer.get("class_name"), layer.get("registered_name")
    known = (module == "keras.layers" and _in(kind, LAYERS) and registered is None) or (
        module == OWN_MODULE and _in(kind, OWN) and registered == f"hvd_imaging>{kind}"
    )
    if not known:
        raise Unknown(f"{where} is a {_shown(kind)} of {_shown(module)}, which may hold code")
    config = layer.get("config")
    if not isinstance(config, dict):
        raise Unknown(f"{where}: expected settings, found {_shown(config)}")
    for key, value in config.items():
        _setting(key, value, f"{where}, {_shown(key)}")
    built = layer.get("build_config")
    if built is not None:
        _keys(built, frozenset({"input_shape"}), f"{where}, build_config")
        _plain(built.get("input_shape"), f"{where}, build_config")
    _calls(layer.get("inbound_nodes"), f"{where}, inbound_nodes", names)


def _setting(key: str, value: Any, where: str) -> None:
    if key == "name":
        _name(value, where)
    elif isinstance(value, str):
        if not _in(value, _WORDS.get(key, frozenset())):
            raise Unknown(f"{where} is {_shown(value)}, which may name code")
    elif isinstance(value, dict):
        _object(key, value, where)
    else:
        _plain(value, where)


def _object(key: str, value: Mapping[str, Any], where: str) -> None:
    """An initializer, a regularizer, a constraint, a policy of number types."""
    module, kinds = next((found for end, found in _OBJECTS.items() if key.endswith(end)), ("", frozenset()))
    _keys(value, _OBJECT, where)
    kind, config = value.get("class_name"), value.get("config")
    if value.get("module") != module or not _in(kind, kinds) or value.get("registered_name") is not None or not isinstance(config, dict):
        raise Unknown(f"{where} is a {_shown(kind)} of {_shown(value.get('module'))}, which may hold code")
    for name, inner in config.items():
        if isinstance(inner, str):
            if not _in(inner, _WORDS.get("dtype" if kind == "Policy" else name, frozenset())):
                raise Unknown(f"{where}, {_shown(name)} is {_shown(inner)}, which may name code")
        else:
            _plain(inner, f"{where}, {_shown(name)}")


def _calls(nodes: Any, where: str, names: set[str]) -> None:
    """``[[[layer, call, output, {}], ...], ...]``: who is read; what else a layer is called with are arguments, which may be objects."""
    if not isinstance(nodes, list):
        raise Unknown(f"{where}: expected a list, found {_shown(nodes)}")
    for node in nodes:
        if not isinstance(node, list) or not node:
            raise Unknown(f"{where}: expected a list of layers, found {_shown(node)}")
        for given in node:
            if not isinstance(given, list) or len(given) != 4 or not isinstance(given[3], dict):
                raise Unknown(f"{where}: expected a layer that is read, found {_shown(given)}")
            _place(given[:3], where, names)
            for key, value in given[3].items():
                if key not in ("training", "mask") or not (value is None or isinstance(value, bool)):
                    raise Unknown(f"{where}: calls its layer with {_shown(key)}, which may hold code")


def _ends(value: Any, where: str, names: set[str]) -> None:
    """``[layer, call, output]``, or a list of those."""
    if not isinstance(value, list):
        raise Unknown(f"{where}: expected a list, found {_shown(value)}")
    for place in [value] if value and not isinstance(value[0], list) else value:
        _place(place, where, names)


def _place(value: Any, where: str, names: set[str]) -> None:
    numbers = isinstance(value, list) and len(value) == 3 and all(isinstance(n, int) and not isinstance(n, bool) for n in value[1:])
    if not numbers or not _in(value[0], names):
        raise Unknown(f"{where}: expected the name of a layer and two numbers, found {_shown(value)}")


def _plain(value: Any, where: str) -> None:
    """Numbers, truth values, nothing, and lists of them."""
    if isinstance(value, list):
        for inner in value:
            _plain(inner, where)
    elif not (value is None or isinstance(value, bool | int | float)):
        raise Unknown(f"{where} is {_shown(value)}, expected numbers")


def _name(value: Any, where: str) -> None:
    if not isinstance(value, str) or not value or len(value) > _NAME_LENGTH or not value.isprintable():
        raise Unknown(f"{where}: expected a name, found {_shown(value)}")


def _keys(value: Any, known: frozenset[str], where: str) -> None:
    if not isinstance(value, dict):
        raise Unknown(f"{where}: expected an object, found {_shown(value)}")
    other = sorted(map(_shown, value.keys() - known))
    if other:
        raise Unknown(f"{where} has the unknown key {other[0]}")


def _in(value: Any, known: frozenset[str] | set[str]) -> bool:
    return isinstance(value, str) and value in known


def _shown(value: Any) -> str:
    """A foreign value for a message of one line."""
    text = repr(value) if isinstance(value, str) else type(value).__name__ if isinstance(value, dict | list) else repr(value)[:60]
    return text if len(text) <= 80 else f"{text[:77]}..."
