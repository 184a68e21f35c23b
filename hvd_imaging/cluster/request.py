"""What a job asks of Slurm: checked values, site defaults, and Slurm's own notation of times and sizes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import pydantic
from pydantic import Field

from ..config import Section, check, load
from ..errors import ConfigError

STEPS = ("ingest", "train", "evaluate", "compress")
"""Kinds of jobs, in the order of a chain."""

_DAYS = re.compile(r"(\d+)-(\d{1,2})(?::(\d{1,2}))?(?::(\d{1,2}))?")
_CLOCK = re.compile(r"(\d+)(?::(\d{1,2}))?(?::(\d{1,2}))?")
_SIZE = re.compile(r"(\d+)([KMGT]?)", re.IGNORECASE)


class Request(Section):
    """One job. The names are those of sbatch's options; `site.yaml` beside the templates may change the defaults."""

    nodes: int = Field(1, ge=1, description="machines")
    ntasks_per_node: int = Field(1, ge=1, description="ranks on each; one for each GPU, or for each socket")
    cpus_per_task: int | None = Field(None, ge=1, description="cores of a rank; null: the partition's default")
    gres: str | None = Field(None, description="generic resources of a node, as in gpu:1")
    mem: str | None = Field(None, description="memory of a node, as in 64G; null: the partition's default")
    time: str = Field("01:00:00", description="time limit of one start: minutes, HH:MM:SS or D-HH:MM:SS")
    partition: str | None = Field(None, description="queue; null: the default one")
    account: str | None = Field(None, description="who pays")
    qos: str | None = Field(None, description="quality of service")
    constraint: str | None = Field(None, description="features of the nodes")
    exclusive: bool = Field(False, description="whole nodes; false: cores that others leave")
    job_name: str | None = Field(None, description="null: step and run folder")
    mail_user: str | None = Field(None, description="address for mail")
    mail_type: str = Field("FAIL,END", description="when mail is sent, if mail_user is given")
    options: list[str] = Field([], description="more options for sbatch, as in --reservation=imaging")
    modules: list[str] = Field([], description="environment modules to load")
    setup: list[str] | None = Field(
        None, description="lines of shell before the command; null: PATH as at submission, so that the job finds this installation"
    )
    launcher: Literal["mpirun", "srun", "horovodrun"] = Field(
        "mpirun", description="mpirun: through `hvd-imaging launch`, with restarts inside the job; srun: through --mpi=pmix"
    )
    container: str | None = Field(None, description="Apptainer image that holds hvd-imaging; needs launcher: srun")
    container_options: list[str] = Field([], description="for `apptainer exec`, as in --bind=/data; --nv comes with GPUs")
    stage: Literal["none", "node", "disk"] = Field(
        "none", description="train: shards are copied to each node first: node: shared memory, disk: $SLURM_TMPDIR or $TMPDIR"
    )
    requeue: bool = Field(True, description="queue the job again after preemption, a lost node, or its time limit")
    requeues: int = Field(50, ge=0, description="how often at most")
    restarts: int = Field(3, ge=0, description="launcher=mpirun: restarts inside the job after a dead rank")
    signal_seconds: int = Field(180, ge=10, description="s before the time limit that a checkpoint is asked for")

    @pydantic.model_validator(mode="after")
    def _plain(self) -> Request:
        for name, value in self.model_dump().items():
            texts = [value] if isinstance(value, str) else value if isinstance(value, list) else []
            if any(not text.isprintable() for text in texts):
                raise ValueError(f"{name}: expected printable characters in one line")
        try:
            seconds(self.time)
            megabytes(self.mem)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        if self.container and self.launcher != "srun":
            raise ValueError("container: needs launcher=srun, which starts the ranks inside the image")
        return self

    @property
    def ranks(self) -> int:
        """World size."""
        return self.nodes * self.ntasks_per_node

    @property
    def gpus_per_node(self) -> int:
        """GPUs that ``gres`` asks for on each node."""
        return gpus(self.gres)


def seconds(text: str) -> float:
    """Slurm's time in s; infinite for UNLIMITED.

    Raises:
        ConfigError: not one of Slurm's forms (sbatch(1), --time).
    """
    if text.upper() in ("UNLIMITED", "INFINITE"):
        return float("inf")
    if match := _DAYS.fullmatch(text):
        days, hours, minutes, rest = (int(part or 0) for part in match.groups())
    elif match := _CLOCK.fullmatch(text):
        first, second, third = match.groups()
        days = 0
        hours, minutes, rest = (0, int(first), int(second or 0)) if third is None else (int(first), int(second), int(third))
    else:
        raise ConfigError(f"time: expected minutes, HH:MM:SS or D-HH:MM:SS, found '{text}'")
    return float(((days * 24 + hours) * 60 + minutes) * 60 + rest)


def megabytes(text: str | None) -> float | None:
    """Slurm's memory in MiB; None if not given, 0 for all of a node.

    Raises:
        ConfigError: not a number with K, M, G or T.
    """
    if text is None:
        return None
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"mem: expected a size such as 64G, found '{text}'")
    return int(match[1]) * {"K": 1 / 1024, "": 1, "M": 1, "G": 1024, "T": 1024**2}[match[2].upper()]


def gpus(gres: str | None) -> int:
    """Number of GPUs in ``gpu:a100:2`` and the like, also as sinfo prints it."""
    total = 0
    for part in re.sub(r"\([^)]*\)", "", gres or "").split(","):
        name, *rest = re.split("[:=]", part.strip().removeprefix("gres/"))
        if name == "gpu":
            # gpu, gpu:2, gpu:a100, gpu:a100:2
            total += int(rest[-1]) if rest and rest[-1].isdigit() else 1
    return total


def site_folders(environ: Mapping[str, str] | None = None) -> list[Path]:
    """Where templates and `site.yaml` are looked for before the package's own, nearest first."""
    environ = os.environ if environ is None else environ
    folders = [Path(folder) for folder in environ.get("HVD_IMAGING_SLURM", "").split(":") if folder]
    home = Path(environ.get("XDG_CONFIG_HOME") or Path(environ.get("HOME", "~")).expanduser() / ".config")
    return [*folders, home / "hvd-imaging" / "slurm", Path("/etc/hvd-imaging/slurm")]


def make_requests(
    steps: Iterable[str], given: Mapping[str, Any], single: Iterable[str] = (), folders: Iterable[Path] = ()
) -> dict[str, Request]:
    """The request of each step: site defaults, then ``given`` (None: not given), then ``STEP:KEY=VALUE`` of ``single``.

    Raises:
        ConfigError: unknown step or key, a value of another kind.
    """
    steps = list(steps)
    values: dict[str, Any] = {}
    # The nearest folder speaks last.
    for folder in reversed(list(folders)):
        if (folder / "site.yaml").is_file():
            values |= load(Request, folder / "site.yaml").model_dump(exclude_unset=True)
    values |= {key: value for key, value in given.items() if value is not None}
    special: dict[str, list[str]] = {step: [] for step in steps}
    for text in single:
        step, colon, rest = text.partition(":")
        if not colon or step not in special:
            raise ConfigError(f"--for {text}: expected STEP:OPTION=VALUE with one of the steps {', '.join(steps)}")
        special[step].append(rest.replace("-", "_", rest.partition("=")[0].count("-")))
    found = {}
    for step in steps:
        base = check(Request, values, "submit")
        found[step] = base
        if special[step]:
            own = load(Request, None, special[step]).model_dump(exclude_unset=True)
            found[step] = check(Request, values | own, f"--for {step}")
    return found
