"""The command line: help is light, and every end has its message and exit code."""

import json
import os
import subprocess
import sys

import click
import pytest

from hvd_imaging.cli import main as entry
from hvd_imaging.errors import ConfigError, DatasetError, HvdImagingError, PeerError, SourceError

HEAVY = ("tensorflow", "tf_keras", "horovod", "mpi4py", "numpy", "h5py", "pydicom", "highdicom", "nibabel", "scipy", "matplotlib")

# Runs the entry point on the arguments and tells on stderr which heavy libraries it has loaded.
_WATCH = f"""
import atexit, sys
atexit.register(lambda: print("LOADED", *sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr))
from hvd_imaging.cli.main import main
main()
"""


def run(*arguments, cwd=None, watch=False, environ=None):
    """The real command in a process of its own."""
    command = [sys.executable, "-c", _WATCH] if watch else [sys.executable, "-m", "hvd_imaging.cli.main"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120, check=False, cwd=cwd, env=environ)


def subcommands():
    found = []
    for name in entry.COMMANDS:
        try:
            command = entry.cli.get_command(None, name)
        except ModuleNotFoundError:
            continue  # test_every_command_of_the_table_can_be_loaded says so
        found.append((name,))
        if isinstance(command, click.Group):
            found += [(name, inner) for inner in command.commands]
    return found


@pytest.mark.parametrize("name", entry.COMMANDS)
def test_every_command_of_the_table_can_be_loaded(name):
    command = entry.cli.get_command(None, name)
    assert isinstance(command, click.Command)
    assert command.help


@pytest.mark.parametrize("words", subcommands(), ids=" ".join)
def test_o_is_short_for_where_to(words):
    """Whoever has typed -o for one command types it for the next."""
    command = entry.cli.get_command(None, words[0])
    options = [option for option in (command.commands[words[1]] if len(words) > 1 else command).params if isinstance(option, click.Option)]
    for option in options:
        assert ("--out" in option.opts) == ("-o" in option.opts), option.opts


@pytest.mark.parametrize("words", [(), *subcommands()], ids=" ".join)
def test_help_is_light_and_ends_well(words):
    done = run(*words, "--help", watch=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Usage: ")
    assert done.stderr.strip() == "LOADED"


def test_the_help_lists_all_commands_in_the_order_of_the_work():
    shown = run("-h").stdout
    places = [shown.index(f"\n  {name} ") for name in entry.COMMANDS]
    assert places == sorted(places)


def test_the_help_of_train_shows_the_three_launchers():
    shown = run("train", "--help").stdout
    for line in ("  hvd-imaging train run.yaml", "mpirun -np 2 hvd-imaging train run.yaml", "horovodrun -np 2 hvd-imaging train run.yaml"):
        assert line in shown


def test_the_version_is_that_of_the_package():
    done = run("--version")
    assert done.returncode == 0 and done.stdout.startswith("hvd-imaging, version ")


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (("fly",), "No such command 'fly'"),
        (("train",), "Missing argument 'run.yaml'"),
        (("dataset", "burn", "x"), "No such command 'burn'"),
        (("init", "detection"), "'detection' is not one of"),
        (("phantom", "out", "--patients", "none"), "'none' is not a valid integer"),
        (("ingest", "a", "b", "--quickly"), "No such option"),
    ],
)
def test_a_wrong_command_line_ends_with_2_and_says_how(words, shown, tmp_path):
    done = run(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert shown in done.stderr and "Traceback" not in done.stderr and done.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "code", "shown"),
    [
        (("train", "nowhere.yaml"), 2, "nowhere.yaml: cannot be read"),
        (("ingest", "nowhere", "out"), 3, "nowhere"),
        (("ingest", "nowhere", "out", "--set", "preprocess.spacin=1"), 2, "preprocess.spacing"),
        (("dataset", "info", "nowhere"), 4, "nowhere"),
        (("dataset", "verify", "nowhere"), 4, "nowhere"),
        (("evaluate", "nowhere"), 5, "nowhere"),
        (("export", "nowhere", "--format", "savedmodel", "out"), 5, "nowhere"),
        (("predict", "nowhere", "nowhere2", "out"), 5, "nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_what_is_missing_is_told_in_one_line_and_nothing_is_written(words, code, shown, tmp_path):
    if words[:1] not in subcommands():
        pytest.skip(f"no command {words[0]} in this installation")
    done = run(*words, cwd=tmp_path)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == code, done.stderr
    assert len(lines) == 1 and lines[0].startswith("hvd-imaging: error: ") and shown in lines[0]
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def ended(monkeypatch, capsys, failure, world=None):
    """Exit code and stderr of `main` when the called command fails."""

    def fail(**_):
        raise failure

    monkeypatch.setattr(entry.cli, "main", fail)
    monkeypatch.setattr(entry, "_PATIENCE_S", 0.0)
    for name in ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    if world:
        monkeypatch.setenv("OMPI_COMM_WORLD_RANK", str(world[0]))
        monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", str(world[1]))
        # A real abort would end the tests.
        monkeypatch.setattr(entry.os, "_exit", lambda code: sys.exit(code))
        monkeypatch.delitem(sys.modules, "mpi4py.MPI", raising=False)
    with pytest.raises(SystemExit) as caught:
        entry.main()
    return caught.value.code, capsys.readouterr().err


@pytest.mark.parametrize("kind", [HvdImagingError, *HvdImagingError.__subclasses__()])
def test_every_error_ends_with_its_own_code_and_one_line(monkeypatch, capsys, kind):
    code, text = ended(monkeypatch, capsys, kind("first\nsecond"))
    assert code == kind.exit_code
    assert text == "hvd-imaging: error: first second\n"


def test_the_exit_codes_differ():
    codes = [kind.exit_code for kind in (HvdImagingError, *HvdImagingError.__subclasses__())]
    assert len(set(codes)) == len(codes) and 0 not in codes


def test_one_failing_rank_names_itself(monkeypatch, capsys):
    code, text = ended(monkeypatch, capsys, DatasetError("shard-00000.h5: damaged"), world=(1, 2))
    assert code == 4 and text == "hvd-imaging: error: rank 1: shard-00000.h5: damaged\n"


@pytest.mark.parametrize("failure", [ConfigError("train.epochs: wrong"), SourceError("rank 1: no files"), PeerError("stopped")])
def test_what_all_ranks_end_with_is_told_once(monkeypatch, capsys, failure):
    code, text = ended(monkeypatch, capsys, failure, world=(1, 2))
    assert code == failure.exit_code and text == ""
    code, text = ended(monkeypatch, capsys, failure, world=(0, 2))
    assert code == failure.exit_code and text == f"hvd-imaging: error: {failure}\n"


def test_a_fault_of_the_program_shows_its_traceback_and_ends_with_70(monkeypatch, capsys):
    code, text = ended(monkeypatch, capsys, KeyError("inner"))
    assert code == 70 and "Traceback" in text and "please report it" in text
    code, text = ended(monkeypatch, capsys, KeyError("inner"), world=(1, 3))
    assert code == 70 and text.startswith("rank 1:")


def test_an_interrupt_ends_with_130(monkeypatch, capsys):
    assert ended(monkeypatch, capsys, KeyboardInterrupt())[0] == 130


def test_json_is_all_that_goes_to_stdout(tmp_path):
    done = run("phantom", "archive", "--patients", "1", "--seed", "3", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["patients"] == 1


def test_progress_yields_all_items_and_stays_off_stdout(capsys):
    from hvd_imaging.cli.console import progress
    from hvd_imaging.world import World

    for world in (World(), World(1, 2)):
        assert list(progress(range(5), "reading", world)) == [0, 1, 2, 3, 4]
        assert list(progress(iter("ab"), "reading", world)) == ["a", "b"]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("value", ["\x1b[31mred", "a\x07b", "\u202eevil", "\x00", "\x9b2J"])
def test_what_a_terminal_obeys_is_escaped_in_messages(value):
    error = ConfigError(f"run.yaml: name: found '{value}'\nnext")
    assert not any((ord(c) < 32 and c not in "\n\t") or 0x7F <= ord(c) < 0xA0 or c == "\u202e" for c in str(error))
    assert "\\" in str(error) and str(error).endswith("'\nnext")


def test_long_messages_are_cut_in_the_middle():
    text = str(ConfigError("begin" + "x" * 100_000 + "end"))
    assert len(text) < 2100 and text.startswith("begin") and text.endswith("end")


FAILS = """
import errno, os, sys
import click
from hvd_imaging.cli import main as entry

@click.command()
@click.argument("out")
def command(out):
    raise OSError(getattr(errno, os.environ["CODE"]), "No space left", os.environ["PLACE"])

entry.COMMANDS["fails"] = ""
entry.cli.get_command = lambda ctx, name: command
entry.main()
"""


@pytest.mark.parametrize("code", ["ENOSPC", "EROFS", "EACCES", "EMFILE", "EDQUOT", "EIO"])
def test_an_error_of_the_machine_is_one_line_and_names_what_the_user_named(tmp_path, code):
    for place, shown in ((tmp_path / "runs" / "Doe^John" / "x", str(tmp_path / "runs")), ("/elsewhere/Doe^John", "")):
        done = subprocess.run(
            [sys.executable, "-c", FAILS, "fails", str(tmp_path / "runs")], capture_output=True, text=True, timeout=60,
            env=os.environ | {"CODE": code, "PLACE": str(place)},
        )  # fmt: skip
        assert done.returncode == 6 and "Traceback" not in done.stderr and "Doe" not in done.stderr
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"hvd-imaging: error: {shown}") and "check space, permissions and limits" in line


def test_other_errors_of_the_system_are_still_faults_of_the_program(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FAILS, "fails", "x"], capture_output=True, text=True, timeout=60, env=os.environ | {"CODE": "EBADF", "PLACE": "x"}
    )
    assert done.returncode == 70 and "fault of the program" in done.stderr
