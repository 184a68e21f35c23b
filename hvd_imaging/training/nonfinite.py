"""What follows when a loss or a gradient is NaN or infinite: pure decisions, the same on all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

MOST_IN_A_ROW = 10
"""Steps left out one after another before the run ends: nothing will mend itself by then."""
RECOVERY = 100
"""Fine steps after which a halved learning rate is doubled again."""


@dataclass(frozen=True)
class Backoff:
    """State of the policies ``skip`` and ``back_off``.

    Attributes:
        scale: of the learning rate, 1 or less.
        in_a_row: steps left out since the last fine one.
        fine: fine steps since ``scale`` was changed.
    """

    scale: float = 1.0
    in_a_row: int = 0
    fine: int = 0

    def after_fine(self) -> Backoff:
        """After a step that was applied."""
        if self.scale == 1.0:
            return replace(self, in_a_row=0) if self.in_a_row else self
        if self.fine + 1 >= RECOVERY:
            return Backoff(min(1.0, self.scale * 2))
        return Backoff(self.scale, 0, self.fine + 1)

    def after_nonfinite(self, policy: str) -> Backoff | None:
        """After a step that was left out; None if the run has to end."""
        if policy == "stop" or self.in_a_row + 1 >= MOST_IN_A_ROW:
            return None
        return Backoff(self.scale / 2 if policy == "back_off" else self.scale, self.in_a_row + 1)


def describe(loss: float, sick: Sequence[int], norms: np.ndarray, names: Sequence[str]) -> str:
    """What was not finite, and where."""
    wrong = [name for name, norm in zip(names, norms, strict=True) if not np.isfinite(norm)]
    what = []
    if sick:
        what.append(f"rank{'s' * (len(sick) > 1)} {', '.join(map(str, sick))}: loss or gradients")
    elif not np.isfinite(loss):
        what.append(f"the loss is {loss}")
    if wrong:
        what.append(f"gradient of {wrong[0]}" + (f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""))
    return "not finite: " + "; ".join(what or ["the sum of the gradients"])
