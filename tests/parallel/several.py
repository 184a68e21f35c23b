"""A program for `mpirun`: several commands of `hvd-imaging` one after another in one world.

Most of a small run is the start of TensorFlow and Horovod on every rank; so it is paid once. Each run still makes its own
network, data and files. The first argument is a JSON list of command lines. The first one that fails ends the program
as it would end alone.
"""

from __future__ import annotations

import json
import sys


def run(commands: list[list[str]]) -> None:
    """Run the commands; ends the process at the first one with an exit code, or after the last."""
    from hvd_imaging.cli.main import main

    for arguments in commands:
        sys.argv[1:] = arguments
        try:
            main()
        except SystemExit as error:
            if error.code:
                raise


if __name__ == "__main__":
    run(json.loads(sys.argv[1]))
