"""`bench io`: what is asked for, the figures and rows, the picture, and that every format gives back what was written."""

import json
import math

import numpy as np
import pytest

from hvd_imaging.bench import io, io_peers, io_worker
from hvd_imaging.errors import HvdImagingError
from hvd_imaging.reporting.io_plot import best_rates, draw_io

SIDE, PATCH = 32, (16, 16, 16)
ASKED = io.requests([(SIDE,) * 3] * 2, 6, PATCH)


def results(**rates):
    """``system__mode=MB/s`` at 1 and 2 threads: two are twice as fast."""
    found = io.Results()
    for key, rate in rates.items():
        system, _, mode = key.partition("__")
        system = system.replace("_", "-")
        variant = next(iter(io.SYSTEMS[system].variants))
        times = {"1": 1 / rate, "2": 0.5 / rate}
        found.add(system, variant, {"warm": {mode: times}, "cold": {mode: {"2": 10 / rate}}}, {mode: (1_000_000, 2)})
    return found


ALL = results(
    none__aligned=900, raw__aligned=1000, blosc__aligned=300, h5py_ours__aligned=100, gzip__aligned=5,
    blosc__random=200, h5py_blosc__random=50, zarr_blosc__random=100, blosc2__random=160,
    none__random=400, npy__random=100, tfrecord__random=5, zarr_none__random=200, none__whole=1000,
)  # fmt: skip


def test_figures():
    ALL.amplification = 1.5
    values = {figure.name: (figure.value, figure.goal, figure.better) for figure in io.figures(ALL)}
    assert values == {
        "uncompressed aligned / raw pread, same threads": (pytest.approx(0.9), 0.85, "higher"),
        "Blosc, 2 threads / plain h5py on the same file": (pytest.approx(3.0), 1.8, "higher"),
        "Blosc / gzip by slice": (pytest.approx(60.0), 60, "higher"),
        "random patches / best h5py settings": (pytest.approx(4.0), 2, "higher"),
        "random patches / fastest peer format, Blosc": (pytest.approx(1.25), 1, "higher"),
        "random patches / fastest peer format, uncompressed": (pytest.approx(2.0), 1, "higher"),
        "bytes read / bytes needed, random patch": (1.5, 1.6, "lower"),
    }
    empty = io.figures(io.Results())
    assert len(empty) == 6 and all(figure.reached is None for figure in empty)


def test_the_best_variant_is_named():
    found = io.Results()
    for variant, seconds in (("h5py-blosc-64-8", 3.0), ("h5py-blosc-32-1", 2.0)):
        for _ in range(2):
            found.add("h5py-blosc", variant, {"warm": {"random": {"1": seconds}}, "cold": {}}, {"random": (10**6, 4)})
    rate, samples = io.rows(found)
    assert rate.system == "h5py, Blosc (chunks 32^3, cache 1 MiB)"
    assert (rate.case, rate.runs, rate.unit) == ("random, warm, 1 thread", (0.5, 0.5), "MB/s")
    assert (samples.metric, samples.runs) == ("samples", (2.0, 2.0))


def test_rows_of_what_is_absent_and_of_processes():
    found = io.Results(absent={"zarr-none": "not installed: zarr"}, at_once={("blosc", 2): [7.0]}, counted={"none": [1.5]})
    absent, together, counted = io.rows(found)
    assert (absent.value, absent.reason) == (None, "not installed: zarr")
    assert together.case == "random, warm, 2 processes, 1 thread each" and together.value == 7.0
    assert (counted.metric, counted.value) == ("bytes of read calls / bytes needed", 1.5)
    json.dumps([row.to_json() for row in io.rows(ALL)])


def test_utilisation():
    assert io.utilisation(0.323, 7, 10.0, 1) == pytest.approx(0.323 * 10 / 7)
    assert io.utilisation(0.323, 7, 10.0, 2) == pytest.approx(2 * 0.323 * 10 / 7)
    assert io.utilisation(1.0, 7, 1e6, 1) == 1.0
    shares = [row for row in io.rows(ALL, step_ms=1.0) if row.metric == "accelerator utilisation"]
    assert all(0 < row.value <= 1 for row in shares)
    # 2000 MB/s of whole volumes are 13.6 samples of 146.6 MB a second.
    whole = next(row for row in shares if "147 MB" in row.case and "warm" in row.case)
    assert whole.value == pytest.approx(2000e6 / io.SAMPLE_BYTES * 1e-3 / 7, rel=1e-3)


def test_requests_are_inside_and_repeatable():
    shapes = [(64, 80, 30, 2), (20, 64, 64, 2)]
    asked = io.requests(shapes, 50)
    assert asked == io.requests(shapes, 50) and asked != io.requests(shapes, 50, seed=1)
    for mode in ("aligned", "random"):
        assert len(asked[mode]) == 50
        for volume, start, shape in asked[mode]:
            assert shape == tuple(min(64, n) for n in shapes[volume][:3])
            assert all(a >= 0 and a + n <= m for a, n, m in zip(start, shape, shapes[volume], strict=False))
            assert mode == "random" or not any(a % n for a, n in zip(start, shape, strict=True))
    assert asked["whole"] == [(0, (0, 0, 0), (64, 80, 30)), (1, (0, 0, 0), (20, 64, 64))]
    assert io.needed(asked, [4, 8])["whole"] == (64 * 80 * 30 * 4 + 20 * 64 * 64 * 8, 2)


@pytest.mark.parametrize(("cores", "expected"), [(1, [1, 2]), (2, [1, 2]), (6, [1, 2, 4]), (16, [1, 2, 4, 8, 16])])
def test_threads(cores, expected):
    assert io.thread_counts(cores) == expected


@pytest.mark.parametrize("itemsize", [1, 2, 4])
@pytest.mark.parametrize(("shape", "patch"), [((192, 192, 192), (64, 64, 64)), ((20, 512, 512), (16, 160, 160)), ((1, 8, 8), (1, 8, 8))])
def test_the_layout_of_nnunet(shape, patch, itemsize):
    chunks, blocks = io_peers.blosc2_layout(shape, patch, itemsize)
    assert all(b <= c <= n for b, c, n in zip(blocks, chunks, shape, strict=True))
    assert math.prod(blocks) * itemsize <= 0.8 * 32 * 1024 and math.prod(chunks) * itemsize <= 0.8 * 1408 * 1024
    assert sum(c / p for c, p in zip(chunks, patch, strict=True)) / 3 <= 1.5


def test_made_volumes_compress_like_ct():
    volume = io.made_volume(1, 32)
    assert volume.dtype == np.int16 and volume.shape == (32, 32, 32) and volume.std() > 20
    assert (volume == io.made_volume(1, 32)).all() and (volume != io.made_volume(2, 32)).any()


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """The folder, and the paths of the true volumes."""
    folder = tmp_path_factory.mktemp("io")
    paths = [folder / f"volume{i}.npy" for i in range(2)]
    for i, path in enumerate(paths):
        np.save(path, io.made_volume(i, SIDE))
    return folder, [str(path) for path in paths]


@pytest.mark.parametrize("key", [key for key in io_peers.FORMATS if key != "tfrecord"])
def test_every_format_gives_back_what_was_written(stores, key):
    folder, volumes = stores
    form = io_peers.FORMATS[key]
    if why := io_peers.missing(form):
        pytest.skip(why)
    job = {"format": key, "folder": str(folder / form.store), "volumes": volumes, "patch": PATCH, "requests": ASKED}
    if not (folder / form.store).exists():
        assert io_worker.write(job)["bytes"] > 0
    io_worker.check(job)
    found = io_worker.read(job | {"threads": [1, 2], "seconds": 0.0, "cold": True})
    assert set(found["warm"]) == set(found["cold"]) == set(io.MODES)
    assert all(seconds > 0 for times in found["warm"].values() for seconds in times.values())


def test_a_wrong_reader_is_found(stores):
    folder, volumes = stores
    job = {"format": "npy", "folder": str(folder / "swapped"), "patch": PATCH, "requests": ASKED}
    io_worker.write(job | {"volumes": volumes[::-1]})
    with pytest.raises(ValueError, match="npy read other voxels than were written: aligned"):
        io_worker.check(job | {"volumes": volumes})


def test_what_a_thread_raises_is_raised():
    def fail(*_):
        raise OSError("torn")

    with pytest.raises(OSError, match="torn"):
        io_peers.BoxReader(fail).ready(ASKED["random"], 2)(1)


def test_a_run_of_processes(tmp_path, monkeypatch):
    broken = io.System("broken", {"broken": ""})
    monkeypatch.setitem(io.SYSTEMS, "broken", broken)
    monkeypatch.setitem(io_peers.FORMATS, "broken", io_peers.Npy("broken"))  # the workers do not know it
    monkeypatch.setitem(io.SYSTEMS, "lost", io.System("lost", {"lost": ""}))
    monkeypatch.setitem(io_peers.FORMATS, "lost", io_peers.Npy("lost", needs=("no_such_module",)))
    bench = io.Bench(tmp_path, True, lambda _: None, SIDE, ["none", "raw", "broken", "lost"])
    bench.make()
    bench.take(tmp_path / "ours-none" / "data")
    bench.round(0)
    assert bench.systems == ["none", "raw"]
    assert "failed: KeyError" in bench.results.absent["broken"]
    assert bench.results.absent["lost"] == "not installed: no_such_module"
    rows = io.rows(bench.results)
    assert {"hvd_imaging, uncompressed", "raw preadv, as many bytes", "hvd_imaging, DATASET"} <= {row.system for row in rows}
    assert any("processes" in row.case for row in rows)
    assert io.figures(bench.results)[0].value > 0 and bench.results.amplification >= 1


def test_a_dataset_without_train_samples(tmp_path):
    bench = io.Bench(tmp_path, True, lambda _: None, SIDE)
    with pytest.raises(HvdImagingError, match="no manifest"):
        bench.take(tmp_path)


def test_the_picture(tmp_path):
    rows = [row.to_json() for row in io.rows(ALL)]
    rates = best_rates(rows, "warm")
    assert rates["hvd_imaging, uncompressed"] == {"aligned": 1800.0, "random": 800.0, "whole": 2000.0}
    assert rates["h5py, Blosc"] == {"random": 100.0}  # its settings are not part of the name
    draw_io(tmp_path / "a.png", rows)
    draw_io(tmp_path / "b.png", [])
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
