"""The training loop, read straight down: data, model, steps, validation, checkpoint.

Every rank runs this same code on its part of each global batch. Gradients are sums over all ranks divided by the true
global batch, metrics are sums and counts, so the number of ranks changes speed and nothing else.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.framework import config as tf_config

from .. import models
from ..communicator import together
from ..config import RunConfig, TrainConfig
from ..errors import ConfigError, PeerError, RunError, on_all_ranks
from ..models import losses
from ..models.spec import ModelSpec
from ..monitoring.monitor import Monitor
from ..monitoring.stragglers import stragglers
from ..monitoring.tracking import MLflow
from ..parallel.choose import settle
from ..parallel.columns import Columns, shard_dense, to_share
from ..parallel.exchange import check_exchange, make_exchange
from ..parallel.grid import check_grid
from ..parallel.horovod import Horovod, is_peer_failure
from ..parallel.spatial import SlabModel
from ..pipeline.cache import open_cache
from ..pipeline.dataset import TrainingData, ValidationData
from ..pipeline.plan import Cut, balanced_cut, busiest, check_fits, equal_cut
from ..shards.manifest import Manifest
from ..shards.signing import load_signed
from ..world import host_name
from . import checkpoint, nonfinite, run, schedule
from .callbacks import MONITORS, Reporter, Silent, TensorBoard
from .events import EventLog, rank_log
from .guard import ItemTrace, check_replicas, digests
from .heartbeat import Heartbeat
from .optimizer import make_optimizer
from .owner import Owner
from .position import Position, newest, restore, snapshot
from .requests import Requests
from .start import Start
from .step import Outcome, Step, time_gradients
from .validate import make_validation_step, validate

keras = tf.keras

# Steps between two looks at the ranks' speeds (train.balance=auto), and the gain that is worth another cut.
_BALANCE_STEPS, _BALANCE_GAIN = 20, 0.95


@dataclass(frozen=True)
class Summary:
    """What a run says of itself when it ends.

    Attributes:
        directory: the run directory.
        steps: done in all.
        best: score and epoch of the best model.
        weights_sha256: of the weights, equal on all ranks.
        stopped_early: by ``train.early_stop``.
        left: asked to leave before the end (SIGTERM, SIGUSR1); ``--resume`` goes on from here.
    """

    directory: Path
    steps: int
    best: Any
    weights_sha256: str
    stopped_early: bool
    left: bool = False


def train(
    config: RunConfig, run_dir: str | Path, hvd: Horovod, resume: bool = False, report: Reporter | None = None,
    start: Start | None = None,
) -> Summary:  # fmt: skip
    """Train, or go on with a run.

    Args:
        config: the resolved configuration, the same on all ranks.
        run_dir: where the run lives; see `training/run.py`.
        hvd: the connected ranks.
        resume: go on from the newest checkpoint; begin anew where there is none.
        report: shows progress; used on rank 0 only.
        start: the network to begin from; a fresh one without.

    Raises:
        ConfigError, DatasetError, RunError: on all ranks alike for what all can see, else on the rank that saw it;
            the others then raise PeerError or are ended by the launcher.
    """
    try:
        with Requests(config.train.checkpoint_minutes if hvd.world.is_root else 0) as requests:
            trainer = Trainer(config, Path(run_dir), hvd, resume, report, requests, start or Start())
            try:
                summary = trainer.run()
                trainer.own_log.write("leave" if summary.left else "end", step=summary.steps)
                return summary
            except BaseException as error:
                trainer.failed(error)
                raise
            finally:
                trainer.close()
    except tf.errors.ResourceExhaustedError as error:
        raise RunError(
            "out of memory in a training step; lower data.patch, model.filters or model.width, raise train.accumulate, or "
            "start more ranks so that each has less of train.batch_size"
        ) from error
    except (tf.errors.OpError, RuntimeError) as error:
        if is_peer_failure(error):
            raise PeerError("stopped because another rank failed; its own message names the reason") from error
        raise


class Trainer:
    """One process of a run: what it holds, and the loop over epochs and steps."""

    def __init__(
        self, config: RunConfig, directory: Path, hvd: Horovod, resume: bool, report: Reporter | None, requests: Requests,
        start: Start,
    ) -> None:  # fmt: skip
        self.config, self.directory, self.hvd, self.requests, self.start = config, directory, hvd, requests, start
        self.world = world = hvd.world
        self.share = hvd.data_world
        self.report = report if report is not None and world.is_root else Silent()
        self.writer = checkpoint.Writer()
        self.heart: Heartbeat | None = None
        self.monitor: Monitor | None = None
        self.position: Position | None = None
        self.own_log: EventLog | None = None
        self.board: TensorBoard | None = None
        self.tracker: MLflow | None = None
        self.ended = False

        # What to learn from, and what is to learn.
        manifest = together(hvd, lambda: load_signed(config.data.dataset, config.data.public_key))
        self.files_hash = manifest.files_hash()
        self.spec = together(hvd, lambda: make_spec(config, manifest, directory.name))
        self.loss = losses.kind_for(self.spec.task, config.train.loss)
        self.loss_title = losses.title(self.loss, config.train.class_weights is not None)
        _prepare_numerics(config.train)
        dataset = Path(config.data.dataset)
        self.cache = together(hvd, lambda: open_cache(config.data.cache, dataset, manifest, world, self._say))
        reader = self.cache.reader(dataset, manifest)
        together(hvd, lambda: self._check_grid())
        self.model = together(hvd, lambda: start.network(self.spec))
        self.parameters = self.model.count_params()
        if config.parallel.dense == "sharded" and world.size > 1 and start.shared:
            together(hvd, lambda: to_share(self.model, world.size))
            self.model = shard_dense(self.model, hvd)
        self.columns = Columns(hvd, self.model)
        # Ranks that share volumes call the network slab by slab; its weights stay those of the whole.
        self.net, slab = together(hvd, lambda: self._on_slabs(self.model))
        self.data = TrainingData(reader, config.data, config.train.seed, config.train.batch_size, slab)
        self.cut = together(hvd, lambda: self._first_cut())
        rows = max(1, config.train.batch_size // (config.train.exact_parts if self._exact else self.share.size))
        self.validation = ValidationData(reader, config.data, rows, slab)
        self.optimizer = make_optimizer(config.train)
        self.optimizer.build(self.model.trainable_variables)
        weights_of_class = class_weights(config.train, self.data, self.spec)

        # Where the run stands: rank 0 reads it, all others hear it from there.
        self.hosts = hvd.gather(host_name())
        together(hvd, lambda: self._claim(manifest, resume) if world.is_root else None)
        self.heart = Heartbeat(
            directory, world, config.parallel.heartbeat_seconds, config.parallel.stall_seconds, self._stalled
        )
        self.heart.watch_saving(lambda: self.writer.busy)
        self.own_log = rank_log(directory, world.rank)
        self.own_log.write("start", rank=world.rank, host=self.hosts[world.rank], pid=os.getpid(), local_rank=world.local_rank)
        self.monitor = Monitor(
            directory, world, self.hosts[world.rank], config.monitor, lambda: self.position.total if self.position else 0, self._say
        )
        try:
            self.cache.start()
            self._begin(resume, weights_of_class)
        except BaseException as error:
            self.failed(error)
            self.close()
            raise

    def _claim(self, manifest: Manifest, resume: bool) -> None:
        run.claim(self.directory, self.config, self.spec, manifest, self.world, resume, self.hosts)
        self.owner = Owner(self.directory)
        self.start.record(self.directory, self.model)

    def _begin(self, resume: bool, weights_of_class: tf.Tensor) -> None:
        config, directory, hvd, world = self.config, self.directory, self.hvd, self.world
        state = together(hvd, lambda: newest(directory, self.report) if resume and world.is_root else None)
        meta = hvd.broadcast(dict(state.meta) if state is not None else None)
        self.position = Position.from_json(meta) if meta else Position()
        self.trace = ItemTrace()
        self.mark("agree")

        # How the ranks talk, and the step.
        variables = [*self.model.weights, *self.optimizer.variables]
        shapes = [tuple(v.shape) for v in self.columns.common(self.model.trainable_variables)]
        self.compression, why = self._settle(meta, shapes, weights_of_class)
        self.exchange = make_exchange(config, hvd, shapes, self.compression)
        if state is not None:
            restore(state, directory, self.model, self.optimizer, self.exchange.variables, self.columns, self.report)
        hvd.broadcast_variables([*self.columns.common(variables), *self.exchange.variables])
        if meta:
            whole = [*state.weights, *state.optimizer] if state is not None else None
            self.columns.deal([(at, v) for at, v in enumerate(variables) if self.columns.of(v) is not None], whole)
        self.start.begin(self.model)
        self.step = Step(
            self.net, self.optimizer, weights_of_class, config.train, self.exchange, self.cut.micro, self.start.training, self.columns
        )
        judged, _ = self._on_slabs(models.inference_model(self.model))
        self.validate_batch = make_validation_step(judged, self.spec.task, self.loss, weights_of_class)

        self.log = EventLog(directory, active=world.is_root)
        self.board = TensorBoard(directory, active=world.is_root and config.output.tensorboard)
        origin = run.record(self.spec, world, self.files_hash, self.hosts)
        self.tracker = together(hvd, lambda: MLflow(
            config.monitor.mlflow if world.is_root else None, directory, run.flatten(config.model_dump(mode="json")), origin, self._say
        ))  # fmt: skip
        self.steps = self.data.plan(0).steps
        self.last_step = config.train.max_steps or config.train.epochs * self.steps
        self.saved = self.position.total if meta else -1
        self.pending_save = self.pending_leave = self.leaving = False
        self.times = np.zeros(3)  # seconds of this epoch: waiting for input, computing, exchanging
        self.computed, self.computing = 0, 0.0  # samples of this epoch on this rank and their seconds, without the first step
        self.began = self.position.total
        self.speeds: list[float] = []
        self.log.write(
            "resume" if meta else "start", step=self.position.total, steps_per_epoch=self.steps, last_step=self.last_step,
            grid={"data": hvd.grid.data, "spatial": hvd.grid.spatial},
            **origin,
        )  # fmt: skip
        if config.parallel.compression == "auto":
            self.log.write("compression", chosen=self.compression, reason=why)
            self.report.message(f"parallel.compression: {self.compression} ({why})")
        self.report.message(
            f"{self.spec.model.name}: {self.parameters:,} parameters, {len(self.data.samples)} samples, "
            f"{self.steps} steps an epoch, {world.size} rank{'s' * (world.size > 1)}"
            + (f", {hvd.grid.spatial} to a volume" if hvd.grid.spatial > 1 else "")
            + (", dense layers shared out" if self.columns else "")
        )
        if not meta and self.start.judged and self.validation.samples and self.start.settled(0, self.last_step):
            self._judge_start()

    def _judge_start(self) -> None:
        record = validate(self.validation, self.validate_batch, self.hvd, self.spec, self.loss, self.mark)
        name, sign = MONITORS[self.spec.task]
        if self.position.best.update(float(sign * record[name]), -1):
            self._keep_best({"epoch": -1, "step": 0, name: record[name]})
        self.log.write("judged", step=0, **record)
        self.report.message("before: " + "  ".join(f"{key} {record[key]:.4f}" for key in dict.fromkeys(("val_loss", name))))

    def _keep_best(self, meta: dict[str, Any]) -> None:
        weights = self.columns.whole(self.model.weights) if self.columns or self.world.is_root else []
        if self.world.is_root:
            self.owner.check()
            self.writer.submit(self.directory / run.BEST, checkpoint.State(weights, [], meta))

    def _check_grid(self) -> None:
        train, parallel = self.config.train, self.config.parallel
        whole = {
            "train.balance=auto": train.balance == "auto", "train.reproducible=exact": self._exact,
            "parallel.reduction=adasum": parallel.reduction == "adasum",
        }  # fmt: skip
        check_grid(self.hvd.grid, self.config.data.patch[0], [name for name, used in whole.items() if used])

    def _on_slabs(self, model: Any) -> tuple[Any, tuple[int, int] | None]:
        group, recompute = self.hvd.group, self.config.train.recompute
        if group.size == 1:
            return (SlabModel(model, group, recompute) if recompute else model), None
        net = SlabModel(model, group, recompute)
        return net, (net.bounds[group.index], net.bounds[group.index + 1])

    @property
    def _exact(self) -> bool:
        return self.config.train.reproducible == "exact"

    def _first_cut(self) -> Cut:
        train, size = self.config.train, self.share.size
        check_fits(len(self.data.samples) * self.data.draws, train.batch_size, self.share, "train")
        check_exchange(self.config, self.hvd)
        # Exact bits: always the same parts, spread over the ranks.
        return equal_cut(size, max(1, train.exact_parts // size) if self._exact else train.accumulate)

    def _settle(self, meta: Any, shapes: list[tuple[int, ...]], weights_of_class: tf.Tensor) -> tuple[str, str]:
        if meta and self.config.parallel.compression == "auto" and meta.get("compression"):
            return meta["compression"], "as before the resume"

        def compute() -> float:
            rows = self.cut.rows(self.data.batch, self.share.rank)
            batch = self.data.blank(rows)
            return self.cut.micro * time_gradients(
                self.net, self.optimizer, weights_of_class, self.config.train.loss, batch
            )

        return settle(self.config, self.hvd, shapes, compute)

    def run(self) -> Summary:
        """All epochs that are left."""
        position, train = self.position, self.config.train
        self.check_replicas("at the start")
        self.batches = self.stream()
        stopped_early = bool(train.early_stop and position.best.waited >= train.early_stop)
        while position.epoch < train.epochs and position.total < self.last_step and not stopped_early:
            self.run_steps()
            if self.leaving:
                break
            stopped_early = self.end_epoch()
        if self.saved != position.total:
            self.save()
        self.mark("save")
        self.writer.wait()
        self.batches = iter(())  # ends its thread
        self.check_replicas("at the end")
        sha = checkpoint.digest(self.columns.whole(self.model.weights))
        self.log.write(
            "leave" if self.leaving else "end", step=position.total, weights_sha256=sha, best=position.best.to_json(),
            stopped_early=stopped_early,
        )  # fmt: skip
        self.ended = not self.leaving
        return Summary(self.directory, position.total, position.best, sha, stopped_early, self.leaving)

    def run_steps(self) -> None:
        """The steps that are left of the current epoch."""
        position, train, plan = self.position, self.config.train, self.data.plan(self.position.epoch)
        items = plan.batches(position.step)
        while position.step < plan.steps and position.total < self.last_step and not self.leaving:
            began = time.perf_counter()
            self.mark("input")
            micro_batches = [next(self.batches) for _ in range(self.cut.micro)]
            waited = time.perf_counter() - began
            self.mark("step")
            batch = next(items)
            rate = schedule.rate(position.total, self.steps, train) * position.backoff.scale
            last = position.step + 1 == plan.steps or position.total + 1 == self.last_step
            every = train.checkpoint_steps
            save_after = self.pending_save or bool(every and (position.total + 1) % every == 0)
            outcome = self.step.run(
                iter(micro_batches), len(batch), rate, self.requests.stop, self.requests.save, save_after or last
            )
            self.trace.add(position.epoch, position.step, batch)
            position.step, position.total = position.step + 1, position.total + 1
            self.start.after_update(self.model, position.total, self.last_step)
            self.take_in(outcome, rate)
            self.times += waited, outcome.compute_s, outcome.exchange_s
            if position.total - 1 > self.began:
                # The first step of a start traces and compiles: it says nothing about a rank's speed.
                self.computed += self.mine(len(batch))
                self.computing += outcome.compute_s
            position.seconds += time.perf_counter() - began
            self.report.step(
                position.epoch, position.step, plan.steps, float(outcome.sums[0] / max(outcome.sums[2], 1)), rate
            )
            if train.guard_steps and position.total % train.guard_steps == 0:
                self.check_replicas(f"step {position.total}")
            if save_after and (self.leaving or not last):
                self.save()
            if train.balance == "auto" and self.rebalance(outcome, len(batch)):
                self.batches = self.stream()

    def stream(self) -> Iterator[Any]:
        """This rank's batches from here to the end, cut as they are now."""
        epochs = range(self.position.epoch, self.config.train.epochs)
        return self.data.batches(epochs, self.position.step, self.cut, self.share.rank)

    def take_in(self, outcome: Outcome, rate: float) -> None:
        """What all ranks decide after a step, each by itself and all alike."""
        position, train = self.position, self.config.train
        if outcome.applied:
            position.sums = position.sums + outcome.sums
            position.backoff = position.backoff.after_fine()
        else:
            names = [v.name.split(":")[0] for v in self.step.variables]
            loss = float(outcome.sums[0] / max(outcome.sums[2], 1))
            what = nonfinite.describe(loss, outcome.sick, outcome.norms, names)
            backoff = position.backoff.after_nonfinite(train.on_nonfinite)
            self.log.write("nonfinite", step=position.total, what=what, policy=train.on_nonfinite, rate=rate)
            where = f"epoch {position.epoch}, step {position.step - 1}: {what}"
            if backoff is None:
                self.writer.wait()
                raise on_all_ranks(RunError(
                    f"{where}; lower train.learning_rate (now {rate:g}), lengthen train.warmup_epochs, or set "
                    f"train.on_nonfinite; the last good state is in {self.directory / checkpoint.FOLDER}"
                ))  # fmt: skip
            position.backoff = backoff
            self.report.message(f"{where}; left out" + (f", rate x {backoff.scale:g}" if backoff.scale < 1 else ""))
        # A wish is fulfilled one step later: that step leaves nothing held back between ranks.
        self.leaving = self.leaving or (self.pending_leave and self.pending_save)
        self.pending_leave = self.pending_leave or outcome.stop
        self.pending_save = outcome.save or outcome.stop

    def end_epoch(self) -> bool:
        """Metrics, best model, checkpoint; True if training is to stop early."""
        position, train, world = self.position, self.config.train, self.world
        whole = position.step == self.data.plan(position.epoch).steps
        rate = schedule.rate(max(position.total - 1, 0), self.steps, train) * position.backoff.scale
        self.mark("agree")
        times = self._gather_times()
        record = epoch_record(position, rate, times, self.spec.task)
        due = whole and (position.epoch + 1) % train.validate_every == 0
        if self.validation.samples and (due or position.total >= self.last_step or position.epoch + 1 == train.epochs):
            record |= validate(self.validation, self.validate_batch, self.hvd, self.spec, self.loss, self.mark)
        name, sign = MONITORS[self.spec.task]
        name = name if name in record or self.validation.samples else "loss"
        if name in record and self.start.settled(position.total, self.last_step):
            score = -record["loss"] if name == "loss" else sign * record[name]
            # A partial epoch (max_steps) is no candidate: a resumed run has to judge the same epochs as a whole one.
            is_best = whole and position.best.update(float(score), position.epoch)
            missing = self.hvd.broadcast(world.is_root and not (self.directory / run.BEST).exists())
            if is_best or missing:
                self._keep_best({"epoch": position.epoch, "step": position.total, name: record[name]})
            record["best"] = is_best
        self.log.write("epoch", step=position.total, world_size=world.size, loss_title=self.loss_title, **record)
        self.board.epoch(record)
        self.tracker.epoch(record)
        self.report.epoch(record)
        if whole:
            position.epoch, position.step = position.epoch + 1, 0
            position.sums, position.seconds = np.zeros(3), 0.0
        stopped_early = bool(train.early_stop and position.best.waited >= train.early_stop)
        if not whole or stopped_early or position.epoch % train.checkpoint_epochs == 0 or position.epoch == train.epochs:
            self.save()
        return stopped_early

    def save(self) -> None:
        """Begin to write a checkpoint of this moment; training goes on as soon as the variables are copied."""
        position = self.position
        self.mark("save")
        self.saved = position.total
        if not (self.world.is_root or self.columns):
            return
        if self.world.is_root:
            self.owner.check()
            self.requests.saved()
            # Before the copies are taken: one set of them at a time in memory.
            self.writer.wait()
        meta = position.to_json() | {
            "seed": self.config.train.seed, "dataset_hash": self.spec.dataset_hash, "compression": self.compression,
        }  # fmt: skip
        step, epoch = position.total, position.epoch

        def written(sha: str) -> None:
            checkpoint.rotate(self.directory, self.config.train.keep_checkpoints)
            self.log.write("checkpoint", step=step, epoch=epoch, sha256=sha)

        state = snapshot(self.model, self.optimizer, self.exchange.variables, self.columns, meta)
        if self.world.is_root:
            self.writer.submit(checkpoint.path_of(self.directory, step), state, written)

    def check_replicas(self, when: str) -> None:
        """Compare the ranks' variables and items; see `training/guard.py`."""
        if self.world.size == 1:
            return
        self.mark("agree")
        # A part that one rank alone holds has no other to be compared with.
        variables = self.columns.common([*self.model.weights, *self.optimizer.variables, *self.exchange.variables])
        names = ["the items of the batches", *(v.name.split(":")[0] for v in variables)]
        check_replicas(self.hvd, names, [self.trace.value, *digests([v.numpy() for v in variables])], when)

    def mine(self, count: int) -> int:
        """This rank's samples of a global batch of ``count``."""
        return sum(len(self.cut.part(np.arange(count), self.share.rank, m)) for m in range(self.cut.micro))

    def _gather_times(self) -> np.ndarray:
        """(3,) mean seconds of this epoch over the ranks; what each of them had is written down, and who is slow."""
        position, rows = self.position, self.hvd.gather([*map(float, self.times), self.computing, self.computed])
        waited, compute, exchange, steady, samples = zip(*rows, strict=True)
        where = {"epoch": position.epoch, "step": position.total}
        self.log.write(
            "ranks", **where, hosts=self.hosts, input_seconds=_rounded(waited), compute_seconds=_rounded(compute),
            exchange_seconds=_rounded(exchange), samples=list(samples),
        )  # fmt: skip
        for slow in stragglers(steady, samples, self.hosts):
            self.log.write("straggler", **where, **asdict(slow))
            self.report.message(
                f"rank {slow.rank} on {slow.host} is slow: {slow.seconds:.3g} s for a sample, the others take {slow.typical_seconds:.3g}"
            )
        own = _rounded(self.times)
        self.own_log.write("epoch", **where, input_seconds=own[0], compute_seconds=own[1], exchange_seconds=own[2], samples=self.computed)
        self.times, self.computed, self.computing = np.zeros(3), 0, 0.0
        return np.mean([row[:3] for row in rows], 0)

    def rebalance(self, outcome: Outcome, count: int) -> bool:
        """Take in this rank's speed; every so often cut the batches anew. True if the cut has changed."""
        size, batch = self.world.size, self.data.batch
        mine = self.mine(count)
        if mine:
            self.speeds.append(outcome.compute_s / mine)
        if size == 1 or self.position.total % _BALANCE_STEPS:
            return False
        self.mark("agree")
        seconds = self.hvd.gather(float(np.median(self.speeds)) if self.speeds else None)
        self.speeds = []
        if None in seconds:
            return False
        cut = balanced_cut(seconds, batch, self.cut.micro)
        now = busiest(self.cut, seconds) / sum(self.cut.shares)
        if busiest(cut, seconds) / sum(cut.shares) > _BALANCE_GAIN * now:
            return False
        self.cut = cut
        self.log.write("balance", step=self.position.total, shares=cut.shares, seconds_per_sample=seconds)
        self.report.message(f"balance: the ranks now take {', '.join(map(str, cut.shares))} of {batch} samples")
        return True

    def mark(self, event: str) -> None:
        """Tell the heartbeat what comes."""
        if self.heart is not None:
            self.heart.mark(event, self.position.total)

    def failed(self, error: BaseException) -> None:
        """Into this rank's log; where even that cannot be written, the error itself is the news."""
        with contextlib.suppress(OSError):
            self.own_log.write("error", kind=type(error).__name__, message=str(error)[:1000])

    def close(self) -> None:
        """End the threads; what is being written is finished."""
        if self.heart is not None:
            self.heart.close()
        if self.monitor is not None:
            self.monitor.close()
        if self.board is not None:
            self.board.close()
        if self.tracker is not None:
            self.tracker.close(whole=self.ended)
        self.writer.wait()
        self.cache.close()

    def _say(self, message: str) -> None:
        """Of the caches: each rank's own, as each node has its own memory and disk."""
        print(f"hvd-imaging: warning: rank {self.world.rank}: {message}", file=sys.stderr)
        if self.own_log is not None:
            with contextlib.suppress(OSError):
                self.own_log.write("warning", message=message)

    def _stalled(self, message: str) -> None:
        # In the heartbeat's thread: the main one hangs in a collective call and would never see an exception.
        print(f"hvd-imaging: error: rank {self.world.rank}: {message}", file=sys.stderr)
        with contextlib.suppress(OSError):
            EventLog(self.directory).write("stall", rank=self.world.rank, message=message)
            self.own_log.write("stall", message=message)
        self.hvd.abort(PeerError.exit_code)


def _rounded(values: Any) -> list[float]:
    return [round(float(value), 4) for value in values]


def _prepare_numerics(config: TrainConfig) -> None:
    # For the whole process: a run after a reproducible one has to switch it off again. TensorFlow has no public name for it.
    (tf_config.enable_op_determinism if config.reproducible else tf_config.disable_op_determinism)()
    keras.mixed_precision.set_global_policy(
        {"none": "float32"}.get(config.mixed_precision, f"mixed_{config.mixed_precision}")
    )
    keras.utils.set_random_seed(config.seed)


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


def epoch_record(position: Position, rate: float, times: np.ndarray, task: str) -> dict[str, Any]:
    """Training metrics of an epoch over all ranks; ``times`` are means over the ranks."""
    loss, correct, examples = position.sums
    record = {
        "epoch": position.epoch,
        "loss": float(loss / max(examples, 1)),
        "learning_rate": rate,
        "examples": int(examples),
        "seconds": round(position.seconds, 3),
        "samples_per_second": float(examples / max(position.seconds, 1e-9)),
        "input_seconds": round(float(times[0]), 4),
        "compute_seconds": round(float(times[1]), 4),
        "exchange_seconds": round(float(times[2]), 4),
    }
    return record | ({"accuracy": float(correct / max(examples, 1))} if task == "classification" else {})
