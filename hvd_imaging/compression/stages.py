"""The steps of a recipe, one after another, each in a folder of its own that a later try goes on from.

::

    steps/01-filters/
        start/         the changed network before it is trained on (architecture.json, network.npz), and plan.json
        training/      the run folder of training on
        network.npz, architecture.json, outcome.json     the step is done

The network after a step is a network of 3D layers again, so that the next step sees what it knows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from .. import models
from ..communicator import together
from ..config import RunConfig
from ..errors import RunError
from ..files import atomic_folder, write_json
from ..models import architecture
from ..models.losses import sample_losses
from ..models.spec import ModelSpec
from ..parallel.horovod import Horovod
from ..texts import read_json
from ..training import checkpoint
from ..training.callbacks import Reporter
from ..world import World
from . import filters, macs, norms, quantize
from .clusters import Clusters
from .finetune import Hold, finetune, settings
from .masks import Masks, Zeros, fragile_layers, spread
from .patches import training_batches
from .recipe import Cluster, Filters, FreezeNorms, Quantize, Recipe, Step, Weights

NETWORK, OUTCOME, PLAN = "network.npz", "outcome.json", "plan.json"
layers = tf.keras.layers


@dataclass(frozen=True)
class Stage:
    """One folder's work.

    Attributes:
        name: of its folder.
        step: of the recipe.
        share: of the filters' measure that leaves in this round; 0 for other steps.
        zeros: whether zeros in the weights have to stay, as an earlier step has made them.
    """

    name: str
    step: Step
    share: float = 0.0
    zeros: bool = False


def stages(recipe: Recipe) -> list[Stage]:
    """The folders of a recipe in their order; a step of several rounds has several. Pure."""
    found: list[Stage] = []
    zeros = False
    for step in recipe.steps:
        rounds = step.rounds if isinstance(step, Filters) else 1
        # The same share of what is left in every round, so that all of them together remove what is wanted.
        share = 1 - (1 - step.remove) ** (1 / rounds) if isinstance(step, Filters) else 0.0
        for number in range(1, rounds + 1):
            name = f"{len(found) + 1:02d}-{step.do}" + (f"-{number}" if rounds > 1 else "")
            found.append(Stage(name, step, share, zeros))
        zeros = zeros or isinstance(step, Weights)
    return found


@dataclass(frozen=True)
class Context:
    """What all stages share.

    Attributes:
        config, spec: of the run.
        hvd: the ranks.
        folder: of all stages.
        report: shows training on; used on rank 0 only.
        say: one line for people, on rank 0.
        trusted: see `models.architecture.load`.
    """

    config: RunConfig
    spec: ModelSpec
    hvd: Horovod
    folder: Path
    report: Reporter | None
    say: Callable[[str], None]
    trusted: bool = False


def carry_out(stage: Stage, model: Any, context: Context) -> tuple[Any, dict[str, Any]] | None:
    """One stage, or what is left of it.

    Args:
        model: network before it, giving logits; not used further if the stage was begun before.

    Returns:
        the network after it, and the outcome: {"outcome": a sentence, "parameters": ..., "zeros": ..., "score": ...}. None
        if training was asked to leave.

    Raises:
        RunError, DatasetError: on all ranks alike.
    """
    hvd, folder = context.hvd, context.folder / stage.name
    if hvd.broadcast((folder / OUTCOME).is_file()):  # rank 0 decides: a network filesystem may show others less
        return together(hvd, lambda: (_open(folder, context.trusted), _read(folder / OUTCOME)))
    start = folder / "start"
    if not hvd.broadcast(start.is_dir()):
        # Not under `together`: it holds collective calls, so a rank that fails alone ends all.
        changed, plan = CHANGES[type(stage.step)](stage, model, context)
        together(hvd, partial(_write_start, start, changed, plan) if hvd.world.is_root else lambda: None)
        hvd.barrier()
    model, plan = together(hvd, lambda: (_open(start, context.trusted), _read(start / PLAN)))
    sentence, score = plan["outcome"], None
    if stage.step.epochs:
        trained = _train(stage, model, plan, context)
        if trained is None:
            return None
        sentence, score = f"{sentence}; {trained[0]}", trained[1]
    totals = macs.totals(model)
    outcome = {"outcome": sentence, "parameters": totals.parameters, "zeros": totals.zeros, "score": score}
    together(hvd, partial(_finish, folder, model, outcome) if hvd.world.is_root else lambda: None)
    return model, outcome


def _train(stage: Stage, model: Any, plan: dict[str, Any], context: Context) -> tuple[str, float | None] | None:
    step, folder = stage.step, context.folder / stage.name / "training"
    trained, keep = model, True
    if isinstance(step, Quantize):
        trained, keep = together(context.hvd, lambda: quantize.prepare(model, _whole_images(context, step.patches))), False
    hold = _hold(stage, trained, plan)
    summary = finetune(
        trained, settings(context.config, step), folder, context.hvd, context.report, hold, keep, training=keep
    )
    if summary.left:
        return None
    if isinstance(step, Quantize):
        quantize.finish(model, trained)
    best = summary.best
    sentence = f"best of {step.epochs} epochs of training on was the {_ordinal(best.epoch + 1)}"
    if best.epoch < 0:
        sentence = f"{step.epochs} epochs of training on made it no better, so it stays as it was before them"
    return sentence, best.to_json()["score"]


def _ordinal(number: int) -> str:
    return f"{number}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10 if number // 10 % 10 != 1 else 0, 'th') }"


def _hold(stage: Stage, model: Any, plan: dict[str, Any]) -> Hold | None:
    step: Step = stage.step
    found = kernels(model)
    if isinstance(step, Weights):
        return _masks(step, model, plan)
    if isinstance(step, Cluster):
        return Clusters(found, step.clusters)
    return Zeros(found) if stage.zeros else None


# Transposed convolutions hold (..., out, in).
_IN_OUT = {layers.Conv3DTranspose: (0, 1, 2, 4, 3), layers.Conv2DTranspose: (0, 1, 3, 2)}


def kernels(model: Any) -> dict[str, Any]:
    """Layer name -> kernel variable of every convolution and dense layer but those that give the outputs."""
    outputs = {tensor._keras_history.layer.name for tensor in model.outputs}
    found = {}
    for layer in model.layers:
        # By the variables' names: a layer that tfmot has wrapped holds a rounded tensor where its kernel was.
        kernel = next((v for v in layer.trainable_variables if v.name.split("/")[-1].split(":")[0] == "kernel"), None)
        if kernel is not None and layer.name not in outputs:
            found[layer.name] = kernel
    return found


# --- what each step changes before training on ----------------------------------------------------------------------


def _freeze(stage: Stage, model: Any, context: Context) -> tuple[Any, dict[str, Any]]:
    step: Any = stage.step

    def images():
        return (image for image, _ in training_batches(context.config, context.hvd.world, step.patches))

    count = norms.count(model)
    changed = norms.freeze(model, images, partial(_sum, context.hvd))
    return changed, {"outcome": f"{count} norm{'s' * (count != 1)} became part of the convolutions before them"}


def _filters(stage: Stage, model: Any, context: Context) -> tuple[Any, dict[str, Any]]:
    step: Any = stage.step
    before = macs.totals(model)
    loss = _loss(context)

    def batches():
        return training_batches(context.config, context.hvd.world, step.patches)

    importance = filters.importance(model, batches, loss, partial(_sum, context.hvd))
    keep = filters.choose(model, importance, stage.share, step.measure, step.floor)
    changed = filters.remove(model, keep)
    after = macs.totals(changed)
    return changed, {
        "outcome": (
            f"{before.parameters:,} parameters became {after.parameters:,} "
            f"({1 - after.parameters / before.parameters:.0%} gone), multiply-accumulates {before.macs:,} became {after.macs:,}"
        )
    }


def _weights(stage: Stage, model: Any, context: Context) -> tuple[Any, dict[str, Any]]:
    step: Any = stage.step
    found = kernels(model)
    sparsity = step.sparsity if step.pattern is None else step.pattern[0] / step.pattern[1]
    sizes = {name: int(np.prod(kernel.shape)) for name, kernel in found.items()}
    batches = list(training_batches(context.config, context.hvd.world, step.patches))
    losses = tf.function(lambda image, label: tf.reduce_sum(_loss(context)(label, model(image, training=False))))

    def loss() -> float:
        total = sum((float(losses(image, label)) for image, label in batches), 0.0)
        return float(context.hvd.sum_array(np.array([total]), "compression.loss")[0])

    even = dict.fromkeys(sizes, sparsity)
    fragile = fragile_layers(found, even, loss, step.spare)
    if step.pattern is not None:
        final = {name: sparsity for name in sizes if name not in fragile}
        what = f"{step.pattern[0]} of {step.pattern[1]} neighbouring weights"
    else:
        final = spread(sizes, fragile, sparsity)
        what = f"{sparsity:.0%} of the weights"
    spared = f"; spared: {', '.join(fragile)}" if fragile else ""
    plan = {"outcome": f"{what} in {len(final)} layers become zero{spared}", "final": final}
    if not step.epochs:  # no training on that would raise them by and by
        _masks(step, model, plan).after_update(1, 1)
    return model, plan


def _masks(step: Any, model: Any, plan: dict[str, Any]) -> Masks:
    found = kernels(model)
    axes = {x.name: _IN_OUT[type(x)] for x in model.layers if type(x) in _IN_OUT}
    return Masks({name: found[name] for name in plan["final"]}, plan["final"], step.pattern, axes)


def _cluster(stage: Stage, model: Any, context: Context) -> tuple[Any, dict[str, Any]]:
    step: Any = stage.step
    Clusters(kernels(model), step.clusters)  # sets the values; training on keeps them shared
    return model, {"outcome": f"the weights of a layer share {step.clusters} values"}


def _quantize(stage: Stage, model: Any, context: Context) -> tuple[Any, dict[str, Any]]:
    return model, {"outcome": "trained with the rounding of 8-bit integers"}


CHANGES: dict[type, Callable[[Stage, Any, Context], tuple[Any, dict[str, Any]]]] = {
    FreezeNorms: _freeze,
    Filters: _filters,
    Weights: _weights,
    Cluster: _cluster,
    Quantize: _quantize,
}


def _loss(context: Context) -> Callable[[Any, Any], Any]:
    """``(labels, logits)`` -> float32 ``(N,)``: the run's loss, classes alike."""
    same = tf.ones(len(context.spec.classes))
    return lambda labels, logits: sample_losses(context.config.train.loss, labels, logits, same)


def _sum(hvd: Horovod, arrays: list[np.ndarray]) -> list[np.ndarray]:
    return [hvd.sum_array(np.asarray(array, np.float64), f"compression.{i}") for i, array in enumerate(arrays)]


def _whole_images(context: Context, count: int) -> list[np.ndarray]:
    """The same patches on every rank."""
    return [image for image, _ in training_batches(context.config, World(), count)]


# --- files ----------------------------------------------------------------------------------------------------------


def save_network(model: Any, folder: Path) -> None:
    """Write ``architecture.json`` and ``network.npz`` into ``folder``."""
    architecture.save(model, folder)
    checkpoint.save(folder / NETWORK, checkpoint.State([w.numpy() for w in model.weights], [], {}))


def _open(folder: Path, trusted: bool) -> Any:
    model = architecture.load(folder, trusted)
    checkpoint.restore(model.weights, checkpoint.load(folder / NETWORK).weights, "weight", str(folder / NETWORK))
    return models.inference_model(model)


def _write_start(start: Path, model: Any, plan: dict[str, Any]) -> None:
    with atomic_folder(start) as folder:
        save_network(model, folder)
        write_json(folder / PLAN, plan)


def _finish(folder: Path, model: Any, outcome: dict[str, Any]) -> None:
    save_network(model, folder)
    write_json(folder / OUTCOME, outcome)


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: damaged ({str(error).splitlines()[0]}); delete the folder {path.parent.name} to do the step again") from error
