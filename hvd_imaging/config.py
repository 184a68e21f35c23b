"""The configuration: one model per stage, read from YAML, changed by ``--set key=value``.

Unknown keys name the nearest valid ones; every message names file and key.
"""

from __future__ import annotations

import difflib
import re
import reprlib
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar

import pydantic
from pydantic import Field

from .errors import ConfigError
from .texts import TextError, parse_yaml, read_yaml

Positive = typing.Annotated[int, Field(gt=0)]
Fraction = typing.Annotated[float, Field(ge=0, le=1)]
PositiveFloat = typing.Annotated[float, Field(gt=0)]
Triple = tuple[Positive, Positive, Positive]


def one_line(name: str) -> str:
    """A class name: it goes into tables, pages, terminals and scripts."""
    if not name.strip() or not name.isprintable() or len(name) > 64:
        raise ValueError(f"expected 1 to 64 printable characters, found {name[:64]!r}")
    return name


ClassName = typing.Annotated[str, pydantic.AfterValidator(one_line)]


class Section(pydantic.BaseModel):
    """Base of all sections: unknown keys are errors, values cannot change after checking."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _empty_section(cls, values: Any) -> Any:
        """A section with nothing in it (``train:`` alone) is one with all values as they come."""
        return {} if values is None else values


class PreprocessConfig(Section):
    """From a source volume to what the network sees. Stored with the dataset, so prediction repeats it exactly."""

    units: Literal["hu", "stored"] = Field("hu", description="DICOM: rescaled values (HU for CT), or stored ones")
    orientation: Literal["lps", "source"] = Field(
        "lps", description="axes of the volumes; lps: D to the head, H to the back, W to the left, the nearest axis each; source: as in the file"
    )
    spacing: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = Field(
        None, description="resample to this spacing in mm (D, H, W); none keeps each volume's own"
    )
    intensity: Literal["auto", "window", "percentile", "zscore", "none"] = Field(
        "auto", description="how intensities become [0, 1]; auto: window for CT, percentile otherwise"
    )
    window: tuple[float, float] = Field((-1000.0, 400.0), description="intensity=window: these HU become 0 and 1")
    percentiles: tuple[Fraction, Fraction] = Field(
        (0.005, 0.995), description="intensity=percentile: these quantiles of the foreground become 0 and 1"
    )
    zscore_range: PositiveFloat = Field(4.0, description="intensity=zscore: mean +- this many deviations become 0 and 1")
    crop: Literal["none", "body", "foreground"] = Field(
        "none", description="crop to the body (CT, > -500 HU) or to the non-zero foreground"
    )
    crop_margin_mm: typing.Annotated[float, Field(ge=0)] = Field(5.0, description="margin around the crop in mm")
    projection: Literal["none", "mip", "mean"] = Field(
        "none", description="reduce the depth to one image: maximum intensity or mean projection (for 2D networks)"
    )

    projection_slab: tuple[Fraction, Fraction] = Field(
        (0.0, 1.0), description="part of the depth that is projected; the middle of a chest keeps the lungs open"
    )

    @pydantic.model_validator(mode="after")
    def _ordered(self) -> PreprocessConfig:
        if not self.projection_slab[0] < self.projection_slab[1]:
            raise ValueError("projection_slab: the first share is not below the second one")
        if not self.window[0] < self.window[1]:
            raise ValueError(f"window: the lower limit {self.window[0]} is not below the upper one {self.window[1]}")
        if not self.percentiles[0] < self.percentiles[1]:
            raise ValueError("percentiles: the lower one is not below the upper one")
        return self

    def named(self) -> dict[str, Any]:
        """The settings as a hash takes them: ``orientation: source`` is what settings mean that do not speak of it."""
        values = self.model_dump(mode="json")
        if self.orientation == "source":
            del values["orientation"]
        return values


def stored_preprocess(values: Any) -> Any:
    """Stored settings as they were meant: without a word on orientation, voxels stayed in the order of their files. Pure."""
    return {"orientation": "source", **values} if isinstance(values, dict) else values


class ShardConfig(Section):
    """How samples lie in HDF5 files."""

    shard_mb: PositiveFloat = Field(256.0, description="close a shard at this size (MB, before compression)")
    patch: Triple = Field((32, 48, 48), description="the patch (D, H, W) that will be read; chunks are planned for it")
    chunk: Triple | None = Field(None, description="chunk shape (D, H, W) by hand; null: planned from patch and volume")
    dtype: Literal["auto", "float32", "float16", "int16", "uint8"] = Field(
        "auto", description="stored type of the image; auto: the smallest one within max_error, by each image's content"
    )
    max_error: Fraction = Field(
        1e-5, description="dtype=auto: largest error of a voxel, as a share of the image's range; 0: none at all"
    )
    compression: Literal["auto", "none", "lz4", "zstd", "gzip"] = Field(
        "auto", description="auto: measured on this disk and these cores; lz4, zstd: Blosc2; gzip: read by HDF5 alone, slow"
    )


class SplitConfig(Section):
    """How patients are spread over training, validation and test; see docs/splits.md."""

    val: Fraction = Field(0.15, description="share of the patients for validation")
    test: Fraction = Field(0.15, description="share of the patients for the final test")
    seed: int = Field(0, description="another seed, another split")
    by: Literal["patient", "site", "date"] = Field(
        "patient", description="site: all patients of an institution together; date: the newest patients are tested"
    )
    stratify: bool = Field(False, description="by=patient: equal shares of each label, or of each class in the masks")
    folds: typing.Annotated[int, Field(ge=0)] = Field(0, description="k-fold cross-validation: number of folds; 0: none")
    fold: typing.Annotated[int, Field(ge=0)] = Field(0, description="folds: the one that validates, from 0")
    frozen: str | None = Field(None, description="file with pseudonyms of patients, one a line: they, and nobody else, are test")
    patient: str | None = Field(
        None, description="regular expression whose first group in a case's name (NIfTI, NRRD) or PatientID is the patient; null: all of it"
    )

    @pydantic.field_validator("patient")
    @classmethod
    def _regular(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"expected a regular expression ({error})") from None
        return value

    @pydantic.model_validator(mode="after")
    def _possible(self) -> SplitConfig:
        if self.val + self.test > 1:
            raise ValueError(f"val + test = {self.val + self.test:g} is more than 1")
        if self.folds == 1 or (self.folds and self.fold >= self.folds):
            raise ValueError(f"folds={self.folds}, fold={self.fold}: expected two folds or more, and a fold below their number")
        if not self.folds and self.fold:
            raise ValueError(f"fold={self.fold} without folds: set folds as well")
        if self.stratify and self.by != "patient":
            raise ValueError(f"stratify needs by=patient: whole groups by {self.by} leave nothing to choose")
        if self.folds and self.by == "date":
            raise ValueError("folds have no order in time: by=date cannot be combined with them")
        return self


class PrivacyConfig(Section):
    """What must not enter a dataset."""

    burned_in: Literal["quarantine", "blank", "keep"] = Field(
        "quarantine", description="images with writing in their pixels: set aside, blank the writing, or keep as they are"
    )
    faces: Literal["note", "deface", "quarantine", "keep"] = Field(
        "note", description="head series that show a face: say so, cut the face off, set aside, or do not look"
    )


class LabelsConfig(Section):
    """How masks are made of annotations (DICOM SEG, RTSTRUCT, NIfTI, NRRD); see docs/labels.md."""

    names: list[ClassName] | None = Field(
        None, min_length=1, description="segmentation: these structures become the classes, in this order; null: all, by alphabet"
    )
    consensus: Literal["first", "union", "majority", "staple"] = Field(
        "majority", description="several annotators of one structure: the first one's, all that any marked, what more than half marked, or STAPLE"
    )
    empty: Literal["keep", "quarantine"] = Field("keep", description="cases in which nothing is marked")

    @pydantic.field_validator("names")
    @classmethod
    def _names(cls, names: list[str] | None) -> list[str] | None:
        if names is not None and (len(set(names)) < len(names) or any(not n.strip() or n.lower() == "background" for n in names)):
            raise ValueError("names: expected each structure once, without the background, which is always class 0")
        return names


class IngestConfig(Section):
    """`hvd-imaging ingest --set preprocess.spacing=[2,2,2]`."""

    preprocess: PreprocessConfig = PreprocessConfig()
    shards: ShardConfig = ShardConfig()
    split: SplitConfig = SplitConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    labels: LabelsConfig = LabelsConfig()


class AugmentConfig(Section):
    """Random changes of training samples; image and mask move together. 0 switches one off."""

    flip: tuple[bool, bool, bool] = Field((False, False, True), description="mirror along D (head, foot), H (front, back), W (left, right) with probability 1/2")
    rotate_deg: typing.Annotated[float, Field(ge=0, le=180)] = Field(10.0, description="in-plane rotation, degrees")
    scale: typing.Annotated[float, Field(ge=0, lt=1)] = Field(0.1, description="zoom by 1 +- this")
    shift: typing.Annotated[float, Field(ge=0, lt=1)] = Field(0.05, description="classification: shift by this share")
    gamma: typing.Annotated[float, Field(ge=0, lt=1)] = Field(0.15, description="gamma in [1 - x, 1 + x]")
    noise: typing.Annotated[float, Field(ge=0)] = Field(0.01, description="deviation of added Gaussian noise")
    probability: Fraction = Field(0.5, description="chance of the spatial change (rotation and zoom) per sample")


def refuse_password(url: str | None) -> str | None:
    """A configuration is copied into runs, reports, batch scripts and other servers: no place for a password."""
    if url is not None and re.search(r"://[^/]*:[^/]*@|://:.*@", url):
        raise ValueError(
            "holds a password, which would stand in run.yaml, reports and batch scripts: put it into a file of mode 600 (password_file), or into "
            "the environment (docs/security.md)"
        )
    return url


class CacheConfig(Section):
    """A nearer place for what is read again and again."""

    kind: Literal["none", "node", "disk", "redis"] = Field(
        "none", description="node: shards in shared memory; disk: on a disk of the node; redis: chunks, shared by nodes"
    )
    folder: str | None = Field(None, description="node, disk: of the copies; null: /dev/shm, or $SLURM_TMPDIR, $TMPDIR, /tmp")
    gb: PositiveFloat = Field(16.0, description="node, disk: most that all datasets together take of the folder (GB)")
    url: str = Field("redis://localhost:6379/0", description="redis: rediss:// for TLS")
    password_file: str | None = Field(None, description="redis: file with the password in one line; null: $HVD_IMAGING_REDIS_PASSWORD, if there is one")
    ca_file: str | None = Field(None, description="redis: PEM certificates that the server's is checked against")
    ttl_hours: PositiveFloat = Field(24.0, description="redis: the server drops a chunk after so long")

    _open = pydantic.field_validator("url")(refuse_password)


class DataConfig(Section):
    """What is read."""

    dataset: str = Field(description="dataset folder made by `hvd-imaging ingest`")
    public_key: str | None = Field(
        None, description="Ed25519 public key (PEM): the dataset's manifest must be signed by it, or training does not begin"
    )
    patch: Triple = Field((32, 48, 48), description="what the network sees, voxels (D, H, W); D = 1 for 2D networks")
    patches_per_volume: Positive = Field(1, description="segmentation: random patches of each volume in an epoch")
    foreground: Fraction = Field(0.5, description="segmentation: share of patches centred on a labelled voxel")
    train_split: str = Field("train", description="split to learn from")
    val_split: str = Field("val", description="split for early stopping and the best model")
    readers: Positive = Field(1, description="threads of a rank that read and augment ahead of the training step")
    cache: CacheConfig = CacheConfig()
    augment: AugmentConfig | None = Field(AugmentConfig(), description="null: none")


class ModelConfig(Section):
    """Which network."""

    name: str = Field(description="a key of hvd_imaging.models.BUILDERS: vgg16, cnn3d, unet3d, or your own")
    width: PositiveFloat = Field(1.0, description="vgg16, cnn3d: multiplier of all filter counts")
    head: Literal["average", "max", "dense"] = Field(
        "average", description="vgg16: global average, global maximum (small findings), or VGG's dense layers"
    )
    filters: Positive = Field(16, description="unet3d: filters of the first level, doubled on each")
    depth: Positive = Field(3, description="unet3d: resolution levels")
    norm: Literal["none", "group", "instance"] = Field("instance", description="normalization after convolutions")
    deep_supervision: bool = Field(False, description="unet3d: a loss on each decoder level")
    dropout: typing.Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="before the last layer")
    options: dict[str, Any] = Field(default_factory=dict, description="for builders of your own")

    @pydantic.field_validator("norm", mode="before")
    @classmethod
    def _no_batch_norm(cls, value: Any) -> Any:
        if value == "batch":
            raise ValueError("batch norm depends on how many ranks share a batch; take 'group' or 'instance' instead")
        return value


class TrainConfig(Section):
    """How it learns."""

    epochs: Positive = Field(10, description="passes over the training split")
    batch_size: Positive = Field(4, description="the GLOBAL batch; the ranks share it, so results do not depend on them")
    optimizer: Literal["sgd", "adam", "adamw"] = Field("adam", description="update rule")
    learning_rate: PositiveFloat = Field(1e-3, description="for a global batch of base_batch_size")
    momentum: typing.Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="sgd")
    nesterov: bool = Field(True, description="sgd")
    weight_decay: typing.Annotated[float, Field(ge=0)] = Field(0.0, description="adamw")
    epsilon: PositiveFloat = Field(1e-5, description="adam: 1e-7 turns rounding noise into steps")
    scale_learning_rate: Literal["linear", "sqrt", "none"] = Field(
        "none", description="with batch_size / base_batch_size"
    )
    base_batch_size: Positive = Field(4, description="the batch that learning_rate was found for")
    schedule: Literal["constant", "cosine", "poly"] = Field("cosine", description="course of the learning rate")
    warmup_epochs: typing.Annotated[float, Field(ge=0)] = Field(0.5, description="linear rise from 0")
    poly_power: PositiveFloat = Field(0.9, description="schedule=poly")
    recompute: bool = Field(False, description="compute activations again on the way back: less memory, about a third more time")
    accumulate: Positive = Field(
        1, description="micro-batches that a rank computes one after another: less memory, the same result"
    )
    balance: Literal["equal", "auto"] = Field(
        "equal", description="parts of a global batch; auto: slow ranks get smaller ones, as measured"
    )
    clip_norm: typing.Annotated[float, Field(ge=0)] = Field(12.0, description="global gradient norm; 0: no clipping")
    loss: Literal["dice_ce", "dice", "ce"] = Field("dice_ce", description="classification always takes ce")
    class_weights: list[PositiveFloat] | Literal["balanced"] | None = Field(
        None, description="per class for cross-entropy; balanced: from the training split's counts"
    )
    seed: int = Field(0, description="of initial weights, order, patches and augmentation")
    max_steps: Positive | None = Field(None, description="stop after so many steps (for trials)")
    validate_every: Positive = Field(1, description="epochs between validations")
    early_stop: typing.Annotated[int, Field(ge=0)] = Field(0, description="validations without gain; 0: never")
    checkpoint_epochs: Positive = Field(1, description="epochs between checkpoints")
    checkpoint_steps: typing.Annotated[int, Field(ge=0)] = Field(0, description="steps between checkpoints; 0: none")
    checkpoint_minutes: typing.Annotated[float, Field(ge=0)] = Field(0.0, description="minutes between checkpoints; 0: none")
    keep_checkpoints: Positive = Field(2, description="newest ones that stay")
    reproducible: bool | Literal["exact"] = Field(
        False,
        description="true: a repeat on the same number of ranks is equal to the bit; exact: on 1, 2, 4, ... ranks too",
    )
    exact_parts: Positive = Field(
        4, description="reproducible=exact: parts of a global batch, a power of two and the most ranks it can use"
    )
    on_nonfinite: Literal["stop", "skip", "back_off"] = Field(
        "stop", description="a NaN or infinite loss or gradient: stop, skip the step, or skip and halve the rate"
    )
    guard_steps: typing.Annotated[int, Field(ge=0)] = Field(
        100, description="steps between comparisons of all ranks' weights; 0: never"
    )
    mixed_precision: Literal["none", "float16", "bfloat16"] = Field("none", description="float16 for GPUs only")


class ParallelConfig(Section):
    """How ranks share the work, and how they talk."""

    data: Positive | None = Field(None, description="spatial groups, each with its part of every global batch; null: world size / spatial")
    spatial: Positive | Literal["auto"] = Field(
        1, description="ranks that share each volume, a slab of its depth each (docs/model-parallel.md); auto: as few as memory permits"
    )
    memory_gb: PositiveFloat | None = Field(None, description="of a rank, for spatial=auto; null: what its node has free, shared by the node's ranks")
    dense: Literal["replicated", "sharded"] = Field(
        "replicated", description="sharded: each rank holds a part of the columns of the dense layers; see docs/model-parallel.md"
    )
    compression: Literal["none", "fp16", "powersgd", "auto"] = Field(
        "none", description="of gradients on the wire; pays on slow links; auto: measured at the start"
    )
    auto_among: list[Literal["none", "fp16", "powersgd"]] = Field(
        ["none", "fp16", "powersgd"], min_length=1, description="compression=auto: what it may choose"
    )
    powersgd_rank: Positive = Field(4, description="compression=powersgd: columns of each factor")
    reduction: Literal["sum", "adasum"] = Field(
        "sum", description="adasum: for very large batches; the number of ranks then changes what is learned"
    )
    groups: Positive = Field(1, description="gradient groups; several let the first travel while others are computed")
    fusion_mb: PositiveFloat = Field(128.0, description="Horovod's fusion buffer, MB")
    cycle_ms: PositiveFloat = Field(1.0, description="pause between Horovod's looks at what is ready, ms")
    threads_per_rank: typing.Annotated[int, Field(ge=0)] = Field(
        0, description="0: the cores that the rank was given; 1 with reproducible=exact"
    )
    stall_seconds: typing.Annotated[float, Field(ge=0)] = Field(
        300.0, description="a rank that waits so long for another one ends the run and names it; 0: never"
    )
    heartbeat_seconds: PositiveFloat = Field(1.0, description="pause between signs of life of each rank")


class MonitorConfig(Section):
    """What each rank says of its machine while it trains; see docs/monitoring.md."""

    seconds: typing.Annotated[float, Field(ge=0)] = Field(10.0, description="pause between samples of CPU, memory, network, GPU; 0: none")
    prometheus: str | None = Field(
        None, description="textfile:/folder of the node exporter, or port:9400 (loopback; port:0.0.0.0:9400 for all)"
    )
    idle_watts: PositiveFloat | None = Field(None, description="power of an idle host, where it has no counters; null: 40")
    busy_watts: PositiveFloat | None = Field(None, description="with all cores at work; null: 8 more for each core")
    mlflow: str | None = Field(None, description="tracking URI of MLflow; null: not used (extra `mlflow`)")

    _open = pydantic.field_validator("mlflow")(refuse_password)

    @pydantic.field_validator("prometheus")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"textfile:.+|port:(?:[^\s]+:)?\d+", value):
            raise ValueError("expected textfile:/folder, port:9400 or port:0.0.0.0:9400")
        return value


class OutputConfig(Section):
    """What is written and where."""

    run_dir: str = Field("runs/run", description="made by training; --run-dir overrides it")
    tensorboard: bool = Field(True, description="write TensorBoard files")


class RunConfig(Section):
    """A whole training run."""

    data: DataConfig
    model: ModelConfig
    train: TrainConfig = TrainConfig()
    parallel: ParallelConfig = ParallelConfig()
    monitor: MonitorConfig = MonitorConfig()
    output: OutputConfig = OutputConfig()

    @pydantic.model_validator(mode="after")
    def _promises(self) -> RunConfig:
        train, parallel = self.train, self.parallel
        if train.exact_parts & (train.exact_parts - 1):
            raise ValueError(f"train.exact_parts: expected a power of two, found {train.exact_parts}")
        if train.reproducible == "exact":
            if train.accumulate > 1:
                raise ValueError("train.accumulate: reproducible=exact cuts the batch by train.exact_parts; leave it at 1")
            if parallel.compression not in ("none", "auto") or parallel.reduction != "sum":
                raise ValueError("parallel: reproducible=exact takes compression=none and reduction=sum")
        if train.reproducible and train.balance == "auto":
            raise ValueError("train.balance=auto follows measured times, so it cannot be reproducible; use balance=equal")
        if parallel.reduction == "adasum" and parallel.compression not in ("none", "auto"):
            raise ValueError("parallel.compression: reduction=adasum takes none")
        if parallel.dense == "sharded":
            other = {
                f"parallel.spatial={parallel.spatial}": parallel.spatial != 1, "parallel.reduction=adasum": parallel.reduction == "adasum",
                "train.reproducible=exact": train.reproducible == "exact", "train.balance=auto": train.balance == "auto",
                f"train.mixed_precision={train.mixed_precision}": train.mixed_precision != "none",
            }  # fmt: skip
            if any(other.values()):
                raise ValueError(f"parallel.dense=sharded does not go together with {', '.join(key for key, used in other.items() if used)}")
        return self

    @property
    def threads_per_rank(self) -> int:
        """0: as many as the rank has cores. Exact bits want the same number for any number of ranks."""
        return self.parallel.threads_per_rank or int(self.train.reproducible == "exact")


S = TypeVar("S", bound=Section)


def load(model: type[S], path: str | Path | None, assignments: Iterable[str] = ()) -> S:
    """Read ``path`` (YAML), apply ``--set`` assignments, check against ``model``.

    Raises:
        ConfigError: with file, key, what was expected and found.
    """
    where = str(path) if path is not None else "--set"
    values: Any = {}
    if path is not None:
        try:
            values = read_yaml(path) or {}
        except OSError as error:
            raise ConfigError(
                f"{path}: cannot be read ({error.strerror}); `hvd-imaging init segmentation -o run.yaml` makes one"
            ) from error
        except TextError as error:
            line = f", line {error.line}" if error.line is not None else ""
            raise ConfigError(f"{path}{line}: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: expected sections such as 'data:', found {type(values).__name__}")
    for assignment in assignments:
        _assign(values, assignment)
    return check(model, values, where)


def check(model: type[S], values: Any, where: str) -> S:
    """Validate plain values against ``model``; ``where`` names their origin in messages."""
    try:
        return model.model_validate(values)
    except pydantic.ValidationError as error:
        raise ConfigError(f"{where}: " + "; ".join(_explain(model, e) for e in error.errors()[:5])) from None


def _assign(values: dict[str, Any], assignment: str) -> None:
    key, separator, text = assignment.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise ConfigError(f"--set {assignment}: expected key=value, such as train.epochs=20")
    try:
        value = parse_yaml(text)
    except TextError as error:
        raise ConfigError(f"--set {assignment}: the value is not valid YAML") from error
    target = values
    for part in parts[:-1]:
        if target.get(part) is None:
            target[part] = {}
        target = target[part]
        if not isinstance(target, dict):
            raise ConfigError(f"--set {assignment}: '{part}' holds a value, not a section")
    target[parts[-1]] = value


def keys(model: type[pydantic.BaseModel], prefix: str = "") -> list[str]:
    """All dotted keys of a model."""
    found = []
    for name, info in model.model_fields.items():
        inner = section_of(info.annotation)
        found += keys(inner, f"{prefix}{name}.") if inner else [prefix + name]
    return found


def section_of(annotation: Any) -> type[Section] | None:
    """The section class of a field, also behind ``| None``; None for a plain value."""
    for candidate in (annotation, *typing.get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 200
_repr.maxlist = _repr.maxtuple = 10


def _explain(model: type[Section], error: Any) -> str:
    place = ".".join(str(part)[:100] for part in error["loc"])
    # A union's error place ends with the name of the tried alternative: only names of fields matter to the user.
    known = keys(model)
    if error["type"] == "extra_forbidden":
        last = place.rsplit(".", 1)[-1]
        near = [k for k in known if k.rsplit(".", 1)[-1] == last]
        beside = {k.rsplit(".", 1)[-1]: k for k in known if k.rpartition(".")[0] == place.rpartition(".")[0]}
        near += [beside[name] for name in difflib.get_close_matches(last, beside, n=3, cutoff=0.5)]
        near += difflib.get_close_matches(place, known, n=3, cutoff=0.6)
        near += [k for k in known if difflib.get_close_matches(last, [k.rsplit(".", 1)[-1]], cutoff=0.6)]
        section = place.rpartition(".")[0]
        siblings = [k for k in known if k.rpartition(".")[0] == section] or sorted({k.split(".")[0] for k in known})
        best = list(dict.fromkeys(near))[:3]
        return f"{place}: unknown key; " + (
            f"nearest valid keys: {', '.join(best)}" if best else f"valid keys here: {', '.join(siblings)}"
        )
    if error["type"] == "missing":
        return f"{place}: missing; this key is required"
    message = error["msg"].removeprefix("Value error, ")
    found = error.get("input")
    shown = f", found {_repr.repr(found)}" if isinstance(found, str | int | float | list | tuple | None) else ""
    return f"{place}: {message}{shown}" if place else message
