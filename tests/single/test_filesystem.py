"""Filesystems: mountinfo, recognition, stripes and advice, as tables."""

import errno
import subprocess
from pathlib import Path

import pytest

from hvd_imaging import filesystem
from hvd_imaging.filesystem import Filesystem, Mount, find_mount, recognize

ROOT = "27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw,discard"
LINES = {
    "lustre": "90 27 0:61 / /data rw,noatime shared:50 - lustre 10.0.0.1@o2ib:10.0.0.2@o2ib:/scratch rw,checksum,flock,user_xattr",
    "ceph": "91 27 0:62 / /data rw,relatime shared:51 - ceph ai@07fe3187-00d9-42a3-814b-72a4d5e7d5be.fs=/ rw,name=ai,ms_mode=crc",
    "fuse.ceph-fuse": "92 27 0:63 / /data rw,nosuid,nodev shared:52 - fuse.ceph-fuse ceph-fuse rw,user_id=0,allow_other",
    "fuse.ceph": "92 27 0:63 / /data rw,nosuid,nodev - fuse.ceph ceph-fuse rw,user_id=0,allow_other",
    "fuse.glusterfs": "93 27 0:64 / /data rw - fuse.glusterfs g1:/vol rw,user_id=0,default_permissions,max_read=131072",
    "nfs": "94 27 0:65 / /data ro,relatime shared:53 - nfs nas:/export/ai ro,vers=3,rsize=1048576,local_lock=none",
    "nfs4": "95 27 0:66 / /data rw,relatime shared:54 master:2 - nfs4 nas:/export rw,vers=4.2,rsize=1048576,nconnect=8",
    "beegfs": "96 27 0:67 / /data rw,relatime - beegfs beegfs_nodev rw,cfgFile=/etc/beegfs/beegfs-client.conf",
    "gpfs": "97 27 0:68 / /data rw,relatime shared:55 - gpfs gpfs0 rw",
    "cifs": "98 27 0:69 / /data rw,relatime - cifs //nas/share rw,vers=3.1.1,cache=strict,rsize=4194304",
    "smb3": "98 27 0:69 / /data rw,relatime - smb3 //nas/share rw,vers=3.1.1",
    "fuse.sshfs": "99 27 0:70 / /data rw,nosuid,nodev - fuse.sshfs me@host:/data rw,user_id=1000,group_id=1000",
    "fuse": "99 27 0:70 / /data rw - fuse thing rw",
    "tmpfs": "100 27 0:71 / /data rw,nosuid,nodev shared:4 - tmpfs tmpfs rw,size=24684092k,inode64",
    "ramfs": "100 27 0:71 / /data rw - ramfs none rw",
    "ext4": "101 27 259:1 / /data rw,relatime shared:30 - ext4 /dev/nvme0n1p1 rw",
    "xfs": "101 27 259:1 / /data rw,relatime shared:30 - xfs /dev/mapper/vg-data rw,attr2,inode64,logbufs=8",
    "btrfs": "102 27 0:45 /@data /data rw,relatime shared:31 - btrfs /dev/sda2 rw,ssd,subvolid=257,subvol=/@data",
    "zfs": "103 27 0:46 / /data rw,relatime - zfs tank/data rw,xattr,posixacl",
    "overlay": "104 27 0:47 / /data rw,relatime - overlay overlay rw,lowerdir=/a:/b,upperdir=/c,workdir=/d",
    "f2fs": "105 27 259:2 / /data rw - f2fs /dev/sdb1 rw",
    "9p": "106 27 0:48 / /data rw,relatime - 9p host0 rw,trans=virtio",
    "autofs": "107 27 0:49 / /data rw,relatime - autofs /etc/auto.data rw,fd=6,pgrp=1,timeout=300,indirect",
}


def mountinfo(*lines):
    return "\n".join((ROOT, *lines)) + "\n"


@pytest.mark.parametrize(
    ("name", "kind", "shared"),
    [
        ("lustre", "lustre", True),
        ("ceph", "ceph", True),
        ("fuse.ceph", "ceph", True),
        ("fuse.ceph-fuse", "ceph", True),
        ("fuse.glusterfs", "gluster", True),
        ("nfs", "nfs", True),
        ("nfs4", "nfs", True),
        ("beegfs", "beegfs", True),
        ("gpfs", "gpfs", True),
        ("cifs", "smb", True),
        ("smb3", "smb", True),
        ("fuse.sshfs", "fuse", True),
        ("fuse", "fuse", True),
        ("tmpfs", "memory", False),
        ("ramfs", "memory", False),
        ("ext4", "local", False),
        ("xfs", "local", False),
        ("btrfs", "local", False),
        ("zfs", "local", False),
        ("overlay", "local", False),
        ("f2fs", "local", False),
        ("9p", "unknown", True),
        ("autofs", "unknown", True),
    ],
)
def test_each_kind_is_recognized_from_its_line(name, kind, shared):
    mount = find_mount(mountinfo(LINES[name]), Path("/data/set/shard-00000.h5"))
    assert mount.point == Path("/data")
    assert recognize(mount) == Filesystem(name, kind, shared)


def test_a_mount_has_its_source_and_both_kinds_of_options():
    mount = find_mount(mountinfo(LINES["nfs"]), Path("/data"))
    assert mount == Mount("nfs", Path("/data"), "nas:/export/ai", ("ro", "relatime", "vers=3", "rsize=1048576", "local_lock=none"))


@pytest.mark.parametrize(
    ("path", "kind"),
    [("/data", "nfs4"), ("/data/x", "nfs4"), ("/data/fast", "xfs"), ("/data/fast/a/b", "xfs"), ("/data/faster", "nfs4"), ("/database", "ext4"), ("/", "ext4")],
)
def test_the_longest_mount_point_wins_by_whole_names(path, kind):
    inner = "110 95 259:3 / /data/fast rw - xfs /dev/nvme1n1 rw"
    assert find_mount(mountinfo(LINES["nfs4"], inner), Path(path)).kind == kind
    assert find_mount(mountinfo(inner, LINES["nfs4"]), Path(path)).kind == kind


def test_of_equal_mount_points_the_last_covers_the_others():
    assert find_mount(mountinfo(LINES["autofs"], LINES["nfs4"]), Path("/data/x")).kind == "nfs4"
    assert find_mount(mountinfo(LINES["nfs4"], LINES["tmpfs"]), Path("/data/x")).kind == "tmpfs"


def test_a_bind_mount_is_of_the_filesystem_behind_it():
    bind = "120 27 0:61 /projects/ai /people/me/ai\\040data rw,noatime shared:50 - lustre 10.0.0.1@o2ib:/scratch rw,flock"
    mount = find_mount(mountinfo(LINES["lustre"], bind), Path("/people/me/ai data/set"))
    assert (mount.kind, mount.point) == ("lustre", Path("/people/me/ai data"))
    assert find_mount(mountinfo(bind), Path("/people/me")).kind == "ext4"


@pytest.mark.parametrize(("written", "meant"), [(r"a\040b", "a b"), (r"a\011b", "a\tb"), (r"a\012b", "a\nb"), (r"a\134b", "a\\b"), (r"a\134040b", r"a\040b"), (r"a\043b", "a#b")])
def test_escapes(written, meant):
    line = f"90 27 0:61 / /mnt/{written} rw - nfs nas:/{written} rw"
    mount = find_mount(mountinfo(line), Path("/mnt") / meant / "x")
    assert mount.point == Path("/mnt") / meant and mount.source == f"nas:/{meant}"


@pytest.mark.parametrize("text", ["", "\n", "short\n", "1 2 3:4 / /data rw\n", "1 2 3 - ext4\n", "90 27 0:61 / /data rw - nfs\n"])
def test_what_is_not_a_mount_is_left_out(text):
    mount = find_mount(text, Path("/data"))
    assert recognize(mount) == Filesystem("unknown", "unknown", True)


def test_the_filesystem_of_a_real_folder(tmp_path):
    found = filesystem.of(tmp_path)
    assert found.name and found == filesystem.of(tmp_path / "not" / "there")
    assert filesystem.stripe_bytes(tmp_path, found) >= 4096
    (tmp_path / "link").symlink_to("/proc")
    assert filesystem.of(tmp_path / "link").name == "proc"


def test_without_mountinfo_it_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(filesystem, "_MOUNTINFO", tmp_path / "nowhere")
    assert filesystem.of(tmp_path) == Filesystem("unknown", "unknown", True)


# --- stripes ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("answer", "size"),
    [("4194304\n", 4194304), ("stripe_size:   1048576\n", 1048576), ("/scratch/set\n1048576\n", 1048576), ("0\n", None), ("", None), ("-1", None)],
)
def test_what_lfs_prints(answer, size):
    assert filesystem.parse_getstripe(answer) == size


@pytest.mark.parametrize(
    ("layout", "size"),
    [
        ("stripe_unit=4194304 stripe_count=1 object_size=4194304 pool=data", 4 << 20),
        ("stripe_unit=1048576 stripe_count=1 object_size=8388608 pool=data", 8 << 20),
        ("stripe_unit=1048576 stripe_count=8 object_size=8388608 pool=data", 1 << 20),
        ("", None),
        ("pool=data", None),
    ],
)
def test_what_ceph_says(layout, size):
    assert filesystem.parse_ceph_layout(layout) == size


def test_lfs_is_asked_for_the_folder_itself(tmp_path, monkeypatch):
    asked = []

    def run(command, **options):
        asked.append((command, options["timeout"]))
        return subprocess.CompletedProcess(command, 0, stdout="2097152\n")

    monkeypatch.setattr(filesystem.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(filesystem.subprocess, "run", run)
    assert filesystem.stripe_bytes(tmp_path, Filesystem("lustre", "lustre", True)) == 2 << 20
    assert asked == [(["/usr/bin/lfs", "getstripe", "-S", "-d", str(tmp_path)], 10.0)]
    (tmp_path / "shard").touch()
    filesystem.stripe_bytes(tmp_path / "shard", Filesystem("lustre", "lustre", True))
    assert "-d" not in asked[1][0]


@pytest.mark.parametrize("failure", [subprocess.TimeoutExpired("lfs", 10), FileNotFoundError()])
def test_lfs_that_does_not_answer_leaves_the_usual_value(tmp_path, monkeypatch, failure):
    def run(*_, **__):
        raise failure

    monkeypatch.setattr(filesystem.shutil, "which", lambda name: name)
    monkeypatch.setattr(filesystem.subprocess, "run", run)
    assert filesystem.stripe_bytes(tmp_path, Filesystem("lustre", "lustre", True)) == 1 << 20


def test_a_ceph_folder_without_a_layout_has_that_above_it(tmp_path, monkeypatch):
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)

    def getxattr(path, name):
        assert name == ("ceph.dir.layout" if Path(path).is_dir() else "ceph.file.layout")
        if Path(path) == tmp_path:
            return b"stripe_unit=8388608 stripe_count=1 object_size=8388608 pool=shards"
        raise OSError(errno.ENODATA if Path(path).exists() else errno.ENOENT, "none")

    monkeypatch.setattr(filesystem.os, "getxattr", getxattr)
    ceph = Filesystem("ceph", "ceph", True)
    assert filesystem.stripe_bytes(inner, ceph) == filesystem.stripe_bytes(inner / "shard", ceph) == 8 << 20


@pytest.mark.parametrize(
    ("kind", "least"), [("lustre", 1 << 20), ("ceph", 4 << 20), ("beegfs", 512 << 10), ("nfs", 4096), ("local", 4096), ("unknown", 4096)]
)
def test_the_usual_stripe_where_nothing_is_told(tmp_path, monkeypatch, kind, least):
    monkeypatch.setattr(filesystem.shutil, "which", lambda name: None)
    found = Filesystem(kind, kind, True)
    assert least <= filesystem.stripe_bytes(tmp_path, found) == filesystem.stripe_bytes(tmp_path, found)
    assert filesystem.stripe_bytes(tmp_path / "nowhere", found) == least


# --- advice -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "commands"),
    [
        ("lustre", ("lfs setstripe -c 1 -S 1M DIR", "-1 means all OSTs")),
        ("ceph", ("setfattr -n ceph.dir.layout.pool", "ceph.dir.layout.object_size -v 4194304", "size 3", "read_from_replica=balance")),
        ("gluster", ("disperse 6 redundancy 2", "features.shard")),
        ("nfs", ("rsize=1048576,nconnect=16,actimeo=600", " ro,")),
        ("beegfs", ("beegfs entry set --chunk-size=1MiB --num-targets=1", "beegfs-ctl --setpattern --chunksize=1M --numtargets=1")),
        ("gpfs", ("mmlsfs DEVICE -B",)),
        ("smb", ("mount -t cifs -o ro",)),
        ("fuse", ("findmnt -T DIR",)),
        ("memory", ("df -h DIR",)),
        ("unknown", ("findmnt -T DIR",)),
    ],
)
def test_advice_holds_the_command(kind, commands):
    lines = filesystem.advice(Filesystem(kind, kind, True), 256 << 20, 32)
    assert [command for command in commands if not any(command in line for line in lines)] == []
    assert all(len(line) < 160 and "\n" not in line for line in lines)


def test_a_local_disk_needs_no_advice():
    assert filesystem.advice(Filesystem("xfs", "local", False), 1 << 30, 8) == ()


@pytest.mark.parametrize(
    ("shard_bytes", "readers", "stripes"),
    [(0, 0, 1), (1, 8, 1), (1 << 30, 8, 1), ((1 << 30) + 1, 8, 2), (16 << 30, 4, 4), (16 << 30, 64, 16), (1 << 40, 512, 32)],
)
def test_stripes_follow_the_shard_and_its_readers(shard_bytes, readers, stripes):
    assert filesystem.lustre_stripes(shard_bytes, readers) == stripes


@pytest.mark.parametrize(("shard_bytes", "size"), [(0, 4), (256 << 20, 4), (1 << 30, 4), (2 << 30, 8), (4 << 30, 16), (1 << 40, 16)])
def test_objects_grow_with_the_shard(shard_bytes, size):
    assert filesystem.object_bytes(shard_bytes) == size << 20
