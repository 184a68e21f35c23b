"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click


def trust(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--trust`` and ``--public-key`` of commands that open a model."""
    for add in (
        click.option("--public-key", type=click.Path(path_type=Path), metavar="FILE", help="Refuse a model that the holder of this key has not signed."),
        click.option("--trust", "trusted", is_flag=True, help="Open the model also if it runs code of its maker (docs/security.md)."),
    ):
        command = add(command)
    return command


def check_signed(model: Path, public_key: Path | None) -> None:
    """What ``--public-key`` asks for; the same on all ranks.

    Raises:
        RunError, SetupError: see `inference.signing.check`.
    """
    if public_key is not None:
        from ..errors import HvdImagingError, on_all_ranks
        from ..inference.signing import check

        try:
            check(model, public_key)
        except HvdImagingError as error:
            raise on_all_ranks(error) from None
