"""A network that no builder can make from its settings (after pruning): its layers, as Keras describes them, in JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import RunError
from ..files import write_json

NAME = "architecture.json"


def save(model: Any, folder: str | Path) -> None:
    """Write ``folder/architecture.json``: layers and their connections, no weights."""
    write_json(Path(folder) / NAME, {"schema": 1, "network": model.get_config()})


def load(folder: str | Path) -> Any:
    """The network of ``folder/architecture.json``, with fresh weights.

    Raises:
        RunError: damaged, of another schema, or with a layer that is not known here.
    """
    import tensorflow as tf

    from . import blocks as _  # noqa: F401 - registers the package's layers

    path = Path(folder) / NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["schema"] != 1:
            raise RunError(f"{path}: expected schema 1, found {values['schema']!r}; open it with the release that wrote it")
        return tf.keras.Model.from_config(values["network"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise RunError(f"{path}: damaged, or with unknown layers ({(str(error).splitlines() or [''])[0][:200]}); compress the run again") from error
