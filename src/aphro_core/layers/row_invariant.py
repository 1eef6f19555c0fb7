"""Products in which a row's result is the same bits whatever rows are beside it, and however many.

Libraries choose how they split a product by its number of rows, and with it the order in which they add. Here rows go
in a few fixed numbers, padded, and only in such as were seen to give the same bits as the smallest, on this very CPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

_SIZES: Final = (4, 8, 16, 32, 64, 128, 256)
_LOG: Final = logging.getLogger(__name__)

Multiply = Callable[[Tensor], Tensor]  # [rows, in_features] to [rows, out_features], each row from its own


def multiply_rows(multiply: Multiply, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """``multiply(x)`` in parts of these numbers of rows, ascending; (1,): each row alone, since no number is safe."""
    parts, largest = [], sizes[-1]
    for start in range(0, len(x), largest):
        rows = x[start : start + largest]
        size = next(size for size in sizes if size >= len(rows))
        parts.append(multiply(_padded(rows, max(size, _SIZES[0])))[: len(rows)])
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _padded(rows: Tensor, size: int) -> Tensor:
    if len(rows) == size:
        return rows
    padded = rows.new_zeros(size, rows.shape[1])
    padded[: len(rows)] = rows
    return padded


class RowSizes:
    """Which numbers of rows are safe for a weight, looked at once for each shape and dtype."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int, torch.dtype], tuple[int, ...]] = {}

    def of(self, weight: Tensor, multiply: Multiply) -> tuple[int, ...]:
        """``weight`` [out_features, in_features], of which ``multiply`` is the product."""
        key = (*weight.shape, weight.dtype)
        if key not in self._known:
            self._known[key] = safe_sizes(multiply, weight.shape[1], weight.dtype)
            if self._known[key] != _SIZES:
                _LOG.warning(
                    "deterministic: products with a weight of %d x %d are safe in %s rows only, which is slower",
                    *weight.shape,
                    self._known[key],
                )
        return self._known[key]


def safe_sizes(multiply: Multiply, in_features: int, dtype: torch.dtype) -> tuple[int, ...]:
    """Those in which every row, at every place, has the bits that it has among the fewest."""
    x = torch.randn(_SIZES[-1], in_features, generator=torch.Generator().manual_seed(0)).to(dtype)
    fewest = _SIZES[0]
    expected = multiply_rows(multiply, x, (fewest,))
    for shift in range(1, fewest):  # every row at every place of the fewest
        if not torch.equal(multiply_rows(multiply, x.roll(shift, 0), (fewest,)), expected.roll(shift, 0)):
            return (1,)
    return tuple(size for size in _SIZES if torch.equal(multiply_rows(multiply, x, (size,)), expected))
