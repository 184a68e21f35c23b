"""Training through the caches on real ranks: the same weights, one copy a node, and a server that dies."""

import os
import signal
import threading
import time

import pytest
from datasets import make_dataset
from redis_server import Server
from test_guarantees_mpi import all_trained, trained
from test_training_mpi import write

pytestmark = pytest.mark.mpi


@pytest.fixture(scope="module")
def trained_runs(tmp_path_factory):
    """A run without a cache, and one through the cache of the node; both on two ranks."""
    folder = tmp_path_factory.mktemp("caches")
    make_dataset(folder / "seg", samples=7, split=(0.15, 0.15))
    config = write(folder, "plain", "seg", max_steps=6)
    place = folder / "shm"
    place.mkdir()
    settings = ["data.cache.kind=node", f"data.cache.folder={place}", "data.cache.gb=1"]
    through = [word for setting in settings for word in ("--set", setting)]
    summaries = all_trained(2, (config, folder / "without"), (config, folder / "through", *through))
    return folder, config, place, settings, {name: summary["weights_sha256"] for name, summary in summaries.items()}


def test_two_ranks_share_one_copy_and_the_next_job_takes_it(trained_runs, tmp_path):
    folder, config, place, settings, hashes = trained_runs
    assert hashes["through"] == hashes["without"]
    copies = [path for path in place.rglob("shard-*.h5") if path.is_file()]
    originals = list((folder / "seg").glob("shard-*.h5"))
    assert sorted(path.name for path in copies) == sorted(path.name for path in originals)
    assert sum(path.stat().st_size for path in place.rglob("*") if path.is_file()) <= 1.1 * sum(
        path.stat().st_size for path in originals
    )
    made = {path: path.stat().st_ino for path in copies}
    assert trained(1, config, tmp_path / "b", *settings)["steps"] == 6
    assert {path: path.stat().st_ino for path in place.rglob("shard-*.h5")} == made


def test_redis_dies_in_the_middle_and_training_goes_on(trained_runs, tmp_path):
    pytest.importorskip("redis")
    _, config, *_, hashes = trained_runs
    server = Server(tmp_path)
    url = f"data.cache.url=redis://127.0.0.1:{server.port}/0"

    def end_it_when_used():
        import redis

        client = redis.Redis(port=server.port)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not client.dbsize():
            time.sleep(0.01)
        os.kill(server.process.pid, signal.SIGKILL)

    killer = threading.Thread(target=end_it_when_used)
    killer.start()
    try:
        found = trained(2, config, tmp_path / "a", "data.cache.kind=redis", url)
    finally:
        killer.join()
        server.kill()
    assert found["weights_sha256"] == hashes["without"]
