"""Percentiles of measured values, and of Prometheus' histograms between two scrapes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Final

SHARES: Final = {"p50": 0.50, "p90": 0.90, "p95": 0.95, "p99": 0.99}


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean, percentiles and largest of some values, in their unit."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float

    def to_json(self) -> dict[str, float]:
        return asdict(self)


def spread(values: Sequence[float]) -> Spread | None:
    """None without values."""
    if not values:
        return None
    ordered = sorted(values)
    shares = {name: percentile(ordered, share) for name, share in SHARES.items()}
    return Spread(mean=math.fsum(ordered) / len(ordered), max=ordered[-1], **shares)


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value below which ``share`` (0 to 1) of sorted values lie, between neighbours by their distance.

    Hyndman and Fan's type 7, numpy's default.
    """
    place = (len(ordered) - 1) * share
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def histogram_quantile(before: Mapping[float, float], after: Mapping[float, float], share: float) -> float | None:
    """Of the values that a cumulative histogram gained between two scrapes; None if it gained none.

    Upper bound -> count at or below it. Inside a bucket values are taken to be even, as PromQL's function does; beyond
    the last finite bound the bound itself is the answer. A counter that fell began anew: then ``after`` alone counts.
    """
    total = max(after.values(), default=0.0)
    is_anew = total < max(before.values(), default=0.0)
    gained = {bound: count - (0.0 if is_anew else before.get(bound, 0.0)) for bound, count in sorted(after.items())}
    wanted = max(gained.values(), default=0.0) * share
    if not wanted:
        return None
    low, below = 0.0, 0.0
    for bound, count in gained.items():
        if count >= wanted:
            return low if math.isinf(bound) else low + (bound - low) * (wanted - below) / (count - below)
        low, below = bound, count
    return low
