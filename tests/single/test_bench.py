"""The pure parts of the benchmarks: figures from rows, and the picture."""

import json

import pytest

from hvd_imaging.bench import allreduce, guarantees, mirrored_worker, scaling
from hvd_imaging.bench.processes import clean_environment, reason_of, run_at_once
from hvd_imaging.bench.report import Row
from hvd_imaging.bench.training import alone, parse, slowest, workshop
from hvd_imaging.errors import HvdImagingError
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
