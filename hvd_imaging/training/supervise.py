"""Runs training under `mpirun`, and starts it again from the last checkpoint when a rank or a host dies.

Decisions are in `restart.py`, mpirun's words in `notices.py`; here processes, signals and files. Open MPI's mpirun is
expected. One thread only, so that a process may be prepared between fork and exec.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from ..errors import SetupError
from . import checkpoint
from .events import EventLog
from .heartbeat import Beat, read_beats
from .notices import Filter, Notice
from .restart import (
    TRY_AGAIN,
    Failure,
    Host,
    Policy,
    Start,
    Stop,
    announce,
    attribute,
    command,
    decide,
    ending,
    fresh,
    react,
    size,
)

PROGRAM = (sys.executable, "-m", "hvd_imaging.cli.main")

# Written by training/run.py when it claims the folder; that module loads more than a launcher should.
_CONFIG = "run.yaml"
_TICK_S = 0.2
_PROBE_S = 30.0
_END_S = 10.0
_PR_SET_PDEATHSIG = 1
# Variables of a launcher around this one would make the ranks believe that they are in another world.
_OUTER = (
    "OMPI_COMM_WORLD_", "OMPI_APP_CTX_", "OMPI_NUM_APP_CTX", "OMPI_UNIVERSE_SIZE", "OMPI_COMMAND", "OMPI_FIRST_RANKS",
    "OMPI_FILE_LOCATION", "OMPI_MCA_orte_", "OMPI_MCA_ess", "OMPI_MCA_pmix", "OMPI_MCA_initial_wdir", "PMI_", "PMIX_",
    "PRTE_", "HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_", "HOROVOD_CROSS_", "HOROVOD_GLOO_RENDEZVOUS_",
)  # fmt: skip
# What ranks on other hosts need to know: their environment is that of a login there.
_PASSED = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH")
_PASSED_PREFIXES = ("HVD_", "HOROVOD_", "TF_", "OMP_", "NCCL_")


@dataclass(frozen=True)
class Job:
    """What to run.

    Attributes:
        arguments: after the program, such as ``("train", "run.yaml")``.
        run_dir: where checkpoints and the ranks' heartbeats appear.
        policy: how many ranks, where, how often.
        program: what understands ``arguments`` and ``--resume``.
        mpirun_args: further options of mpirun.
        grace_s: seconds for the ranks' checkpoint when asked to stop.
        pause_s: seconds before a restart.
        heartbeat_s: seconds between two writings of a rank's own file.
    """

    arguments: Sequence[str]
    run_dir: Path
    policy: Policy
    program: Sequence[str] = PROGRAM
    mpirun_args: Sequence[str] = ()
    grace_s: float = 120.0
    pause_s: float = 1.0
    heartbeat_s: float = 1.0


def supervise(job: Job) -> int:
    """Run ``job`` to its end, with restarts; returns the exit code of the launcher. To be called in the main thread.

    Raises:
        SetupError: no mpirun.
    """
    mpirun = _mpirun()
    policy, failures = job.policy, list[Failure]()
    start = Start(size(policy, policy.hosts), policy.hosts)
    record = _Record(job.run_dir, resumed="--resume" in job.arguments)
    environ = environment(os.environ)
    abroad = passed(environ) if policy.hosts or "SLURM_JOB_ID" in environ else []
    with _signals() as asked:
        while True:
            attempt = len(failures) + 1
            again = ["--resume"] if failures and "--resume" not in job.arguments else []
            words = command(mpirun, start, abroad, job.mpirun_args, [*job.program, *job.arguments, *again])
            hosts = [str(host) for host in start.hosts]
            record.note("restart" if failures else "launch", attempt=attempt, np=start.ranks, hosts=hosts)
            before, began = read_ranks(job.run_dir), time.monotonic()
            code, notices = _attempt(words, environ, asked, job.grace_s, record.flush)
            seconds = round(time.monotonic() - began, 1)
            ranks, newest = fresh(before, read_ranks(job.run_dir)), newest_checkpoint(job.run_dir)
            failure = attribute(code, notices, ranks, newest)
            verdict: Start | Stop | None
            if asked.killed:
                verdict = Stop(128 + asked.killed, "ended at once, without a checkpoint")
            else:
                verdict = ending(failure, asked.stop)
            if verdict is None:
                answering = _probe(mpirun, policy.hosts, job.mpirun_args, environ, asked)
                missing = tuple(host.name for host in start.hosts if host not in answering)
                # A signal during the probe has cut it short.
                verdict = ending(failure, asked.stop)
                if verdict is None:
                    failure = attribute(code, notices, ranks, newest, missing, 1.5 * job.heartbeat_s)
                    failures.append(failure)
                    verdict = decide(policy, failures, answering)
            facts = {
                "attempt": attempt, "exit_code": code, "step": failure.step, "checkpoint": newest, "rank": failure.rank,
                "host": failure.host, "missing": list(failure.missing), "seconds": seconds,
            }  # fmt: skip
            if isinstance(verdict, Start):
                start, reason = verdict, announce(policy, failures, verdict)
                record.note("failure", **facts, reason=reason)
                say(reason)
                _sleep(job.pause_s, asked)
                if not asked.stop:
                    continue
                verdict = Stop(TRY_AGAIN, "stopped as asked between two starts; go on with `--resume` after run.yaml")
            if verdict.text:
                say(verdict.text)
            record.note("verdict", **facts, code=verdict.code, reason=verdict.text or "done", restarts=attempt - 1)
            return verdict.code


def say(text: str) -> None:
    """One line on stderr."""
    _show(f"hvd-imaging: launch: {text}\n".encode())


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment for mpirun: without what an outer launcher has set."""
    return {key: value for key, value in environ.items() if not key.startswith(_OUTER)}


def passed(environ: Mapping[str, str]) -> list[str]:
    """Names of the variables that ranks on other hosts get with ``-x``."""
    return sorted(key for key in environ if key in _PASSED or key.startswith(_PASSED_PREFIXES))


def read_ranks(run_dir: Path) -> dict[int, Beat]:
    """The ranks' own files; broken ones are left out."""
    return {beat.rank: beat for beat in read_beats(run_dir)}


def newest_checkpoint(run_dir: Path) -> int | None:
    """Global step of the newest checkpoint file, None without one."""
    try:
        found = checkpoint.newest_first(run_dir)
    except OSError:
        return None
    return int(found[0].stem.removeprefix("step-")) if found else None


class _Record:
    """Events of the launcher in `events.jsonl`.

    Training refuses a folder that holds something strange: nothing is written before it has claimed the folder, and
    nothing at all to a run that it has refused.
    """

    def __init__(self, run_dir: Path, resumed: bool) -> None:
        self._run_dir = run_dir
        self._waiting: list[tuple[str, dict[str, Any]]] = []
        self._before = self._signature()
        self._claimed = resumed and self._before is not None

    def note(self, event: str, **values: Any) -> None:
        """Write an event now, or when the folder is claimed."""
        self._waiting.append((event, values))
        self.flush()

    def flush(self) -> None:
        """Write what waits."""
        if not self._waiting:
            return
        # Training writes its configuration anew at every start.
        now = self._signature()
        self._claimed = self._claimed or (now is not None and now != self._before)
        if self._claimed:
            with contextlib.suppress(OSError):  # a full disk must not end a run that is well
                log = EventLog(self._run_dir)
                while self._waiting:
                    log.write(self._waiting[0][0], **self._waiting[0][1])
                    del self._waiting[0]

    def _signature(self) -> tuple[int, int] | None:
        try:
            status = os.stat(self._run_dir / _CONFIG)
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns


class _Asked:
    """What signals have asked for so far."""

    def __init__(self) -> None:
        self.stop = False
        self.killed = 0
        self._earlier: list[tuple[int, float]] = []

    def __call__(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        meaning = react(self._earlier, number, now)
        self._earlier.append((number, now))
        self.stop = True
        if meaning == "kill":
            self.killed = number


@contextlib.contextmanager
def _signals() -> Iterator[_Asked]:
    """SIGTERM, SIGINT and SIGUSR1 become requests inside the block."""
    asked = _Asked()
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = {number: signal.signal(number, asked) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _attempt(
    words: Sequence[str], environ: Mapping[str, str], asked: _Asked, grace_s: float, tick: Callable[[], None]
) -> tuple[int, list[Notice]]:
    """One start of mpirun: its exit code (128 + n after signal n) and what it said about ranks and hosts."""
    with _Process(words, environ) as process:
        deadline = None
        while process.running():
            process.pump(_TICK_S)
            tick()
            if asked.killed:
                break
            if deadline is None and asked.stop:
                say(f"asked to stop: the ranks have {grace_s:g} s to write a checkpoint")
                process.signal(signal.SIGUSR1)  # mpirun passes it on to all ranks
                deadline = time.monotonic() + grace_s
            if deadline is not None and time.monotonic() > deadline:
                say(f"the ranks have not left after {grace_s:g} s (--grace): ending them")
                break
        return process.end(), process.notices


class _Process:
    """mpirun and its ranks: none of them outlives the block."""

    def __init__(self, words: Sequence[str], environ: Mapping[str, str]) -> None:
        self._filter = Filter()
        # A session of its own: signals of the terminal reach the launcher only, and all members can be found.
        self._popen = subprocess.Popen(
            list(words), env=dict(environ), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
            preexec_fn=_die_with_parent(),
        )  # fmt: skip
        assert self._popen.stderr is not None
        self._stderr = self._popen.stderr
        self._open = True
        os.set_blocking(self._stderr.fileno(), False)

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        self._stderr.close()

    @property
    def notices(self) -> list[Notice]:
        return self._filter.notices

    def running(self) -> bool:
        return self._popen.poll() is None

    def signal(self, number: int) -> None:
        self._popen.send_signal(number)

    def pump(self, seconds: float) -> None:
        """Pass stderr on, waiting so long for something to come."""
        if not self._open:
            time.sleep(seconds)
            return
        ready, _, _ = select.select([self._stderr], [], [], seconds)
        data = b""
        if ready:
            with contextlib.suppress(BlockingIOError):
                data = os.read(self._stderr.fileno(), 1 << 16)
                self._open = bool(data)
        _show(self._filter.feed(data))

    def end(self) -> int:
        """End what still runs; returns the exit code."""
        if self.running():
            # mpirun ends its ranks here and on other hosts, first with SIGTERM.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._popen.pid, signal.SIGTERM)
            self._wait(lambda: not self.running(), _END_S)
            if self.running():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._popen.pid, signal.SIGKILL)
                self._popen.wait()
        # Ranks that a killed mpirun left behind have process groups of their own.
        self._wait(lambda: not _members(self._popen.pid), 2.0)
        for pid in _members(self._popen.pid):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        self._wait(lambda: not self._open, 1.0)
        _show(self._filter.release())
        code = self._popen.returncode
        return code if code >= 0 else 128 - code

    def _wait(self, done: Callable[[], bool], seconds: float) -> None:
        until = time.monotonic() + seconds
        while not done() and time.monotonic() < until:
            self.pump(0.05)


def _die_with_parent() -> Callable[[], None]:
    """For ``preexec_fn``: the kernel ends the child with SIGTERM when this process is killed.

    The library is loaded before the fork; after it there are two system calls and no allocation worth a lock.
    """
    try:
        prctl = ctypes.CDLL(None).prctl
    except (OSError, AttributeError):
        return lambda: None  # not Linux
    parent = os.getpid()

    def prepare() -> None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
        if os.getppid() != parent:  # killed before the line above
            os._exit(1)

    return prepare


def _members(session: int) -> list[int]:
    """Processes of a session, without those that have ended and only wait for their parent."""
    found = []
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():
        with contextlib.suppress(OSError, ValueError):
            if os.getsid(int(name)) == session:
                # "pid (name) state ...": the name may hold anything.
                state = Path("/proc", name, "stat").read_text(errors="replace").rpartition(")")[2].split()[0]
                found += [int(name)] * (state not in "ZX")
    return found


def _probe(
    mpirun: str, hosts: Sequence[Host], mpirun_args: Sequence[str], environ: Mapping[str, str], asked: _Asked
) -> tuple[Host, ...]:
    """The hosts on which mpirun can start this Python; all of them if there is one only."""
    if len(hosts) < 2:
        return tuple(hosts)
    answering = []
    with contextlib.ExitStack() as stack:
        processes = []
        for host in hosts:
            words = [mpirun, "-np", "1", "-H", host.name, "--oversubscribe", *mpirun_args, sys.executable, "-c", ""]
            # A killed launcher leaves no probe either.
            process = subprocess.Popen(
                words, env=dict(environ), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL, start_new_session=True, preexec_fn=_die_with_parent(),
            )  # fmt: skip
            stack.callback(_kill, process)
            processes.append((host, process))
        until = time.monotonic() + _PROBE_S
        while any(process.poll() is None for _, process in processes) and time.monotonic() < until and not asked.stop:
            time.sleep(0.05)
        answering = [host for host, process in processes if process.returncode == 0]
    return tuple(answering)


def _kill(process: subprocess.Popen[bytes]) -> None:
    for pid in {process.pid, *_members(process.pid)} if process.poll() is None else _members(process.pid):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def _sleep(seconds: float, asked: _Asked) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and not asked.stop:
        time.sleep(0.05)


def _mpirun() -> str:
    program = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if program is None:
        raise SetupError(
            "no mpirun beside this Python or on PATH: run scripts/setup_env.sh, or load the site's MPI module; "
            "`hvd-imaging train run.yaml` trains as one process without it"
        )
    return program


def _show(data: bytes) -> None:
    """Write to stderr at once; nobody reading there is no reason to end a run."""
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(2, data) :]
