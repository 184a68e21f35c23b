"""Progress for people: a bar on a terminal, a line now and then without one, rank 0 only."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

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
def counter(description: str, world: World = World()) -> Iterator[Callable[[int, int], None]]:
    """A function ``(done, total)`` that shows on stderr how far rank 0 is."""
    if not world.is_root:
        yield lambda done, total: None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(description, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
    else:
        last = time.monotonic()

        def line(done: int, total: int) -> None:
            nonlocal last
            if time.monotonic() - last > _EVERY_S:
                last = time.monotonic()
                print(f"{description}: {done} of {total}", file=sys.stderr, flush=True)

        yield line


def refuse_many_ranks(command: str) -> None:
    """A command that is one process must not run as several that write the same file.

    Raises:
        ConfigError: on all ranks alike.
    """
    size = world_from_environment().size
    if size > 1:
        raise ConfigError(f"`hvd-imaging {command}` is a single process, but {size} ranks were started: run it without mpirun")
