"""Progress for people: a bar on a terminal, a line now and then without one, rank 0 only."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import click

from ..errors import ConfigError
from ..world import World, world_from_environment

T = TypeVar("T")
_EVERY_S = 10.0


def progress(items: Iterable[T], description: str, world: World) -> Iterator[T]:
    """Yield ``items``, showing on stderr how far this rank is."""
    items = items if isinstance(items, Sequence) else list(items)
    if not world.is_root:
        yield from items
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track

        yield from track(items, description, console=Console(stderr=True), transient=True)
    else:
        last = time.monotonic()
        for done, item in enumerate(items):
            if time.monotonic() - last > _EVERY_S:
                last = time.monotonic()
                print(f"{description}: {done} of {len(items)}", file=sys.stderr, flush=True)
            yield item


@contextlib.contextmanager
def counter(description: str, world: World = World(), unit: str = "") -> Iterator[Callable[[int, int], None]]:
    """A function ``(done, total)`` that shows on stderr how far it is, how fast, and how long it will take still.

    Args:
        unit: of both numbers; "bytes" are shown as MB.
    """
    if not world.is_root:
        yield lambda done, total: None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task, start = bar.add_task(description, total=None, text=""), time.monotonic()

            def draw(done: int, total: int) -> None:
                text = describe_rate(done, total, time.monotonic() - start, unit)
                bar.update(task, completed=done, total=total, text=text)

            yield draw
    else:
        last = start = time.monotonic()

        def line(done: int, total: int) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last > _EVERY_S:
                last = now
                left = f", {(total - done) * (now - start) / done:.0f} s left" if done else ""
                print(f"{description}: {describe_rate(done, total, now - start, unit)}{left}", file=sys.stderr, flush=True)

        yield line


def describe_rate(done: int, total: int, seconds: float, unit: str) -> str:
    """"30 of 120 files, 15/s" or "30 of 120 MB, 15 MB/s". Pure."""
    scale, name = (1e6, "MB") if unit == "bytes" else (1, unit)
    shown = f"{done / scale:.0f} of {total / scale:.0f} {name}".rstrip()
    if not done or seconds <= 0:
        return shown
    rate = done / scale / seconds
    return f"{shown}, {rate:.{0 if rate >= 10 else 1}f}{' MB' if name == 'MB' else ''}/s"


def refuse_many_ranks(command: str) -> None:
    """A command that is one process must not run as several that write the same file.

    Raises:
        ConfigError: on all ranks alike.
    """
    size = world_from_environment().size
    if size > 1:
        raise ConfigError(f"`hvd-imaging {command}` is a single process, but {size} ranks were started: run it without mpirun")


def listed(title: str, rows: list[tuple[str, str]], most: int = 10) -> None:
    """A short list on stderr; what was said of several inputs is said once, with their number."""
    if not rows:
        return
    click.echo(f"{len(rows)} {title}:", err=True)
    kinds = kinds_of(rows)
    for text, paths in kinds[:most]:
        where = paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
        click.echo(f"  {where}: {text}", err=True)
    if left := sum(len(paths) for _, paths in kinds[most:]):
        click.echo(f"  and {left} of {len(kinds) - most} other kinds", err=True)


def kinds_of(rows: Sequence[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    """(text of the first, paths) of each kind of (path, text), the most frequent first. Pure.

    Texts that differ in references and numbers only are of one kind.
    """
    said: dict[str, tuple[str, list[str]]] = {}
    for path, text in rows:
        kind = re.sub(r"\d+", "0", re.sub(r"\b(file|folder)-[0-9a-f]{10}\b", r"\1", text))
        said.setdefault(kind, (text, []))[1].append(path)
    return sorted(said.values(), key=lambda each: -len(each[1]))


def table_console() -> Any:
    """A console for tables: as wide as the terminal; a file or a pipe has no edge, nor has what mpirun passes on."""
    from rich.console import Console

    try:
        # mpirun gives its ranks a terminal without a size.
        columns = os.get_terminal_size(sys.stdout.fileno()).columns
    except (OSError, ValueError):
        columns = 0
    return Console(highlight=False) if columns else Console(highlight=False, width=160, force_terminal=False)
