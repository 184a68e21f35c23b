"""Disks for what is held: pure."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigError

TB = 1e12


@dataclass(frozen=True)
class Disks:
    """What a volume needs.

    Attributes:
        usable_tb: the volume itself, with room to work.
        raw_tb: with copies or parity: what is bought.
    """

    usable_tb: float
    raw_tb: float


def disks(held_bytes: float, copies: float, fill: float) -> Disks:
    """Disks for ``held_bytes``.

    Args:
        copies: raw bytes for each byte: 3 of triple replication, 1.5 of erasure coding 4+2, 1.25 of RAID 6 with ten disks.
        fill: share that disks may be filled to; parallel filesystems slow down when they are full.

    Raises:
        ConfigError: impossible shares.
    """
    if copies < 1 or not 0 < fill <= 1:
        raise ConfigError(f"copies={copies}, fill={fill}: expected 1 or more copies, and to fill more than 0 and at most 1")
    usable = held_bytes / TB / fill
    return Disks(usable, usable * copies)
