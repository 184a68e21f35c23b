"""The one interface of all caches: where a reader takes shards and chunks from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..config import CacheConfig
from ..errors import ConfigError
from ..shards.manifest import Manifest
from ..shards.reader import ShardReader
from ..world import World
from .redis_chunks import RedisChunks, connect
from .staging import Staging, default_folder

GIGABYTE = 1_000_000_000


@dataclass(frozen=True)
class Cache:
    """What `open_cache` made; at most one of the two is there."""

    staging: Staging | None = None
    chunks: RedisChunks | None = None

    def reader(self, dataset: Path, manifest: Manifest) -> ShardReader:
        """A reader that goes through the cache."""
        return ShardReader(dataset, manifest, self.staging, self.chunks)

    def start(self) -> None:
        """Begin to fill it, in the background."""
        if self.staging is not None:
            self.staging.start()

    def close(self) -> None:
        """Stop filling it; what is there stays for the next job."""
        if self.staging is not None:
            self.staging.close()
        if self.chunks is not None:
            self.chunks.close()


def open_cache(config: CacheConfig, dataset: Path, manifest: Manifest, world: World, log: Callable[[str], None]) -> Cache:
    """The cache that the configuration asks for. The key of all that it keeps is `Manifest.files_hash`.

    Args:
        log: takes a line for the user, from any thread.

    Raises:
        ConfigError: the folder is missing, or the Redis URL cannot be used.
        SetupError: the package redis is missing, or a file of its configuration.
    """
    if config.kind == "none":
        return Cache()
    key = manifest.files_hash()
    if config.kind == "redis":
        files = [None if name is None else Path(name) for name in (config.password_file, config.ca_file)]
        ttl = max(1, round(config.ttl_hours * 3600))
        return Cache(chunks=connect(config.url, f"hvd_imaging/{key}/", files[0], files[1], ttl, log))
    folder = default_folder(config.kind) if config.folder is None else Path(config.folder)
    if not folder.is_dir():
        raise ConfigError(f"data.cache.folder: expected a folder of this node, found nothing at '{folder}'; make it or name another")
    sizes = {shard.name: shard.bytes for shard in manifest.shards}
    return Cache(staging=Staging(dataset, sizes, key, folder, int(config.gb * GIGABYTE), world, log))
