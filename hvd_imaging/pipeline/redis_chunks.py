"""Raw chunks of shards in a Redis server. A server that fails costs time, never the training."""

from __future__ import annotations

import errno
import importlib
import ipaddress
import os
import re
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, SetupError

TIMEOUT_S = 2.0
"""Longest wait for a connection, and for each piece of an answer."""

RETRY_AFTER_S = 60.0
"""Pause after a failure."""


@dataclass(frozen=True)
class Address:
    """Where a server is; `str` gives it without the password."""

    host: str
    port: int
    database: int
    tls: bool
    username: str | None
    password: str | None

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'rediss' if self.tls else 'redis'}://{host}:{self.port}/{self.database}"

    def __repr__(self) -> str:
        return f"Address({self})"

    @property
    def is_local(self) -> bool:
        """True if what is sent to the server stays on this machine."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


PASSWORD = "HVD_IMAGING_REDIS_PASSWORD"
"""Variable of the environment; a file is better: it reaches all nodes, and no list of processes shows it."""


def masked(url: str) -> str:
    """``url``, however malformed, without anything that may be a password."""
    head, at, tail = url.rpartition("@")
    scheme = re.match("[a-z]+://", head) if at else None
    shown = f"{scheme.group() if scheme else ''}***@{tail}" if at else tail
    return re.sub(r"[?#].*", "?***", shown, flags=re.DOTALL)


def parse(url: str) -> Address:
    """The address that ``redis[s]://[[username]:password@]host[:port][/database]`` tells.

    Raises:
        ConfigError: it is not of this form; shows `masked`.
    """
    # Errors of urllib quote the text they cannot read, which may be a part of the password.
    try:
        parts = urllib.parse.urlsplit(url)
        port = 6379 if parts.port is None else parts.port
        host = parts.hostname
        database = int(parts.path.strip("/") or "0")
    except ValueError:
        host, port, database = None, 0, 0
    # Options behind a "?" could switch off the check of certificates.
    if not host or parts.scheme not in ("redis", "rediss") or parts.query or parts.fragment or database < 0:
        raise ConfigError(
            f"the address of Redis is '{masked(url)}', expected "
            "redis[s]://[[username]:password@]host[:port][/database] without options; "
            "special characters of a password are written as %XX, or it stands in a password file"
        )
    username, password = (urllib.parse.unquote(text) if text else None for text in (parts.username, parts.password))
    return Address(host, port, database, parts.scheme == "rediss", username, password)


class RedisChunks:
    """A cache of bytes by key, for any number of threads. Made by `connect`.

    After a failure it is off for ``retry_after`` seconds: `get` finds nothing and `put` does nothing. Then one call
    tries again. A failure and the return are said in one line each.

    Args:
        client: `redis.Redis`; its own retries are off.
        shown: the address as messages show it.
        prefix: of all keys.
        ttl_s: seconds after which the server drops a value; None: never.
        log: takes a line for the user.
        retry_after: seconds.
    """

    def __init__(
        self,
        client: Any,
        shown: str,
        prefix: str,
        ttl_s: int | None,
        log: Callable[[str], None],
        retry_after: float = RETRY_AFTER_S,
    ) -> None:
        self._client, self._shown, self._prefix, self._ttl_s = client, shown, prefix, ttl_s
        self._log, self._retry_after = log, retry_after
        self._lock = threading.Lock()
        self._off = False
        self._failures = 0
        self._retry_at = 0.0  # monotonic second
        self._full_until = 0.0  # monotonic second
        self._said_full = False

    def get(self, keys: Sequence[str], sizes: Sequence[int] | None = None) -> list[bytes | None]:
        """The values of ``keys``, None where there is none, or where it has not as many bytes as ``sizes`` says."""
        nothing: list[bytes | None] = [None] * len(keys)
        if sizes is not None and len(sizes) != len(keys):
            raise ValueError(f"{len(keys)} keys with {len(sizes)} sizes")
        ticket = self._ask() if keys else None
        if ticket is None:
            return nothing
        try:
            found = self._client.mget([self._prefix + key for key in keys])
            if not isinstance(found, list) or len(found) != len(keys):
                raise TypeError("not a list of values")
            if not all(value is None or isinstance(value, bytes) for value in found):
                raise TypeError("not values of bytes")
        except Exception as error:  # an answer that is not Redis's makes the client raise errors of many kinds
            self._failed(ticket, error)
            return nothing
        self._worked(ticket)
        if sizes is None:
            return found
        return [
            value if value is not None and len(value) == size else None
            for value, size in zip(found, sizes, strict=True)
        ]

    def put(self, items: Mapping[str, bytes]) -> None:
        """Store values; a server without memory left for them is asked again only after ``retry_after`` seconds."""
        ticket = self._ask() if items and time.monotonic() >= self._full_until else None
        if ticket is None:
            return
        try:
            with self._client.pipeline(transaction=False) as pipe:
                for key, value in items.items():
                    pipe.set(self._prefix + key, value, ex=self._ttl_s)
                answers = pipe.execute()
            if answers != [True] * len(items):
                raise TypeError("not an answer to SET")
        except Exception as error:  # as in `get`
            if type(error).__name__ != "OutOfMemoryError":
                self._failed(ticket, error)
                return
            self._full()
        self._worked(ticket)

    def close(self) -> None:
        """Close all connections."""
        self._client.close()
        self._client.connection_pool.disconnect()

    def _ask(self) -> int | None:
        """A ticket, the number of failures so far, or None while the cache is off."""
        with self._lock:
            if self._off:
                now = time.monotonic()
                if now < self._retry_at:
                    return None
                self._retry_at = now + self._retry_after  # one thread tries, the others do without
            return self._failures

    def _failed(self, ticket: int, error: BaseException) -> None:
        with self._lock:
            if ticket != self._failures:
                return  # another call, that ran at the same time, has told
            self._failures += 1
            first, self._off = not self._off, True
            self._retry_at = time.monotonic() + self._retry_after
        if first:
            self._log(
                f"{self._shown}: the cache of chunks is off: {reason(error)}; training goes on with the shard files; "
                f"tried again every {self._retry_after:g} s"
            )

    def _worked(self, ticket: int) -> None:
        with self._lock:
            back = self._off and ticket == self._failures  # a call from before the failure says nothing
            if back:
                self._off = False
        if back:
            self._log(f"{self._shown}: the cache of chunks is back")

    def _full(self) -> None:
        with self._lock:
            self._full_until = time.monotonic() + self._retry_after
            first, self._said_full = not self._said_full, True
        if first:
            self._log(
                f"{self._shown}: no memory left for more chunks; those it has are used, the others are read from the "
                "shard files; raise the server's maxmemory, or set its maxmemory-policy to allkeys-lru"
            )


def reason(error: BaseException) -> str:
    """Why a call failed, in words of our own: messages of the client and the server may quote values and passwords."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    kinds = {kind.__name__ for item in chain for kind in type(item).__mro__}
    for item in chain:
        if isinstance(item, ssl.SSLCertVerificationError):
            return f"its certificate is refused ({item.verify_message}); give its CA's file, and the host as certified"
        if isinstance(item, ssl.SSLError):
            return "TLS fails; is the server's port one for TLS (rediss://), and its version allowed?"
    if "AuthenticationError" in kinds:
        return "it refuses the password, or wants one"
    if kinds & {"NoPermissionError", "AuthorizationError"}:
        return "its access rules forbid the user MGET or SET on these keys"
    if "ReadOnlyError" in kinds:
        return "it is a read-only replica; give the primary's address"
    if "BusyLoadingError" in kinds:
        return "it is still loading its data"
    if "TimeoutError" in kinds:
        return f"no answer within {TIMEOUT_S:g} s"
    # Only errors of the system itself have both a number and a text that is its own.
    codes = [item.errno for item in chain if isinstance(item, OSError) and item.errno]
    if "gaierror" in kinds:
        return "its host name is unknown"
    if codes and codes[0] in errno.errorcode:
        return f"no connection ({os.strerror(codes[0])})"
    if type(error).__name__ == "ConnectionError":
        return "the connection was closed"
    return f"its answer is not what Redis would say ({type(error).__name__})"


def connect(
    url: str,
    prefix: str,
    password_file: Path | None,
    ca_file: Path | None,
    ttl_s: int | None,
    log: Callable[[str], None],
    retry_after: float = RETRY_AFTER_S,
) -> RedisChunks:
    """The cache at ``url``, see `parse`. Opens no connection: a server that is down now may be up later.

    Args:
        password_file: holds the password in one line; None: the password is in the URL, in the environment (`PASSWORD`), or there is none.
        ca_file: PEM certificates that the server's is checked against besides the system's; for rediss:// only.

    The other arguments are those of `RedisChunks`.

    Raises:
        ConfigError: the URL cannot be used, or contradicts a file.
        SetupError: the package redis is missing, or a file cannot be read.
    """
    address = parse(url)
    try:
        redis: Any = importlib.import_module("redis")
        retries: Any = importlib.import_module("redis.retry")
        backoff: Any = importlib.import_module("redis.backoff")
    except ImportError as error:
        raise SetupError(
            "a cache in Redis needs the Python package redis, which is not installed; `pip install hvd_imaging[redis]`"
        ) from error
    tls: dict[str, Any] = {}
    if address.tls:
        # The client checks the certificate, but not whether it is the host's, unless told.
        tls = {"ssl": True, "ssl_cert_reqs": "required", "ssl_check_hostname": True}
    if ca_file is not None:
        if not address.tls:
            raise ConfigError(f"{address}: a CA file is for TLS; expected rediss://, or no CA file")
        _read(ca_file, "the CA file of Redis")
        tls["ssl_ca_certs"] = str(ca_file)
    password = address.password or os.environ.get(PASSWORD) or None
    if password_file is not None:
        if password is not None:
            raise ConfigError(f"{address}: a password in the address or in ${PASSWORD}, and a password file; remove the one or the other")
        password = _read(password_file, "the password file of Redis").rstrip("\r\n")
        if not password or "\n" in password:
            raise ConfigError(f"{password_file}: expected the password of Redis in one line, found none or several")
        if password_file.stat().st_mode & 0o077:
            log(f"{password_file}: other users may read the password of Redis; `chmod 600 {password_file}`")
    if not address.tls and not address.is_local:
        log(f"{address}: images and the password travel unencrypted to another machine; rediss:// encrypts them")
    client = redis.Redis(
        host=address.host,
        port=address.port,
        db=address.database,
        username=address.username,
        password=password,
        socket_timeout=TIMEOUT_S,
        socket_connect_timeout=TIMEOUT_S,
        socket_keepalive=True,
        retry=retries.Retry(backoff.NoBackoff(), 0),
        **tls,
    )
    return RedisChunks(client, str(address), prefix, ttl_s, log, retry_after)


def _read(path: Path, what: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not text"
        raise SetupError(f"{path}: {what} cannot be read ({why}); check the path and its permissions") from None
