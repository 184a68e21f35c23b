"""Copies of shard files in a folder of the node, one a node, shared by its ranks and left for the next job.

Layout::

    FOLDER/hvd_imaging-<uid>/       mode 700
        .lock                       held, shortly, by who counts, reserves or removes
        <key>/                      one dataset; the key is its manifest's hash
            .use                    shared lock of each process that uses the dataset
            <shard>                 a whole copy, mode 600; its time of change is its last use
            <shard>.<pid>.part      a copy in the making, of its final size from the start: that reserves its bytes
            <shard>.lock            held by who makes the copy

All locks are flocks, which the system frees when their owner ends, however it ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from ..world import World, bounds

RESERVE = 1 << 30
"""Bytes that staging leaves free on the folder's filesystem, and in memory if that filesystem is memory."""

_PIECE = 4 << 20  # bytes between two looks at the stop flag
_MARK_S = 60.0  # seconds between two marks of use of one copy
_POLL_S = 0.01
_BUSY_S = 0.2
_ROOT_LOCK, _USE = ".lock", ".use"
_CLAIM, _PART = ".lock", ".part"

Outcome = Literal["staged", "busy", "no room", "unreadable"]


class _Stopped(Exception):
    """`close` was called."""


class _Unreadable(Exception):
    """The original cannot be read, or is not of the size it should have."""


class _Refused(Exception):
    """The folder cannot be trusted; the text says why."""


@dataclass(frozen=True)
class Entry:
    """A file of the folder.

    Attributes:
        key: of its dataset.
        shard: file name.
        bytes: its size.
        last_used: seconds since the epoch.
        in_use: a live process uses the dataset (the running one does).
    """

    key: str
    shard: str
    bytes: int
    last_used: float
    in_use: bool


def order(shards: Iterable[str], local_rank: int, local_size: int) -> list[str]:
    """All shards by name, from a place on that differs between the node's ranks, so that they copy different ones."""
    names = sorted(shards)
    start, _ = bounds(len(names), local_size, local_rank)
    return names[start:] + names[:start]


def plan(present: Sequence[Entry], wanted: Mapping[str, int], budget: int) -> tuple[list[Entry], list[str]]:
    """What to remove and what to copy, so that at most ``budget`` bytes lie in the folder.

    Files of datasets in use stay, even beyond the budget. Shards of one dataset never push each other out: an epoch
    reads all of them, so the least recently used one is the next to be read.

    Args:
        present: files of the folder.
        wanted: shard -> bytes of absent shards of the running dataset, in order of preference.
        budget: bytes.

    Returns:
        entries to remove, least recently used first, and the wanted shards that have room.
    """
    idle = sorted((entry for entry in present if not entry.in_use), key=lambda e: (e.last_used, e.key, e.shard))
    used = sum(entry.bytes for entry in present)
    removable = sum(entry.bytes for entry in idle)
    evict: list[Entry] = []
    admit: list[str] = []

    def make_room(size: int) -> None:
        nonlocal used, removable
        while idle and used + size > budget:
            entry = idle.pop(0)
            evict.append(entry)
            used -= entry.bytes
            removable -= entry.bytes

    make_room(0)
    for shard, size in wanted.items():
        if used - removable + size <= budget:
            make_room(size)
            admit.append(shard)
            used += size
    return evict, admit


def default_folder(kind: Literal["node", "disk"], environ: Mapping[str, str] | None = None) -> Path:
    """Shared memory for "node"; for "disk" the first of $SLURM_TMPDIR, $TMPDIR and /tmp."""
    environ = os.environ if environ is None else environ
    return Path("/dev/shm" if kind == "node" else environ.get("SLURM_TMPDIR") or environ.get("TMPDIR") or "/tmp")


class Staging:
    """The node's copies of one dataset's shards. Whatever fails here, the originals are read: `path` always answers.

    Args:
        dataset: folder of the originals.
        shards: file name -> bytes.
        key: hex hash of the manifest; equal keys mean equal files.
        folder: on this node; exists.
        budget: most bytes that all datasets together may take of the folder.
        world: gives the local rank and the number of local ranks.
        log: takes a line for the user; called from the staging thread.
        reserve: bytes to leave free.
    """

    def __init__(
        self,
        dataset: str | Path,
        shards: Mapping[str, int],
        key: str,
        folder: str | Path,
        budget: int,
        world: World,
        log: Callable[[str], None],
        reserve: int = RESERVE,
    ) -> None:
        if not re.fullmatch("[0-9a-f]+", key):
            raise ValueError("the key is not a hex hash")
        self.dataset, self.key, self.budget, self.world, self.log = Path(dataset), key, budget, world, log
        self.reserve = reserve
        # Names that mean something else in the layout stay where they are.
        self.shards = {
            name: size for name, size in shards.items() if name[:1] != "." and not name.endswith((_CLAIM, _PART))
        }
        self.root = Path(folder) / f"hvd_imaging-{os.getuid()}"
        self.home = self.root / key
        self._marked: dict[str, float] = {}  # staged shard -> monotonic second of its last mark
        self._forgotten: set[str] = set()
        self._use: int | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Clean up after killed jobs and copy what has room, in a background thread."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="staging", daemon=True)
            self._thread.start()

    def wait(self, timeout: float) -> bool:
        """True if within ``timeout`` seconds all copies are made, by whichever process, or given up."""
        if self._thread is None:
            return False
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def close(self) -> None:
        """Stop copying. Copies stay for the next job; from now on `path` gives originals."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        use, self._use = self._use, None
        if use is not None:
            _unlock(use)
        self._marked.clear()

    def path(self, shard: str) -> Path:
        """The staged copy if it is whole, else the original. Marks the copy as used."""
        if self._use is None or shard in self._forgotten:
            return self.dataset / shard
        last = self._marked.get(shard)
        now = time.monotonic()
        if last is None and not self._whole(shard):
            return self.dataset / shard
        copy = self.home / shard
        if last is None or now - last > _MARK_S:
            try:
                os.utime(copy)
            except OSError:  # a cleaner of temporary folders removed it
                self._marked.pop(shard, None)
                return self.dataset / shard
            self._marked[shard] = now
        return copy

    def forget(self, shard: str) -> None:
        """Remove a copy that turned out damaged or gone; this process reads the original from now on."""
        self._forgotten.add(shard)
        self._marked.pop(shard, None)
        if self._use is not None and shard in self.shards:
            with contextlib.suppress(OSError):
                os.unlink(self.home / shard)

    def _whole(self, shard: str) -> bool:
        try:
            found = os.stat(self.home / shard, follow_symlinks=False)
        except OSError:
            return False
        return stat.S_ISREG(found.st_mode) and found.st_size == self.shards.get(shard)

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)  # on Linux, of this thread only
        try:
            self._open()
            self._stage_all()
        except _Stopped:
            pass
        except (_Refused, OSError) as error:
            # All ranks of the node fail alike to open the folder; a copy fails in the rank that makes it.
            if self._use is not None or self.world.local_rank == 0:
                self._give_up(getattr(error, "strerror", None) or str(error) or type(error).__name__)

    def _give_up(self, reason: str) -> None:
        missing = sum(size for shard, size in self.shards.items() if not self._whole(shard))
        try:
            free = f"{_show(shutil.disk_usage(self.root.parent).free)} free"
        except OSError:
            free = "free space unknown"
        self.log(
            f"{self.root}: shards are no longer copied to this node: {reason} ({_show(missing)} still to copy, "
            f"{free}); training goes on with the originals in {self.dataset}; mend or free the folder, or choose "
            "another one"
        )

    def _open(self) -> None:
        """Make the folders, remove what killed processes left, and tell others that the dataset is in use."""
        _private_folder(self.root)
        with self._root_locked():
            for key in _keys(self.root):
                _remove_abandoned(self.root / key)
            with contextlib.suppress(FileExistsError):
                os.mkdir(self.home, 0o700)
            use = _open_lock(self.home / _USE)
            try:
                fcntl.flock(use, fcntl.LOCK_SH | fcntl.LOCK_NB)  # who takes it exclusively has the root lock, as we do
            except BaseException:
                _unlock(use)
                raise
            self._use = use

    def _stage_all(self) -> None:
        pending = order(self.shards, self.world.local_rank, self.world.local_size)
        no_room: list[str] = []
        while pending:
            outcomes = {shard: self._stage(shard) for shard in pending}
            no_room += [shard for shard in pending if outcomes[shard] == "no room"]
            pending = [shard for shard in pending if outcomes[shard] == "busy"]
            if pending and self._stop.wait(_BUSY_S):
                raise _Stopped
        no_room = [shard for shard in no_room if not self._whole(shard)]
        if no_room and self.world.local_rank == 0:  # the other ranks found the same
            self.log(
                f"{self.root}: {len(no_room)} of {len(self.shards)} shards "
                f"({_show(sum(self.shards[shard] for shard in no_room))}) have no room and are read from "
                f"{self.dataset}: budget {_show(self.budget)}, {_show(_free(self.root))} free, of which "
                f"{_show(self.reserve)} stay free; raise the budget, free the folder, or choose another one"
            )

    def _stage(self, shard: str) -> Outcome:
        if self._stop.is_set():
            raise _Stopped
        if self._whole(shard):
            return "staged"
        claim = _claim(self.home / f"{shard}{_CLAIM}")
        if claim is None:
            return "busy"
        part = self.home / f"{shard}.{os.getpid()}{_PART}"
        try:
            if self._whole(shard):
                return "staged"
            for left in _parts_of(self.home, shard):
                _unlink(left)
            _unlink(self.home / shard)  # of another size
            with self._original(shard) as source:
                target = self._reserve(shard, part)
                if target is None:
                    return "no room"
                try:
                    self._copy(source, target, self.shards[shard])
                finally:
                    os.close(target)
            os.rename(part, self.home / shard)
            return "staged"
        except _Unreadable:  # the training's reader will meet it, and tell
            return "unreadable"
        finally:
            _unlink(part)
            _unlink(self.home / f"{shard}{_CLAIM}")
            _unlock(claim)

    @contextlib.contextmanager
    def _original(self, shard: str) -> Iterator[int]:
        try:
            source = os.open(self.dataset / shard, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise _Unreadable from error
        try:
            if os.fstat(source).st_size != self.shards[shard]:
                raise _Unreadable
            yield source
        finally:
            os.close(source)

    def _reserve(self, shard: str, part: Path) -> int | None:
        """The open part file, of its final size, or None if there is no room for it."""
        size = self.shards[shard]
        with self._root_locked(), contextlib.ExitStack() as idle:
            present, unwritten = _scan(self.root, self.key, idle)
            held = sum(entry.bytes for entry in present)
            room = _free(self.root) - unwritten - self.reserve
            evict, admit = plan(present, {shard: size}, min(self.budget, held + room))
            for entry in evict:
                _unlink(self.root / entry.key / entry.shard)
            for key in {entry.key for entry in evict}:
                _remove_if_empty(self.root / key)
            if not admit:
                return None
            target = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                os.ftruncate(target, size)
            except BaseException:
                os.close(target)
                raise
            return target

    def _copy(self, source: int, target: int, size: int) -> None:
        buffer = memoryview(bytearray(min(_PIECE, max(size, 1))))
        done = 0
        while done < size:
            if self._stop.is_set():
                raise _Stopped
            try:
                count = os.preadv(source, [buffer[: size - done]], done)
            except OSError as error:
                raise _Unreadable from error
            if count == 0:
                raise _Unreadable
            written = 0
            while written < count:
                written += os.write(target, buffer[written:count])
            done += count

    @contextlib.contextmanager
    def _root_locked(self) -> Iterator[None]:
        handle = _open_lock(self.root / _ROOT_LOCK)
        try:
            while not _try_lock(handle):
                if self._stop.wait(_POLL_S):
                    raise _Stopped
            yield
        finally:
            _unlock(handle)


def _show(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _private_folder(root: Path) -> None:
    """Make ``root``, mode 700; /tmp and /dev/shm are open to all users, so one that is there may be a trap.

    Raises:
        _Refused: it is a symlink, no folder, another user's, or others may put another in its place.
    """
    with contextlib.suppress(FileExistsError):
        os.mkdir(root, 0o700)
    found = os.lstat(root)
    if not stat.S_ISDIR(found.st_mode):
        raise _Refused("expected a folder, found a symlink or a file")
    if found.st_uid != os.getuid():
        raise _Refused(f"it belongs to user {found.st_uid}, expected {os.getuid()}")
    if os.stat(root.parent).st_mode & (stat.S_IWOTH | stat.S_ISVTX) == stat.S_IWOTH:
        raise _Refused(f"all users may rename what is in {root.parent} (expected its sticky bit: chmod +t)")
    if stat.S_IMODE(found.st_mode) != 0o700:
        os.chmod(root, 0o700)


def _open_lock(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _unlock(handle: int) -> None:
    """Free the lock and close. Closing alone is not enough: a forked child may hold a copy of the handle."""
    try:
        fcntl.flock(handle, fcntl.LOCK_UN)
    finally:
        os.close(handle)


def _claim(path: Path) -> int | None:
    """The open, locked lock file, or None if another process has it. Its owner unlinks it before closing."""
    while True:
        handle = _open_lock(path)
        try:
            if not _try_lock(handle):
                os.close(handle)
                return None
            if os.fstat(handle).st_nlink:
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # the last owner unlinked it between our opening and locking


def _unlink(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _keys(root: Path) -> list[str]:
    with os.scandir(root) as found:
        return sorted(item.name for item in found if item.is_dir(follow_symlinks=False))


def _files(home: Path) -> dict[str, os.stat_result]:
    """Name -> stat of a dataset's copies, whole and in the making."""
    files = {}
    with os.scandir(home) as found:
        for item in found:
            if item.name[0] != "." and not item.name.endswith(_CLAIM):
                with contextlib.suppress(FileNotFoundError):  # renamed by its maker since
                    files[item.name] = item.stat(follow_symlinks=False)
    return files


def _shard_of(part: str) -> str:
    return part.removesuffix(_PART).rpartition(".")[0]


def _parts_of(home: Path, shard: str) -> list[Path]:
    return [home / name for name in _files(home) if name.endswith(_PART) and _shard_of(name) == shard]


def _remove_abandoned(home: Path) -> None:
    """Remove unfinished copies and claims whose owner is gone."""
    names = [item.name for item in os.scandir(home) if item.name[0] != "."]
    shards = {_shard_of(name) for name in names if name.endswith(_PART)}
    shards |= {name.removesuffix(_CLAIM) for name in names if name.endswith(_CLAIM)}
    for shard in shards:
        path = home / f"{shard}{_CLAIM}"
        claim = _claim(path)
        if claim is None:
            continue
        try:
            for part in _parts_of(home, shard):
                _unlink(part)
            _unlink(path)
        finally:
            _unlock(claim)


def _remove_if_empty(home: Path) -> None:
    """Remove the folder of a dataset that nobody uses, if no copy is left. The caller has the root lock."""
    if not _files(home):
        _unlink(home / _USE)
        with contextlib.suppress(OSError):
            os.rmdir(home)


def _scan(root: Path, own: str, idle: contextlib.ExitStack) -> tuple[list[Entry], int]:
    """All copies, and the bytes reserved but not yet written. The caller has the root lock.

    Args:
        own: key of the running dataset.
        idle: gets the exclusive locks on datasets that nobody uses: nobody begins to while it is open.
    """
    entries: list[Entry] = []
    unwritten = 0
    for key in _keys(root):
        in_use = True
        if key != own:
            handle = _open_lock(root / key / _USE)
            idle.callback(_unlock, handle)
            in_use = not _try_lock(handle)
        for name, found in _files(root / key).items():
            entries.append(Entry(key, name, found.st_size, found.st_mtime, in_use))
            if name.endswith(_PART):
                unwritten += max(found.st_size - found.st_blocks * 512, 0)
    return entries, unwritten


def _free(folder: Path) -> int:
    """Bytes that may be written: of the filesystem and, if that is memory, of the memory too."""
    free = shutil.disk_usage(folder).free
    try:
        mounts = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return free
    # A full memory filesystem does not answer "no space": the system kills the job instead.
    return min(free, _free_memory()) if _is_memory(os.path.realpath(folder), mounts) else free


def _is_memory(folder: str, mounts: str) -> bool:
    """True if the mount that holds ``folder`` is of a kind that lives in memory. ``mounts`` is as /proc/mounts."""
    best, kind = "", ""
    for line in mounts.splitlines():
        _, place, found, *_ = line.split(" ")
        place = place.replace("\\040", " ")
        if len(place) >= len(best) and (folder == place or folder.startswith(place.rstrip("/") + "/")):
            best, kind = place, found
    return kind in ("tmpfs", "ramfs")


def _free_memory() -> int:
    """Bytes of memory that this process may still take: of the machine and of each control group above it."""
    left = int(psutil.virtual_memory().available)
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return left
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if controllers == "":
            base, limit, usage = Path("/sys/fs/cgroup"), "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            base, limit, usage = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        inner = Path(place.lstrip("/"))
        for group in (base / inner, *(base / parent for parent in inner.parents)):
            # A group without a limit says "max"; inside a container the outer groups cannot be seen.
            with contextlib.suppress(OSError, ValueError):
                most = int((group / limit).read_text())
                statistics = dict(item.split() for item in (group / "memory.stat").read_text().splitlines())
                cached = int(statistics.get("total_inactive_file", statistics.get("inactive_file", "0")))
                left = min(left, most - int((group / usage).read_text()) + cached)
    return left
