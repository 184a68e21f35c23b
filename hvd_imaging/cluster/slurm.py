"""The door to Slurm's programs: each call is one program with a list of words, its output parsed by pure functions."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import RunError, SetupError
from .request import gpus, seconds

_PATIENCE_S = 30.0
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "PREEMPTED")
"""States of a job that does not go on (squeue(1), JOB STATE CODES); a requeued one is PENDING."""


@dataclass(frozen=True)
class Partition:
    """A queue.

    Attributes:
        name: as of ``--partition``.
        default: taken without one.
        up: takes jobs.
        limit_s: longest job, s.
        most_nodes: of one job; None: all.
    """

    name: str
    default: bool
    up: bool
    limit_s: float
    most_nodes: int | None = None


@dataclass(frozen=True)
class Node:
    """A machine in a queue.

    Attributes:
        name: of Slurm.
        partition: one line for each queue that it is in.
        state: as sinfo's compact form: idle, mix, alloc, down, drain, ...; a ``*`` (does not answer) is kept.
        cores, idle_cores: of the machine, and those that no job has.
        memory_mb: MiB.
        gpus: in all.
    """

    name: str
    partition: str
    state: str
    cores: int
    idle_cores: int
    memory_mb: int
    gpus: int

    @property
    def usable(self) -> bool:
        """Jobs can run there, now or later."""
        return self.state.rstrip("*~#!%$@^-") in ("idle", "mix", "alloc", "comp", "resv", "mixed", "allocated") and "*" not in self.state


@dataclass(frozen=True)
class Job:
    """A job as squeue or scontrol tell it.

    Attributes:
        id: with the task's number for arrays.
        state: long form.
        reason: why it waits, or "".
        nodes: where it runs.
        used_s, left_s: of its time limit; None unknown.
        restarts: how often it was queued again.
        start: when it began, or is expected to; "" unknown.
        code: exit code, None before the end.
    """

    id: str
    state: str
    reason: str = ""
    nodes: str = ""
    used_s: float | None = None
    left_s: float | None = None
    restarts: int = 0
    start: str = ""
    code: int | None = None


def run(words: Sequence[str], text: str | None = None) -> str:
    """Output of one of Slurm's programs.

    Raises:
        SetupError: it is not on this machine, or does not answer.
        RunError: it refuses; its own words are passed on.
    """
    if shutil.which(words[0]) is None:
        raise SetupError(
            f"{words[0]}: not on this machine, so there is no Slurm to talk to; run this on a login node, or train without it: "
            "hvd-imaging launch -np N -- train run.yaml"
        )
    try:
        done = subprocess.run(
            words, input=text, capture_output=True, text=True, timeout=_PATIENCE_S, check=False, env={**os.environ, "LC_ALL": "C"}
        )
    except subprocess.TimeoutExpired:
        raise SetupError(f"{words[0]}: no answer within {_PATIENCE_S:.0f} s; is slurmctld up? (scontrol ping)") from None
    if done.returncode:
        said = " ".join(line.removeprefix(f"{words[0]}: ") for line in done.stderr.strip().splitlines()[-3:])
        if "Unable to contact slurm controller" in said or "Unable to process configuration" in said:
            raise SetupError(f"{words[0]}: {said}; is slurmctld up? (scontrol ping)")
        raise RunError(f"{words[0]}: {said or f'exit code {done.returncode}'}")
    return done.stdout


def partitions() -> list[Partition]:
    """All queues."""
    return parse_partitions(run(["scontrol", "show", "partition", "-o"]))


def parse_partitions(text: str) -> list[Partition]:
    """From ``scontrol show partition -o``."""
    found = []
    for line in text.splitlines():
        values = _pairs(line)
        if "PartitionName" not in values:
            continue
        most = values.get("MaxNodes", "UNLIMITED")
        found.append(
            Partition(
                values["PartitionName"], values.get("Default") == "YES", values.get("State") == "UP",
                seconds(values.get("MaxTime", "UNLIMITED")), None if most == "UNLIMITED" else int(most),
            )
        )  # fmt: skip
    return found


def nodes() -> list[Node]:
    """All machines, one entry for each queue that they are in."""
    return parse_nodes(run(["sinfo", "-h", "-N", "-o", "%N|%R|%t|%C|%m|%G"]))


def parse_nodes(text: str) -> list[Node]:
    """From ``sinfo -h -N -o '%N|%R|%t|%C|%m|%G'``."""
    found = []
    for line in text.splitlines():
        parts = line.strip().split("|")
        if len(parts) == 6:
            name, partition, state, cores, memory, gres = parts
            idle, total = (int(n) for n in cores.split("/")[1::2])
            found.append(Node(name, partition, state, total, idle, int(memory.rstrip("+")), gpus(gres)))
    return found


def submit(script: Path, after: str | None = None) -> str:
    """Queue a script; the job's number.

    Raises:
        RunError: sbatch refuses.
    """
    # A job whose predecessor failed would wait for ever otherwise.
    words = ["sbatch", "--parsable", *([f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"] if after else []), str(script)]
    return run(words).strip().split(";")[0]


def expected_start(script: Path, options: Sequence[str] = ()) -> str | None:
    """When Slurm's scheduler would start the script (ISO 8601), None if never."""
    done = subprocess.run(
        ["sbatch", "--test-only", *options, str(script)], capture_output=True, text=True, timeout=_PATIENCE_S, check=False
    )
    match = re.search(r"to start at (\S+)", done.stderr)
    return match[1] if match else None


def jobs(ids: Iterable[str]) -> dict[str, Job]:
    """What Slurm knows of ``ids``: the queue, what the controller still remembers, then the accounting; missing ones are left out."""
    wanted = list(ids)
    found: dict[str, Job] = {}
    for job in parse_queue(run(["squeue", "-h", "-a", "-r", "--me", "-o", "%i|%T|%r|%N|%M|%L|%S"])):
        if job.id.split("_")[0] in wanted:
            found[job.id] = job
    for id in wanted:
        # Ended jobs leave the queue's list at once, and the controller's memory after MinJobAge.
        try:
            for job in parse_show(run(["scontrol", "show", "job", "-o", id])):
                before = found.get(job.id)
                found[job.id] = job if before is None else _joined(before, job)
        except RunError:
            if not any(key.split("_")[0] == id for key in found):
                found |= {job.id: job for job in _accounting(id)}
    return found


def parse_queue(text: str) -> list[Job]:
    """From ``squeue -h -o '%i|%T|%r|%N|%M|%L|%S'``."""
    found = []
    for line in text.splitlines():
        parts = line.strip().split("|")
        if len(parts) == 7:
            id, state, reason, where, used, left, start = parts
            found.append(
                Job(id, state, "" if reason == "None" else reason, where, _clock(used), _clock(left), start="" if start == "N/A" else start)
            )
    return found


def parse_show(text: str) -> list[Job]:
    """From ``scontrol show job -o``; one line a job."""
    found = []
    for line in text.splitlines():
        values = _pairs(line)
        if "JobId" not in values:
            continue
        id = values["JobId"]
        if "ArrayJobId" in values and "ArrayTaskId" in values:
            id = f"{values['ArrayJobId']}_{values['ArrayTaskId']}"
        state, ended = values.get("JobState", "UNKNOWN"), values.get("JobState") in ENDED
        found.append(
            Job(
                id, state, values.get("Reason", "").replace("None", ""), values.get("NodeList", "").replace("(null)", ""),
                _clock(values.get("RunTime", "")), None, int(values.get("Restarts", 0)), values.get("StartTime", "").replace("Unknown", ""),
                _code(values.get("ExitCode", "")) if ended else None,
            )
        )  # fmt: skip
    return found


def parse_accounting(text: str) -> list[Job]:
    """From ``sacct -n -X -P -o JobID,State,ExitCode,NodeList,ElapsedRaw,Start``."""
    found = []
    for line in text.splitlines():
        parts = line.strip().split("|")
        if len(parts) == 6 and parts[4].isdigit():
            # "CANCELLED by 1000"
            found.append(Job(parts[0], parts[1].split()[0], "", parts[3], float(parts[4]), code=_code(parts[2]), start=parts[5]))
    return found


def _accounting(id: str) -> list[Job]:
    try:
        return parse_accounting(run(["sacct", "-n", "-X", "-P", "-j", id, "-o", "JobID,State,ExitCode,NodeList,ElapsedRaw,Start"]))
    except (RunError, SetupError):
        return []  # not every site keeps accounts


def cancel(ids: Sequence[str]) -> None:
    """End jobs at once."""
    run(["scancel", *ids])


def ask_to_leave(ids: Sequence[str]) -> None:
    """SIGTERM to the batch scripts alone: they write a checkpoint and leave."""
    run(["scancel", "--batch", "--signal=TERM", *ids])


def _joined(queue: Job, shown: Job) -> Job:
    return Job(
        queue.id, queue.state, queue.reason or shown.reason, queue.nodes, queue.used_s, queue.left_s, shown.restarts,
        queue.start or shown.start, shown.code,
    )  # fmt: skip


def _pairs(line: str) -> dict[str, str]:
    """``Key=Value`` words; a value may hold spaces, a key not."""
    return {match[1]: match[2].strip() for match in re.finditer(r"(\w[\w:/]*)=(.*?)(?=\s+\w[\w:/]*=|$)", line)}


def _clock(text: str) -> float | None:
    # squeue writes seconds behind the last colon, unlike what --time takes.
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text.strip())
    if match is None:
        return None
    days, hours, minutes, rest = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + rest)


def _code(text: str) -> int | None:
    match = re.fullmatch(r"(\d+):(\d+)", text)
    return None if match is None else 128 + int(match[2]) if int(match[2]) else int(match[1])
