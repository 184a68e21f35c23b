"""Training in one process: it learns, resumes to the bit, stops, and refuses what it should."""

import functools
import json
import os
import signal

import numpy as np
import pytest
import tensorflow as tf
from click.testing import CliRunner
from datasets import make_dataset

from hvd_imaging.cli.train import command
from hvd_imaging.config import RunConfig, check
from hvd_imaging.errors import ConfigError, DatasetError, RunError
from hvd_imaging.models.losses import sample_losses
from hvd_imaging.parallel.horovod import Horovod, check_build
from hvd_imaging.pipeline.dataset import TrainingData, ValidationData, patch_start
from hvd_imaging.pipeline.plan import equal_cut, generator
from hvd_imaging.shards import manifest as manifests
from hvd_imaging.shards import signing
from hvd_imaging.shards.reader import ShardReader
from hvd_imaging.training import checkpoint
from hvd_imaging.training.callbacks import Silent
from hvd_imaging.training.events import epoch_records, read_events
from hvd_imaging.training.loop import make_spec, train
from hvd_imaging.training.requests import Requests
from hvd_imaging.training.run import load_run, load_trained
from hvd_imaging.training.validate import make_validation_step, validate
from hvd_imaging.world import World


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_dataset(folder / "seg")
    make_dataset(folder / "cls", "classification", 20, (1, 32, 32))
    return folder


def settings(data, task="seg", **changes):
    values = {
        "data": {"dataset": str(data / task), "patch": [8, 16, 16], "patches_per_volume": 2},
        "model": {"name": "unet3d", "filters": 4, "depth": 2},
        "train": {"epochs": 3, "batch_size": 3, "learning_rate": 0.01},
        "output": {"tensorboard": False},
    }
    if task == "cls":
        values["data"] |= {"patch": [1, 32, 32], "augment": None}
        values["model"] = {"name": "vgg16", "width": 0.125, "norm": "group"}
    for key, value in changes.items():
        section, name = key.split("__")
        values[section][name] = value
    return check(RunConfig, values, "test")


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["ce", "dice", "dice_ce"])
def test_validation_gives_the_loss_of_training_over_whole_cases(data, kind, weighted):
    """A network that looks at single voxels answers the same for a tile as for the whole, so the tiling must make no difference."""
    manifest = manifests.load(data / "seg")
    weights = tf.constant([0.3, 2.0] if weighted else [1.0, 1.0])
    keras = tf.keras
    image = keras.Input((None, None, None, 1))
    net = keras.Model(image, tf.concat([1 - 3 * image, 4 * image - 1], -1))
    spec = make_spec(settings(data), manifest, "test")
    with ShardReader(data / "seg", manifest) as reader:
        wholes = [reader.read_whole(sample) for sample in manifest.of_split("val")]
        expected = np.mean([sample_losses(kind, mask[None].astype(np.int32), net(whole[None]), weights).numpy() for whole, mask in wholes])
        for patch, batch in (((8, 16, 16), 3), ((5, 7, 24), 1), ((32, 32, 32), 2)):
            config = settings(data, data__patch=list(patch))
            step = make_validation_step(net, "segmentation", kind, weights)
            found = validate(ValidationData(reader, config.data, batch), step, Horovod(), spec, kind)
            assert found["val_loss"] == pytest.approx(expected, rel=1e-4)


def test_both_losses_of_a_run_are_one_quantity(data, tmp_path):
    """Where training sees what validation sees, and learns nothing, both say the same."""
    size = list(manifests.load(data / "seg").samples[0].shape[:3])
    for task, changes in {
        "seg": {"data__patch": size, "data__augment": None, "train__class_weights": [0.5, 2.0]},
        "cls": {"train__class_weights": [0.25, 3.0]},
    }.items():
        config = settings(data, task, **changes, data__val_split="train", train__epochs=1, train__learning_rate=1e-12)
        train(config, tmp_path / task, Horovod())
        (record,) = epoch_records(tmp_path / task)
        assert record["val_loss"] == pytest.approx(record["loss"], rel=1e-3), task
        assert record["loss_title"] == ("soft Dice loss + " if task == "seg" else "") + "cross-entropy (classes weighted)"


def test_a_run_learns_and_leaves_what_it_should(data, tmp_path):
    summary = train(settings(data, train__epochs=30, train__learning_rate=0.02), tmp_path / "run", Horovod())
    records = epoch_records(tmp_path / "run")
    assert len(records) == 30 and records[-1]["loss"] < 0.6 * records[0]["loss"]
    assert records[-1]["val_dice"] > 0.6
    record = json.loads((tmp_path / "run/run.json").read_text())
    run = load_run(tmp_path / "run")
    assert record["dataset_hash"] == run.spec.dataset_hash == manifests.load(data / "seg").hash()
    assert record["dataset_files_hash"] == manifests.load(data / "seg").files_hash()
    assert {event["dataset_files_hash"] for event in read_events(tmp_path / "run") if event["event"] == "start"} == {record["dataset_files_hash"]}
    assert record["world_size"] == 1 and record["versions"]["tensorflow"]
    assert load_trained(run).output_shape == (None, 8, 16, 16, 2)
    assert read_events(tmp_path / "run")[-1]["weights_sha256"] == summary.weights_sha256
    assert len(checkpoint.newest_first(tmp_path / "run")) == 2


def test_training_asks_for_the_signature(tmp_path):
    make_dataset(tmp_path / "seg")
    public = signing.make_key(tmp_path / "maker.pem")
    config = settings(tmp_path, data__public_key=str(public), train__max_steps=1)
    with pytest.raises(DatasetError, match="not signed"):
        train(config, tmp_path / "run", Horovod())
    signing.sign(tmp_path / "seg", manifests.load(tmp_path / "seg"), tmp_path / "maker.pem")
    train(config, tmp_path / "run", Horovod())
    path = tmp_path / "seg" / "manifest.json"
    path.write_text(path.read_text().replace('"split": "val"', '"split": "train"'))
    with pytest.raises(DatasetError, match="does not fit"):
        train(config, tmp_path / "other", Horovod())
    assert not (tmp_path / "other").exists()


@pytest.fixture(scope="module")
def whole_run(data, tmp_path_factory):
    """Call with a task: the folder and the summary of an undisturbed run, made at the first call."""

    @functools.cache
    def make(task):
        folder = tmp_path_factory.mktemp("whole") / task
        return folder, train(settings(data, task), folder, Horovod())

    return make


@pytest.mark.parametrize(("task", "stop"), [("seg", 4), ("seg", 5), ("cls", 2)])
def test_resume_is_exact_to_the_bit(data, tmp_path, whole_run, task, stop):
    folder, whole = whole_run(task)
    train(settings(data, task, train__max_steps=stop), tmp_path / "parts", Horovod())
    resumed = train(settings(data, task), tmp_path / "parts", Horovod(), resume=True)
    assert resumed.weights_sha256 == whole.weights_sha256
    assert resumed.best == whole.best
    noisy = {"time", "seconds", "samples_per_second", "input_seconds", "compute_seconds", "exchange_seconds"}

    def clean(run):
        return [{k: v for k, v in r.items() if k not in noisy} for r in epoch_records(run)]

    assert clean(tmp_path / "parts") == clean(folder)


def test_resume_without_a_run_begins_one(data, tmp_path):
    summary = train(settings(data, train__epochs=1), tmp_path / "run", Horovod(), resume=True)
    assert summary.steps == 3


def test_early_stop(data, tmp_path):
    config = settings(data, "cls", train__epochs=30, train__early_stop=2, train__learning_rate=1e-30)
    config = config.model_copy(update={"train": config.train.model_copy(update={"schedule": "constant"})})
    summary = train(config, tmp_path / "run", Horovod())
    assert summary.stopped_early and len(epoch_records(tmp_path / "run")) < 30


def test_a_run_is_not_overwritten(data, tmp_path):
    train(settings(data, train__max_steps=1), tmp_path / "run", Horovod())
    before = (tmp_path / "run/run.yaml").read_bytes()
    with pytest.raises(RunError, match="holds a run already.*--resume"):
        train(settings(data, train__max_steps=1), tmp_path / "run", Horovod())
    with pytest.raises(RunError, match=r"train\.seed was 0 .* is now 1"):
        train(settings(data, train__seed=1), tmp_path / "run", Horovod(), resume=True)
    assert (tmp_path / "run/run.yaml").read_bytes() == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").write_text("x")
    with pytest.raises(RunError, match="not a run folder"):
        train(settings(data), tmp_path / "other", Horovod())


def test_a_missing_shard_stops_with_its_name(data, tmp_path):
    make_dataset(tmp_path / "seg")
    shard = next((tmp_path / "seg").glob("shard-*.h5"))
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(DatasetError, match=f"{shard.name}.*missing"):
        train(settings(tmp_path), tmp_path / "run", Horovod())
    # Nothing was learned, so the same command works once the shard is back.
    shard.write_bytes(content)
    assert train(settings(tmp_path, train__epochs=1), tmp_path / "run", Horovod()).steps == 3


def test_a_damaged_run_can_not_be_resumed_silently(data, tmp_path):
    train(settings(data, train__max_steps=1), tmp_path / "run", Horovod())
    for path in checkpoint.newest_first(tmp_path / "run"):
        path.write_bytes(b"x")
    with pytest.raises(RunError, match="no checkpoint is whole"):
        train(settings(data), tmp_path / "run", Horovod(), resume=True)


def test_wrong_settings_for_the_dataset(data, tmp_path):
    with pytest.raises(ConfigError, match="class_weights: expected 2"):
        train(settings(data, train__class_weights=[1.0, 2.0, 3.0]), tmp_path / "run", Horovod())
    with pytest.raises(ConfigError, match="data.train_split"):
        train(settings(data, data__train_split="none"), tmp_path / "run", Horovod())
    assert not (tmp_path / "run").exists()


def test_a_diverging_run_stops_and_says_so(data, tmp_path):
    config = settings(data, train__learning_rate=1e30, train__clip_norm=0, train__warmup_epochs=0, train__optimizer="sgd")
    with pytest.raises(RunError, match=r"lower train\.learning_rate"):
        train(config, tmp_path / "run", Horovod())


@pytest.fixture
def one_bad_step(monkeypatch):
    """The example of item 2 in epoch 0 holds a NaN."""
    whole = TrainingData.example

    def example(self, epoch, item):
        image, label, draw = whole(self, epoch, item)
        return (image * np.nan if (epoch, item) == (0, 2) else image), label, draw

    monkeypatch.setattr(TrainingData, "example", example)


def test_a_nan_stops_with_its_place_and_the_last_state_is_kept(data, tmp_path, one_bad_step):
    with pytest.raises(RunError, match=r"epoch 0, step \d: not finite: rank 0: loss or gradients.*on_nonfinite"):
        train(settings(data, train__checkpoint_steps=1), tmp_path / "run", Horovod())
    for path in checkpoint.newest_first(tmp_path / "run"):
        assert all(np.isfinite(w).all() for w in checkpoint.load(path).weights)


@pytest.mark.parametrize("policy", ["skip", "back_off"])
def test_a_nan_can_be_left_out(data, tmp_path, one_bad_step, policy):
    summary = train(settings(data, train__on_nonfinite=policy), tmp_path / "run", Horovod())
    events = read_events(tmp_path / "run")
    (event,) = [e for e in events if e["event"] == "nonfinite"]
    assert event["policy"] == policy
    state, _ = checkpoint.load_newest(tmp_path / "run")
    assert all(np.isfinite(w).all() for w in state.weights) and summary.steps == 9
    assert state.meta["backoff"]["scale"] == (0.5 if policy == "back_off" else 1.0)
    epoch = next(e for e in events if e["event"] == "epoch")
    assert np.isfinite(epoch["loss"]) and epoch["examples"] in (5, 6)


def test_dropout_belongs_to_the_sample(data, tmp_path):
    config = {"model__dropout": 0.5, "train__reproducible": True}
    whole = train(settings(data, **config), tmp_path / "whole", Horovod())
    train(settings(data, **config, train__max_steps=4), tmp_path / "parts", Horovod())
    assert train(settings(data, **config), tmp_path / "parts", Horovod(), resume=True).weights_sha256 == whole.weights_sha256
    without = train(settings(data, train__reproducible=True), tmp_path / "without", Horovod())
    assert without.weights_sha256 != whole.weights_sha256
    micro = train(settings(data, model__dropout=0.5, train__accumulate=3), tmp_path / "micro", Horovod())
    assert micro.steps == whole.steps
    weights = [np.concatenate([w.ravel() for w in checkpoint.load_newest(tmp_path / run)[0].weights]) for run in ("whole", "micro")]
    assert np.linalg.norm(weights[0] - weights[1]) < 1e-3 * np.linalg.norm(weights[0])


@pytest.mark.parametrize("task", ["seg", "cls"])
def test_what_is_computed_again_is_the_same(data, tmp_path, task):
    model = {"seg": {"name": "unet3d", "filters": 4, "depth": 3, "dropout": 0.3, "deep_supervision": True}}.get(
        task, {"name": "vgg16", "width": 0.125, "norm": "group", "head": "dense", "dropout": 0.3})
    found = []
    for name in ("kept", "again"):
        changes = {"model": model, "train__max_steps": 4, "train__optimizer": "sgd", "train__recompute": name == "again"}
        train(check(RunConfig, with_model(settings(data, task), changes), "test"), tmp_path / name, Horovod())
        state, _ = checkpoint.load_newest(tmp_path / name)
        found.append(np.concatenate([w.ravel() for w in state.weights]))
    assert np.abs(found[0] - found[1]).max() < 1e-5 and np.abs(found[0]).max() > 0


def test_a_dry_run_tells_the_memory_of_every_grid_and_trains_nothing(data, tmp_path):
    (tmp_path / "run.yaml").write_text(json.dumps(settings(data).model_dump(mode="json") | {"parallel": {"memory_gb": 2.0}}))
    words = [str(tmp_path / "run.yaml"), "--run-dir", str(tmp_path / "run"), "--dry-run", "--ranks", "4"]
    told = json.loads(CliRunner().invoke(command, [*words, "--json", "--set", "parallel.spatial=2"]).stdout)
    assert told["rank_memory_bytes"] == 2e9 and [(row["data"], row["spatial"]) for row in told["grids"]] == [(2, 2), (1, 4)]
    assert [row["wanted"] for row in told["grids"]] == [True, False] and all(row["fits"] for row in told["grids"])
    shown = CliRunner().invoke(command, [*words, "--set", "parallel.spatial=1"]).stdout
    assert "data 2 x spatial 2" in shown and "parallel.spatial=1 is not among them" in shown
    automatic = CliRunner().invoke(command, [*words, "--set", "parallel.spatial=auto"]).stdout
    assert "wanted, fits" in automatic and not (tmp_path / "run").exists()
    none = CliRunner().invoke(command, [*words, "--set", "parallel.spatial=auto", "--set", "parallel.memory_gb=0.1"])
    assert isinstance(none.exception, ConfigError) and "no grid of 4 ranks fits into 0.1 GB a rank" in str(none.exception)
    assert none.stdout.count("does not fit") == 2
    assert CliRunner().invoke(command, [*words[:1], "--ranks", "4"]).exit_code == 2


def with_model(config, changes):
    values = config.model_dump(mode="json")
    values["model"] |= changes["model"]
    for key in ("max_steps", "optimizer", "recompute"):
        values["train"][key] = changes[f"train__{key}"]
    return values


def test_sigusr1_saves_and_leaves_and_resume_ends_alike(data, tmp_path, monkeypatch):
    config = settings(data, train__epochs=4)
    whole = train(config, tmp_path / "whole", Horovod())

    class Asked(Silent):
        def step(self, epoch, step, steps, loss, rate):
            if (epoch, step) == (1, 1):
                os.kill(os.getpid(), signal.SIGUSR1)

    parts = train(config, tmp_path / "parts", Horovod(), report=Asked())
    assert parts.left and parts.steps == 3 + 1 + 2
    assert checkpoint.newest_first(tmp_path / "parts")[0].name == "step-00000006.npz"
    assert read_events(tmp_path / "parts")[-1]["event"] == "leave"
    resumed = train(config, tmp_path / "parts", Horovod(), resume=True)
    assert not resumed.left and resumed.weights_sha256 == whole.weights_sha256
    assert [r["epoch"] for r in epoch_records(tmp_path / "parts")] == [0, 1, 2, 3]


def test_checkpoints_by_the_clock(data, tmp_path, monkeypatch):
    monkeypatch.setattr(Requests, "save", property(lambda self: True))
    train(settings(data, train__keep_checkpoints=99), tmp_path / "run", Horovod())
    assert len(checkpoint.newest_first(tmp_path / "run")) == 9 - 1  # the wish of the first step is met by the second


def batch_norm(spec):
    inputs = tf.keras.Input((*spec.patch, spec.channels))
    x = tf.keras.layers.BatchNormalization(name="bn")(tf.keras.layers.Conv3D(4, 3, padding="same")(inputs))
    return tf.keras.Model(inputs, tf.keras.layers.Conv3D(2, 1)(x))


def stock_dropout(spec):
    inputs = tf.keras.Input((*spec.patch, spec.channels))
    return tf.keras.Model(inputs, tf.keras.layers.Conv3D(2, 1)(tf.keras.layers.Dropout(0.5, name="drop")(inputs)))


@pytest.mark.parametrize(
    ("builder", "message"),
    [("batch_norm", "layer 'bn'.*batch norm.*GroupNorm.*freeze"), ("stock_dropout", "layer 'drop'.*blocks.Dropout")],
)
def test_layers_that_depend_on_the_ranks_are_refused(data, tmp_path, builder, message):
    with pytest.raises(ConfigError, match=message):
        train(settings(data, model__name=f"{__name__}:{builder}"), tmp_path / "run", Horovod())


def test_examples_depend_on_seed_epoch_and_item_alone(data):
    config = settings(data).data
    manifest = manifests.load(data / "seg")
    one = TrainingData(ShardReader(data / "seg", manifest), config, 0, 3)
    two = TrainingData(ShardReader(data / "seg", manifest), config, 0, 5)
    two.example(0, 0)
    for item in (3, 1):
        for a, b in zip(one.example(2, item), two.example(2, item), strict=True):
            np.testing.assert_array_equal(a, b)
    assert (one.example(0, 1)[0] != one.example(1, 1)[0]).any()


def test_local_batches_join_to_the_global_batch(data):
    manifest = manifests.load(data / "seg")
    source = TrainingData(ShardReader(data / "seg", manifest), settings(data).data, 0, 3)
    whole = list(source.batches(range(2), 1, equal_cut(1), 0))
    assert len(whole) == 2 * source.plan(0).steps - 1
    parts = [list(source.batches(range(2), 1, equal_cut(2), rank)) for rank in range(2)]
    for step, (image, label, weight, _) in enumerate(whole):
        rows = [np.concatenate([p[step][k].numpy()[p[step][2].numpy() > 0] for p in parts]) for k in range(2)]
        np.testing.assert_array_equal(rows[0], image.numpy()[weight.numpy() > 0])
        np.testing.assert_array_equal(rows[1], label.numpy()[weight.numpy() > 0])


def test_any_number_of_reading_threads_makes_the_same_batches(data):
    manifest = manifests.load(data / "seg")
    batches = []
    for readers in (1, 3):
        source = TrainingData(ShardReader(data / "seg", manifest), settings(data, data__readers=readers).data, 0, 3)
        batches.append(list(source.batches(range(2), 0, equal_cut(1), 0)))
    for one, two in zip(*batches, strict=True):
        for a, b in zip(one, two, strict=True):
            np.testing.assert_array_equal(a, b)


def test_foreground_patches_hold_foreground():
    voxels = np.array([[2, 3, 30], [9, 20, 1]], np.int32)
    for seed in range(200):
        start = np.array(patch_start((10, 24, 32), (4, 8, 8), voxels, 1.0, generator(seed)))
        assert (start >= 0).all() and (start + (4, 8, 8) <= (10, 24, 32)).all()
        assert ((voxels >= start) & (voxels < start + (4, 8, 8))).all(1).any()
    assert patch_start((2, 24, 32), (4, 24, 32), voxels[:0], 1.0, generator(0)) == (-1, 0, 0)


def test_a_horovod_without_mpi_is_refused_under_mpirun():
    from hvd_imaging.errors import SetupError

    with pytest.raises(SetupError, match=r"2 ranks were started by MPI.*HOROVOD_WITH_MPI=1"):
        check_build(World(0, 2), by_gloo=False, mpi_built=False, gloo_built=True)
    with pytest.raises(SetupError, match="HOROVOD_WITH_GLOO=1"):
        check_build(World(0, 2), by_gloo=True, mpi_built=True, gloo_built=False)
    check_build(World(), by_gloo=False, mpi_built=False, gloo_built=False)
