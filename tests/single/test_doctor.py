"""The doctor: each judgement as a table, and one real examination."""

import dataclasses
import json
import subprocess
import sys
import time

import pytest

from hvd_imaging import doctor
from hvd_imaging.doctor import Folder
from hvd_imaging.filesystem import Filesystem


def levels(findings):
    return {finding.name: finding.level for finding in findings}


FULL = dict.fromkeys(doctor.PACKAGES, "1.0")


@pytest.mark.parametrize(
    ("python", "level"),
    [((3, 9, 18), "error"), ((3, 10, 0), "error"), ((3, 11, 7), "ok"), ((3, 12, 4), "ok"), ((3, 13, 0), "error"), ((4, 0, 0), "error")],
)
def test_python(python, level):
    assert levels(doctor.judge_versions(python, FULL))["python"] == level


@pytest.mark.parametrize(("missing", "level"), [("numpy", "error"), ("pydicom", "error"), ("tensorflow", "warning"), ("mpi4py", "warning")])
def test_the_base_is_needed_and_training_is_a_choice(missing, level):
    found = levels(doctor.judge_versions((3, 11, 0), FULL | {missing: None}))
    assert found.pop(missing) == level
    assert set(found.values()) == {"ok"}


@pytest.mark.parametrize(
    ("line", "level", "mend"),
    [
        (None, "warning", "scripts/setup_env.sh"),
        ("", "error", "mpirun --version"),
        ("mpirun (Open MPI) 4.1.8", "ok", ""),
        ("mpirun (Open MPI) 5.0.11", "warning", "--binding-args"),
        ("HYDRA build details:", "ok", ""),
    ],
)
def test_mpirun(line, level, mend):
    found = doctor.judge_mpirun(line)
    assert found.level == level and mend in found.mend


@pytest.mark.parametrize(
    ("mpi4py", "horovod", "level", "shown"),
    [
        ("/a/libmpi.so.40", "/a/libmpi.so.40", "ok", "one MPI library"),
        ("/a/libmpi.so.40", "/b/libmpi.so.12", "error", "two MPI libraries"),
        (None, "/b/libmpi.so.12", "warning", "of mpi4py is not known"),
        (None, None, "warning", "of mpi4py and Horovod is not known"),
    ],
)
def test_two_mpi_libraries_are_an_error(mpi4py, horovod, level, shown):
    found = doctor.judge_same_mpi(mpi4py, horovod)
    assert found.level == level and shown in found.found


@pytest.mark.parametrize(
    ("answer", "level"),
    [
        (None, "warning"),
        ("ImportError: undefined symbol", "error"),
        ({"mpi": True, "gloo": True, "nccl": False}, "ok"),
        ({"mpi": False, "gloo": True, "nccl": False}, "error"),
        ({"mpi": True, "gloo": False, "nccl": False}, "warning"),
    ],
)
def test_horovods_build(answer, level):
    assert doctor.judge_horovod(answer).level == level


@pytest.mark.parametrize(
    ("flags", "exported", "level", "shown"),
    [
        ({"avx2"}, None, "ok", "TensorFlow alone leaves off"),
        ({"avx2", "avx512f"}, None, "ok", "AVX-512"),
        ({"avx2"}, "1", "ok", "AVX2"),
        ({"avx2"}, "0", "warning", "off by TF_ENABLE_ONEDNN_OPTS=0"),
        (set(), None, "ok", "no AVX2"),
    ],
)
def test_onednn(flags, exported, level, shown):
    found = doctor.judge_onednn(frozenset(flags), exported)
    assert found.level == level and shown in found.found


@pytest.mark.parametrize(
    ("sets", "shown"),
    [
        (("avx2", "avx512f", "avx512bw", "avx512_vnni", "amx_int8"), "x86_64, AVX-512 VNNI and AMX: 8-bit exports have instructions of their own"),
        (("fma", "avx2"), "AVX2 without VNNI: no instructions for 8 bit: such exports are smaller, and may be no faster"),
        (("avx2", "avx512f", "avx512bw"), "AVX-512 without VNNI: no instructions for 8 bit"),
        ((), "instruction sets not known"),
    ],
)
def test_what_the_processor_means_for_integers(sets, shown):
    found = doctor.judge_processor("x86_64", sets)
    assert found.level == "ok" and shown in found.found and " ".join(sets) in found.found


@pytest.mark.parametrize(("exported", "level"), [(None, "ok"), ("2", "ok"), ("4", "ok"), ("8", "warning"), ("many", "ok")])
def test_more_threads_than_cores(exported, level):
    assert doctor.judge_threads(4, 8, exported).level == level


@pytest.mark.parametrize(
    ("filters", "level"),
    [({"gzip": True, "lzf": True}, "ok"), ({"gzip": True, "lzf": False}, "error"), ("No module named 'h5py'", "error")],
)
def test_hdf5_filters(filters, level):
    assert doctor.judge_filters(filters).level == level


@pytest.mark.parametrize(
    ("folder", "level", "shown"),
    [
        (Folder("data", False, False, "", None), "error", "no such folder"),
        (Folder("data", True, False, "lustre", None), "warning", "read-only"),
        (Folder("data", True, True, "ext4", None), "ok", "file locks work"),
        (Folder("data", True, True, "nfs", "No locks available"), "warning", "No locks available"),
    ],
)
def test_the_data_folder(folder, level, shown):
    (found,) = doctor.judge_folder(folder)
    assert found.level == level and shown in found.found and "data" in found.found


def test_no_folder_no_finding():
    assert list(doctor.judge_folder(None)) == list(doctor.judge_filesystem(None)) == []


@pytest.mark.parametrize(
    ("exported", "level"),
    [(None, "warning"), ("", "warning"), ("TRUE", "warning"), ("BEST_EFFORT", "warning"), ("FALSE", "ok"), ("0", "ok")],
)
def test_failing_locks_matter_to_programs_that_lock(exported, level):
    (found,) = doctor.judge_folder(Folder("data", True, True, "lustre", "HDF5: Function not implemented"), exported)
    assert found.level == level and "Function not implemented" in found.found
    assert ("HDF5_USE_FILE_LOCKING=FALSE" in found.mend) == (level == "warning")


def test_a_filesystem_without_an_answer_is_an_error():
    (found,) = doctor.judge_folder(Folder("data", True, False, "nfs4", None, hangs=True))
    assert found.level == "error" and "nfs4" in found.found and "does not answer" in found.found


@pytest.mark.parametrize(
    ("filesystem", "level", "shown"),
    [
        (Filesystem("lustre", "lustre", True), "ok", "lustre, shared by nodes, stripes of 1 MiB"),
        (Filesystem("fuse.ceph-fuse", "ceph", True), "ok", "ceph (fuse.ceph-fuse), shared by nodes, stripes of 1 MiB"),
        (Filesystem("ext4", "local", False), "ok", "local (ext4), of this node"),
        (Filesystem("9p", "unknown", True), "warning", "9p: not recognized"),
    ],
)
def test_the_filesystem_is_named(filesystem, level, shown):
    (found,) = doctor.judge_filesystem((filesystem, 1 << 20))
    assert (found.level, found.found) == (level, shown)
    assert bool(found.mend) == (level != "ok")


def test_trying_a_folder_leaves_nothing_in_it(tmp_path):
    found = doctor.try_folder(tmp_path)
    assert found.exists and found.writable and found.lock is None
    assert list(tmp_path.iterdir()) == []
    assert not doctor.try_folder(tmp_path / "nowhere").exists


def test_locks_are_tried_even_if_hdf5_is_told_not_to(tmp_path, monkeypatch):
    monkeypatch.setenv("HDF5_USE_FILE_LOCKING", "FALSE")
    # Another process holds the lock that HDF5 asks for, on whatever file it opens.
    script = doctor._TRY.replace("    h5py.File(path, \"r\"", "    held = open(path); fcntl.flock(held, fcntl.LOCK_EX)\n    h5py.File(path, \"r\"")
    assert script != doctor._TRY
    monkeypatch.setattr(doctor, "_TRY", script)
    found = doctor.try_folder(tmp_path)
    assert found.writable and found.lock and found.lock.startswith("HDF5: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("before", "folder"),
    [
        ("if not os.path.isdir(folder)", {"hangs": True, "writable": False, "lock": None}),
        ("    fcntl.lockf(handle, fcntl.LOCK_EX", {"hangs": False, "writable": True, "lock": "fcntl: no answer in 1 s, HDF5: no answer in 1 s"}),
    ],
)
@pytest.mark.parametrize("deaf", [False, True])
def test_a_hanging_filesystem_is_told_in_time(tmp_path, monkeypatch, before, folder, deaf):
    place = len(before) - len(before.lstrip())
    hang = ("signal.signal(signal.SIGTERM, signal.SIG_IGN); " if deaf else "") + "import time; time.sleep(60)\n"
    script = doctor._TRY.replace(before, f"{' ' * place}{hang}{before}", 1)
    assert script != doctor._TRY
    monkeypatch.setattr(doctor, "_TRY", script)
    monkeypatch.setattr(doctor, "_LEAVE_S", 0.5)
    begun = time.monotonic()
    found = doctor.try_folder(tmp_path, seconds=1)
    assert time.monotonic() - begun < 10
    assert {name: getattr(found, name) for name in folder} == folder
    assert deaf or list(tmp_path.iterdir()) == []


def test_the_filesystem_is_that_of_the_longest_mount(tmp_path):
    place = tmp_path.resolve()
    mounts = f"a / ext4 rw 0 0\nb {place} nfs4 rw 0 0\nc {place}/data lustre rw 0 0\nd {place}/dat xfs rw 0 0\nshort\n"
    assert doctor.filesystem_of(place / "data" / "x", mounts) == "lustre"
    assert doctor.filesystem_of(place / "other", mounts) == "nfs4"
    assert doctor.filesystem_of(place.parent, mounts) == "ext4"
    assert doctor.filesystem_of(place, "") == "unknown"


@pytest.mark.parametrize(
    ("sinfo", "sbatch", "level"),
    [("/usr/bin/sinfo", "/usr/bin/sbatch", "ok"), (None, "/usr/bin/sbatch", "warning"), (None, None, "warning")],
)
def test_slurm(sinfo, sbatch, level):
    assert doctor.judge_slurm(sinfo, sbatch).level == level


@pytest.mark.parametrize(
    ("package", "answer", "level"),
    [(None, None, "warning"), ("5.2", None, "ok"), ("5.2", "", "ok"), ("5.2", "ConnectionError", "error")],
)
def test_redis(package, answer, level):
    assert doctor.judge_redis(package, answer).level == level


def test_what_redis_says_never_shows_the_password():
    pytest.importorskip("redis")
    answer = doctor.ask_redis("redis://:secret@127.0.0.1:1/0")
    assert answer and "secret" not in answer
    assert "secret" not in repr(doctor.judge_redis("5.2", answer))


def test_what_is_wrong_comes_with_a_mend():
    broken = [
        *doctor.judge_versions((3, 9, 0), dict.fromkeys(doctor.PACKAGES)),
        doctor.judge_mpirun(None), doctor.judge_mpirun(""), doctor.judge_mpirun("mpirun (Open MPI) 5.0.1"),
        doctor.judge_same_mpi("/a", "/b"), doctor.judge_same_mpi(None, None),
        doctor.judge_horovod(None), doctor.judge_horovod("broken"), doctor.judge_horovod({"mpi": False}),
        doctor.judge_onednn(frozenset(), "0"), doctor.judge_threads(1, 2, "9"), doctor.judge_filters({"gzip": False}),
        *doctor.judge_folder(Folder("x", False, False, "", None)), *doctor.judge_folder(Folder("x", True, False, "", None)),
        *doctor.judge_folder(Folder("x", True, True, "nfs", "refused")), *doctor.judge_folder(Folder("x", True, False, "nfs", None, True)),
        *doctor.judge_filesystem((Filesystem("9p", "unknown", True), 4096)),
        doctor.judge_slurm(None, None), doctor.judge_redis(None, None), doctor.judge_redis("5", "TimeoutError"),
    ]  # fmt: skip
    assert [finding for finding in broken if finding.level == "ok" or not finding.mend] == []


def test_this_installation_is_whole(tmp_path):
    pytest.importorskip("horovod")
    command = [sys.executable, "-m", "hvd_imaging.cli.main", "doctor", "--json", "--data", "."]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    findings = json.loads(done.stdout)
    fields = {field.name for field in dataclasses.fields(doctor.Finding)}
    assert all(set(finding) == fields for finding in findings)
    found = {finding["name"]: finding["level"] for finding in findings}
    assert found["tensorflow"] == found["horovod"] == found["mpi4py and Horovod"] == found["Horovod build"] == "ok"
    assert found["data folder"] == "ok" and "file system" in found and "error" not in found.values()


def test_an_error_ends_with_1(tmp_path, monkeypatch):
    from click.testing import CliRunner

    from hvd_imaging.cli.doctor import command

    bad = doctor.Finding("thing", "error", "broken", "mend it")
    monkeypatch.setattr(doctor, "examine", lambda data: [bad])
    done = CliRunner().invoke(command, [])
    assert done.exit_code == 1
    assert "broken" in done.output and "-> mend it" in done.output and "1 error, 0 warnings" in done.output
