"""`hvd-imaging`: the table of commands, and how a run ends when something is wrong.

Command modules are imported when their command is called, and import heavy libraries inside their functions: `--help`
never loads TensorFlow.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from ..errors import ConfigError, HvdImagingError, PeerError, SetupError
from ..world import World, world_from_environment

COMMANDS = {
    # name: the line that `hvd-imaging --help` shows; the module is hvd_imaging.cli.<name>
    "phantom": "Make a synthetic chest-CT DICOM archive.",
    "fetch": "Fetch series from a DICOMweb server.",
    "store": "Store DICOM files on a DICOMweb server.",
    "ingest": "Make a dataset from DICOM or NIfTI files.",
    "labels": "Report what the annotations of an archive hold.",
    "deidentify": "Make a copy of DICOM files that names nobody.",
    "dataset": "Look at a dataset: verify, audit, sign, split, compare versions.",
    "init": "Write a commented configuration.",
    "train": "Train a network on a dataset, alone or on many ranks.",
    "launch": "Train under mpirun, with restarts when a rank or a host dies.",
    "submit": "Queue a training, or a chain of steps, on a Slurm cluster.",
    "status": "Say how a run stands, in the queue and in training.",
    "logs": "Show the output of a run's jobs.",
    "cancel": "End a run's jobs, with a checkpoint.",
    "plan": "Forecast volume, storage, nodes, energy and cost.",
    "report": "Make one HTML page on a run, or on several side by side.",
    "evaluate": "Measure a trained network on a split of its dataset.",
    "predict": "Apply a model to a series, a NIfTI file or a dataset.",
    "export": "Turn a run into a SavedModel or a TFLite model.",
    "sign": "Sign a run or an export, so that others can tell who made it.",
    "compress": "Make a trained network smaller and faster, and judge the result.",
    "doctor": "Check the installation and say how to mend it.",
    "bench": "Measure this machine, with the peers in the same run.",
}


_PATIENCE_S = 2.0


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        return importlib.import_module(f"hvd_imaging.cli.{cmd_name}").command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="hvd_imaging", prog_name="hvd-imaging")
def cli() -> None:
    """Train medical-image networks, from a DICOM archive to an exported model, on one process or a cluster."""


def main() -> NoReturn:
    """Entry point; ends the process, and with it all ranks if this one alone has failed."""
    world = world_from_environment()
    try:
        # Exit codes come back as values outside of standalone mode, exceptions as they are.
        code = cli.main(standalone_mode=False)
        _leave(code if isinstance(code, int) else 0, world)
    except SystemExit as error:
        _leave(error.code if isinstance(error.code, int) else 1, world)
    except HvdImagingError as error:
        together = is_alike(error)
        if world.is_root or not together:
            prefix = f"rank {world.rank}: " if world.size > 1 and not together else ""
            print(f"hvd-imaging: error: {prefix}{' '.join(str(error).splitlines())}", file=sys.stderr)
        leave = _leave if together else _abort
        leave(error.exit_code, world)
    except click.exceptions.Exit as error:
        _leave(error.exit_code, world)
    except click.ClickException as error:
        if world.is_root:
            error.show()
        _leave(error.exit_code, world)
    except (KeyboardInterrupt, click.Abort):
        _abort(130, world)
    except BrokenPipeError:
        # The reader (head, less) has gone: nothing is wrong, and nothing may be written any more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _leave(0, world)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _OF_THE_MACHINE:
            print(f"hvd-imaging: error: {f'rank {world.rank}: ' if world.size > 1 else ''}{told(error, sys.argv[1:])}", file=sys.stderr)
            _abort(SetupError.exit_code, world)
        if world.size > 1:
            print(f"rank {world.rank}:", file=sys.stderr)
        traceback.print_exc()
        print("hvd-imaging: this is a fault of the program; please report it with the lines above", file=sys.stderr)
        _abort(70, world)


_OF_THE_MACHINE = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENAMETOOLONG, errno.EIO,
    errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.EFBIG,
}  # fmt: skip
"""Errors that are no fault of the program: a full disk, a folder that may not be written, too many open files."""


def told(error: OSError, words: Sequence[str]) -> str:
    """One line on an error of the machine. Of its path no more than the user's own word for what it lies in: names can name patients. Pure."""
    path = os.path.abspath(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else ""
    values = [word.partition("=")[2] or word for word in words]
    place = [word for word in values if word and path and Path(path).is_relative_to(os.path.abspath(word))]
    where = f"{max(place, key=lambda word: len(os.path.abspath(word)))}: " if place else ""
    return f"{where}{error.strerror or type(error).__name__}; check space, permissions and limits (ulimit -n) there, then try again"


def is_alike(error: HvdImagingError) -> bool:
    """True if all ranks end with this error, so that rank 0 says it for all.

    So it is with the configuration, with what `communicator.together` found (it names the rank), and where another rank
    has failed and told its own reason.
    """
    return error.alike or isinstance(error, ConfigError | PeerError) or str(error).startswith("rank ")


def _leave(code: int, world: World) -> NoReturn:
    """End this process as all ranks do."""
    sys.stdout.flush()
    sys.stderr.flush()
    if code and not world.is_root:
        # mpirun ends all ranks when the first one leaves with an error: rank 0 has to have said why.
        time.sleep(_PATIENCE_S)
    sys.exit(code)


def _abort(code: int, world: World) -> NoReturn:
    """End all ranks, none of which may wait for this one for ever."""
    sys.stdout.flush()
    sys.stderr.flush()
    mpi: Any = sys.modules.get("mpi4py.MPI")
    if world.size > 1:
        if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
            mpi.COMM_WORLD.Abort(code)
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
