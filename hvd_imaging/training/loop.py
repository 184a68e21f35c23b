"""The training loop, read straight down: data, model, steps, validation, checkpoint.

Every rank runs this same code on its part of each global batch. Gradients are sums over all ranks divided by the true
global batch, metrics are sums and counts, so the number of ranks changes speed and nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from .. import models
from ..communicator import together
from ..config import RunConfig, TrainConfig
from ..errors import ConfigError, HvdImagingError, PeerError, RunError
from ..models.losses import sample_losses
from ..models.metrics import dice_of_counts, overlap_counts
from ..models.spec import ModelSpec
from ..parallel.horovod import Horovod, is_peer_failure
from ..pipeline.dataset import TrainingData, ValidationData
from ..pipeline.plan import check_fits
from ..shards import manifest as manifests
from ..shards.manifest import Manifest
from . import checkpoint, run, schedule
from .callbacks import MONITORS, Best, Reporter, Silent, TensorBoard
from .events import EventLog
from .optimizer import make_optimizer

keras = tf.keras


@dataclass
class Position:
    """Where a run stands: everything besides the arrays that a checkpoint holds.

    Attributes:
        epoch: the current one.
        step: the next step inside it.
        total: steps done in all.
        best: best validation so far.
        sums: (loss, correct, examples) of the current epoch so far; on rank 0 those of all ranks after a resume.
        seconds: spent in the current epoch so far.
    """

    epoch: int = 0
    step: int = 0
    total: int = 0
    best: Best = field(default_factory=Best)
    sums: np.ndarray = field(default_factory=lambda: np.zeros(3))
    seconds: float = 0.0


@dataclass(frozen=True)
class Summary:
    """What a finished run says of itself.

    Attributes:
        directory: the run directory.
        steps: done in all.
        best: score and epoch of the best model.
        weights_sha256: of the final weights, equal on all ranks.
        stopped_early: by ``train.early_stop``.
    """

    directory: Path
    steps: int
    best: Best
    weights_sha256: str
    stopped_early: bool


def train(
    config: RunConfig, run_dir: str | Path, hvd: Horovod, resume: bool = False, report: Reporter | None = None
) -> Summary:
    """Train, or go on with a run.

    Args:
        config: the resolved configuration, the same on all ranks.
        run_dir: where the run lives; see `training/run.py`.
        hvd: the connected ranks.
        resume: go on from the newest checkpoint; begin anew where there is none.
        report: shows progress; used on rank 0 only.

    Raises:
        ConfigError, DatasetError, RunError: on all ranks alike for what all can see, else on the rank that saw it;
            the others then raise PeerError or are ended by the launcher.
    """
    try:
        return _train(config, run_dir, hvd, resume, report)
    except tf.errors.ResourceExhaustedError as error:
        raise RunError(
            "out of memory in a training step; lower data.patch, model.filters or model.width, or start more ranks so "
            "that each has less of train.batch_size"
        ) from error
    except (tf.errors.OpError, RuntimeError) as error:
        if is_peer_failure(error):
            raise PeerError("stopped because another rank failed; its own message names the reason") from error
        raise


def _train(config: RunConfig, run_dir: str | Path, hvd: Horovod, resume: bool, report: Reporter | None) -> Summary:
    directory, world = Path(run_dir), hvd.world
    report = report if report is not None and world.is_root else Silent()
    manifest = together(hvd, lambda: manifests.load(config.data.dataset))
    spec = together(hvd, lambda: make_spec(config, manifest, directory.name))

    if config.train.reproducible:
        tf.config.experimental.enable_op_determinism()
    keras.mixed_precision.set_global_policy(
        {"none": "float32"}.get(config.train.mixed_precision, f"mixed_{config.train.mixed_precision}")
    )
    keras.utils.set_random_seed(config.train.seed)

    data = TrainingData(config.data.dataset, manifest, config.data, config.train.seed, config.train.batch_size)
    validation = ValidationData(config.data.dataset, manifest, config.data, max(1, config.train.batch_size // world.size))
    together(hvd, lambda: check_fits(len(data.samples) * data.draws, config.train.batch_size, world, "train"))
    model = together(hvd, lambda: models.build(spec))
    optimizer = make_optimizer(config.train)
    optimizer.build(model.trainable_variables)
    weights_of_class = class_weights(config.train, data, spec)

    together(
        hvd, lambda: run.claim(directory, config, spec, manifest, world, resume) if world.is_root else None
    )
    position = together(hvd, lambda: restore(directory, model, optimizer, world.is_root, report) if resume else Position())
    # A filesystem may show ranks different newest checkpoints for a moment: rank 0's is the truth for all.
    position = agree_on_position(hvd, position)
    hvd.broadcast_variables(model.weights + list(optimizer.variables))

    log = EventLog(directory, active=world.is_root)
    board = TensorBoard(directory, active=world.is_root and config.output.tensorboard)
    steps = data.plan(0).steps
    log.write("resume" if position.total else "start", step=position.total, **run.record(spec, world))
    report.message(
        f"{spec.model.name}: {model.count_params():,} parameters, {len(data.samples)} samples, "
        f"{steps} steps an epoch, {world.size} rank{'s' * (world.size > 1)}"
    )
    train_step = make_train_step(model, optimizer, weights_of_class, config.train, hvd)
    validate_batch = make_validation_step(models.inference_model(model), spec.task)
    saved = -1

    def save() -> None:
        nonlocal saved
        position.sums = hvd.sum_array(position.sums, "checkpoint.sums")
        if world.is_root:
            meta = describe(position, spec, config)
            path = checkpoint.path_of(directory, position.total)
            state = checkpoint.State([w.numpy() for w in model.weights], [v.numpy() for v in optimizer.variables], meta)
            sha = checkpoint.save(path, state)
            checkpoint.rotate(directory, config.train.keep_checkpoints)
            log.write("checkpoint", step=position.total, epoch=position.epoch, sha256=sha)
        else:
            position.sums = np.zeros(3)
        saved = position.total

    last_step = config.train.max_steps or config.train.epochs * steps
    stopped_early = False
    while position.epoch < config.train.epochs and position.total < last_step and not stopped_early:
        plan = data.plan(position.epoch)
        began = time.perf_counter()
        batches = data.batches(position.epoch, position.step, world)
        while position.step < plan.steps and position.total < last_step:
            image, label, weight = next(batches)
            count = min(plan.global_batch, plan.items - position.step * plan.global_batch)
            rate = schedule.rate(position.total, steps, config.train)
            sums = train_step(image, label, weight, tf.constant(count, tf.float32), tf.constant(rate, tf.float32)).numpy()
            if not np.isfinite(sums[0]):
                raise RunError(
                    f"epoch {position.epoch}, step {position.step}: the loss is {sums[0]}; lower train.learning_rate "
                    f"(now {rate:g}), or lengthen train.warmup_epochs; the last good state is in {directory / checkpoint.FOLDER}"
                )
            position.sums += sums
            position.step, position.total = position.step + 1, position.total + 1
            report.step(position.epoch, position.step, plan.steps, float(sums[0] / max(sums[2], 1)), rate)
            every = config.train.checkpoint_steps
            if every and position.total % every == 0 and position.step < plan.steps:
                position.seconds += time.perf_counter() - began
                save()
                began = time.perf_counter()
        position.seconds += time.perf_counter() - began
        whole = position.step == plan.steps

        record = epoch_record(position, hvd, schedule.rate(max(position.total - 1, 0), steps, config.train), spec.task)
        due = whole and (position.epoch + 1) % config.train.validate_every == 0
        if validation.samples and (due or position.total >= last_step or position.epoch + 1 == config.train.epochs):
            record |= validate(validation, validate_batch, hvd, spec)
        name, sign = MONITORS[spec.task]
        name = name if name in record or validation.samples else "loss"
        if name in record:
            score = -record["loss"] if name == "loss" else sign * record[name]
            # A partial epoch (max_steps) is no candidate: a resumed run has to judge the same epochs as a whole one.
            is_best = bool(hvd.broadcast(whole and position.best.update(float(score), position.epoch)))
            if world.is_root and (is_best or not (directory / run.BEST).exists()):
                meta = {"epoch": position.epoch, "step": position.total, name: record[name]}
                checkpoint.save(directory / run.BEST, checkpoint.State([w.numpy() for w in model.weights], [], meta))
            record["best"] = is_best
        log.write("epoch", step=position.total, world_size=world.size, **record)
        board.epoch(record)
        report.epoch(record)
        if whole:
            position.epoch, position.step = position.epoch + 1, 0
            position.sums, position.seconds = np.zeros(3), 0.0
        patience = config.train.early_stop
        stopped_early = bool(hvd.broadcast(bool(patience and position.best.waited >= patience)))
        if not whole or stopped_early or position.epoch % config.train.checkpoint_epochs == 0 or position.epoch == config.train.epochs:
            save()
    if saved != position.total:
        save()
    sha = checkpoint.digest([w.numpy() for w in model.weights])
    differing = [rank for rank, other in enumerate(hvd.gather(sha)) if other != hvd.broadcast(sha)] if world.size > 1 else []
    if differing:
        raise HvdImagingError(f"the weights of ranks {differing} differ from rank 0's: the ranks have drifted apart")
    log.write("end", step=position.total, weights_sha256=sha, best=position.best.to_json(), stopped_early=stopped_early)
    return Summary(directory, position.total, position.best, sha, stopped_early)


def make_spec(config: RunConfig, manifest: Manifest, name: str) -> ModelSpec:
    """The contract of the model that ``config`` trains on this dataset; checks what both have to agree on.

    Raises:
        ConfigError: an unlabelled dataset, class weights for another number of classes.
    """
    if manifest.task == "unlabelled":
        raise ConfigError(
            f"data.dataset: {config.data.dataset} has no labels; ingest with masks, or with --labels labels.csv"
        )
    weights = config.train.class_weights
    if isinstance(weights, list) and len(weights) != len(manifest.classes):
        raise ConfigError(
            f"train.class_weights: expected {len(manifest.classes)} values ({', '.join(manifest.classes)}), found {len(weights)}"
        )
    return ModelSpec(
        task=manifest.task,
        classes=manifest.classes,
        patch=config.data.patch,
        channels=manifest.channels,
        preprocess=manifest.preprocess,
        model=config.model,
        dataset_hash=manifest.hash(),
        run=name,
    )


def class_weights(config: TrainConfig, data: TrainingData, spec: ModelSpec) -> tf.Tensor:
    """float32 ``(K,)``."""
    return tf.constant(data.class_weights(config.class_weights), tf.float32, (len(spec.classes),))


def make_train_step(
    model: Any, optimizer: Any, weights_of_class: tf.Tensor, config: TrainConfig, hvd: Horovod
) -> Callable[..., tf.Tensor]:
    """One step as a graph: ``(image, label, weight, global count, rate) -> float64 (loss sum, correct, examples)``.

    ``weight`` is 0 for rows that only fill up the batch; ``global count`` is the true size of the global batch.
    """
    variables = model.trainable_variables
    scaled = isinstance(optimizer, keras.mixed_precision.LossScaleOptimizer)
    inner = optimizer.inner_optimizer if scaled else optimizer
    classifies = len(model.outputs[0].shape) == 2
    kind = "ce" if classifies else config.loss

    @tf.function
    def step(image, label, weight, count, rate):
        with tf.GradientTape() as tape:
            outputs = model(image, training=True)
            losses = sample_losses(kind, label, outputs, weights_of_class) * weight
            loss = tf.reduce_sum(losses) / count
            loss = optimizer.get_scaled_loss(loss) if scaled else loss
        gradients = tape.gradient(loss, variables)
        gradients = hvd.sum_gradients([tf.convert_to_tensor(g) for g in gradients])
        if scaled:
            gradients = optimizer.get_unscaled_gradients(gradients)
        if config.clip_norm:
            gradients, _ = tf.clip_by_global_norm(gradients, config.clip_norm)
        inner.learning_rate.assign(rate)
        optimizer.apply_gradients(zip(gradients, variables, strict=True))
        correct = 0.0
        if classifies:
            correct = tf.reduce_sum(tf.cast(tf.equal(tf.argmax(outputs, -1, tf.int32), label), tf.float32) * weight)
        return tf.cast(tf.stack([tf.reduce_sum(losses), correct, tf.reduce_sum(weight)]), tf.float64)

    return step


def make_validation_step(model: Any, task: str) -> Callable[..., tuple[tf.Tensor, tf.Tensor]]:
    """``(image, label, weight)`` -> (float64 (cross-entropy sum, its terms), counts of each row).

    Rows of counts are ``(K, 3)`` overlaps for segmentation, where label -1 marks voxels that do not count, and ``(1,)``
    correct or not for classification.
    """

    @tf.function
    def step(image, label, weight):
        logits = model(image, training=False)
        inside = tf.cast(label >= 0, tf.float32)
        loss = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.maximum(label, 0), logits)
        terms = inside * tf.reshape(weight, [-1, *[1] * (len(label.shape) - 1)])
        sums = tf.stack([tf.reduce_sum(tf.cast(loss * terms, tf.float64)), tf.reduce_sum(tf.cast(terms, tf.float64))])
        if task == "segmentation":
            # What does not count becomes predicted background, and background is not scored.
            background = tf.one_hot(tf.zeros_like(label), logits.shape[-1])
            return sums, overlap_counts(label, tf.where(inside[..., None] > 0, logits, background))
        correct = tf.equal(tf.argmax(logits, -1, tf.int32), label)
        return sums, tf.cast(correct, tf.int64)[:, None]

    return step


def validate(data: ValidationData, step: Callable[..., Any], hvd: Horovod, spec: ModelSpec) -> dict[str, float]:
    """Metrics over the whole validation split, equal on all ranks and for any number of them.

    Returns:
        ``val_loss`` (cross-entropy), and ``val_dice`` (mean over cases and foreground classes present) with one
        ``val_dice_<class>`` each, or ``val_accuracy``.
    """
    classes = len(spec.classes)
    width = classes * 3 if spec.task == "segmentation" else 1
    sums, counts = np.zeros(2), np.zeros((len(data.samples), width), np.int64)
    for rows, batch in data.batches(hvd.world):
        found, per_row = step(*batch)
        sums += found.numpy()
        np.add.at(counts, rows, per_row.numpy()[: len(rows)].reshape(len(rows), width))
    sums, counts = hvd.sum_array(sums, "validation.sums"), hvd.sum_array(counts, "validation.counts")
    result = {"val_loss": float(sums[0] / max(sums[1], 1))}
    if spec.task == "classification":
        return result | {"val_accuracy": float(counts.sum() / len(data.samples))}
    dice = dice_of_counts(counts.reshape(-1, classes, 3))[:, 1:]
    result["val_dice"] = mean_or_zero(dice)
    return result | {
        f"val_dice_{name}": mean_or_zero(dice[:, index]) for index, name in enumerate(spec.classes[1:])
    }


def mean_or_zero(values: np.ndarray) -> float:
    """Mean of what is not NaN; 0 if nothing is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else 0.0


def epoch_record(position: Position, hvd: Horovod, rate: float, task: str) -> dict[str, Any]:
    """Training metrics of an epoch over all ranks."""
    loss, correct, examples = hvd.sum_array(position.sums, "epoch.sums")
    record = {
        "epoch": position.epoch,
        "loss": float(loss / max(examples, 1)),
        "learning_rate": rate,
        "examples": int(examples),
        "seconds": round(position.seconds, 3),
        "samples_per_second": float(examples / max(position.seconds, 1e-9)),
    }
    return record | ({"accuracy": float(correct / max(examples, 1))} if task == "classification" else {})


def describe(position: Position, spec: ModelSpec, config: RunConfig) -> dict[str, Any]:
    """The JSON part of a checkpoint."""
    return {
        "epoch": position.epoch,
        "step": position.step,
        "total": position.total,
        "best": position.best.to_json(),
        "sums": position.sums.tolist(),
        "seconds": position.seconds,
        "seed": config.train.seed,
        "dataset_hash": spec.dataset_hash,
    }


def restore(directory: Path, model: Any, optimizer: Any, is_root: bool, report: Reporter) -> Position:
    """Load the newest whole checkpoint into model and optimizer; the beginning of a run where there is none."""
    state, problems = checkpoint.load_newest(directory)
    for problem in problems:
        report.message(f"skipped: {problem}")
    if state is None:
        if problems:
            raise RunError(f"{directory}: no checkpoint is whole; the newest: {problems[0]}")
        return Position()
    checkpoint.restore(model.weights, state.weights, "weight", str(directory))
    checkpoint.restore(list(optimizer.variables), state.optimizer, "optimizer", str(directory))
    meta = state.meta
    sums = np.array(meta["sums"]) if is_root else np.zeros(3)
    return Position(meta["epoch"], meta["step"], meta["total"], Best.from_json(meta["best"]), sums, meta["seconds"])


def agree_on_position(hvd: Horovod, position: Position) -> Position:
    """Rank 0's position on every rank, with sums of its own."""
    values = hvd.broadcast([position.epoch, position.step, position.total, position.best.to_json(), position.seconds])
    epoch, step, total, best, seconds = values
    sums = position.sums if hvd.world.is_root else np.zeros(3)
    return Position(epoch, step, total, Best.from_json(best), sums, seconds)
