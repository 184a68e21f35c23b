"""A network that no builder can make from its settings (after pruning): its layers, as Keras describes them, in JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import trust
from ..errors import RunError
from ..files import write_json
from ..texts import read_json
from . import allowed

NAME = "architecture.json"


def save(model: Any, folder: str | Path) -> None:
    """Write ``folder/architecture.json``: layers and their connections, no weights."""
    write_json(Path(folder) / NAME, {"schema": 1, "network": model.get_config()})
    trust.remember(Path(folder) / NAME)


def load(folder: str | Path, trusted: bool = False) -> Any:
    """The network of ``folder/architecture.json``, with fresh weights.

    Args:
        trusted: build it also where it names what `allowed` does not list, which can run code.

    Raises:
        RunError: damaged, of another schema, or with what is not listed, in a file that was not made here.
    """
    path = Path(folder) / NAME
    try:
        values = read_json(path)
        if values["schema"] != 1:
            raise RunError(f"{path}: expected schema 1, found {values['schema']!r}; open it with the release that wrote it")
        network = values["network"]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _damaged(path, error) from error
    check(network, path, trusted or trust.made_here(path))
    return build(network, path)


def check(network: Any, path: Path, trusted: bool = False) -> bool:
    """Whether a network's configuration is data (`allowed.check`); False: it is not, and is trusted.

    Raises:
        RunError: it is not, and is not trusted.
    """
    try:
        allowed.check(network)
    except (allowed.Unknown, RecursionError) as error:
        if not trusted:
            raise trust.refusal(path, str(error)) from error
        return False
    return True


def build(network: Any, path: Path) -> Any:
    """The network of a configuration that :func:`check` has passed, with fresh weights.

    Raises:
        RunError: Keras cannot build it.
    """
    import tensorflow as tf

    from . import blocks as _  # noqa: F401 - registers the package's layers

    try:
        return tf.keras.Model.from_config(network)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError, RuntimeError, ImportError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> RunError:
    return RunError(f"{path}: damaged, or with unknown layers ({(str(error).splitlines() or [''])[0][:200]}); compress the run again")
