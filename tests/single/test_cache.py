"""Reading through the caches: the same voxels, whatever happens to a copy or to the server."""

import numpy as np
import pytest
from datasets import make_dataset
from redis_server import Server

from hvd_imaging.config import CacheConfig
from hvd_imaging.errors import ConfigError
from hvd_imaging.pipeline import staging
from hvd_imaging.pipeline.cache import open_cache
from hvd_imaging.shards.reader import ShardReader
from hvd_imaging.world import World


@pytest.fixture
def dataset(tmp_path):
    manifest = make_dataset(tmp_path / "data", samples=4)
    with ShardReader(tmp_path / "data", manifest) as reader:
        truth = [reader.read_whole(sample) for sample in manifest.samples]
    return tmp_path / "data", manifest, truth


@pytest.fixture
def told():
    return []


def check(reader, manifest, truth):
    for sample, (image, mask) in zip(manifest.samples, truth, strict=True):
        found = reader.read(sample, (1, -2, 3), (9, 12, 20))
        padded = np.pad(image, [(0, 0), (2, 0), (0, 30), (0, 0)])[1:10, :12, 3:23]
        assert np.array_equal(found[0], padded)
        assert np.array_equal(reader.read_whole(sample)[1], mask)


def test_none(dataset, told):
    folder, manifest, truth = dataset
    cache = open_cache(CacheConfig(), folder, manifest, World(), told.append)
    cache.start()
    check(cache.reader(folder, manifest), manifest, truth)
    cache.close()
    assert told == []


@pytest.mark.parametrize("kind", ["node", "disk"])
def test_copies_are_read_once_they_are_there(dataset, tmp_path, told, kind):
    folder, manifest, truth = dataset
    place = tmp_path / "node"
    place.mkdir()
    cache = open_cache(CacheConfig(kind=kind, folder=str(place), gb=1), folder, manifest, World(), told.append)
    with cache.reader(folder, manifest) as reader:
        check(reader, manifest, truth)  # before
        cache.start()
        assert cache.staging.wait(30)
        copy = cache.staging.path(manifest.samples[0].shard)
        assert copy.is_relative_to(place)
        check(reader, manifest, truth)
        assert copy in reader._descriptors._open
    cache.close()
    assert told == []


def test_a_damaged_copy_is_left_for_the_original(dataset, tmp_path, told, caplog):
    folder, manifest, truth = dataset
    place = tmp_path / "node"
    place.mkdir()
    cache = open_cache(CacheConfig(kind="disk", folder=str(place), gb=1), folder, manifest, World(), told.append)
    cache.start()
    assert cache.staging.wait(30)
    copy = cache.staging.path(manifest.samples[0].shard)
    data = bytearray(copy.read_bytes())
    data[len(data) // 4 :: 64] = bytes(len(data[len(data) // 4 :: 64]))
    copy.write_bytes(data)
    with cache.reader(folder, manifest) as reader:
        check(reader, manifest, truth)
    cache.close()
    assert "a damaged copy; the original is read instead" in caplog.text and not copy.exists()


def test_a_copy_that_vanishes_is_left_for_the_original(dataset, tmp_path, told):
    folder, manifest, truth = dataset
    place = tmp_path / "node"
    place.mkdir()
    cache = open_cache(CacheConfig(kind="disk", folder=str(place), gb=1), folder, manifest, World(), told.append)
    cache.start()
    assert cache.staging.wait(30)
    for name in {sample.shard for sample in manifest.samples}:
        cache.staging.path(name).unlink()
    with cache.reader(folder, manifest) as reader:
        check(reader, manifest, truth)
    cache.close()


def test_another_cut_of_the_same_content_has_another_key(dataset, tmp_path):
    _, manifest, _ = dataset
    assert manifest.files_hash() != manifest.hash()
    other = manifest.model_copy(
        update={"shards": tuple(shard.model_copy(update={"sha256": "0" * 64}) for shard in manifest.shards)}
    )
    assert other.hash() == manifest.hash() and other.files_hash() != manifest.files_hash()


def test_a_missing_folder_is_told(dataset, told, tmp_path):
    folder, manifest, _ = dataset
    config = CacheConfig(kind="disk", folder=str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"data\.cache\.folder: expected a folder.*nowhere"):
        open_cache(config, folder, manifest, World(), told.append)


def test_shared_memory_that_is_too_small_is_said_once_and_training_reads_the_shards(dataset, tmp_path, told, monkeypatch):
    folder, manifest, truth = dataset
    place = tmp_path / "node"
    place.mkdir()
    monkeypatch.setattr(staging, "_free", lambda folder: 0)
    cache = open_cache(CacheConfig(kind="node", folder=str(place), gb=1), folder, manifest, World(), told.append)
    cache.start()
    assert cache.staging.wait(30)
    with cache.reader(folder, manifest) as reader:
        check(reader, manifest, truth)
    cache.close()
    assert len(told) == 1


# A real server


@pytest.fixture
def redis(tmp_path):
    pytest.importorskip("redis")
    server = Server(tmp_path)
    yield server
    server.kill()


def open_redis(redis, folder, manifest, told):
    config = CacheConfig(kind="redis", url=f"redis://127.0.0.1:{redis.port}/0")
    return open_cache(config, folder, manifest, World(), told.append)


def test_chunks_are_shared_through_redis(dataset, redis, told, tmp_path):
    folder, manifest, truth = dataset
    first = open_redis(redis, folder, manifest, told)
    with first.reader(folder, manifest) as reader:
        check(reader, manifest, truth)
    second = open_redis(redis, folder, manifest, told)
    with second.reader(folder, manifest) as reader:
        for sample in manifest.samples:
            for name in ("image", "mask"):
                reader._index(sample, name)
        reader._originals = type(reader._originals)(tmp_path / "gone")  # all chunks come from the server now
        check(reader, manifest, truth)
    for cache in (first, second):
        cache.close()
    assert told == []


def test_rubbish_in_redis_is_noticed_and_replaced(dataset, redis, told, caplog):
    folder, manifest, truth = dataset
    cache = open_redis(redis, folder, manifest, told)
    with cache.reader(folder, manifest) as reader:
        check(reader, manifest, truth)
        client = cache.chunks._client
        keys = client.keys("*")
        for key in keys:
            client.set(key, bytes(client.strlen(key)))
        check(reader, manifest, truth)
        assert "damaged value" in caplog.text
        caplog.clear()
        check(reader, manifest, truth)
        assert any(set(client.get(key)) != {0} for key in keys)
    cache.close()


def test_redis_that_dies_is_one_warning(dataset, redis, told):
    folder, manifest, truth = dataset
    cache = open_redis(redis, folder, manifest, told)
    with cache.reader(folder, manifest) as reader:
        check(reader, manifest, truth)
        redis.kill()
        for _ in range(3):
            check(reader, manifest, truth)
    cache.close()
    assert len(told) == 1
