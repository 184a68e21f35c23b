"""What a rank says of its machine: read from the real one, written, summed up; and who is slow."""

import json
import os
import sys
import time
import types
import urllib.request

import psutil
import pytest

from hvd_imaging.config import MonitorConfig, RunConfig, check
from hvd_imaging.errors import ConfigError, SetupError
from hvd_imaging.monitoring import record, tracking
from hvd_imaging.monitoring.monitor import Monitor
from hvd_imaging.monitoring.network import devices, rdma_counters
from hvd_imaging.monitoring.power import Power, energy_counters, guess, watts_between
from hvd_imaging.monitoring.prometheus import page, parse_target
from hvd_imaging.monitoring.sampler import Sampler
from hvd_imaging.monitoring.stragglers import stragglers
from hvd_imaging.training import run
from hvd_imaging.world import World


def quiet(message):
    raise AssertionError(message)


def wait_for(what):
    until = time.monotonic() + 60
    while not what():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_busy_rank_is_seen_as_busy():
    sampler = Sampler(World(), "n1", Power())
    until, data = time.process_time() + 0.3, []
    while time.process_time() < until:
        data.append(sum(range(1000)))
    ballast = bytearray(64 << 20)
    found = sampler.sample()
    # It computed all the time; how much of a core it got, others on this machine decide too.
    assert 0.05 < found["cpu"] < 2 and 0 < found["host_cpu"] <= 1 and 0 < found["host_memory"] < 1
    assert found["rss_bytes"] > len(ballast) and found["watts"] > 0 and found["watts_from"] in ("rapl", "estimate")
    assert found["net_in_bps"] >= 0 and found["gpu"] == [] and found["threads"] >= 1
    json.dumps(found, allow_nan=False)


def test_one_rank_speaks_for_its_host():
    found = Sampler(World(1, 2, 1, 2), "n1", Power()).sample()
    assert found["host_cpu"] is found["watts"] is found["net_in_bps"] is None and found["rss_bytes"] > 0


def test_power_by_counters_and_by_estimate(tmp_path):
    for name, energy in (("intel-rapl:0", 10_000_000), ("intel-rapl:1", 99_000_000), ("intel-rapl:0:0", 5)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(str(energy))
        (tmp_path / name / "max_energy_range_uj").write_text("100000000")
    now = iter([0.0, 2.0])
    power = Power(folder=tmp_path, clock=lambda: next(now))
    (tmp_path / "intel-rapl:0/energy_uj").write_text("70000000")  # 60 J
    (tmp_path / "intel-rapl:1/energy_uj").write_text("19000000")  # 20 J, over the end of the counter
    assert power.watts(0.5) == (40.0, "rapl")
    assert energy_counters(tmp_path / "none") == {} and watts_between({}, {}, 1) is None
    estimate = Power(100, 300, folder=tmp_path / "none")
    assert estimate.watts(0.25) == (150.0, "estimate") and estimate.watts(1.5, gpus=50.0) == (350.0, "estimate+nvml")
    assert guess(10).watts(1) == 120 and guess(10, busy_w=200).watts(0) == 40


def test_samples_are_written_and_read_again(tmp_path):
    path = record.path_of(tmp_path, 0)
    path.parent.mkdir()
    path.write_text('{"time": "half')  # a killed start
    monitor = Monitor(tmp_path, World(), "n1", MonitorConfig(seconds=0.02), lambda: 7, quiet)
    wait_for(lambda: path.read_text().count("\n") >= 4)
    monitor.close()
    found = record.read(tmp_path)
    assert len(found) == monitor.samples >= 3 and {sample["step"] for sample in found} == {7} and found[-1]["seconds"] > 0
    use = record.summary(found)
    assert use.ranks[0].samples == len(found) and use.ranks[0].host == use.hosts[0].host == "n1"
    assert use.watt_hours > 0 and 0 < monitor.cpu_s < 1
    Monitor(tmp_path / "off", World(), "n1", MonitorConfig(seconds=0), lambda: 0, quiet).close()
    assert not (tmp_path / "off").exists()


def test_a_machine_that_can_not_be_watched(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(psutil, "cpu_times", lambda: 1 / 0)
    monitor = Monitor(tmp_path, World(), "n1", MonitorConfig(), lambda: 7, said.append)
    monitor.close()
    assert said == ["monitor: this machine cannot be watched (ZeroDivisionError: division by zero); the run goes on without samples"]


def test_what_is_no_sample_is_left_out(tmp_path):
    good = {"time": "2026-11-24T01:00:00+00:00", "seconds": 10, "rank": 0, "host": "n1", "cpu": None}
    odd = [{"time": "yesterday"}, {"time": "2026-11-24T01:00:00"}, {"time": None}, {"rank": "0"}, {"cpu": "much"}, {"seconds": []}]
    lines = [json.dumps(good | values) for values in ({}, *odd)] + ["[1]", "null", '{"rank": 0', "\0\0"]
    (tmp_path / "ranks").mkdir()
    record.path_of(tmp_path, 0).write_text("\n".join(lines))
    assert record.read(tmp_path) == [good] and record.summary([good]).ranks[0].cpu == 0


class Nvml(types.ModuleType):
    """Four GPUs, the second one of another job."""

    class NVMLError(Exception):
        pass

    def nvmlInit(self):
        pass

    def nvmlDeviceGetCount(self):
        return 4

    def nvmlDeviceGetHandleByIndex(self, index):
        if index == 1:
            raise self.NVMLError
        return index

    def nvmlDeviceGetUtilizationRates(self, card):
        return types.SimpleNamespace(gpu=50)

    def nvmlDeviceGetMemoryInfo(self, card):
        return types.SimpleNamespace(used=1 << 30)

    def nvmlDeviceGetPowerUsage(self, card):
        return 200_000 + 1000 * card


@pytest.mark.parametrize(
    ("variables", "cards"),
    [
        ({}, [0, 2, 3]),
        ({"CUDA_VISIBLE_DEVICES": "2"}, [2]),
        ({"CUDA_VISIBLE_DEVICES": "2", "SLURM_JOB_GPUS": "2,3"}, [2, 3]),
        ({"CUDA_VISIBLE_DEVICES": "GPU-8932f937"}, [0, 2, 3]),
        ({"SLURM_JOB_GPUS": "6,7"}, [0, 2, 3]),  # numbered anew inside the job
    ],
)
def test_gpus_of_the_job(monkeypatch, variables, cards):
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_JOB_GPUS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(sys.modules, "pynvml", Nvml("pynvml"))
    found = Sampler(World(), "n1", Power(10, 10)).sample()
    assert [gpu["index"] for gpu in found["gpu"]] == cards
    assert found["gpu"][0] == {"index": cards[0], "util": 0.5, "memory_bytes": 1 << 30, "watts": 200.0 + cards[0]}
    assert found["watts_from"].endswith("+nvml") and found["watts"] >= 200 * len(cards)


def test_cards_count_once_and_rdma_by_itself(tmp_path):
    for name in ("eth0", "eth1"):
        (tmp_path / name / "device").mkdir(parents=True)
    (tmp_path / "bond0").mkdir()
    assert devices(["lo", "bond0", "eth0", "eth1"], tmp_path) == ["eth0", "eth1"]
    assert devices(["lo", "veth1"], tmp_path) == ["veth1"] and rdma_counters(tmp_path) is None
    for adapter in ("mlx5_0", "mlx5_1"):
        counters = tmp_path / adapter / "ports" / "1" / "counters"
        counters.mkdir(parents=True)
        (counters / "port_rcv_data").write_text("100\n")
        (counters / "port_xmit_data").write_text("25\n")
    assert rdma_counters(tmp_path) == (800, 200)


def test_a_summary_by_hand():
    def sample(rank, when, seconds, **values):
        return {"time": f"2026-11-24T01:{when:02d}:00+00:00", "seconds": seconds, "rank": rank, "host": "n1", "rss_bytes": 100 * (when + 1)} | values

    found = record.summary([
        sample(0, 0, 60, cpu=1.0, watts=100, watts_from="estimate", host_cpu=0.5, net_in_bps=10, net_out_bps=0, disk_read_bps=2),
        sample(1, 1, 60, cpu=0.5, watts=None),
        sample(0, 1, 60, cpu=2.0, watts=200, watts_from="estimate", host_cpu=1.0, net_in_bps=20, net_out_bps=0, disk_read_bps=0),
        # After a restart: the hour in between nobody was there.
        sample(0, 59, 60, cpu=2.0, watts=300, watts_from="rapl", host_cpu=1.0, net_in_bps=0, net_out_bps=30, disk_read_bps=0),
    ])  # fmt: skip
    assert found.watt_hours == pytest.approx((100 + 200 + 300) * 60 / 3600)
    (host,) = found.hosts
    assert (host.seconds, host.known, host.net_bytes, host.rdma_bytes) == (180, "rapl", 60 * 60, None) and host.cpu == pytest.approx(2.5 / 3)
    first, second = found.ranks
    assert first.cpu == pytest.approx(5 / 3) and first.peak_bytes == 6000 and first.disk_read_bytes == 120 and first.gpu is None
    assert second.cpu == 0.5 and record.summary([]).watt_hours == 0


def test_a_long_run_leaves_small_files():
    """A month at 10 s: less than 6 x 8640 lines of about 500 bytes."""
    when, lines = 0.0, 0
    while when < 30 * 86400:
        when += record.pause(10, lines)
        lines += 1
    assert record.LINES < lines < 6 * record.LINES


@pytest.mark.parametrize(
    ("compute", "samples", "slow"),
    [
        ([10, 10, 10, 10], [5, 5, 5, 5], []),
        ([10, 10, 13, 10], [5, 5, 5, 5], [(2, 1.3)]),
        ([10, 26], [5, 10], [(1, 1.3)]),
        ([10, 20], [5, 10], []),  # twice the work
        ([0.1, 0.5], [5, 5], []),  # too little to tell
        ([10, 0, 40], [5, 0, 10], [(2, 2.0)]),
        ([10], [5], []),
    ],
)
def test_who_is_slow(compute, samples, slow):
    found = stragglers(compute, samples, [f"n{rank}" for rank in range(len(compute))])
    assert [(one.rank, pytest.approx(one.ratio)) for one in found] == slow
    assert all(one.host == f"n{one.rank}" for one in found)


def test_prometheus_reads_a_file_and_a_port(tmp_path):
    folder = tmp_path / "node exporter"
    folder.mkdir()
    (tmp_path / "run").mkdir()
    config = check(MonitorConfig, {"seconds": 0.02, "prometheus": f"textfile:{folder}"}, "t")
    monitor = Monitor(tmp_path / "run", World(), "n1", config, lambda: 7, quiet)
    path = folder / "hvd_imaging-run-00000.prom"
    wait_for(path.exists)
    text = path.read_text()
    assert '# TYPE hvd_imaging_step gauge\nhvd_imaging_step{run="run",rank="0",host="n1"} 7\n' in text and "hvd_imaging_resident_bytes{" in text
    assert abs(float(text.split("hvd_imaging_sample_time_seconds{")[1].split()[1]) - time.time()) < 600
    monitor.close()
    assert not path.exists()

    from redis_server import free_port

    port = free_port()
    monitor = Monitor(tmp_path / "run", World(), "n1", MonitorConfig(seconds=0.02, prometheus=f"port:{port}"), lambda: 8, quiet)
    def scraped():
        with urllib.request.urlopen(f"http://localhost:{port}/metrics", timeout=5) as answer:
            assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            return answer.read().decode()

    wait_for(lambda: 'hvd_imaging_step{run="run",rank="0",host="n1"} 8' in scraped())
    said = []
    second = Monitor(tmp_path / "run", World(), "n1", MonitorConfig(seconds=9, prometheus=f"port:{port}"), lambda: 8, said.append)
    assert len(said) == 1 and said[0].endswith("the run goes on without it")
    second.close()
    monitor.close()
    assert page({"rank": 1, "host": 'a"b\\', "cpu": 0.5}, "r").splitlines()[-1] == 'hvd_imaging_cpu_cores{run="r",rank="1",host="a\\"b\\\\"} 0.5'


def test_where_prometheus_may_read():
    assert parse_target("port:0.0.0.0:9400").address == "0.0.0.0" and parse_target("port:9400").address == "127.0.0.1"
    for text in ("9400", "port:", "port:x", "textfile:", "port:99999999"):
        with pytest.raises(ConfigError, match=r"expected textfile:/folder, port:9400"):
            parse_target(text)
    with pytest.raises(ConfigError, match="monitor.prometheus: expected textfile:/folder"):
        check(RunConfig, {"data": {"dataset": "d"}, "model": {"name": "unet3d"}, "monitor": {"prometheus": "9400"}}, "t")


@pytest.fixture
def server(monkeypatch):
    """A stand-in of MLflow's client; what it was told, and how to let it fail."""
    said, broken = [], []

    class Client:
        def __init__(self, tracking_uri):
            said.append(tracking_uri)

        def __getattr__(self, name):
            def call(*args, **values):
                if broken:
                    raise broken[0]
                said.append((name, *args, *values.values()))
                return None if name == "get_experiment_by_name" else types.SimpleNamespace(info=types.SimpleNamespace(run_id="r"))

            return call

    entity = lambda *values: values  # noqa: E731
    for name in tracking._MANNERS:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(name, os.environ.get(name, ""))  # what the test sets does not outlive it
        monkeypatch.delenv(name)
    monkeypatch.setitem(sys.modules, "mlflow", types.SimpleNamespace(MlflowClient=Client))
    monkeypatch.setitem(sys.modules, "mlflow.entities", types.SimpleNamespace(Metric=entity, Param=entity, RunTag=entity))
    return types.SimpleNamespace(said=said, broken=broken)


def test_mlflow_gets_parameters_origin_and_epochs(server, tmp_path):
    run = tmp_path / "runs-a"
    run.mkdir()
    parameters = {"train.epochs": 3} | {f"key{n}": n for n in range(150)}
    board = tracking.MLflow("http://server", run, parameters, {"job_id": "7", "hosts": ["a", "b"]}, quiet)
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    board.epoch({"epoch": 2, "loss": 0.5, "best": True, "name": "x", "val_dice": float("nan")})
    board.close()
    sent = [call for call in server.said if call[0] == "log_batch"]
    assert sent[0][1:2] == ("r",) and sent[0][2][0] == ("train.epochs", "3") and [len(call[2]) for call in sent] == [100, 51, 2, 2]
    assert sent[2][2] == [("job_id", "7"), ("hosts", '["a", "b"]')]
    assert [(key, value, step) for key, value, _, step in sent[3][2]] == [("loss", 0.5, 2), ("best", 1.0, 2)]
    assert server.said[-1] == ("set_terminated", "r", "FINISHED")
    # Resumed: the same run of the server, its parameters as they were.
    server.said.clear()
    tracking.MLflow("http://server", run, parameters, {}, quiet).close(whole=False)
    assert server.said == ["http://server", ("update_run", "r", "RUNNING"), ("set_terminated", "r", "KILLED")]


def test_mlflow_that_is_away(server, tmp_path, monkeypatch):
    said = []
    board = tracking.MLflow("http://server", tmp_path, {}, {}, said.append)
    server.broken.append(ConnectionError("no route"))
    for epoch in range(3):
        board.epoch({"epoch": epoch, "loss": 1.0})
    board.close()
    assert len(said) == 1 and said[0].endswith("the run goes on")
    with pytest.raises(SetupError, match="monitor.mlflow=http://other: does not take the run: no route"):
        tracking.MLflow("http://other", tmp_path, {}, {}, quiet)
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(SetupError, match=r"MLflow is not installed: pip install 'hvd_imaging\[mlflow\]'"):
        tracking.MLflow("http://server", tmp_path, {}, {}, quiet)
    nobody = tracking.MLflow(None, tmp_path, {}, {}, quiet)
    nobody.epoch({"epoch": 0, "loss": 1.0})
    nobody.close()


def test_the_code_that_ran(tmp_path):
    git, package = tmp_path / ".git", tmp_path / "package"
    package.mkdir()
    (package / "a.py").write_text("one")
    assert run.commit(package) is None
    (git / "refs/heads").mkdir(parents=True)
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    (git / "packed-refs").write_text("# pack-refs\n" + "a" * 40 + " refs/heads/main\n")
    assert run.commit(package) == "a" * 40
    (git / "refs/heads/main").write_text("b" * 40 + "\n")
    assert run.commit(package) == "b" * 40
    (git / "HEAD").write_text("c" * 40 + "\n")
    assert run.commit(package) == "c" * 40
    # The commit stays the same when a file is changed; this does not.
    before = run.source_hash(package)
    (package / "a.py").write_text("two")
    run.source_hash.cache_clear()
    assert run.source_hash(package) != before and len(before) == 64
    run.source_hash.cache_clear()
