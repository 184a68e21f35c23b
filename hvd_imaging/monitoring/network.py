"""What passes a host's network: cards as the kernel counts them, and RDMA, which passes the kernel by."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

CARDS, INFINIBAND = Path("/sys/class/net"), Path("/sys/class/infiniband")
_WORD = 4  # bytes; the unit of the counters of data (kernel: Documentation/ABI/stable/sysfs-class-infiniband)


def devices(names: Iterable[str], folder: Path = CARDS) -> list[str]:
    """The cards among a host's interfaces: what bridges and bonds carry passes a card as well and would count twice.

    In a container without a card of its own, all but the loopback.
    """
    outside = [name for name in names if name != "lo"]
    return [name for name in outside if (folder / name / "device").exists()] or outside


def rdma_counters(folder: Path = INFINIBAND) -> tuple[int, int] | None:
    """(bytes received, bytes sent) by all ports of InfiniBand and RoCE adapters since their start; None without any.

    On RoCE, and with IP over InfiniBand, the cards' own counters hold part of it too.
    """
    totals, found = [0, 0], False
    for port in folder.glob("*/ports/*/counters"):
        with contextlib.suppress(OSError, ValueError):
            both = [int((port / name).read_text()) * _WORD for name in ("port_rcv_data", "port_xmit_data")]
            totals, found = [a + b for a, b in zip(totals, both, strict=True)], True
    return (totals[0], totals[1]) if found else None
