"""What has to be known of a trained model to use it: stored with runs and exports as `model.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pydantic

from ..config import ClassName, ModelConfig, PreprocessConfig, stored_preprocess
from ..errors import RunError
from ..files import write_json
from ..texts import read_json

NAME = "model.json"

_Side = Annotated[int, pydantic.Field(ge=1, le=1 << 16)]


class ModelSpec(pydantic.BaseModel):
    """A network's contract.

    Attributes:
        task: what it answers.
        classes: names; the index is the label code. For segmentation class 0 is the background.
        patch: (D, H, W) voxels that it sees at once; D = 1 for a 2D network.
        channels: of the input.
        preprocess: how a source volume becomes its input.
        model: its configuration.
        dataset_hash: of the manifest it learned from.
        run: name of the training run.
        overlap: share that windows of a whole volume overlap, if the user says nothing else.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    task: Literal["segmentation", "classification"]
    classes: tuple[ClassName, ...]
    patch: tuple[_Side, _Side, _Side]
    channels: _Side
    preprocess: PreprocessConfig
    model: ModelConfig
    dataset_hash: str
    run: str
    overlap: float = pydantic.Field(0.5, ge=0, le=0.95)

    _meant = pydantic.field_validator("preprocess", mode="before")(stored_preprocess)

    @property
    def is_2d(self) -> bool:
        """True for networks of single slices."""
        return self.patch[0] == 1

    def save(self, folder: str | Path) -> None:
        """Write ``folder/model.json`` atomically."""
        write_json(Path(folder) / NAME, self.model_dump(mode="json"))

    @classmethod
    def load(cls, folder: str | Path) -> ModelSpec:
        """Read ``folder/model.json``.

        Raises:
            RunError: missing or damaged.
        """
        path = Path(folder) / NAME
        try:
            return cls.model_validate(read_json(path))
        except FileNotFoundError as error:
            raise RunError(f"{folder}: no {NAME}; expected a run folder or an exported model") from error
        except (OSError, ValueError) as error:
            raise RunError(f"{path}: damaged ({str(error).splitlines()[0]}); export the model again") from error
