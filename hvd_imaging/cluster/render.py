"""From a wish (configuration, steps, requests) to batch scripts: pure, so that it is tested against golden files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..training.layout import SCRIPTS
from .request import STEPS, Request
from .templates import Expanded, directive, render

HOSTS = Expanded('"$hosts"')
"""For horovodrun, which does not ask Slurm; set by the template."""
FOLDER = SCRIPTS
"""In the run folder: scripts, their output, and what was submitted."""


@dataclass(frozen=True)
class Array:
    """Tasks of one job, which differ by words at the end of the command.

    Attributes:
        file: where they come from, for the reader of the script.
        rows: words of each task.
        at_once: so many run together, 0: all.
    """

    file: str
    rows: tuple[tuple[str, ...], ...]
    at_once: int = 0


@dataclass(frozen=True)
class Wish:
    """What is to run; everything that a script depends on.

    Attributes:
        run_dir: of the training, as given.
        folder: where relative paths begin, absolute.
        path: of this installation's programs.
        config: the run's configuration, as the job reads it.
        dataset: of the configuration; ingest makes it.
        source: ingest: archive.
        recipe: compress: recipe file.
        assignments: ``--set`` of ingest and of train, evaluate's and compress' own words.
        template: name of another template than the step's.
        array: hyper-parameters.
        variables: for templates of the user's own.
    """

    run_dir: Path
    folder: Path
    path: str
    config: Path
    dataset: str = ""
    source: str | None = None
    recipe: Path | None = None
    assignments: Mapping[str, Sequence[str]] = field(default_factory=dict)
    template: str | None = None
    array: Array | None = None
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Script:
    """One job, ready to be submitted.

    Attributes:
        step: its kind.
        after: the step that has to end well before.
        text: the batch script.
        request: what it asks for.
    """

    step: str
    after: str | None
    text: str
    request: Request


def parse_chain(text: str) -> tuple[str, ...]:
    """``ingest,train`` as steps in their order.

    Raises:
        ConfigError: an unknown step, one given twice, another order.
    """
    steps = tuple(part.strip() for part in text.split(","))
    if any(step not in STEPS for step in steps) or sorted(set(steps), key=STEPS.index) != list(steps):
        raise ConfigError(f"--chain {text}: expected some of {','.join(STEPS)} in this order")
    return steps


def command(step: str, wish: Wish, request: Request) -> list[str]:
    """The words that start ``step`` inside the job.

    Raises:
        ConfigError: what the step needs was not given.
    """
    run_dir = str(wish.run_dir)
    assignments = [word for text in wish.assignments.get(step, ()) for word in ("--set", text)]
    if step == "train":
        # --resume begins anew where there is no checkpoint: so a queued job can be started any number of times.
        own_folder = [] if wish.array else ["--run-dir", run_dir]  # each task of an array brings its own
        words = ["train", str(wish.config), *own_folder, "--resume", *assignments]
        if request.stage != "none":
            words += ["--set", f"data.cache.kind={request.stage}"]
    elif step == "ingest":
        if wish.source is None:
            raise ConfigError("--chain ingest: expected --source ARCHIVE, the folder with DICOM or NIfTI files")
        words = ["ingest", wish.source, wish.dataset, *assignments]
    elif step == "evaluate":
        words = ["evaluate", run_dir, *wish.assignments.get(step, ())]
    else:
        if wish.recipe is None:
            raise ConfigError("--chain compress: expected --recipe FILE; `hvd-imaging init compress-segmentation -o recipe.yaml` makes one")
        words = ["compress", run_dir, "--recipe", str(wish.recipe), "--out", f"{run_dir}/compressed", "--resume", *assignments]
    return launcher(step, request) + words


def launcher(step: str, request: Request) -> list[str]:
    """What starts the ranks; they are not bound to single cores, as a rank computes with all that it was given."""
    ranks, program = str(request.ranks), "hvd-imaging"
    if request.launcher == "srun":
        inside = ["apptainer", "exec", *(["--nv"] if request.gpus_per_node else []), *request.container_options]
        # srun takes this from no one else: neither from the job nor from sbatch.
        cores = [f"--cpus-per-task={request.cpus_per_task}"] if request.cpus_per_task else ["--cpu-bind=none"]
        return ["srun", "--mpi=pmix", *cores, *([*inside, request.container] if request.container else []), program]
    if request.launcher == "horovodrun" and step in ("train", "compress"):
        return ["horovodrun", "-np", ranks, "-H", HOSTS, program]
    if step == "train":
        grace = str(request.signal_seconds * 5 // 6)
        binding = ["--mpirun-arg", "--bind-to", "--mpirun-arg", "none"]
        # Slurm replaces a lost node; what is left of the old one would let mpirun wait for it.
        leave = ["--leave-lost-hosts"] * request.requeue
        return [program, "launch", "-np", ranks, "--max-restarts", str(request.restarts), *leave, "--grace", grace, *binding, "--"]
    return [program] if request.ranks == 1 else ["mpirun", "-np", ranks, "--bind-to", "none", program]


def directives(step: str, wish: Wish, request: Request) -> list[str]:
    """Options of sbatch, in the order of its manual page."""
    leaves = step in ("train", "compress")
    output = f"{wish.run_dir}/{FOLDER}/{step}-{'%A_%a' if wish.array else '%j'}.out"
    if not wish.run_dir.is_absolute():
        output = f"{wish.folder}/{output}"
    # sbatch knows %x patterns in this path, so a % of the folder's own name is doubled.
    head, _, tail = output.rpartition("/")
    values: list[tuple[str, object]] = [
        ("job-name", request.job_name or f"{step}-{wish.run_dir.name}"),
        ("output", head.replace("%", "%%") + "/" + tail),
        ("nodes", request.nodes),
        ("ntasks-per-node", request.ntasks_per_node),
        ("cpus-per-task", request.cpus_per_task),
        ("gres", request.gres),
        ("mem", request.mem),
        ("time", request.time),
        ("partition", request.partition),
        ("account", request.account),
        ("qos", request.qos),
        ("constraint", request.constraint),
        ("mail-user", request.mail_user),
        ("mail-type", request.mail_type if request.mail_user else None),
    ]
    found = [directive(name, value) for name, value in values if value is not None]
    if wish.array:
        limit = f"%{wish.array.at_once}" if wish.array.at_once else ""
        found.append(directive("array", f"0-{len(wish.array.rows) - 1}{limit}"))
    found += ["--exclusive"] * request.exclusive
    found += ["--requeue", "--open-mode=append"] if request.requeue else ["--no-requeue"]
    if leaves:
        found.append(f"--signal=B:USR1@{request.signal_seconds}")
    return found + [directive(*option.lstrip("-").split("=", 1)) for option in request.options]


def scripts(
    steps: Sequence[str], wish: Wish, requests: Mapping[str, Request], folders: Iterable[Path] = ()
) -> list[Script]:
    """The jobs of a chain.

    Raises:
        ConfigError: see `command` and `templates.render`; an array in a chain of several steps; a value with a line break in it.
    """
    if wish.array and len(steps) > 1:
        raise ConfigError("--array: takes one step; what comes after an array is submitted when its results were looked at")
    found, before = [], None
    for step in steps:
        request = requests[step]
        values: dict[str, Any] = {
            "step": step, "request": request, "ranks": request.ranks, "directives": directives(step, wish, request),
            "command": command(step, wish, request), "folder": str(wish.folder), "path": wish.path, "array": wish.array,
            "run_dir": str(wish.run_dir),
        }  # fmt: skip
        refuse_control(values | dict(wish.variables))
        clash = sorted(values.keys() & wish.variables.keys())
        if clash:
            raise ConfigError(f"--var {clash[0]}: this name is taken; taken are {', '.join(sorted(values))}")
        found.append(Script(step, before, render(wish.template or step, values | dict(wish.variables), folders), request))
        before = step
    return found


def refuse_control(value: Any, name: str = "") -> None:
    """Whatever reaches a script stays in its line, in a comment, an option or a command alike. Pure.

    Raises:
        ConfigError: a text in ``value``, at any depth, holds a line break or another control character.
    """
    if isinstance(value, str | Path):
        if not str(value).isprintable():
            raise ConfigError(f"{name}: expected printable characters in one line, which go into a batch script, found {str(value)!r}")
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            refuse_control(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, Request):
        refuse_control(value.model_dump(), name)
    elif isinstance(value, Array):
        refuse_control((value.file, value.rows), name)
    elif isinstance(value, list | tuple):
        for inner in value:
            refuse_control(inner, name)


def chain_script(jobs: Sequence[Script], files: Mapping[str, Path], folders: Iterable[Path] = ()) -> str:
    """A shell script that submits the same chain by hand."""
    rows = [{"name": job.step, "after": job.after, "script": str(files[job.step])} for job in jobs]
    return render("chain.sh.j2", {"jobs": rows}, folders)
