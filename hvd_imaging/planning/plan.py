"""A plan for the years to come, put together from record, forecast, measured pace and prices."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from ..config import Section
from .compute import Load, Machines, machines, on_one
from .cost import Way, ways
from .forecast import Forecast, Point, cumulated, forecast
from .prices import Prices
from .records import Month, total
from .scaling import Link
from .storage import TB, Disks, disks


class Wishes(Section):
    """What is wanted; options of `hvd-imaging plan`."""

    years: int = Field(3, ge=1, le=10, description="to plan for")
    held_tb: float | None = Field(None, ge=0, description="images held today, TB; null: what the record adds up to")
    copies: float = Field(2.0, ge=1, description="raw bytes for each byte: 3 replicas, 1.5 of erasure coding 4+2, 1.25 of RAID 6")
    fill: float = Field(0.8, gt=0, le=1, description="share that disks may be filled to")
    train_hours: float = Field(12.0, gt=0, description="wanted for one training")
    trainings: float = Field(20.0, ge=0, description="a month")
    link_mbit: float = Field(10_000.0, gt=0, description="network between nodes, Mbit/s")
    latency_us: float = Field(30.0, ge=0, description="of a message between nodes, microseconds")
    ranks_per_node: int = Field(1, ge=1, description="ranks of a node")
    busy: float = Field(0.7, gt=0, le=1, description="share of the time that machines can be kept busy")


@dataclass(frozen=True)
class Year:
    """The end of a year.

    Attributes:
        name: last month of it.
        held: bytes, with interval.
        new: bytes of the year.
        machines, alone: of a cluster, and of one machine; None without a measured pace.
    """

    name: str
    held: Point
    new: float
    disks: Disks
    machines: Machines | None
    alone: Machines | None


@dataclass(frozen=True)
class Plan:
    """All of it."""

    wishes: Wishes
    months: tuple[Month, ...]
    notes: tuple[str, ...]
    forecast: Forecast
    held: tuple[Point, ...]
    held_today: float
    years: tuple[Year, ...]
    ways: tuple[Way, ...]
    currency: str

    @property
    def cheapest(self) -> Way | None:
        """Of those that are enough."""
        enough = [way for way in self.ways if way.enough]
        return min(enough, key=lambda way: way.total) if enough else None

    def to_json(self) -> dict[str, Any]:
        """Plain values; no number is infinite."""

        def plain(value: Any) -> Any:
            if isinstance(value, float):
                return value if abs(value) < 1e300 else None
            if isinstance(value, Mapping):
                return {key: plain(inner) for key, inner in value.items()}
            return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value

        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "wishes"}
        value = dataclasses.asdict(dataclasses.make_dataclass("Plain", found)(**found)) | {"wishes": self.wishes.model_dump(mode="json")}
        for way, entry in zip(self.ways, value["ways"], strict=True):
            entry["total"] = way.total
        cheapest = self.cheapest
        return plain(value) | {"cheapest": cheapest.name if cheapest is not None else None}


def make_plan(
    months: Sequence[Month], notes: Sequence[str], wishes: Wishes, prices: Prices, load: Load | None = None, inside: Link | None = None
) -> Plan:
    """The plan; pure but for the forecast's library.

    Args:
        months: the record without gaps.
        notes: what was done to it.
        load: a measured training; None: compute is left out.
        inside: link between the ranks of a node.

    Raises:
        ConfigError, SetupError: see the parts.
    """
    said = forecast(months, 12 * wishes.years)
    today = wishes.held_tb * TB if wishes.held_tb is not None else total(months)
    held = cumulated(said, today)
    link = Link(wishes.latency_us * 1e-6, wishes.link_mbit * 1e6 / 8)
    years = []
    for year in range(1, wishes.years + 1):
        point = held[12 * year - 1]
        growth = point.value / today if today else 1.0
        before = held[12 * year - 13].value if year > 1 else today
        many = machines(load, link, inside or link, growth) if load is not None else None
        alone = on_one(load, growth) if load is not None else None
        years.append(Year(Month(point.index, 0).name, point, point.value - before, disks(point.value, wishes.copies, wishes.fill), many, alone))
    rows = [(year.disks, year.machines, year.alone) for year in years]
    return Plan(
        wishes, tuple(months), tuple(notes), said, tuple(held), today, tuple(years),
        tuple(ways(prices, wishes.years, rows, [year.held.value for year in years])), prices.currency,
    )  # fmt: skip
