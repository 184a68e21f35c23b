"""Progress for people: a bar on a terminal, a line now and then without one, rank 0 only."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from ..world import World

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
