"""The pure parts of the benchmarks: figures from rows, and the picture."""

import json

import numpy as np
import pytest

from hvd_imaging.bench import allreduce, guarantees, mirrored_worker, predict, scaling
from hvd_imaging.bench.processes import clean_environment, reason_of, run_at_once
from hvd_imaging.bench.report import Row
from hvd_imaging.bench.training import alone, parse, slowest, workshop
from hvd_imaging.errors import HvdImagingError
from hvd_imaging.planning.scaling import Link
from hvd_imaging.reporting.plots import draw_scaling


def row(case, system, metric, *runs):
    return Row(case, system, metric, "ms", runs)


ROWS = [
    row("weak, 2", "independent processes", "step time", 97.0, 96.0, 500.0),
    row("weak, 2", "hvd_imaging ranks", "step time", 100.0),
    row("weak, 2", "hvd_imaging ranks", "input wait", 1.0),
    row("weak, 2", "hvd_imaging ranks", "compute", 90.0),
    row("weak, 2", "hvd_imaging ranks", "exchange", 5.0),
    row("weak, 2", scaling.PEER, "step time", 120.0),
]


def test_scaling_figures_are_ratios_of_medians():
    efficiency, peer, wait = scaling.figures(ROWS, 2)
    assert (efficiency.value, peer.value, wait.value) == (0.97, 1.2, 0.01)
    assert efficiency.reached and peer.reached and wait.reached
    assert scaling.figures(ROWS[:-1], 2)[1].reached is None


def test_a_link_that_can_not_be_made_is_a_figure_that_was_not_measured():
    rows = {(allreduce.LINK, kind): Row("c", kind, "step time", "ms", (), "not root") for kind in ("none", "auto")}
    (figure,) = allreduce.figures(rows)
    assert figure.value is None and figure.reached is None


def test_costs_of_the_guarantees():
    times = {"plain": [100.0], "checkpoints": [101.0], "slow rank, equal": [300.0], "slow rank, auto": [200.0]}
    times["a sample every 0.1 s"] = [103.0]
    checkpoints, guard, monitor, balance = guarantees.figures(times, [10.0], quick=False)
    assert checkpoints.value == pytest.approx(0.01) and guard.value == pytest.approx(0.001) and monitor.value == pytest.approx(0.03 / 100) and balance.value == 1.5
    assert len(guarantees.figures(times, [10.0], quick=True)) == 3


def test_the_line_that_says_most():
    mpirun = "-----\nPrimary job  terminated normally, but 1 process returned\n-----\n"
    assert reason_of(f"Traceback (most recent call last):\n  File x\nTypeError: start is missing\n{mpirun}") == "TypeError: start is missing"
    assert reason_of(f"hvd-imaging: error: no room\n{mpirun}") == "hvd-imaging: error: no room"
    assert reason_of(mpirun).startswith("Primary job") and reason_of("") == ""


def test_a_worker_trains_and_tells_its_times():
    """The process that all benchmarks of training start."""
    with workshop(volumes=2) as place:
        config = place.config("a", "volumes", 2, data__patch=[16, 16, 16], model__filters=4, model__depth=2, train__checkpoint_steps=2)
        (found,) = alone([place.worker(config, "a")])
    assert len(found["steps"]) == 2 and found["save"] and min(found["steps"]) > 0


def test_the_picture_of_scaling(tmp_path):
    draw_scaling(tmp_path / "a.png", [each.to_json() for each in ROWS])
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_the_slowest_process_counts():
    assert slowest([{"steps": [1, 1, 9]}, {"steps": [2, 2, 2]}])["steps"] == [2, 2, 2]
    assert mirrored_worker.slowest([[1.0, 1.0], [3.0, 2.0]]) == [3.0, 2.0]


def test_the_last_json_line_counts():
    assert parse('noise\n{"a": 1}\n{"steps": []}\nnoise') == {"steps": []}
    with pytest.raises(HvdImagingError, match="printed no times"):
        parse("noise")


def test_processes_end_together():
    assert run_at_once([["echo", "1"], ["echo", "2"]], {}, 10) == ["1\n", "2\n"]
    with pytest.raises(HvdImagingError, match="process 2 of 2 failed: exit code 1"):
        run_at_once([["sleep", "60"], ["false"]], {}, 30)
    with pytest.raises(HvdImagingError, match="did not end within 0.2 s"):
        run_at_once([["sleep", "60"]], {}, 0.2)
    assert clean_environment({"TF_X": "1", "OMPI_Y": "1", "HOME": "h"}) == {"HOME": "h"}
    assert json.dumps(ROWS[0].to_json())


def test_figures_of_compression_are_ratios_of_rows_and_missing_ones_are_not_reached():
    from hvd_imaging.bench import compress
    from hvd_imaging.bench.report import Row

    def row(system, metric, value, case=compress.UNET):
        return Row(case, system, metric, "", (value,))

    rows = [
        row("TensorFlow Lite, float32", "size", 1200.0), row("ours, int8", "size", 300.0),
        row("TensorFlow Lite, float32", compress.ONE, 180.0), row("ours, int8", compress.ONE, 30.0),
        row("PyTorch, float32", compress.ONE, 24.0), row("ours, int8", "test dice, change", -0.7),
        row("ours, fewer filters", "parameters", 8.0, compress.VGG),
        row("ours, fewer filters", "parameters of the start", 100.0, compress.VGG),
        row("ours, fewer filters", "test accuracy, change", 0.0, compress.VGG),
    ]  # fmt: skip
    found = {figure.name: figure for figure in compress.figures_of(rows)}
    assert found["U-Net int8: times smaller than float32 TFLite"].value == 4
    assert found["U-Net int8: times faster than float32 TFLite"].value == 6
    assert found["U-Net int8: times as fast as PyTorch float32"].reached is False
    assert found["U-Net int8: Dice lost, points"].value == 0.7 and not found["U-Net int8: Dice lost, points"].reached
    assert found["VGG16, fewer filters: share of parameters gone"].reached
    assert found["VGG16, fewer filters: accuracy lost, points"].reached
    assert found["U-Net, zeros: share of all weights"].reached is None


def test_a_peer_that_is_not_there_is_a_row_with_the_reason():
    from hvd_imaging.bench import compress

    timed = [compress.Timed(compress.UNET, "PyTorch, float32", "torch", "2x48", {}, "torch is not installed")]
    times = compress.time_all(timed, [compress.ONE], 1, 1, lambda text: None)
    (found,) = compress.rows_of(timed, times)
    assert found.value is None and found.reason == "torch is not installed"


def run_folder(folder, weights="ab", seconds=(9.0, 4.0, 4.0), finished=True):
    """A finished run as `bench migrate` reads it: three epochs of two ranks on one host."""
    (folder / "ranks").mkdir(parents=True)
    at = "2026-01-01T00:00:{:02d}.000+00:00".format
    events = [{"time": at(10), "event": "start"}]
    events += [
        {"time": at(20), "event": "epoch", "epoch": number, "seconds": value, "samples_per_second": 8 / value}
        for number, value in enumerate(seconds)
    ]
    events += [{"time": at(40), "event": "end", "weights_sha256": weights}] if finished else []
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    for rank in range(2):
        samples = [
            {"time": at(second), "seconds": 10.0, "rank": rank, "host": "n1", "cpu": 1.5, "rss_bytes": 10**6 * second,
             "watts": None if rank else 72.0, "watts_from": "estimate"}
            for second in (20, 30)
        ]  # fmt: skip
        (folder / "ranks" / f"monitor-0000{rank}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in samples) + '{"half')
    mean = {"dice": {"value": 0.5, "interval": [0.4, 0.6]}, "recall": {"value": None, "interval": None}}
    (folder / "evaluation-test.json").write_text(json.dumps({"mean": mean}))
    return folder


def test_a_finished_run_tells_what_it_took(tmp_path):
    from hvd_imaging.bench.migrate import read_run, rows_of

    began = 1767225600.0  # 2026-01-01 00:00 UTC
    found = read_run(run_folder(tmp_path / "run"), began, 45.0)
    assert (found.wall, found.start, found.epochs, found.weights) == (45.0, 10.0, (9.0, 4.0, 4.0), "ab")
    assert found.peak_bytes == (30_000_000, 30_000_000) and found.cpu == 60.0
    assert found.watt_hours == pytest.approx(72 * 20 / 3600) and found.known == "estimate"
    assert found.test == {"dice": (0.5, (0.4, 0.6))}
    rows = {each.metric: each for each in rows_of("s", [found, found])}
    assert rows["epoch"].value == 4.0 and rows["samples/s"].value == 2.0 and rows["peak memory, rank 1"].value == 30.0
    assert rows["energy of all hosts (estimate)"].unit == "Wh" and rows["test dice, 95% to"].value == 0.6
    assert rows["weights, SHA-256"].reason == "ab"
    with pytest.raises(HvdImagingError, match="did not end"):
        read_run(run_folder(tmp_path / "half", finished=False), began, 45.0)


def test_figures_of_the_step_to_a_cluster(tmp_path):
    from dataclasses import replace

    from hvd_imaging.bench import migrate

    one = migrate.read_run(run_folder(tmp_path / "one"), 0.0, 40.0)
    two = replace(one, epochs=(9.0, 2.0, 2.0), wall=30.0)
    plan = migrate.Plan(tmp_path / "run.yaml", (), ranks=2, exact=True, rounds=1)

    def values(ranks, plan=plan, **more):
        return [(each.value, each.reached) for each in migrate.figures({migrate.ALONE: [one], plan.system: [ranks], **more}, plan)]

    assert values(two) == [(2.0, True), (1.0, True), (0.0, True)]
    assert values(replace(two, weights="cd"))[1] == (0.0, False)
    assert values(replace(two, test={"dice": (0.49, None)}))[2] == (pytest.approx(0.01), False)
    # Where equal weights are not promised, or not told, nothing is said of them.
    assert [value for value, _ in values(two, replace(plan, exact=False))] == [2.0, None, None]
    assert values(replace(two, weights=""))[1] == (None, None)
    whole = replace(plan, rounds=2)
    threads = {migrate.THREADS: [replace(one, epochs=(3.0,))]}
    assert [value for value, _ in values(two, whole, **threads)] == [2.0, pytest.approx(40 / 30), 1.0, 0.0, 1.5]


def test_exact_bits_are_asked_for_where_the_configuration_takes_them(tmp_path):
    from hvd_imaging.bench import migrate
    from hvd_imaging.errors import ConfigError

    def plan(train, ranks=2):
        path = tmp_path / "run.yaml"
        path.write_text(json.dumps({"data": {"dataset": "d"}, "model": {"name": "unet3d"}, "train": train}))
        return migrate.make_plan(path, ranks, 1, slurm=False)

    assert plan({"batch_size": 4}).exact and "train.exact_parts=8" in plan({"batch_size": 8}, ranks=8).changes
    assert not plan({"batch_size": 4, "accumulate": 2}).exact
    assert not plan({"batch_size": 12}, ranks=3).exact
    assert plan({"batch_size": 4}).changes[-1] == "monitor.seconds=1"
    with pytest.raises(ConfigError, match=r"batch_size"):
        plan({"batch_size": 0})


def test_what_can_not_be_compared_is_refused_before_any_work(tmp_path):
    from hvd_imaging.bench.migrate import measure
    from hvd_imaging.errors import ConfigError

    with pytest.raises(ConfigError, match="--ranks 1: expected two or more"):
        measure(ranks=1)
    with pytest.raises(ConfigError, match="--ranks 4096: there are"):
        measure(ranks=4096)
    with pytest.raises(ConfigError, match="give --work DIR"):
        measure(slurm=True)
    (tmp_path / "runs").mkdir()
    with pytest.raises(ConfigError, match="holds runs already"):
        measure(ranks=2, slurm=True, work=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@pytest.mark.parametrize("last", ["done", "failed"])
def test_a_slurm_job_is_waited_for_and_a_failed_one_is_not_left_in_the_queue(tmp_path, monkeypatch, last):
    from hvd_imaging.bench import migrate

    asked, states = [], ["waiting", "running", last]

    def product(folder, arguments):
        asked.append(arguments[0])
        return json.dumps({"state": states.pop(0)}) if arguments[0] == "status" else ""

    monkeypatch.setattr(migrate, "_product", product)
    monkeypatch.setattr(migrate, "_POLL_S", 0)
    plan = migrate.Plan(tmp_path / "run.yaml", (), ranks=2, exact=True, rounds=1, slurm=True)
    if last == "done":
        run_folder(tmp_path / "runs" / "ranks-1")
        assert migrate._run(tmp_path, plan, "runs/ranks-1", (), many=True).weights == "ab"
        assert asked == ["submit", *["status"] * 3, "evaluate"]
    else:
        with pytest.raises(HvdImagingError, match="the job has failed; see `hvd-imaging logs"):
            migrate._run(tmp_path, plan, "runs/ranks-1", (), many=True)
        assert asked == ["submit", *["status"] * 3, "cancel"]


def test_a_step_is_predicted_from_its_parts():
    """One rank: 0.25 s for 2 samples, 0.45 s for 4. Link: 1 ms and 100 MB/s."""
    job = predict.job_of(0.25, 0.45, 20e6)
    assert job.sample_s == pytest.approx(0.1) and job.fixed_s == pytest.approx(0.05)
    links = {predict.LOCAL: Link(0.0, 1e9), predict.LINK: Link(1e-3, 100e6)}
    assert predict.predict(predict.Case("volumes", 2, predict.LINK), job, links, 2) == pytest.approx(0.25 + 2 * (1e-3 + 0.1))
    assert predict.predict(predict.Case("volumes", 2, predict.LOCAL), job, links, 2) == pytest.approx(0.25 + 2 * 0.01)
    # Four ranks on two cores: one sample each, by turns.
    assert predict.predict(predict.Case("volumes", 4, predict.LOCAL), job, links, 2) == pytest.approx(2 * 0.15 + 6 * 0.005)
    assert predict.predict(predict.Case("volumes", 2, predict.LINK), job, {predict.LOCAL: links[predict.LOCAL]}, 2) is None
    found = predict.figures({predict.Case("volumes", 2, predict.LOCAL): 0.1, predict.Case("volumes", 4, predict.LOCAL): 0.2})
    assert [(figure.value, figure.reached) for figure in found] == [(0.1, True), (0.2, False)]
    assert [figure.value for figure in predict.figures({})] == [None, None]


def test_figures_of_shared_volumes_are_ratios_to_the_unsplit_step():
    from hvd_imaging.bench import spatial

    def times(seconds, peak, calls=0):
        return {"steps": [seconds, seconds], "peak": peak * 1e9, "sent": 1e6, "calls": calls, "loss": 1.0}

    found = {(spatial.name(64), spatial.system_of(n)): [times(s, p, n > 1)] for n, s, p in ((1, 10.0, 8.0), (2, 6.0, 4.0), (4, 9.0, 2.0))}
    rows = spatial.rows_of(found)
    assert not [row for row in rows if row.system == spatial.system_of(4) and row.metric == "step time"]
    figures = {figure.name: figure for figure in spatial.figures({(row.case, row.system, row.metric): row for row in rows}, [64])}
    assert figures["step time, 64^3, 2 ranks / 1 rank"].value == 0.6
    assert figures["peak memory a rank, 64^3, 4 ranks / 1 rank"].value == 0.25
    assert figures["steps under the limit: 1 rank"].reached is None


def test_figures_of_shared_columns():
    from hvd_imaging.bench import dense

    runs = {"replicated": [{"steps": [12.0], "sent": [500e6]}], "sharded": [{"steps": [3.0], "sent": [50e6]}]}
    rows = dense.rows_of("c", runs, None)
    found = dense.figures({(row.system, row.metric): row for row in rows}, Row("c", "sharded", "d", "", (2e-5,)))
    assert [figure.value for figure in found] == [10, 4, 2e-5] and all(figure.reached for figure in found)
    assert all(figure.reached is None for figure in dense.figures({(r.system, r.metric): r for r in dense.rows_of("c", {w: [] for w in dense.WAYS}, "not root")}, None))
    assert dense.difference([np.ones(4)], [np.ones(4)]) == 0
