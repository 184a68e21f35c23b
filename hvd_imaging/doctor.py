"""What an installation has, and how to mend what it lacks.

Each probe gathers plain facts (files, processes, environment), each judgement is a pure function of facts. Works in the base
install: nothing here imports TensorFlow, Horovod or mpi4py; what they say is asked of a process of its own.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from . import bootstrap, processor
from . import filesystem as filesystems
from .filesystem import Filesystem
from .world import World

Level = Literal["ok", "warning", "error"]
SETUP = "run scripts/setup_env.sh"


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was found, and the mend where something is wrong."""

    name: str
    level: Level
    found: str
    mend: str = ""


def examine(data: Path | None = None) -> list[Finding]:
    """All findings; ``data`` is a folder whose file system is tried out."""
    libraries = {name: library_of(name) for name in ("mpi4py", "horovod")}
    talk = ask_horovod() if installed("horovod") and installed("tensorflow") else None
    folder = try_folder(data) if data else None
    return [
        *judge_versions(sys.version_info[:3], {name: version(name) for name in PACKAGES}),
        judge_mpirun(mpirun_version()),
        judge_same_mpi(libraries["mpi4py"], libraries["horovod"]),
        judge_horovod(talk),
        judge_processor(processor.architecture(), processor.instruction_sets()),
        judge_onednn(processor.instruction_sets(), os.environ.get("TF_ENABLE_ONEDNN_OPTS")),
        judge_filters(hdf5_filters()),
        judge_threads(len(os.sched_getaffinity(0)), os.cpu_count() or 1, os.environ.get("OMP_NUM_THREADS")),
        *judge_folder(folder, os.environ.get("HDF5_USE_FILE_LOCKING")),
        *judge_filesystem(look_at(data) if data and folder and folder.exists and not folder.hangs else None),
        judge_slurm(shutil.which("sinfo"), shutil.which("sbatch")),
        judge_redis(version("redis"), ask_redis(os.environ.get("REDIS_URL"))),
    ]


# --- versions -----------------------------------------------------------------------------------------------------------
PACKAGES = (
    "numpy", "h5py", "pydicom", "tensorflow", "tf_keras", "horovod", "mpi4py", "tensorflow-model-optimization",
)  # fmt: skip
_BASE = ("numpy", "h5py", "pydicom")


def version(package: str) -> str | None:
    """Installed version, without importing the package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def installed(module: str) -> bool:
    """True if ``module`` can be found."""
    return importlib.util.find_spec(module) is not None


def judge_versions(python: Sequence[int], versions: Mapping[str, str | None]) -> Iterator[Finding]:
    """Python 3.11 or 3.12, the base packages, and those of the extra ``train``."""
    text = ".".join(map(str, python))
    fits = (3, 11) <= tuple(python[:2]) <= (3, 12)
    yield Finding("python", "ok" if fits else "error", text, "" if fits else f"use Python 3.11 or 3.12, then {SETUP}")
    for name, found in versions.items():
        if found:
            yield Finding(name, "ok", found)
        elif name in _BASE:
            yield Finding(name, "error", "not installed", SETUP)
        else:
            yield Finding(name, "warning", "not installed", f"for training, {SETUP} (extra 'train')")


# --- MPI and Horovod ----------------------------------------------------------------------------------------------------
def mpirun_version() -> str | None:
    """First line of ``mpirun --version``, None without an mpirun beside this Python or on PATH."""
    program = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if program is None:
        return None
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return next((line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()), "")


def judge_mpirun(line: str | None) -> Finding:
    """Open MPI 4 is tested; Open MPI 5 works with mpirun, not with a plain horovodrun."""
    if line is None:
        return Finding("mpirun", "warning", "not found", f"for several ranks, {SETUP}, or load the site's MPI module")
    if not line:
        return Finding("mpirun", "error", "does not start", "run `mpirun --version` and mend what it says")
    if re.search(r"Open MPI\) 5\.", line):
        mend = "use mpirun, or horovodrun --binding-args='--bind-to none --map-by slot'"
        return Finding("mpirun", "warning", f"{line}: plain horovodrun fails with it", mend)
    return Finding("mpirun", "ok", line)


# mpi4py's wheels look for the MPI library when they are imported, so only the running process knows which it is.
_MAPPED = """
import mpi4py; mpi4py.rc.initialize = False
from mpi4py import MPI
print(*{line.split()[-1] for line in open("/proc/self/maps") if "/libmpi." in line})
"""


def library_of(package: str) -> str | None:
    """Real path of the MPI library that ``package`` (mpi4py, horovod) loads; None if unknown."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    if package == "mpi4py":
        command, pattern = [sys.executable, "-c", _MAPPED], r"(/\S+)"
    else:
        files = sorted(Path(next(iter(spec.submodule_search_locations))).glob("tensorflow/mpi_lib*.so"))
        if not files:
            return None
        command, pattern = ["ldd", str(files[0])], r"libmpi\S* => (/\S+)"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(pattern, done.stdout)
    return str(Path(found[1]).resolve()) if found else None


def judge_same_mpi(mpi4py: str | None, horovod: str | None) -> Finding:
    """Two MPI libraries in one process hang or crash in the first collective call."""
    name = "mpi4py and Horovod"
    if mpi4py is None or horovod is None:
        missing = " and ".join(n for n, found in (("mpi4py", mpi4py), ("Horovod", horovod)) if found is None)
        return Finding(name, "warning", f"the MPI library of {missing} is not known", f"for several ranks, {SETUP}")
    if mpi4py != horovod:
        mend = f"{SETUP} --force with the wanted mpicxx first on PATH"
        return Finding(name, "error", f"two MPI libraries: mpi4py {mpi4py}, Horovod {horovod}", mend)
    return Finding(name, "ok", f"one MPI library: {mpi4py}")


_ASK = """
import json
from hvd_imaging import bootstrap
bootstrap.prepare(); bootstrap.load_tensorflow()
import horovod.tensorflow as hvd
print(json.dumps({n: bool(getattr(hvd, n + '_built')()) for n in ('mpi', 'gloo', 'nccl', 'cuda', 'rocm')}))
"""


def ask_horovod() -> dict[str, bool] | str:
    """Horovod's build flags, or the last line of what went wrong."""
    try:
        done = subprocess.run([sys.executable, "-c", _ASK], capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        return "did not answer in 120 s"
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no message"])[-1]
    return json.loads(done.stdout.splitlines()[-1])  # noqa: TID251 - from a process of ours


def judge_horovod(answer: Mapping[str, bool] | str | None) -> Finding:
    """MPI is needed for mpirun, Gloo for horovodrun --gloo."""
    if answer is None:
        return Finding("Horovod build", "warning", "not installed", f"for training, {SETUP} (extra 'train')")
    if isinstance(answer, str):
        return Finding("Horovod build", "error", answer, f"{SETUP} --force")
    found = ", ".join(f"{name} {'yes' if built else 'no'}" for name, built in answer.items())
    if not answer.get("mpi"):
        return Finding("Horovod build", "error", f"{found}: cannot train under mpirun", f"{SETUP} --force")
    if not answer.get("gloo"):
        return Finding("Horovod build", "warning", found, f"for horovodrun --gloo, {SETUP} --force")
    return Finding("Horovod build", "ok", found)


# --- speed --------------------------------------------------------------------------------------------------------------
def judge_processor(architecture: str, sets: Sequence[str]) -> Finding:
    """The instruction sets, and what they mean for exports in 8 bit."""
    if not sets:
        return Finding("processor", "ok", f"{architecture}, instruction sets not known: measure 8-bit exports here before choosing them")
    if processor.has_integers(sets):
        meaning = "8-bit exports have instructions of their own here, and are mostly the fastest"
    else:
        meaning = "no instructions for 8 bit: such exports are smaller, and may be no faster than float32 (docs/compression.md)"
    return Finding("processor", "ok", f"{architecture}, {processor.kind(sets)}: {meaning} ({' '.join(sets)})")


def judge_onednn(flags: Collection[str], exported: str | None) -> Finding:
    """hvd_imaging turns oneDNN on; an exported 0 would win."""
    widest = "AVX-512" if "avx512f" in flags else "AVX2" if "avx2" in flags else "no AVX2"
    if exported == "0":
        mend = "unset TF_ENABLE_ONEDNN_OPTS: 3D convolutions take about five times as long without oneDNN"
        return Finding("oneDNN", "warning", f"off by TF_ENABLE_ONEDNN_OPTS=0 ({widest})", mend)
    by = "" if "avx512f" in flags else ", which TensorFlow alone leaves off here"
    return Finding("oneDNN", "ok", f"on ({widest}{by})")


def judge_threads(allowed: int, cores: int, exported: str | None) -> Finding:
    """Threads follow the cores that a process is given."""
    plan = bootstrap.plan_threads(range(allowed), cores, World())
    found = f"{allowed} of {cores} cores, {plan.compute} threads"
    if exported and exported.isdigit() and int(exported) > allowed:
        mend = "unset OMP_NUM_THREADS: threads follow the cores by themselves"
        return Finding("cores", "warning", f"{found}; OMP_NUM_THREADS={exported} is more", mend)
    return Finding("cores", "ok", found)


# --- storage ------------------------------------------------------------------------------------------------------------
def hdf5_filters() -> dict[str, bool] | str:
    """Filters of the HDF5 library."""
    try:
        from h5py import h5z, version
    except ImportError as error:
        return str(error)
    names = {"gzip": h5z.FILTER_DEFLATE, "shuffle": h5z.FILTER_SHUFFLE, "lzf": h5z.FILTER_LZF}
    return {f"HDF5 {version.hdf5_version}": True} | {name: bool(h5z.filter_avail(n)) for name, n in names.items()}


def judge_filters(filters: Mapping[str, bool] | str) -> Finding:
    """All filters that the shards can be written with."""
    if isinstance(filters, str):
        return Finding("HDF5 filters", "error", filters, SETUP)
    missing = [name for name, there in filters.items() if not there]
    found = ", ".join(name for name, there in filters.items() if there)
    if missing:
        return Finding("HDF5 filters", "error", f"missing: {', '.join(missing)}", "install h5py from PyPI")
    return Finding("HDF5 filters", "ok", found)


@dataclass(frozen=True)
class Folder:
    """What trying a folder out has shown.

    Attributes:
        lock: None if all kinds of lock work, else which fail and why.
        hangs: the filesystem did not even answer the first question.
    """

    path: str
    exists: bool
    writable: bool
    filesystem: str
    lock: str | None
    hangs: bool = False


_ANSWER_S = 20.0  # seconds for all that is tried
_LEAVE_S = 2.0  # seconds for leaving, once asked to

# Each line of its answer comes at once, so that what stands there when it hangs shows where. Each kind of lock is freed
# before the next: NFS makes flock a lock of bytes, and two kinds at once could refuse each other.
_TRY = """
import fcntl, os, signal, sys, tempfile
signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
def say(name, error=None):
    print(name, " ".join(str(error or "").split()), sep="\\t", flush=True)
def attempt(name, action):
    try:
        action()
        say(name)
    except OSError as error:
        say(name, error.strerror or error)
    except ImportError as error:
        say(name, error)
folder = sys.argv[1]
if not os.path.isdir(folder):
    say("missing")
    sys.exit()
say("exists")
try:
    handle, path = tempfile.mkstemp(dir=folder, prefix=".hvd_imaging.", suffix=".h5")
except OSError:
    sys.exit()
def flock():
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.flock(handle, fcntl.LOCK_UN)
def lockf():
    fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.lockf(handle, fcntl.LOCK_UN)
def hdf5():
    import h5py
    h5py.File(path, "w", locking=False).close()
    h5py.File(path, "r", locking=True).close()
try:
    say("writable")
    attempt("flock", flock)
    attempt("fcntl", lockf)
    os.close(handle)
    attempt("HDF5", hdf5)
finally:
    os.unlink(path)
"""
LOCKS = ("flock", "fcntl", "HDF5")


def try_folder(path: Path, seconds: float = _ANSWER_S) -> Folder:
    """Write and lock a temporary file in ``path``, in a process of its own that may hang; else nothing stays."""
    answer = _ask_folder(path, seconds)
    if answer is None:
        return Folder(str(path), True, False, filesystems.mount_of(path.absolute()).kind, None, hangs=True)
    if "exists" not in answer:
        return Folder(str(path), False, False, "", None)
    writable = "writable" in answer
    reasons = {name: answer.get(name, f"no answer in {seconds:g} s") for name in LOCKS}
    failing = ", ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason)
    return Folder(str(path), True, writable, filesystem_of(path), failing if writable and failing else None)


def _ask_folder(path: Path, seconds: float) -> dict[str, str] | None:
    """What was tried -> "" or the error, as far as it came; None if there was no answer at all."""
    # The variable would overrule what h5py is asked for.
    environment = {name: value for name, value in os.environ.items() if name != "HDF5_USE_FILE_LOCKING"}
    command = [sys.executable, "-c", _TRY, str(path)]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    )
    lines: list[bytes] = []

    def listen() -> None:
        assert process.stdout
        with process.stdout as answer:
            lines.extend(answer)

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    for patience, end in ((seconds, process.terminate), (_LEAVE_S, process.kill), (_LEAVE_S, None)):
        try:
            process.wait(patience)
            break
        except subprocess.TimeoutExpired:
            # A process inside a dead server's call dies when that ends, maybe never: it is left to the system.
            if end:
                end()
    listener.join(_LEAVE_S)
    pairs = (line.decode("utf-8", "replace").rstrip("\n").partition("\t") for line in list(lines))
    return {name: error for name, _, error in pairs} or None


def filesystem_of(path: Path, mounts: str | None = None) -> str:
    """Type of the file system that holds ``path``, as the kernel names it."""
    try:
        text = mounts if mounts is not None else Path("/proc/mounts").read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    target, best = str(path.resolve()), ("", "unknown")
    for line in text.splitlines():
        fields = line.split()
        if len(fields) < 3:
            continue
        mount = fields[1].replace("\\040", " ")
        inside = target == mount or target.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= len(best[0]):
            best = (mount, fields[2])
    return best[1]


def judge_folder(folder: Folder | None, exported: str | None = None) -> Iterator[Finding]:
    """Readers of hvd_imaging never lock; other HDF5 programs do, and fail where locks do not work.

    Args:
        exported: HDF5_USE_FILE_LOCKING, by which other HDF5 programs are told not to lock.
    """
    if folder is None:
        return
    name = "data folder"
    where = f"{folder.path} ({folder.filesystem})"
    if folder.hangs:
        mend = "mend the mount (`findmnt -T` names its server), or name another folder with --data"
        yield Finding(name, "error", f"{where}: the filesystem does not answer", mend)
        return
    if not folder.exists:
        yield Finding(name, "error", f"{folder.path}: no such folder", "name an existing one with --data")
        return
    if not folder.writable:
        yield Finding(name, "warning", f"{where}: read-only", "training needs no more")
    elif folder.lock is None:
        yield Finding(name, "ok", f"{where}: writable, file locks work ({', '.join(LOCKS)})")
    elif exported and exported in ("FALSE", "0"):
        yield Finding(name, "ok", f"{where}: file locks fail ({folder.lock}); HDF5 is told not to lock")
    else:
        mend = "hvd_imaging reads without locks; for other HDF5 programs export HDF5_USE_FILE_LOCKING=FALSE"
        yield Finding(name, "warning", f"{where}: file locks fail ({folder.lock})", mend)


def look_at(path: Path) -> tuple[Filesystem, int]:
    """The recognized filesystem of a folder that answers, and the bytes of its stripe."""
    found = filesystems.of(path)
    return found, filesystems.stripe_bytes(path, found)


def judge_filesystem(looked: tuple[Filesystem, int] | None) -> Iterator[Finding]:
    """Names the filesystem and its stripe; one that is not recognized may be read as well, but nothing is known of it."""
    if looked is None:
        return
    found, stripe = looked
    size = f"{stripe / 2**20:g} MiB" if stripe >= 2**20 else f"{stripe / 2**10:g} KiB"
    shared = f"shared by nodes, stripes of {size}" if found.shared else "of this node"
    if found.kind == "unknown":
        mend = "measure it with `hvd-imaging bench io`, see docs/storage.md"
        yield Finding("file system", "warning", f"{found.name}: not recognized", mend)
    else:
        name = found.kind if found.kind == found.name else f"{found.kind} ({found.name})"
        yield Finding("file system", "ok", f"{name}, {shared}")


# --- services -----------------------------------------------------------------------------------------------------------
def judge_slurm(sinfo: str | None, sbatch: str | None) -> Finding:
    """Slurm is for clusters only."""
    if sinfo and sbatch:
        return Finding("Slurm", "ok", str(Path(sbatch).parent))
    return Finding("Slurm", "warning", "no sinfo and sbatch on PATH", "needed on a cluster only: load its module there")


def ask_redis(url: str | None) -> str | None:
    """None if REDIS_URL is not set, "" if its server answers, else the reason."""
    if not url:
        return None
    try:
        redis: Any = importlib.import_module("redis")
        redis.Redis.from_url(url, socket_timeout=5, socket_connect_timeout=5).ping()
    except Exception as error:  # every client library error is a finding, not a crash
        return type(error).__name__
    return ""


def judge_redis(package: str | None, answer: str | None) -> Finding:
    """Redis is a choice; REDIS_URL may hold a password and is never shown."""
    if package is None:
        return Finding("Redis", "warning", "the client is not installed", "needed for a shared cache only: extra 'redis'")
    if answer is None:
        return Finding("Redis", "ok", f"client {package}; no server asked (REDIS_URL is not set)")
    if answer:
        return Finding("Redis", "error", f"the server of REDIS_URL does not answer ({answer})", "start it or unset REDIS_URL")
    return Finding("Redis", "ok", f"client {package}; the server of REDIS_URL answers")
