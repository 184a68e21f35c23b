"""How the volume goes on: exponential smoothing with a damped trend and, from two years on, a season (Hyndman et al., 2008)."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import SetupError
from .records import Month

LEVEL = 0.9
"""Of the intervals."""
SEASON = 12


@dataclass(frozen=True)
class Point:
    """A month to come, bytes."""

    index: int
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class BackTest:
    """What a forecast from the earlier months would have said of the last ones.

    Attributes:
        months: that were held out.
        mape: mean of |forecast - true| / true.
        covered: share of them inside the interval.
        naive_mape: of the simplest forecast, the last known month again (or the same month a year before), for comparison.
    """

    months: int
    mape: float
    covered: float
    naive_mape: float


@dataclass(frozen=True)
class Forecast:
    """The months to come and how far to trust them.

    Attributes:
        seasonal: a season was fitted.
        test: None: too few months to hold any out.
    """

    points: tuple[Point, ...]
    seasonal: bool
    test: BackTest | None


def forecast(months: Sequence[Month], ahead: int) -> Forecast:
    """``ahead`` months after the last one of ``months`` (without gaps).

    Raises:
        SetupError: statsmodels is not installed.
    """
    values = [month.bytes for month in months]
    held = min(max(len(months) // 4, 3), 12)
    test = None
    if len(months) - held >= 6:
        known, true = values[:-held], values[-held:]
        said = _fit(known, held)
        naive = [known[-1] if len(known) < SEASON else known[len(known) - SEASON + step % SEASON] for step in range(held)]
        scored = [(point, truth) for point, truth in zip(said, true, strict=True) if truth > 0]
        if scored:
            test = BackTest(
                held, statistics.mean(abs(value - truth) / truth for (value, _, _), truth in scored),
                statistics.mean(low <= truth <= high for (_, low, high), truth in scored),
                statistics.mean(abs(value - truth) / truth for value, truth in zip(naive, true, strict=True) if truth > 0),
            )  # fmt: skip
    start = months[-1].index + 1
    points = tuple(Point(start + step, *row) for step, row in enumerate(_fit(values, ahead)))
    return Forecast(points, len(values) >= 2 * SEASON, test)


def cumulated(forecast: Forecast, held_bytes: float) -> list[Point]:
    """Bytes held at the end of each month to come. Errors of months are taken to go together, so the interval is on the safe side. Pure."""
    found, value, low, high = [], held_bytes, held_bytes, held_bytes
    for point in forecast.points:
        value, low, high = value + point.value, low + point.low, high + point.high
        found.append(Point(point.index, value, low, high))
    return found


def _fit(values: Sequence[float], ahead: int) -> list[tuple[float, float, float]]:
    """(value, low, high) of the months after ``values``. On logarithms: growth is in per cent, and no month is below zero."""
    try:
        import pandas
        from statsmodels.tsa.exponential_smoothing.ets import ETSModel
    except ImportError as error:
        raise SetupError(f"plan: the forecast needs {error.name}, which is not installed; pip install 'hvd_imaging[plan]'") from None
    # An empty month has no logarithm: it counts as a thousandth of a usual one.
    least = max(statistics.median(values), 1.0) / 1000
    series = pandas.Series([math.log(max(value, least)) for value in values])
    if max(series) - min(series) < 1e-9:
        return [(values[0], values[0], values[0])] * ahead  # nothing varies: no model can be fitted, and none is needed
    seasonal = len(values) >= 2 * SEASON
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of convergence: the back-test tells how good it is
        model = ETSModel(
            series, error="add", trend="add", damped_trend=True, seasonal="add" if seasonal else None,
            seasonal_periods=SEASON if seasonal else None,
        )  # fmt: skip
        fitted = model.fit(disp=False, maxiter=2000)
        frame = fitted.get_prediction(start=len(values), end=len(values) + ahead - 1).summary_frame(alpha=1 - LEVEL)
    rows = zip(frame["mean"], frame["pi_lower"], frame["pi_upper"], strict=True)
    return [(_exp(mean), _exp(low), _exp(high)) for mean, low, high in rows]


def _exp(value: float) -> float:
    return math.exp(min(float(value), 700.0)) if math.isfinite(value) else math.inf
