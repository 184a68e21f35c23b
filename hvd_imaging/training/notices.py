"""What Open MPI's `mpirun` says when ranks or hosts fail, told apart from the ranks' own lines.

Open MPI puts its words between two lines of dashes. Those about a failed rank become a :class:`Notice` and are not shown;
all else passes in order.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Kind = Literal["signal", "exit", "abort", "lost", "start", "root", "slots", "none"]

_DASHES = b"-" * 74
_FORWARD = b"mpirun: Forwarding signal "
# Longer than any of mpirun's own words about a rank: something else got in between, so nothing is held back.
_MOST_LINES = 16
# mpirun writes a banner at once: a line of dashes that stays open this long is a rank's own.
_HOLD_S = 1.0
_NOISE = re.compile(
    rb"(mpirun|prterun): Forwarding signal \d+ to job\s*$"
    rb"|\[\S+\] \d+ more process(es)? ha(s|ve) sent help message "
    rb"|\[\S+\] Set MCA parameter .* to 0 to see all help"
)
_LAUNCHER = r"(?:mpirun|mpiexec|orterun|prterun)"
# (kind, whether it is shown, pattern with the groups rank, host, code); white space is one blank.
_PATTERNS: tuple[tuple[Kind, bool, re.Pattern[str]], ...] = (
    ("signal", False, re.compile(
        rf"{_LAUNCHER} noticed that process rank (?P<rank>\d+) with PID \d+ on node (?P<host>\S+) exited on signal (?P<code>\d+)")),
    ("exit", False, re.compile(
        rf"{_LAUNCHER} detected that one or more processes exited with non-zero status.*"
        r"Process name: \[.*?,\s?(?P<rank>\d+)\] Exit code: (?P<code>\d+)")),
    ("abort", False, re.compile(
        r"MPI_ABORT was invoked on rank (?P<rank>\d+) in communicator MPI_COMM_WORLD.*?error ?code:? (?P<code>\d+)", re.I)),
    ("lost", False, re.compile(
        r"(?:ORTE|PRTE) has lost communication with a remote daemon.*Remote daemon\s?: .*? on node (?P<host>\S+)")),
    ("none", False, re.compile(r"Primary job terminated normally, but \d+ process")),
    ("start", True, re.compile(r"was unable to (?:launch|start) the specified application.*?Node: (?P<host>\S+)")),
    ("root", True, re.compile(r"has detected an attempt to run as root")),
    ("slots", True, re.compile(r"There are not enough slots available")),
)  # fmt: skip


@dataclass(frozen=True)
class Notice:
    """One banner of mpirun.

    Attributes:
        kind: signal, exit, abort: so ended a rank; lost: a host; start: the program did not start there; root, slots:
            mpirun refused to begin.
        rank: of the failed process.
        host: as mpirun calls it.
        code: signal number or exit code.
    """

    kind: Kind
    rank: int | None = None
    host: str | None = None
    code: int | None = None


def parse(text: str) -> tuple[Notice | None, bool]:
    """What a banner tells, None if it is none of ours; and whether people should still see it."""
    lines = len(text.splitlines())
    text = " ".join(text.split())
    for kind, shown, pattern in _PATTERNS:
        if match := pattern.search(text):
            found = match.groupdict()
            rank, code = (int(found[key]) if found.get(key) else None for key in ("rank", "code"))
            return Notice(kind, rank, found.get("host"), code), shown or lines > _MOST_LINES
    return None, True


class Filter:
    """Takes the bytes of mpirun's stderr as they come and gives back what people should see."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.notices: list[Notice] = []
        self._clock = clock
        self._tail = b""  # an unfinished line that may become mpirun's
        self._inside = False  # the line's beginning has been passed on
        self._held: list[bytes] = []
        self._since = 0.0

    def feed(self, data: bytes) -> bytes:
        """Add bytes, none as time passes; returns those that may be shown now."""
        if not self._held and not self._tail:
            self._since = self._clock()
        *lines, self._tail = (self._tail + data).split(b"\n")
        shown = [self._line(line + b"\n") for line in lines]
        if self._tail and not self._held and (self._inside or not self._may_be_ours(self._tail)):
            shown.append(self._tail)
            self._tail, self._inside = b"", True
        if self._clock() - self._since > _HOLD_S:
            shown.append(self.release())
        return b"".join(shown)

    def release(self) -> bytes:
        """All that is held back: at the end of the stream, or when it has waited too long."""
        shown = b"".join(self._held) + self._tail
        if shown:
            self._inside = bool(self._tail)
        self._held, self._tail = [], b""
        return shown

    def _line(self, line: bytes) -> bytes:
        if self._inside:
            self._inside = False
            return line
        border = line.rstrip() == _DASHES
        if self._held:
            self._held.append(line)
            return self._banner() if border else b""
        if border:
            self._held, self._since = [line], self._clock()
            return b""
        return b"" if _NOISE.match(line) else line

    def _banner(self) -> bytes:
        held, self._held = self._held, []
        notice, shown = parse(b"".join(held[1:-1]).decode("utf-8", "replace"))
        if notice is not None and notice.kind != "none":
            self.notices.append(notice)
        return b"".join(held) if shown else b""

    @staticmethod
    def _may_be_ours(tail: bytes) -> bool:
        return any(whole.startswith(tail[: len(whole)]) for whole in (_DASHES, _FORWARD))
