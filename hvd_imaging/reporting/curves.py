"""Which of a run's numbers may stand in one plot: those that measure the same. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Points = list[tuple[float, float]]


def points(epochs: Sequence[Mapping[str, Any]], key: str) -> Points:
    """(epoch from 1, value) of the "epoch" events that have a finite one."""
    known = [(event["epoch"] + 1, event.get(key)) for event in epochs]
    return [(float(x), float(y)) for x, y in known if isinstance(y, int | float) and math.isfinite(y)]


def loss_title(epochs: Sequence[Mapping[str, Any]]) -> str:
    """What the run calls its loss; "" if its events do not tell."""
    return next((str(event["loss_title"]) for event in reversed(epochs) if event.get("loss_title")), "")


def loss_panels(epochs: Sequence[Mapping[str, Any]]) -> list[tuple[str, dict[str, Points]]]:
    """(title, name of a line -> points) of each plot of losses; no plot without a point.

    ``val_loss`` is the training's loss where the event names that loss. In events without a name it is the plain cross-entropy,
    whatever was trained with, and stands in a plot of its own.
    """
    named = [event for event in epochs if event.get("loss_title")]
    unnamed = [event for event in epochs if not event.get("loss_title")]
    title = loss_title(epochs)
    patches = any("val_dice" in event for event in epochs)
    training, validation = ("training (patches)", "validation (whole cases)") if patches else ("training", "validation")
    panels = [
        (f"Loss: {title}" if title else "Training loss", {training: points(epochs, "loss"), validation: points(named, "val_loss")}),
        ("Cross-entropy of the validation", {validation: points(unnamed, "val_loss")}),
    ]
    drawn = [(name, {line: values for line, values in lines.items() if values}) for name, lines in panels]
    return [panel for panel in drawn if panel[1]]
