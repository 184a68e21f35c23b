"""A slow network that is made, not imagined: two network namespaces of this machine, joined by a cable of a known rate.

Rank 0 runs in the first namespace and rank 1 in the second, which has a host name of its own. So MPI takes them for two
nodes: all that passes between them goes by TCP over the cable, and local_size is 1. Only root on Linux can make it.
Nothing of it reaches another network: the namespaces have the cable and nothing else.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import SetupError

# Kept for benchmarks of networks (RFC 2544): on no real network.
ADDRESSES = ("198.18.77.1", "198.18.77.2")
DEVICE = "slow0"
_serial = itertools.count()


class LinkError(SetupError):
    """The machine does not allow the link."""


@dataclass(frozen=True)
class Link:
    """Two joined namespaces.

    Attributes:
        names: of the namespaces.
        cores: of rank 0 and rank 1; the same one twice where there is only one.
    """

    names: tuple[str, str]
    cores: tuple[int, int]

    def mpirun(self, args: Sequence[str | os.PathLike[str]], ranks: int = 2) -> list[str]:
        """The command that runs ``args`` (options of mpirun, then a program) as two ranks, each bound to its core.

        All ranks get the environment that the command is started with. With four, two share each namespace and its core.
        """
        # mpirun starts its daemon for rank 1 by "AGENT HOST COMMAND"; main() below is this ssh. The core stands before it:
        # Open MPI 4.1 drops the last word of an agent if that is a single letter or digit.
        agent = [*self.enter(1), "unshare", "--uts", sys.executable, "-m", "hvd_imaging.bench.slow_link"]
        network = f"{ADDRESSES[0]}/30"
        settings = {
            "plm": "rsh",
            "plm_rsh_agent": " ".join(agent),
            "pml": "ob1",
            "btl": "tcp,self",
            "btl_tcp_if_include": network,
            "oob_tcp_if_include": network,
        }
        return [
            *self.enter(0), str(mpirun_path()), "--allow-run-as-root", "-np", str(ranks),
            "--host", ",".join(f"{address}:{ranks // 2}" for address in ADDRESSES), "--bind-to", "none",
            *(word for name, value in settings.items() for word in ("--mca", name, value)),
            *(os.fspath(arg) for arg in args),
        ]  # fmt: skip

    def enter(self, rank: int) -> list[str]:
        """What stands before a command, so that it runs where this rank runs, on its core."""
        return ["taskset", "-c", str(self.cores[rank]), "ip", "netns", "exec", self.names[rank]]


def mpirun_path() -> str | None:
    """The environment's or the site's mpirun, None where there is none."""
    return shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")


def why_not() -> str | None:
    """The reason why this machine cannot make a link, None if it can. It makes one to find out."""
    if not sys.platform.startswith("linux"):
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "only root can make network namespaces"
    if mpirun_path() is None:
        return "no mpirun on PATH"
    for program, package in (("ip", "iproute2"), ("tc", "iproute2"), ("unshare", "util-linux"), ("taskset", "util-linux")):
        if shutil.which(program) is None:
            return f"no program '{program}' (Debian package {package})"
    try:
        with slow_link():
            return None
    except LinkError as error:
        return str(error)


@contextlib.contextmanager
def slow_link(mbit: float | None = 1000, delay_ms: float = 0) -> Iterator[Link]:
    """Two namespaces joined by a cable; at the end they and every process in them are gone.

    Args:
        mbit: Mbit/s in each direction; None for what the machine can do.
        delay_ms: on the way in each direction; needs a kernel with netem.

    Raises:
        LinkError: the machine does not allow it.
    """
    stem = f"hvdslow{os.getpid()}n{next(_serial)}"
    allowed = sorted(os.sched_getaffinity(0))
    link = Link((stem + "a", stem + "b"), (allowed[0], allowed[min(1, len(allowed) - 1)]))
    made = []
    try:
        for name in link.names:
            _run("ip", "netns", "add", name)
            made.append(name)
        first, second = link.names
        _run("ip", "link", "add", DEVICE, "netns", first, "type", "veth", "peer", "name", DEVICE, "netns", second)
        for name, address in zip(link.names, ADDRESSES, strict=True):
            _run("ip", "-n", name, "address", "add", f"{address}/30", "dev", DEVICE)
            for device in ("lo", DEVICE):
                _run("ip", "-n", name, "link", "set", device, "up")
            for words in queues(mbit, delay_ms):
                _run("tc", "-n", name, "qdisc", "add", "dev", DEVICE, *words)
        yield link
    finally:
        for name in made:
            _remove(name)


def queues(mbit: float | None, delay_ms: float) -> list[list[str]]:
    """Arguments of `tc qdisc add dev DEVICE` for one end of the cable; pure."""
    if mbit is None:
        rate = []
    else:
        # 2 ms of data may pass at once, but a whole large packet of 64 KiB always: a smaller bucket would split it.
        burst = max(65536 + 4096, int(mbit * 1e6 / 8 * 2e-3))
        rate = [["root", "handle", "1:", "tbf", "rate", f"{mbit:g}mbit", "burst", str(burst), "latency", "20ms"]]
    place = ["parent", "1:1"] if rate else ["root"]
    delay = [[*place, "netem", "delay", f"{delay_ms:g}ms", "limit", "10000"]] if delay_ms else []
    return rate + delay


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LinkError(f"'{' '.join(command)}' cannot run: {error}") from error
    if done.returncode:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[0]
        raise LinkError(f"'{' '.join(command)}' failed: {reason}")
    return done.stdout


def _remove(name: str) -> None:
    """End what still runs in a namespace of ours, and the namespace; what is gone already is fine."""
    with contextlib.suppress(LinkError):
        # More than once: a process may start another one while it is ended.
        for _ in range(50):
            pids = _run("ip", "netns", "pids", name).split()
            if not pids:
                break
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.05)
    with contextlib.suppress(LinkError):
        _run("ip", "netns", "delete", name)


def main() -> None:
    """``slow_link HOST WORD...``: runs the words by a shell as ssh would, under a host name of their own."""
    socket.sethostname("slow-link-peer")
    words = sys.argv[2:]
    os.execvp("sh", ["sh", "-c", " ".join(words)])


if __name__ == "__main__":
    main()
