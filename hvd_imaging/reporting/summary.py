"""A short table of finished runs: ``python -m hvd_imaging.reporting.summary RUN_DIR... [--files FOLDER...]``.

Reads what training and evaluation have written; loads neither TensorFlow nor images.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import HvdImagingError, RunError
from ..texts import read_json

HEAD = ("run", "model", "Dice", "accuracy", "recall", "AUC", "samples/s")


def summarize(run_dir: str | Path, split: str = "test") -> dict[str, Any]:
    """Figures of one run, None for what it does not have.

    Returns:
        ``run``, ``model``, ``task``, ``dice``, ``accuracy``, ``recall``, ``auc`` (means of ``evaluation-<split>.json``) and
        ``samples_per_second`` (median of the epochs, all ranks together).

    Raises:
        RunError: not a run, or not evaluated on this split yet.
    """
    directory = Path(run_dir)
    report = _read(directory / f"evaluation-{split}.json", f"`hvd-imaging evaluate {run_dir} --split {split}` makes it")
    spec = _read(directory / "model.json", f"{run_dir} is no run folder")
    mean = report.get("mean", {})
    row: dict[str, Any] = {"run": directory.name, "model": spec["model"]["name"], "task": report["task"]}
    for name in ("dice", "accuracy", "recall", "auc"):
        row[name] = mean.get(name, {}).get("value")
    # The first epoch compiles the graph: it counts only if there is no other.
    speeds = _speeds(directory / "events.jsonl")
    row["samples_per_second"] = statistics.median(speeds[1:] or speeds) if speeds else None
    return row


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rows of `summarize` as lines of text."""
    keys = ("dice", "accuracy", "recall", "auc")
    cells = [HEAD] + [
        (row["run"], row["model"], *(_number(row[key], 3) for key in keys), _number(row["samples_per_second"], 1))
        for row in rows
    ]
    widths = [max(len(line[column]) for line in cells) for column in range(len(HEAD))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def count_files(folder: str | Path) -> tuple[int, int]:
    """(files, bytes) below a folder, or of one file."""
    path = Path(folder)
    files = [path] if path.is_file() else [item for item in path.rglob("*") if item.is_file()]
    return len(files), sum(item.stat().st_size for item in files)


def _speeds(path: Path) -> list[float]:
    from ..training.events import epoch_records

    return [float(r["samples_per_second"]) for r in epoch_records(path.parent) if "samples_per_second" in r]


def _read(path: Path, next_step: str) -> dict[str, Any]:
    try:
        values = read_json(path)
    except FileNotFoundError as error:
        raise RunError(f"{path}: no such file; {next_step}") from error
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(values, dict):
        raise RunError(f"{path}: expected a JSON object")
    return values


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m hvd_imaging.reporting.summary", description=(__doc__ or "").split(":")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR")
    parser.add_argument("--split", default="test")
    parser.add_argument("--files", nargs="*", default=[], metavar="PATH", help="also count the files written here")
    options = parser.parse_args(arguments)
    try:
        rows = [summarize(run, options.split) for run in options.runs]
    except HvdImagingError as error:
        print(f"hvd-imaging: error: {error}", file=sys.stderr)
        return error.exit_code
    print("\n".join(table(rows)))
    if options.files:
        print("\nfiles written")
        width = max(map(len, options.files))
        for name in options.files:
            files, size = count_files(name)
            print(f"  {name:<{width}}  {files:5d} file{'s' * (files != 1):1}  {size / 1e6:8.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
