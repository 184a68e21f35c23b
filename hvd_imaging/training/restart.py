"""What follows when a run under `mpirun` has ended: nothing, another start, or a verdict. Pure decisions.

The global batch does not depend on the number of ranks, so a run may go on with fewer of them.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import TRY_AGAIN, ConfigError, DatasetError, PeerError, RunError, SetupError, SourceError
from .heartbeat import Beat
from .notices import Notice

# The same input gives the same refusal. DatasetError is not here: a filesystem may fail on one node only.
_FINAL = {
    ConfigError.exit_code: "mend the configuration or the command line",
    SourceError.exit_code: "mend the input files",
    RunError.exit_code: "mend what the message above says of the run, or choose another --run-dir",
    SetupError.exit_code: "mend the installation; `hvd-imaging doctor` says how",
}
_ADVICE = {
    DatasetError.exit_code: "`hvd-imaging dataset verify DATASET` lists damaged shards",
    PeerError.exit_code: "the messages above name the rank that failed or stood still",
    70: "it is a fault of the program; please report it with the lines above",
    128 + signal.SIGKILL: "out of memory is the usual reason (`dmesg`): fewer ranks on a host, or a smaller data.patch",
    128 + signal.SIGSEGV: "a native library crashed: PYTHONFAULTHANDLER=1 shows where",
    128 + signal.SIGBUS: "a memory-mapped file was cut, or /dev/shm is full",
}
_SAYS_WHY = "the messages above say why"
_HOST = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)(?::([1-9][0-9]*))?")
# Slurm signals the launcher and its batch script at once; some scripts pass the signal on a second time.
HOST_LOST = 205
"""Exit code when a host is lost: mpirun's own."""
_TWICE_S = 0.5


@dataclass(frozen=True)
class Host:
    """A machine and how many ranks it takes."""

    name: str
    slots: int = 1

    def __str__(self) -> str:
        return f"{self.name}:{self.slots}"


@dataclass(frozen=True)
class Policy:
    """What the user permits.

    Attributes:
        ranks: as many as wanted.
        least: fewer than these do not run.
        restarts: at most, in all.
        hosts: empty leaves them to mpirun.
        powers_of_two: only 1, 2, 4, 8, ... ranks are permitted.
        leave_lost: a lost host ends it with HOST_LOST: a scheduler gives another one.

    Raises:
        ConfigError: no first start is possible.
    """

    ranks: int
    least: int
    restarts: int = 3
    hosts: tuple[Host, ...] = ()
    powers_of_two: bool = False
    leave_lost: bool = False

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise ConfigError(f"-np {self.ranks}: expected at least 1 rank")
        if self.least < 1:
            raise ConfigError(f"--min-np {self.least}: expected at least 1 rank")
        if self.least > self.ranks:
            raise ConfigError(f"--min-np {self.least}: more than -np {self.ranks}; give at most that many")
        if self.restarts < 0:
            raise ConfigError(f"--max-restarts {self.restarts}: expected 0 or more")
        if self.powers_of_two and size(self, self.hosts) < self.least:
            power = size(self, self.hosts)
            raise ConfigError(
                f"-np {self.ranks}: train.reproducible=exact needs 1, 2, 4, 8, ... ranks; give -np {power} or "
                f"-np {2 * power}, or permit fewer ranks with --min-np {power}"
            )


@dataclass(frozen=True)
class Failure:
    """How one start ended.

    Attributes:
        code: mpirun's exit code; 128 + n after signal n.
        rank, host: the first to fail, None if that cannot be told.
        step: global step of the failure, None before the first one.
        checkpoint: global step of the newest checkpoint, None without one.
        kind: of mpirun's notice.
        missing: hosts of this start that do not answer any more.
    """

    code: int
    rank: int | None = None
    host: str | None = None
    step: int | None = None
    checkpoint: int | None = None
    kind: str = "none"
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Start:
    """The next start."""

    ranks: int
    hosts: tuple[Host, ...] = ()


@dataclass(frozen=True)
class Stop:
    """The end: the launcher's exit code, and why in one line (empty: nothing to say)."""

    code: int
    text: str = ""


def parse_hosts(text: str | None) -> tuple[Host, ...]:
    """``h1:2,h2:2`` as mpirun's -H takes it; a name alone is one slot.

    Raises:
        ConfigError: malformed, or a host given twice.
    """
    hosts: list[Host] = []
    for part in text.split(",") if text is not None else ():
        match = _HOST.fullmatch(part.strip())
        if match is None:
            raise ConfigError(f"--hosts {text}: expected names with slots such as node1:4,node2:4, found '{part}'")
        host = Host(match[1], int(match[2] or 1))
        if host.name in {other.name for other in hosts}:
            raise ConfigError(f"--hosts {text}: {host.name} stands here twice; add its slots up: {host.name}:2")
        hosts.append(host)
    return tuple(hosts)


def size(policy: Policy, hosts: Sequence[Host]) -> int:
    """How many ranks to start on the hosts that are left: the largest permitted number, 0 without a host."""
    ranks = policy.ranks
    if len(hosts) < len(policy.hosts):
        ranks = min(ranks, sum(host.slots for host in hosts))
    if policy.powers_of_two and ranks:
        ranks = 1 << (ranks.bit_length() - 1)
    return ranks


def command(
    mpirun: str, start: Start, passed: Sequence[str], extra: Sequence[str], program: Sequence[str]
) -> list[str]:
    """Arguments of one start; ``passed`` are names of environment variables for other hosts."""
    hosts = ["-H", ",".join(map(str, start.hosts))] if start.hosts else []
    variables = [word for name in passed for word in ("-x", name)]
    return [mpirun, "-np", str(start.ranks), *hosts, *variables, *extra, *program]


def fresh(before: Mapping[int, Beat], after: Mapping[int, Beat]) -> dict[int, Beat]:
    """What the ranks of this start said: files that an earlier start left have not changed since."""
    return {rank: state for rank, state in after.items() if before.get(rank) != state}


def silent(ranks: Mapping[int, Beat], margin_s: float = 1.5) -> Beat | None:
    """The rank whose heartbeat clearly ended first; None if none did.

    Clearly: all others went on for longer than ``margin_s``, which has to be more than the pause between two heartbeats,
    and than they differ among themselves.
    """
    states = sorted(ranks.values(), key=lambda state: state.alive)
    if len(states) < 2:
        return None
    gap = states[1].alive - states[0].alive
    return states[0] if gap >= margin_s and gap > states[-1].alive - states[1].alive else None


def attribute(
    code: int, notices: Sequence[Notice], ranks: Mapping[int, Beat], checkpoint: int | None,
    missing: tuple[str, ...] = (), margin_s: float = 1.5,
) -> Failure:  # fmt: skip
    """Who failed, where and at which step: mpirun's own words come first, then the heartbeats.

    The ranks take each step together and those that are left wait in it, so the latest place is the exact one: what a
    killed rank wrote last is as old as a heartbeat.
    """
    # A rank that leaves with PeerError tells of another one; MPI_ABORT may come with the same code.
    telling = [notice for notice in notices if notice.code != PeerError.exit_code and notice.kind != "none"]
    notice = telling[0] if telling else Notice("none")
    rank, host = notice.rank, notice.host
    if rank is None and host is None and missing:
        host = missing[0]
    elif rank is None and host is None and (quiet := silent(ranks, margin_s)) is not None:
        rank, host = quiet.rank, quiet.host
    own = ranks.get(rank) if rank is not None else None
    if own is not None:
        host = host or own.host
    steps = [state.reached for state in ranks.values() if state.reached is not None]
    step = max(steps) if steps else None
    return Failure(code, rank, host, step, checkpoint, notice.kind, missing)


def cause(failure: Failure) -> str:
    """``killed by signal 9`` or ``exit code 4``."""
    if failure.kind == "lost" or (failure.host is not None and failure.host in failure.missing):
        return "host lost"
    if failure.kind == "start":
        return "the program did not start"
    # Codes above belong to mpirun itself, such as 205 when a host is lost.
    if 128 < failure.code <= 128 + signal.SIGRTMAX:
        return f"killed by signal {failure.code - 128}"
    return f"exit code {failure.code}"


def describe(failure: Failure) -> str:
    """Who ended how, and when."""
    reason = cause(failure)
    verb = {"killed": "was ", "exit": "ended with "}.get(reason.split()[0], "")
    if failure.rank is not None:
        who = f"rank {failure.rank}" + (f" (host {failure.host})" if failure.host else "")
    else:
        who = f"host {failure.host}" if failure.host else "a rank"
    if reason == "host lost":
        text = f"host {failure.host} was lost" if failure.host else "a host was lost"
    elif reason == "the program did not start":
        text = f"the program did not start on host {failure.host}"
    elif failure.host and failure.rank is None:
        text = f"a rank on {who} {verb}{reason}"
    else:
        text = f"{who} {verb}{reason}"
    return f"{text} {_at(failure.step)}"


def _at(step: int | None) -> str:
    return f"at step {step}" if step is not None else "before the first step"


def repeats(failures: Sequence[Failure]) -> bool:
    """True if the last two starts failed at one step, gained no checkpoint, and lost no host."""
    if len(failures) < 2:
        return False
    before, last = failures[-2:]
    gained = (last.checkpoint or 0) > (before.checkpoint or 0)
    lost = before.missing or last.missing or "lost" in (before.kind, last.kind)
    return before.step == last.step and not gained and not lost


def decide(policy: Policy, failures: Sequence[Failure], answering: Sequence[Host]) -> Start | Stop:
    """Another start after ``failures`` (at least one) on the hosts that answer, or the verdict."""
    last = failures[-1]
    if policy.leave_lost and (last.kind == "lost" or last.missing):
        return Stop(HOST_LOST, f"{describe(last)}; left to the scheduler")
    if last.kind == "root":
        mend = "export OMPI_ALLOW_RUN_AS_ROOT=1 and OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1, or work as another user"
        return Stop(SetupError.exit_code, f"mpirun refuses to run as root: {mend}")
    if last.kind == "slots":
        mend = "give --hosts more slots, a smaller -np, or --mpirun-arg --oversubscribe"
        return Stop(SetupError.exit_code, f"mpirun has fewer slots than ranks: {mend}")
    if last.code in _FINAL:
        return Stop(last.code, f"{describe(last)}: a restart does not help; {_FINAL[last.code]}")
    advice = _ADVICE.get(last.code, _SAYS_WHY)
    if repeats(failures):
        known = [f"rank {last.rank}"] * (last.rank is not None) + [f"host {last.host}"] * (last.host is not None)
        elsewhere = None not in (failures[-2].host, last.host) and failures[-2].host != last.host
        machine = "on another host: it is not the machine" if elsewhere else "a restart does not help"
        where = ", ".join([*known, cause(last)])
        return Stop(last.code, f"the failure repeats {_at(last.step)} ({where}), {machine}; {advice}")
    if len(failures) > policy.restarts:
        used = f"all {policy.restarts} restarts are used up" if policy.restarts else "no restart is permitted"
        return Stop(last.code, f"{describe(last)}; {used}; {advice}")
    ranks = size(policy, answering)
    if ranks < policy.least:
        left = f"{ranks} rank{'s' * (ranks != 1)} can run"
        gone = f" without {', '.join(last.missing)}" if last.missing else ""
        return Stop(
            SetupError.exit_code,
            f"{describe(last)}; {left}{gone}, --min-np is {policy.least}: mend the hosts, or lower --min-np",
        )
    return Start(ranks, tuple(answering))


def announce(policy: Policy, failures: Sequence[Failure], start: Start) -> str:
    """The line that tells of a restart."""
    last = failures[-1]
    point = "the beginning (no checkpoint yet)"
    if last.checkpoint is not None:
        point = f"the checkpoint of step {last.checkpoint}"
    gone = [host.name for host in policy.hosts if host not in start.hosts]
    without = f" (without {', '.join(gone)})" if gone else ""
    ranks = f"{start.ranks} rank{'s' * (start.ranks != 1)}"
    return f"{describe(last)}; restart {len(failures)} of {policy.restarts} with {ranks}{without} from {point}"


def ending(failure: Failure, asked: bool) -> Stop | None:
    """The end that is no failure: done, or asked to stop. None: see :func:`decide`."""
    again = "go on with `--resume` after run.yaml"
    if failure.code == 0:
        return Stop(0)
    if failure.code == TRY_AGAIN:
        return Stop(TRY_AGAIN, f"stopped as asked; {again}")
    if asked and failure.code not in _FINAL:
        # What was asked for was to leave; the last checkpoint is as good as it was.
        point = "no checkpoint yet"
        if failure.checkpoint is not None:
            point = f"the checkpoint of step {failure.checkpoint} stays"
        return Stop(TRY_AGAIN, f"stopped as asked, but {describe(failure)}: {point}; {again}")
    return None


def react(earlier: Sequence[tuple[int, float]], number: int, now: float) -> str:
    """What a signal to the launcher means: ``stop`` (the first), ``kill`` (SIGINT or SIGTERM again), ``ignore``.

    Args:
        earlier: (number, seconds) of the signals before.
        number: of this one.
        now: seconds.
    """
    if not earlier:
        return "stop"
    urgent = [when for which, when in earlier if which != signal.SIGUSR1]
    if number == signal.SIGUSR1 or not urgent or now - urgent[0] < _TWICE_S:
        return "ignore"
    return "kill"
