"""`bench allreduce`: what compressed gradients gain, for a VGG16 with its dense head over a link of 1 Gbit/s.

The link is made of two network namespaces (slow_link.py); where the machine does not allow it, its rows say why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from .report import Figure, Row, ratio
from .slow_link import slow_link, why_not
from .training import Workshop, launch, parse, ranks, workshop

KINDS = ("none", "fp16", "powersgd", "auto")
LINK, LOCAL = "1 Gbit/s, 2 ranks", "shared memory, 2 ranks"


def measure(quick: bool = False, on_run: Callable[[str], None] | None = None) -> tuple[list[Row], list[Figure]]:
    """Time training steps with each kind of compression.

    Raises:
        HvdImagingError: a process failed.
    """
    kinds = ("none", "auto") if quick else KINDS
    rounds, steps = (1, 3) if quick else (2, 8)
    reason = why_not()
    times: dict[tuple[str, str], list[float]] = {(LINK, kind): [] for kind in kinds}
    chosen: dict[str, str] = {}
    with workshop(volumes=0, images=32) as place:
        for turn in range(rounds):
            for kind in kinds if turn % 2 == 0 else reversed(kinds):
                if on_run:
                    on_run(f"round {turn + 1} of {rounds}: {kind}")
                if reason is None:
                    with slow_link(1000) as link:
                        found = parse(launch(link.mpirun(_worker(place, kind, steps)), 600))
                    times[LINK, kind] += [1e3 * t for t in found["steps"]]
                    chosen.update((LINK, event["chosen"]) for event in found["compression"])
                if not quick:
                    found = ranks(_worker(place, kind, steps), 2)
                    times.setdefault((LOCAL, kind), []).extend(1e3 * t for t in found["steps"])
                    chosen.update((LOCAL, event["chosen"]) for event in found["compression"])
    rows = [
        Row(
            f"VGG16 dense head, {place_}", f"auto ({chosen[place_]})" if kind == "auto" and place_ in chosen else kind,
            "step time", "ms", tuple(round(t, 1) for t in runs), "" if runs else reason or "",
        )
        for (place_, kind), runs in times.items()
    ]  # fmt: skip
    return rows, figures(dict(zip(times, rows, strict=True)))


def figures(rows: Mapping[tuple[str, str], Row]) -> list[Figure]:
    """The gain of ``auto`` over the slow link; pure."""
    return [Figure("speed with auto / without compression, 1 Gbit/s", ratio(rows[LINK, "none"], rows[LINK, "auto"]), 1.7, "higher")]


def _worker(place: Workshop, kind: str, steps: int) -> Sequence[str]:
    config = place.config(kind, "images", steps, train__batch_size=4, parallel__compression=kind)
    return place.worker(config, kind)
