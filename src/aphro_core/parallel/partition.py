"""Split a dimension into contiguous ranges, one a rank."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from aphro_core.errors import PlacementError


def partition(size: int, weights: Sequence[int], *, unit: int = 1) -> list[range]:
    """Split ``range(size)`` by ``weights``, cutting only between whole units (a head group, a quantization block).

    Shares are as near to the weights as whole units allow (largest remainders); among equals the first get more.
    Raises PlacementError when ``unit`` does not divide ``size`` or a share would be empty.
    """
    num_units, rest = divmod(size, unit)
    total = sum(weights)
    shares = [num_units * weight // total for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda i: -(num_units * weights[i] % total))
    for i in by_remainder[: num_units - sum(shares)]:
        shares[i] += 1
    if rest or 0 in shares:
        raise PlacementError(f"{size} does not split {list(weights)} ways in units of {unit}")
    return [range(start * unit, stop * unit) for start, stop in pairwise(accumulate(shares, initial=0))]
