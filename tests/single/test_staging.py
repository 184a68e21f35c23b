"""Copies of shards on the node: one each, within the budget, and never in training's way."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_imaging.pipeline import staging
from hvd_imaging.pipeline.staging import Entry, Staging, default_folder, order, plan
from hvd_imaging.world import World

KEY, OTHER = "ab12", "cd34"
MIB = 1 << 20


@pytest.fixture
def dataset(tmp_path):
    folder = tmp_path / "dataset"
    folder.mkdir()
    for number in range(4):
        (folder / f"shard-{number}.h5").write_bytes(os.urandom(300_000 + number))
    return folder


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "node").mkdir()
    return tmp_path / "node"


def sizes(dataset):
    return {path.name: path.stat().st_size for path in dataset.iterdir()}


def started(dataset, folder, told=None, key=KEY, budget=64 * MIB, world=None, shards=None):
    log = (lambda line: pytest.fail(line)) if told is None else told.append
    shards = sizes(dataset) if shards is None else shards
    made = Staging(dataset, shards, key, folder, budget, world or World(), log, reserve=0)
    made.start()
    assert made.wait(60)
    return made


def home(folder, key=KEY):
    return folder / f"hvd_imaging-{os.getuid()}" / key


def names(folder, key=KEY):
    return sorted(path.name for path in home(folder, key).iterdir() if path.name != ".use")


def is_staged(made, shard):
    return made.path(shard).parent == made.home


def all_staged(made, dataset):
    return all(is_staged(made, name) for name in sizes(dataset))


def test_copies_are_whole_private_and_used(dataset, folder):
    made = started(dataset, folder)
    for name in sizes(dataset):
        copy = made.path(name)
        assert copy == home(folder) / name and copy.read_bytes() == (dataset / name).read_bytes()
        assert copy.stat().st_mode & 0o777 == 0o600
    assert names(folder) == sorted(sizes(dataset)) and home(folder).parent.stat().st_mode & 0o777 == 0o700
    made.close()
    assert made.path("shard-0.h5") == dataset / "shard-0.h5"  # others may remove the copies now


def test_the_original_is_read_until_the_copy_is_there(dataset, folder):
    made = Staging(dataset, sizes(dataset), KEY, folder, MIB, World(), pytest.fail, reserve=0)
    assert made.path("shard-0.h5") == dataset / "shard-0.h5" and not made.wait(0)
    made.close()


def test_a_second_job_copies_nothing(dataset, folder, monkeypatch):
    started(dataset, folder).close()
    before = {name: (home(folder) / name).stat().st_ino for name in names(folder)}
    monkeypatch.setattr(Staging, "_copy", lambda *_: pytest.fail("copied again"))
    again = started(dataset, folder)
    assert all_staged(again, dataset)
    assert before == {name: (home(folder) / name).stat().st_ino for name in names(folder)}
    again.close()


@pytest.mark.parametrize("content", [b"", b"x" * 10, b"x" * 400_000])
def test_a_copy_of_another_size_is_made_again(dataset, folder, content):
    started(dataset, folder).close()
    (home(folder) / "shard-1.h5").write_bytes(content)
    unused = Staging(dataset, sizes(dataset), KEY, folder, MIB, World(), pytest.fail)
    assert unused.path("shard-1.h5") == dataset / "shard-1.h5"
    made = started(dataset, folder)
    assert made.path("shard-1.h5").read_bytes() == (dataset / "shard-1.h5").read_bytes() and all_staged(made, dataset)
    made.close()


def test_a_symlink_in_place_of_a_copy_is_not_followed(dataset, folder, tmp_path):
    started(dataset, folder).close()
    victim = tmp_path / "victim"
    victim.write_bytes((dataset / "shard-0.h5").read_bytes())
    (home(folder) / "shard-0.h5").unlink()
    (home(folder) / "shard-0.h5").symlink_to(victim)
    made = started(dataset, folder)
    assert not made.path("shard-0.h5").is_symlink() and victim.exists()
    made.close()


def test_a_missing_or_changed_original_is_left_to_the_reader(dataset, folder):
    shards = sizes(dataset)
    shards["shard-1.h5"] += 5
    (dataset / "shard-2.h5").unlink()
    made = started(dataset, folder, shards=shards)
    assert names(folder) == ["shard-0.h5", "shard-3.h5"]
    assert made.path("shard-1.h5").parent == made.path("shard-2.h5").parent == dataset
    made.close()


def test_an_original_that_can_not_be_read_is_left_to_the_reader(dataset, folder, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    made = started(dataset, folder)
    assert names(folder) == [] and made.path("shard-0.h5") == dataset / "shard-0.h5"
    made.close()


def test_a_forgotten_copy_is_removed_and_not_used_again(dataset, folder):
    made = started(dataset, folder)
    copy = made.path("shard-3.h5")
    made.forget("shard-3.h5")
    assert made.path("shard-3.h5") == dataset / "shard-3.h5" and not copy.exists()
    made.close()


def test_a_copy_that_a_cleaner_removed_is_not_named_for_long(dataset, folder, monkeypatch):
    monkeypatch.setattr(staging, "_MARK_S", 0.0)
    made = started(dataset, folder)
    made.path("shard-3.h5").unlink()
    assert made.path("shard-3.h5") == dataset / "shard-3.h5"
    made.close()


def test_names_of_the_layout_are_never_staged(dataset, folder):
    for name in (".use", "a.lock", "b.part"):
        (dataset / name).write_bytes(b"1")
    made = started(dataset, folder)
    assert made.path("a.lock") == dataset / "a.lock" and len(names(folder)) == 4
    made.close()


def test_the_key_is_no_way_out_of_the_folder(dataset, folder):
    with pytest.raises(ValueError, match="hex"):
        Staging(dataset, {}, "../../etc", folder, 1, World(), print)


# --- decisions


@pytest.mark.parametrize(
    "rank, size, expected", [(0, 1, "abcde"), (0, 2, "abcde"), (1, 2, "cdeab"), (2, 3, "deabc"), (6, 8, "deabc")]
)
def test_ranks_begin_at_different_shards(rank, size, expected):
    assert "".join(order(reversed("abcde"), rank, size)) == expected


def entry(shard, size, last_used=0.0, in_use=False, key=OTHER):
    return Entry(key, shard, size, last_used, in_use)


@pytest.mark.parametrize(
    "present, wanted, budget, evicted, admitted",
    [
        ([], {"a": 3, "b": 3}, 6, "", "ab"),
        ([], {"a": 3, "b": 3}, 5, "", "a"),
        ([], {"a": 7, "b": 3}, 5, "", "b"),
        ([entry("x", 5, 2), entry("y", 5, 1)], {"a": 3}, 10, "y", "a"),
        ([entry("x", 5, 2), entry("y", 5, 1)], {"a": 6}, 10, "yx", "a"),
        ([entry("x", 5, 2), entry("y", 5, 1)], {"a": 11}, 10, "", ""),  # would not fit anyway: nothing is lost for it
        ([entry("x", 5, in_use=True), entry("y", 5, 1)], {"a": 6}, 10, "", ""),
        ([entry("x", 5, in_use=True), entry("y", 5, 1)], {"a": 5}, 10, "y", "a"),
        ([entry("own", 8, in_use=True, key=KEY)], {"a": 3}, 10, "", ""),
        ([entry("x", 5, 2), entry("y", 5, 1)], {}, 7, "y", ""),  # the budget is smaller than last time
        ([entry("x", 5, in_use=True)], {"a": 0}, 3, "", ""),
        ([entry("x", 5)], {"a": 1}, -4, "x", ""),
    ],
)
def test_the_plan(present, wanted, budget, evicted, admitted):
    evict, admit = plan(present, wanted, budget)
    assert "".join(e.shard for e in evict) == evicted and "".join(admit) == admitted


entries = st.lists(
    st.builds(
        Entry,
        st.sampled_from([OTHER, "ef"]),
        st.text("xyz", min_size=1, max_size=3),
        st.integers(0, 50),
        st.floats(0, 9),
        st.booleans(),
    ),
    max_size=8,
    unique_by=lambda e: (e.key, e.shard),
)


wishes = st.dictionaries(st.text("abc", min_size=1, max_size=2), st.integers(0, 50), max_size=6)


@given(entries, wishes, st.integers(0, 150))
def test_never_above_the_budget_and_never_at_the_cost_of_those_in_use(present, wanted, budget):
    evict, admit = plan(present, wanted, budget)
    assert not any(e.in_use for e in evict) and len(set(evict)) == len(evict) and set(evict) <= set(present)
    assert set(admit) <= set(wanted) and admit == [shard for shard in wanted if shard in admit]
    after = sum(e.bytes for e in present if e not in evict) + sum(wanted[shard] for shard in admit)
    assert after <= max(budget, sum(e.bytes for e in present if e.in_use))
    assert not admit or after <= budget
    kept = [e.last_used for e in present if not e.in_use and e not in evict]
    assert not kept or not evict or max(e.last_used for e in evict) <= min(kept)
    if sum(e.bytes for e in present) + sum(wanted.values()) <= budget:
        assert (evict, admit) == ([], list(wanted))


@pytest.mark.parametrize(
    "kind, environ, expected",
    [
        ("node", {"TMPDIR": "/x"}, "/dev/shm"),
        ("disk", {"TMPDIR": "/x", "SLURM_TMPDIR": "/y"}, "/y"),
        ("disk", {"TMPDIR": "/x", "SLURM_TMPDIR": ""}, "/x"),
        ("disk", {}, "/tmp"),
    ],
)
def test_the_default_folder(kind, environ, expected):
    assert default_folder(kind, environ) == Path(expected)


@pytest.mark.parametrize(
    "folder, expected",
    [("/dev/shm", True), ("/dev/shm/a", True), ("/dev/shmem", False), ("/dev/shm/disk/a", False), ("/x y/a", True)],
)
def test_memory_is_known_by_the_innermost_mount(folder, expected):
    mounts = (
        "/dev/a / ext4 rw 0 0\ntmpfs /dev/shm tmpfs rw 0 0\n"
        "/dev/b /dev/shm/disk xfs rw 0 0\nt /x\\040y tmpfs rw 0 0\n"
    )
    assert staging._is_memory(folder, mounts) is expected


def test_a_full_machine_counts_as_a_full_memory_folder(folder, monkeypatch):
    monkeypatch.setattr(staging, "_free_memory", lambda: 5)
    assert staging._free(folder) > 5
    monkeypatch.setattr(staging, "_is_memory", lambda *_: True)
    assert staging._free(folder) == 5


def test_free_memory_is_a_number_of_bytes():
    assert MIB < staging._free_memory() < 1 << 50


# --- the budget on real files


def test_what_has_no_room_is_said_once_with_its_bytes(dataset, folder):
    told = []
    made = started(dataset, folder, told, budget=700_000)
    assert names(folder) == ["shard-0.h5", "shard-1.h5"]
    assert len(told) == 1 and "2 of 4 shards (0.6 MiB) have no room" in told[0] and "raise the budget" in told[0]
    made.close()
    silent = started(dataset, folder, budget=700_000, world=World(1, 2, 1, 2))
    silent.close()
    assert names(folder) == ["shard-0.h5", "shard-1.h5"]


def test_only_unused_copies_of_other_datasets_make_room(dataset, folder):
    running = started(dataset, folder, key=OTHER)
    told = []
    started(dataset, folder, told, budget=4 * 300_100).close()
    assert len(names(folder, OTHER)) == 4 and names(folder) == [] and len(told) == 1
    running.close()
    for age, name in enumerate(names(folder, OTHER)):
        os.utime(home(folder, OTHER) / name, (age, age))
    started(dataset, folder, shards={"shard-3.h5": 300_003}, budget=4 * 300_100).close()
    assert names(folder, OTHER) == ["shard-1.h5", "shard-2.h5", "shard-3.h5"] and names(folder) == ["shard-3.h5"]
    started(dataset, folder, budget=4 * 300_100).close()
    assert len(names(folder)) == 4 and not home(folder, OTHER).exists()


def test_use_is_marked_for_the_next_eviction(dataset, folder):
    started(dataset, folder).close()
    os.utime(home(folder) / "shard-2.h5", (5, 5))
    made = started(dataset, folder)
    made.path("shard-2.h5")
    assert time.time() - (home(folder) / "shard-2.h5").stat().st_mtime < 60
    made.close()


# --- several processes

WORKER = """
import sys, os, json, time
from pathlib import Path
from hvd_imaging.pipeline import staging
from hvd_imaging.world import World
dataset, folder, rank, size = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
slow = float(sys.argv[5])
staging._PIECE = 1 << 16
copied, copy, read = [], staging.Staging._copy, os.preadv
def slowly(*arguments):
    time.sleep(slow)
    return read(*arguments)
os.preadv = slowly
def counted(self, source, target, size):
    print("copying", flush=True)
    copy(self, source, target, size)
    copied.append(size)
staging.Staging._copy = counted
shards = {path.name: path.stat().st_size for path in dataset.iterdir()}
world, budget = World(rank, size, rank, size), int(sys.argv[6])
made = staging.Staging(dataset, shards, "ab12", folder, budget, world, print, reserve=0)
made.start()
assert made.wait(60)
print(json.dumps([len(copied), [made.path(name).parent.name for name in sorted(shards)]]), flush=True)
made.close()
"""


def worker(dataset, folder, rank=0, size=1, slow=0.0, budget=1 << 30):
    arguments = (dataset, folder, rank, size, slow, budget)
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
    )


def test_ranks_of_a_node_make_one_copy_of_each_shard(dataset, folder):
    workers = [worker(dataset, folder, rank, 3, 0.02) for rank in range(3)]
    lines = [each.communicate(timeout=60)[0].splitlines() for each in workers]
    results = [json.loads(found[-1]) for found in lines]
    assert [each.returncode for each in workers] == [0, 0, 0]
    assert sum(copied for copied, _ in results) == 4 and all(parents == [KEY] * 4 for _, parents in results)
    assert all(set(found[:-1]) <= {"copying"} for found in lines)  # no warnings
    assert names(folder) == sorted(sizes(dataset))
    assert all((home(folder) / name).read_bytes() == (dataset / name).read_bytes() for name in sizes(dataset))


def test_ranks_that_copy_at_once_stay_within_the_budget(dataset, folder):
    started(dataset, folder, key=OTHER, shards={"shard-0.h5": 300_000}).close()
    workers = [worker(dataset, folder, rank, 4, 0.02, budget=700_000) for rank in range(4)]
    most = 0
    while any(each.poll() is None for each in workers):
        found = []
        for path in home(folder).parent.glob("*/shard*"):
            try:
                found.append((path.stat().st_ino, path.stat().st_size))
            except FileNotFoundError:
                found = []  # renamed while we counted: each file is counted once, or not at all
                break
        most = max(most, sum(dict(found).values()))
        time.sleep(0.01)
    lines = [each.communicate(timeout=60)[0].splitlines() for each in workers]
    assert [each.returncode for each in workers] == [0] * 4
    assert 600_000 <= most <= 700_000 and not home(folder, OTHER).exists()
    assert sum(json.loads(found[-1])[0] for found in lines) == len(names(folder)) == 2
    assert sum("have no room" in line for found in lines for line in found) == 1


@pytest.mark.parametrize("next_key", [KEY, OTHER])
def test_the_next_job_cleans_up_after_a_killed_one(dataset, folder, next_key):
    victim = worker(dataset, folder, slow=0.3)
    assert victim.stdout.readline() == "copying\n"
    assert any(name.endswith(".part") for name in names(folder))
    victim.send_signal(signal.SIGKILL)
    victim.communicate(timeout=30)
    assert any(name.endswith(".part") for name in names(folder))
    made = started(dataset, folder, key=next_key)
    assert names(folder) == (sorted(sizes(dataset)) if next_key == KEY else [])
    assert all_staged(made, dataset)
    made.close()


def test_the_copies_of_a_live_process_are_left_alone(dataset, folder):
    live = worker(dataset, folder, slow=0.1)
    assert live.stdout.readline() == "copying\n"
    made = started(dataset, folder, key=OTHER)
    assert all_staged(made, dataset)
    made.close()
    assert "staging" not in live.communicate(timeout=60)[0] and live.returncode == 0
    assert len(names(folder)) == 4


def test_a_rank_takes_over_what_a_killed_one_had_begun(dataset, folder):
    victim = worker(dataset, folder, slow=0.5)
    assert victim.stdout.readline() == "copying\n"
    made = Staging(dataset, sizes(dataset), KEY, folder, 64 * MIB, World(), pytest.fail, reserve=0)
    made.start()
    assert not made.wait(0.5)
    victim.send_signal(signal.SIGKILL)
    victim.communicate(timeout=30)
    assert made.wait(30) and all_staged(made, dataset) and names(folder) == sorted(sizes(dataset))
    made.close()


def test_who_counts_and_reserves_is_alone(dataset, folder):
    started(dataset, folder, shards={}).close()
    lock = staging._open_lock(home(folder).parent / ".lock")
    assert staging._try_lock(lock)
    made = Staging(dataset, sizes(dataset), KEY, folder, 64 * MIB, World(), pytest.fail, reserve=0)
    made.start()
    assert not made.wait(0.3) and names(folder) == []
    staging._unlock(lock)
    assert made.wait(30) and all_staged(made, dataset)
    made.close()


def test_what_others_reserved_but_did_not_write_yet_is_not_free(dataset, folder, monkeypatch):
    other = started(dataset, folder, key=OTHER, shards={})
    with open(home(folder, OTHER) / "big.h5.1.part", "wb") as part:
        part.truncate(10 * MIB)
    claim = staging._claim(home(folder, OTHER) / "big.h5.lock")
    monkeypatch.setattr(staging, "_free", lambda folder: 10 * MIB + 700_000)
    told = []
    made = started(dataset, folder, told, shards={"shard-0.h5": 300_000})
    assert is_staged(made, "shard-0.h5") and told == []
    made.close()
    monkeypatch.setattr(staging, "_free", lambda folder: 10 * MIB + 200_000)
    made = started(dataset, folder, told, shards={"shard-1.h5": 300_001})
    assert not is_staged(made, "shard-1.h5") and len(told) == 1
    made.close()
    staging._unlock(claim)
    other.close()


def test_a_claim_on_a_lock_file_that_its_owner_removed_meanwhile_is_made_anew(tmp_path, monkeypatch):
    path, lock, calls = tmp_path / "a.lock", staging._try_lock, []

    def removed_before_the_first(handle):
        if not calls:
            path.unlink()
        calls.append(handle)
        return lock(handle)

    monkeypatch.setattr(staging, "_try_lock", removed_before_the_first)
    claim = staging._claim(path)
    assert len(calls) == 2 and os.fstat(claim).st_ino == path.stat().st_ino
    assert staging._claim(path) is None
    staging._unlock(claim)


def test_close_stops_in_the_middle_and_leaves_no_part(dataset, folder, monkeypatch):
    monkeypatch.setattr(staging, "_PIECE", 1 << 12)
    read = os.preadv

    def slowly(*arguments):
        time.sleep(0.02)
        return read(*arguments)

    monkeypatch.setattr(os, "preadv", slowly)
    made = Staging(dataset, sizes(dataset), KEY, folder, 64 * MIB, World(), pytest.fail, reserve=0)
    made.start()
    deadline = time.monotonic() + 20
    while not (home(folder).exists() and any(name.endswith(".part") for name in names(folder))):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    made.close()
    assert names(folder) == []


# --- a folder that cannot be used


@pytest.fixture
def mount(tmp_path):
    """Makes a small memory filesystem with the given options."""
    places = []

    def make(options):
        place = tmp_path / f"mount{len(places)}"
        place.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True)
        if done.returncode:
            pytest.skip("this user may not mount a filesystem")
        places.append(place)
        return place

    yield make
    for place in places:
        subprocess.run(["umount", str(place)], check=True)


def test_a_small_folder_is_filled_as_far_as_it_goes(dataset, mount):
    place, told = mount("size=1m,mode=1777"), []
    made = started(dataset, place, told)
    assert names(place) == ["shard-0.h5", "shard-1.h5", "shard-2.h5"]
    assert len(told) == 1 and "1 of 4 shards (0.3 MiB) have no room" in told[0] and str(place) in told[0]
    assert made.path("shard-3.h5") == dataset / "shard-3.h5" and made.path("shard-0.h5").parent == home(place)
    made.close()


def test_a_disk_that_fills_up_in_mid_copy_costs_one_warning(dataset, mount, monkeypatch):
    place, told = mount("size=1m,mode=1777"), []
    monkeypatch.setattr(staging, "_free", lambda folder: 1 << 40)  # as if another program took the space meanwhile
    made = started(dataset, place, told)
    assert names(place) == ["shard-0.h5", "shard-1.h5", "shard-2.h5"]
    assert len(told) == 1 and "No space left on device (0.3 MiB still to copy" in told[0] and "free)" in told[0]
    assert made.path("shard-3.h5") == dataset / "shard-3.h5" and made.path("shard-0.h5").parent == home(place)
    made.close()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EIO])
def test_a_write_that_fails_costs_one_warning(dataset, folder, monkeypatch, code):
    def fails(*_):
        raise OSError(code, os.strerror(code))

    told = []
    with monkeypatch.context() as patch:
        patch.setattr(staging, "os", SimpleNamespace(**{**vars(os), "write": fails}))
        made = started(dataset, folder, told, world=World(1, 2, 1, 2))
    assert names(folder) == [] and made.path("shard-0.h5") == dataset / "shard-0.h5"
    assert len(told) == 1 and os.strerror(code) in told[0] and "1.1 MiB still to copy" in told[0]
    assert str(folder) in told[0] and "choose another" in told[0]
    made.close()


def test_a_read_only_folder_costs_one_warning_a_node(dataset, mount):
    place, told = mount("size=1m,ro"), []
    for rank in range(2):
        made = started(dataset, place, told, world=World(rank, 2, rank, 2))
        assert made.path("shard-0.h5") == dataset / "shard-0.h5"
        made.close()
    assert len(told) == 1 and "Read-only file system" in told[0]


def test_a_missing_folder_costs_one_warning(dataset, tmp_path):
    told = []
    made = started(dataset, tmp_path / "nowhere", told)
    assert len(told) == 1 and "No such file" in told[0] and made.path("shard-0.h5") == dataset / "shard-0.h5"
    made.close()


def refused(dataset, folder):
    told = []
    made = started(dataset, folder, told)
    assert made.path("shard-0.h5") == dataset / "shard-0.h5"
    made.close()
    assert len(told) == 1
    return told[0]


def test_a_symlink_in_place_of_our_folder_is_refused(dataset, folder, tmp_path):
    (tmp_path / "trap").mkdir()
    home(folder).parent.symlink_to(tmp_path / "trap")
    assert "expected a folder, found a symlink" in refused(dataset, folder)
    assert list((tmp_path / "trap").iterdir()) == []


def test_the_folder_of_another_user_is_refused(dataset, folder, monkeypatch):
    home(folder).parent.mkdir()
    if os.getuid() == 0:
        os.chown(home(folder).parent, 4321, 4321)
        found = 4321
    else:
        found, name = os.getuid(), home(folder).parent
        monkeypatch.setattr(staging.os, "getuid", lambda: found + 1)
        name.rename(home(folder).parent)
    assert f"belongs to user {found}" in refused(dataset, folder)
    assert list(home(folder).parent.iterdir()) == []


def test_a_folder_where_all_may_rename_is_refused(dataset, folder):
    folder.chmod(0o777)
    assert "sticky" in refused(dataset, folder)
    folder.chmod(0o1777)
    started(dataset, folder).close()


def test_our_own_folder_is_closed_to_others(dataset, folder):
    home(folder).parent.mkdir(mode=0o755)
    started(dataset, folder).close()
    assert home(folder).parent.stat().st_mode & 0o777 == 0o700
