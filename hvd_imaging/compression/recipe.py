"""The recipe of a compression: steps in their order, what is exported, and the limits that decide what is released."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic
from pydantic import Field

from ..config import Positive, PositiveFloat, Section
from .gate import Limits

Share = Annotated[float, Field(gt=0, lt=1)]

Format = Literal[
    "keras", "savedmodel", "tflite", "tflite-float16", "tflite-dynamic", "tflite-int8", "onnx", "onnx-int8"
]


class Tuned(Section):
    """A step that trains on: with the run's own settings, data and loss, at a lower rate."""

    epochs: Annotated[int, Field(ge=0)] = Field(3, description="passes over the training split; 0: none")
    learning_rate: PositiveFloat | None = Field(None, description="null: a tenth of the run's")


class FreezeNorms(Tuned):
    """Group and instance norms take the training split's statistics and go into the convolutions before them.

    Statistics of the image at hand have no range that could be calibrated, so a norm stays float in an integer network and its
    neighbours are converted to and fro. Frozen ones cost nothing; training on makes up for what they did.
    """

    do: Literal["freeze_norms"]
    patches: Positive = Field(64, description="patches of the training split that the statistics are of")


class Filters(Tuned):
    """Whole filters leave, with everything that reads them: the network is smaller and faster on any device."""

    do: Literal["filters"]
    remove: Share = Field(0.5, description="share of what is measured that leaves")
    measure: Literal["parameters", "macs", "both"] = Field(
        "both", description="what `remove` is a share of: parameters make a file small, multiply-accumulates a network fast"
    )
    rounds: Positive = Field(1, description="so many times a part of it, with `epochs` after each")
    patches: Positive = Field(32, description="patches of the training split that importance is measured on")
    floor: Share = Field(0.1, description="share of its filters that every layer keeps")


class Weights(Tuned):
    """Small weights become zeros, by a cubic schedule (Zhu and Gupta, 2018): a smaller file, not a faster network."""

    do: Literal["weights"]
    sparsity: Share = Field(0.8, description="share of all prunable weights that become zero")
    pattern: tuple[Positive, Positive] | None = Field(
        None, description="[m, n]: at least m zeros in every n neighbouring input channels; sets the sparsity by itself"
    )
    spare: Annotated[float, Field(ge=0)] = Field(
        0.02, description="sensitivity: a layer that alone raises the loss by more than this share is pruned half as much"
    )
    patches: Positive = Field(16, description="patches that sensitivity is measured on")

    @pydantic.model_validator(mode="after")
    def _fits(self) -> Weights:
        if self.pattern is not None and self.pattern[0] >= self.pattern[1]:
            raise ValueError(f"pattern: expected m below n, found {list(self.pattern)}")
        return self


class Cluster(Tuned):
    """The weights of a layer share few values (Han et al., 2016): a smaller compressed file. Zeros stay zeros."""

    do: Literal["cluster"]
    clusters: Annotated[int, Field(ge=2, le=256)] = Field(32, description="values a layer")


class Quantize(Tuned):
    """Training with the rounding of 8-bit integers (Jacob et al., 2018), on the lowered network."""

    do: Literal["quantize"]
    patches: Positive = Field(32, description="patches of the training split that ranges are measured on")


Step = Annotated[FreezeNorms | Filters | Weights | Cluster | Quantize, Field(discriminator="do")]


class Recipe(Section):
    """`hvd-imaging compress RUN_DIR --recipe recipe.yaml --out DIR`."""

    steps: list[Step] = Field(default_factory=list, description="what is done to the network, one after another")
    formats: list[Format] = Field(
        ["keras", "tflite", "tflite-int8", "onnx", "onnx-int8"], min_length=1, description="what is exported and judged"
    )
    calibration: Positive = Field(32, description="patches of the training split that integer ranges are measured on")
    split: Literal["val", "test"] = Field("test", description="the cases that the formats are judged on")
    repeats: Positive = Field(3, description="processes that time each format, one after another")
    limits: Limits = Limits()

    @pydantic.model_validator(mode="after")
    def _order(self) -> Recipe:
        kinds = [step.do for step in self.steps]
        for kind, why in (
            ("quantize", "training on in floats would undo the rounding"),
            ("cluster", "training on would part the shared values"),
        ):
            if kind in kinds[:-1]:
                raise ValueError(f"steps: {kind} has to be the last one: {why}")
        if "weights" in kinds and "filters" in kinds[kinds.index("weights") :]:
            raise ValueError("steps: filters come before weights; a filter that leaves takes its zeros along")
        return self


TEMPLATES = {
    "segmentation": """\
# hvd-imaging compress RUN_DIR --recipe THIS_FILE --out DIR; docs/compression.md says what each step is good for.
steps:
  # Norms take the training split's statistics and go into the convolutions: without them the network can be all integers.
  - {do: freeze_norms, patches: 64, epochs: 4}
  # Whole filters leave: smaller and faster everywhere. Left out: only integers, at the same number of filters.
  - {do: filters, remove: 0.6, rounds: 2, epochs: 8}
  # Others: {do: weights, sparsity: 0.8}  {do: weights, pattern: [2, 4]}  {do: cluster, clusters: 32}
  # Training with rounding; leave it out where the integers after training are good enough (the table says so).
  # - {do: quantize, epochs: 2}
formats: [keras, tflite, tflite-int8, onnx, onnx-int8]
calibration: 32                       # patches of the training split for integer ranges
split: test                           # cases that decide
limits:
  metric_loss: 0.5                    # points of Dice (segmentation) or accuracy (classification)
  faster: 1.0                         # times as fast as the run's network, at least
  smaller: 1.0                        # times as small
""",
    "classification": """\
# hvd-imaging compress RUN_DIR --recipe THIS_FILE --out DIR; docs/compression.md says what each step is good for.
steps:
  - {do: freeze_norms, patches: 64, epochs: 4}
  # VGG16 has far more filters than most tasks need.
  - {do: filters, remove: 0.92, measure: parameters, rounds: 4, epochs: 16}
formats: [keras, tflite, tflite-int8, onnx, onnx-int8]
calibration: 64
split: test
limits:
  metric_loss: 0.5
  faster: 1.0
  smaller: 1.0
""",
}
