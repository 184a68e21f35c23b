"""Keras' own file, for those who go on in Keras. Logits out, as trained."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from ..inference.exported import KERAS
from ..models.spec import ModelSpec


def write(model: Any, spec: ModelSpec, folder: Path) -> None:
    """Write ``folder/model.keras``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it was never compiled
        model.save(str(folder / KERAS))
