"""A workstation, own nodes, or rented ones: what each costs over the planned years. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .compute import MONTH_H, Machines
from .prices import NodePrices, Prices
from .storage import TB, Disks

HOURS_YEAR = 365.25 * 24


@dataclass(frozen=True)
class Way:
    """One way of working.

    Attributes:
        name: workstation, on-premises, rented.
        parts: what -> amount, over all years.
        kwh: over all years, the building's.
        enough: it does what is wanted; else why not.
        why_not: "" if enough.
    """

    name: str
    parts: dict[str, float]
    kwh: float
    enough: bool
    why_not: str = ""

    @property
    def total(self) -> float:
        """Of all parts."""
        return sum(self.parts.values())


def machine_share(node: NodePrices, years: float) -> float:
    """Of the price of one machine that falls on ``years``: it is written off evenly, and bought again when it is done."""
    return node.purchase * years / node.years


def machine_kwh(node: NodePrices, count: int, busy_hours: float, years: float) -> float:
    """Electricity of ``count`` machines over ``years``, without cooling.

    Args:
        busy_hours: of all of them together.
    """
    idle_hours = max(count * years * HOURS_YEAR - busy_hours, 0.0)
    return (busy_hours * node.busy_watts + idle_hours * node.idle_watts) / 1000


def ways(
    prices: Prices, years: float, by_year: Sequence[tuple[Disks, Machines | None, Machines | None]], held_bytes: Sequence[float]
) -> list[Way]:
    """The three ways.

    Args:
        by_year: disks, machines of a cluster and of one machine at the end of each year; None: nothing is known of the compute.
        held_bytes: at the end of each year.
    """
    return [_workstation(prices, years, by_year), _own(prices, years, by_year), _rented(prices, years, by_year, held_bytes)]


def _storage(prices: Prices, years: float, by_year: Sequence[tuple[Disks, Machines | None, Machines | None]]) -> tuple[float, float]:
    """(price, kWh without cooling): bought when it is needed, on the whole."""
    raw = [disk.raw_tb for disk, _, _ in by_year]
    kwh = sum(tb * prices.storage.watts_per_tb * HOURS_YEAR / 1000 for tb in raw) * years / max(len(raw), 1)
    return raw[-1] * prices.storage.disk_tb, kwh


def _workstation(prices: Prices, years: float, by_year: Sequence[tuple[Disks, Machines | None, Machines | None]]) -> Way:
    node, (disks, kwh) = prices.workstation, _storage(prices, years, by_year)
    alone = [one for _, _, one in by_year if one is not None]
    busy = sum(one.node_hours for one in alone) / max(len(alone), 1) * 12 * years
    kwh += machine_kwh(node, 1, min(busy, years * HOURS_YEAR), years)
    why = ""
    late = next((one for one in alone if one.nodes is not None and one.nodes > 1), None)
    if late is not None:
        why = f"all trainings of a month take it {late.node_hours:,.0f} h, a month has {MONTH_H:.0f}"
    slow = next((one for (_, many, one) in by_year if one is not None and many is not None and many.nodes_of_one > 1), None)
    if slow is not None and not why:
        why = f"a training takes {slow.hours:,.1f} h"
    raw = by_year[-1][0].raw_tb
    if raw > prices.storage.workstation_tb:
        why = f"{raw:,.0f} TB of disks do not fit into one machine ({prices.storage.workstation_tb:,.0f} TB)"
    parts = {"machines": machine_share(node, years), "disks": disks, "electricity": kwh * prices.overhead * prices.kwh,
             "staff": prices.staff_year * years * prices.staff_share.get("workstation", 0.0)}  # fmt: skip
    return Way("workstation", parts, kwh * prices.overhead, not why, why)


def _own(prices: Prices, years: float, by_year: Sequence[tuple[Disks, Machines | None, Machines | None]]) -> Way:
    disks, kwh = _storage(prices, years, by_year)
    known = [many for _, many, _ in by_year if many is not None]
    count = max((many.nodes or many.nodes_of_one for many in known), default=0)
    busy = sum(many.node_hours for many in known) / max(len(known), 1) * 12 * years
    kwh += machine_kwh(prices.node, count, min(busy, count * years * HOURS_YEAR), years)
    why = next((many.limit for many in known if many.nodes is None), "")
    parts = {"machines": count * machine_share(prices.node, years), "network": (count + 1) * prices.network_port * (count > 0), "disks": disks,
             "electricity": kwh * prices.overhead * prices.kwh, "staff": prices.staff_year * years * prices.staff_share.get("on-premises", 0.0)}  # fmt: skip
    return Way("on-premises", parts, kwh * prices.overhead, not why, why)


def _rented(
    prices: Prices, years: float, by_year: Sequence[tuple[Disks, Machines | None, Machines | None]], held_bytes: Sequence[float]
) -> Way:
    known = [many for _, many, _ in by_year if many is not None]
    hours = sum(many.node_hours for many in known) / max(len(known), 1) * 12 * years
    # What is there on average over a year, at the next year's end.
    tb_months = sum(disk.usable_tb for disk, _, _ in by_year) / max(len(by_year), 1) * 12 * years
    why = "" if prices.node.rented_hour is not None else "no price for a rented node"
    why = why or next((many.limit for many in known if many.nodes is None), "")
    parts = {"machines": hours * (prices.node.rented_hour or 0.0), "storage": tb_months * prices.storage.rented_tb_month,
             "leaving": held_bytes[-1] / TB * prices.egress_tb, "staff": prices.staff_year * years * prices.staff_share.get("rented", 0.0)}  # fmt: skip
    return Way("rented", parts, hours * prices.node.busy_watts / 1000 * prices.overhead, not why, why)
