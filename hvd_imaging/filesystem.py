"""Which filesystem holds a path, in which pieces it spreads a file, and what setting large read-only shards want of it.

Recognition and advice are pure functions; only `of`, `mount_of` and `stripe_bytes` ask the machine.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal[
    "lustre", "ceph", "gluster", "nfs", "beegfs", "gpfs", "smb", "fuse", "memory", "local", "unknown",
]  # fmt: skip

_KIB, _MIB, _GIB = 1 << 10, 1 << 20, 1 << 30
_MOUNTINFO = Path("/proc/self/mountinfo")
_LFS_S = 10.0  # seconds

# By the type in mountinfo; what is missing here is decided in `recognize`.
_KINDS: dict[str, Kind] = {
    "lustre": "lustre",
    "ceph": "ceph", "fuse.ceph": "ceph", "fuse.ceph-fuse": "ceph",
    "fuse.glusterfs": "gluster", "glusterfs": "gluster",
    "nfs": "nfs", "nfs4": "nfs",
    "beegfs": "beegfs", "fuse.beegfs": "beegfs",
    "gpfs": "gpfs",
    "cifs": "smb", "smb3": "smb", "smbfs": "smb",
    "tmpfs": "memory", "ramfs": "memory",
}  # fmt: skip
_LOCAL = frozenset(
    ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "overlay", "f2fs", "bcachefs", "jfs", "vfat", "exfat", "ntfs3",
     "fuseblk", "squashfs", "iso9660")
)  # fmt: skip

# Bytes where nothing better can be asked.
_STRIPES: dict[Kind, int] = {"lustre": _MIB, "ceph": 4 * _MIB, "beegfs": 512 * _KIB}
_BLOCK = 4096


@dataclass(frozen=True)
class Mount:
    """A line of mountinfo.

    Attributes:
        kind: the kernel's name of the type, such as ext4 or fuse.glusterfs; "unknown" if no line fits.
        point: where it is mounted.
        source: device, export or server, as it was mounted.
        options: of the mount, then of the filesystem.
    """

    kind: str
    point: Path
    source: str
    options: tuple[str, ...]


@dataclass(frozen=True)
class Filesystem:
    """A recognized filesystem.

    Attributes:
        name: the kernel's name of the type.
        shared: other nodes may see the same files; True where that is not known.
    """

    name: str
    kind: Kind
    shared: bool


def find_mount(mountinfo_text: str, path: Path) -> Mount:
    """The mount that holds ``path``: the longest mount point above it, of equal ones the last, which covers the others.

    Args:
        mountinfo_text: as /proc/self/mountinfo; lines of another form are left out.
        path: absolute, without symlinks.
    """
    best = Mount("unknown", Path("/"), "", ())
    depth = 0
    for line in mountinfo_text.splitlines():
        # id, parent, device, root, point, options, optional fields..., "-", type, source, options of the filesystem
        left, separator, right = line.partition(" - ")
        fields, tail = left.split(" "), right.split(" ")
        if not separator or len(fields) < 6 or len(tail) < 2:
            continue
        point = Path(_unescape(fields[4]))
        if len(point.parts) < depth or not path.is_relative_to(point):
            continue
        options = dict.fromkeys(option for text in (fields[5], *tail[2:3]) for option in text.split(",") if option)
        best, depth = Mount(tail[0], point, _unescape(tail[1]), tuple(options)), len(point.parts)
    return best


def _unescape(text: str) -> str:
    """The kernel writes blank, tab, newline, backslash and # as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)


def recognize(mount: Mount) -> Filesystem:
    """The filesystem of a mount, by its type alone."""
    name = mount.kind
    if name in _LOCAL:
        return Filesystem(name, "local", shared=False)
    kind = _KINDS.get(name, "fuse" if name == "fuse" or name.startswith("fuse.") else "unknown")
    return Filesystem(name, kind, shared=kind != "memory")


def mount_of(path: str | os.PathLike[str]) -> Mount:
    """The mount that holds an absolute path without symlinks. Asks the kernel's table only: no dead server blocks."""
    try:
        text = _MOUNTINFO.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:  # not Linux
        text = ""
    return find_mount(text, Path(path))


def of(path: str | os.PathLike[str]) -> Filesystem:
    """The filesystem that holds ``path``, which need not exist; of kind "unknown" where the system has no mountinfo."""
    return recognize(mount_of(os.path.realpath(path)))


# --- stripes ------------------------------------------------------------------------------------------------------------
def stripe_bytes(path: str | os.PathLike[str], filesystem: Filesystem) -> int:
    """Bytes of a file that lie together on one server or device: of the file ``path``, or of new files in that folder.

    What the filesystem says of the path; else its kind's usual value, at least the block size that it reports.
    """
    path = Path(path)
    told = None
    if filesystem.kind == "lustre":
        told = parse_getstripe(_getstripe(path))
    elif filesystem.kind == "ceph":
        told = parse_ceph_layout(_ceph_layout(path))
    if told is not None:
        return told
    try:
        block = os.statvfs(path).f_bsize
    except OSError:
        block = 0
    return max(block, _STRIPES.get(filesystem.kind, _BLOCK))


def parse_getstripe(answer: str) -> int | None:
    """Bytes of a stripe from what ``lfs getstripe -S`` prints, the last number; None if there is none above 0."""
    numbers = [int(word) for word in answer.split() if word.isdigit()]
    return numbers[-1] if numbers and numbers[-1] > 0 else None


def parse_ceph_layout(layout: str) -> int | None:
    """Bytes that lie together under a layout such as ``stripe_unit=... stripe_count=... object_size=... pool=...``."""
    fields = {name: int(value) for name, value in re.findall(r"(stripe_unit|stripe_count|object_size)=(\d+)", layout)}
    # With several objects side by side, each gets one unit after the other.
    size = fields.get("object_size" if fields.get("stripe_count", 1) == 1 else "stripe_unit", 0)
    return size if size > 0 else None


def _getstripe(path: Path) -> str:
    lfs = shutil.which("lfs")
    if lfs is None:
        return ""
    # -d: of a folder, not of each file in it.
    command = [lfs, "getstripe", "-S", *(["-d"] if path.is_dir() else []), str(path)]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_LFS_S, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _ceph_layout(path: Path) -> str:
    """What is not there yet, or a folder without a layout of its own, has that of the next one above it."""
    for place in (path, *path.absolute().parents):
        name = "ceph.dir.layout" if place.is_dir() else "ceph.file.layout"
        try:
            return os.getxattr(place, name).decode("utf-8", "replace")
        except OSError as error:
            if error.errno not in (errno.ENODATA, errno.ENOENT):
                return ""
    return ""


# --- advice -------------------------------------------------------------------------------------------------------------
def lustre_stripes(shard_bytes: int, readers: int) -> int:
    """OSTs for one shard: one for each begun GiB, no more than there are readers, at most 32."""
    return max(1, min(-(-shard_bytes // _GIB), readers, 32))


def object_bytes(shard_bytes: int) -> int:
    """Bytes of a RADOS object or a chunk: a power of two near a 256th of the shard, 4 to 16 MiB.

    Smaller ones give each shard many objects to look up, larger ones keep a shard on few disks.
    """
    size = 4 * _MIB
    while size < 16 * _MIB and size * 256 < shard_bytes:
        size *= 2
    return size


def advice(filesystem: Filesystem, shard_bytes: int, readers: int) -> tuple[str, ...]:
    """What to set for shards that are written once and read by many, as commands and hints; () where nothing helps.

    POOL, SERVER and the like are to be filled in. DIR is the folder that holds the datasets, not a dataset's own,
    which ingest makes anew. Layouts hold for new files only: set them before ingest, or copy the shards.

    Args:
        shard_bytes: size of a usual shard.
        readers: processes that read at the same time, of all nodes.
    """
    kind = filesystem.kind
    if kind == "lustre":
        stripes = lustre_stripes(shard_bytes, readers)
        size = 4 if shard_bytes >= _GIB else 1
        return (
            f"lfs setstripe -c {stripes} -S {size}M DIR  # before ingest; many shards share the OSTs among themselves",
            "-c -1 means all OSTs: only for a few shards of tens of GiB; for many shards each open then asks every OST",
            "lfs getstripe -d DIR  # shows it; lfs migrate -c ... -S ... FILE applies it to shards that exist",
        )
    if kind == "ceph":
        size = object_bytes(shard_bytes)
        lines = [
            "setfattr -n ceph.dir.layout.pool -v POOL DIR  # a data pool of its own; the client's MDS caps need rwp",
            f"setfattr -n ceph.dir.layout.object_size -v {size} DIR",
            f"setfattr -n ceph.dir.layout.stripe_unit -v {size} DIR  # after object_size, which it must divide",
            "ceph osd pool set POOL size 3  # replicas; erasure coding needs half the room, but more disks a read",
        ]
        if readers >= 16:
            lines.append("mount -o read_from_replica=balance ...  # kernel client, replicated pool: reads all copies")
        return tuple(lines)
    if kind == "gluster":
        lines = [
            "gluster volume create VOLUME disperse 6 redundancy 2 SERVER1:/BRICK ... SERVER6:/BRICK  # or replica 3",
            "gluster volume get VOLUME features.shard  # should be off, it is for images of virtual machines; "
            "but where files were written with it, it must stay on",
        ]
        if readers >= 16:
            lines.append("a shard lies on one set of bricks: have many more shards than sets, or copies on the nodes")
        return tuple(lines)
    if kind == "nfs":
        connections = max(2, min(readers, 16))
        return (
            f"mount -t nfs -o ro,rsize=1048576,nconnect={connections},actimeo=600 SERVER:/EXPORT DIR",
            "actimeo: seconds for which sizes and times are believed; longer is right for files that never change",
            "one server serves all readers: beyond its network's speed only copies on the nodes help",
        )
    if kind == "beegfs":
        targets = max(1, min(-(-shard_bytes // (256 * _MIB)), readers, 8))
        chunk = 4 if shard_bytes >= _GIB else 1
        return (
            f"beegfs entry set --chunk-size={chunk}MiB --num-targets={targets} DIR  # before ingest",
            f"beegfs-ctl --setpattern --chunksize={chunk}M --numtargets={targets} DIR  # the same with the other tool",
        )
    if kind == "gpfs":
        return (
            "mmlsfs DEVICE -B  # the block size, chosen at creation, is the stripe; 1 to 16 MiB suit shards",
            "mmlsconfig pagepool  # the clients' read cache; nothing is set by folder",
        )
    if kind == "smb":
        return (
            "mount -t cifs -o ro,vers=3.1.1,rsize=4194304,actimeo=600,multichannel,max_channels=4 //SERVER/SHARE DIR",
            "one server serves all readers: copies on the nodes, or NFS, are usually faster",
        )
    if kind == "fuse":
        return (
            f"findmnt -T DIR  # {filesystem.name} is not known here: look for its block size, read-ahead and cache",
            "copy the shards to the nodes' own disks if `hvd-imaging bench io` shows slow single reads",
        )
    if kind == "memory":
        return ("df -h DIR  # memory of this node, lost at restart: good for copies, not for the only shards",)
    if kind == "unknown":
        return ("findmnt -T DIR  # this kind is not known here; measure with `hvd-imaging bench io`",)
    return ()
