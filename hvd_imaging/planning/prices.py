"""The price file: everything that costs money, to be filled in by the site. The numbers that come with it are invented round examples."""

from __future__ import annotations

from pydantic import Field

from ..config import Section


class StoragePrices(Section):
    """Of one usable or raw terabyte (10^12 bytes)."""

    disk_tb: float = Field(30.0, ge=0, description="buying a raw TB of disk in a storage server, its share of server and network in it")
    watts_per_tb: float = Field(1.0, ge=0, description="power of a raw TB, W")
    workstation_tb: float = Field(100.0, ge=0, description="most raw TB that one machine takes")
    rented_tb_month: float = Field(20.0, ge=0, description="renting a usable TB for a month")


class NodePrices(Section):
    """Of one machine."""

    purchase: float = Field(..., ge=0, description="buying one")
    busy_watts: float = Field(..., ge=0, description="power while it computes, W")
    idle_watts: float = Field(..., ge=0, description="power while it waits, W")
    years: float = Field(5.0, gt=0, description="it is written off over so many years")
    rented_hour: float | None = Field(None, ge=0, description="renting a like one for an hour; null: cannot be rented")


class Prices(Section):
    """`hvd-imaging init prices -o prices.yaml`."""

    currency: str = Field("EUR", description="of all amounts")
    kwh: float = Field(0.25, ge=0, description="electricity")
    overhead: float = Field(1.5, ge=1, description="cooling and losses: electricity of the building / of the machines (PUE)")
    staff_year: float = Field(80_000.0, ge=0, description="one engineer for a year")
    staff_share: dict[str, float] = Field(
        {"workstation": 0.05, "on-premises": 0.25, "rented": 0.1}, description="share of an engineer that each way of working takes"
    )
    network_port: float = Field(400.0, ge=0, description="buying a switch port with cable and card")
    egress_tb: float = Field(80.0, ge=0, description="moving a TB out of a rented place")
    workstation: NodePrices = NodePrices(purchase=8_000, busy_watts=600, idle_watts=120, years=4)
    node: NodePrices = NodePrices(purchase=15_000, busy_watts=900, idle_watts=200, years=5, rented_hour=3.0)
    storage: StoragePrices = StoragePrices()


def run_cost(prices: Prices, watt_hours: float, host_seconds: float) -> dict[str, float]:
    """What a run cost: electricity with cooling, and its share of the machines' price; pure.

    Args:
        watt_hours: of all hosts.
        host_seconds: sum over the hosts.
    """
    electricity = watt_hours / 1000 * prices.kwh * prices.overhead
    hourly = prices.node.purchase / (prices.node.years * 365.25 * 24)
    found = {"electricity": electricity, "machines": host_seconds / 3600 * hourly}
    if prices.node.rented_hour is not None:
        found["rented instead"] = host_seconds / 3600 * prices.node.rented_hour
    return found
