"""The matrices of a rank's experts as one, for products over tiles of rows (GPU)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final, Protocol

import torch
from aphro_kernels.expert_rows import spread_rows
from aphro_kernels.grouped_gemm import grouped_linear
from aphro_kernels.grouped_hopper import grouped_wide, suits_wide
from aphro_kernels.grouped_hopper_float8 import grouped_float8_wide, suits_float8_wide
from aphro_kernels.grouped_packed import grouped_packed_linear
from aphro_kernels.packed_linear import PackedWeight, dequantise
from aphro_kernels.quantise_rows import round_rows
from aphro_kernels.row_tiles import RowTiles
from aphro_kernels.silu_and_mul import silu_and_mul
from aphro_kernels.split_places import split_places
from torch import Tensor

from aphro_core.quantization.matrix import PackedMatrix, below_each_other, cut_rows

# rows an expert, on average, from which tiles of 128 are faster (docs/kernels.md); others dequantise there in any case
_WIDE_FROM: Final = {"plain": 24, "fp8": 48}
_DEQUANTISED_FROM: Final = 40
_MANY_ROWS: Final = 768  # from which a dequantised copy of fp8 is
_GATHERED: Final = 2**24  # inputs that are put into another order at once: their indices take eight bytes each


class Wide(Protocol):
    """Matrices for rows that stand by expert, in wide tiles, on Hopper. A dequantised copy, where one is taken, is gone
    behind each product."""

    from_rows: int  # an expert, on average, for which this is faster

    def of_tokens(self, x: Tensor, tiles: RowTiles, *, is_gated: bool) -> tuple[Tensor, bool]:
        """Rows ``x`` [num_tokens, in] to [capacity, out], a row a place. ``is_gated`` asks for SiLU(gate) * up; the
        second result says whether that is done."""
        ...

    def of_places(self, x: Tensor, tiles: RowTiles, *, is_merged: bool) -> Tensor:
        """Of rows [capacity, in] at their places; ``is_merged``: gate and up, of which SiLU(gate) * up is still to be
        taken."""
        ...


class Stack(Protocol):
    """The matrices of a rank's experts, [experts, out, in]."""

    num_experts: int
    takes_one_row: bool  # in a tile, besides 16 and more
    wide: Wide | None

    def times(self, x: Tensor, tiles: RowTiles, slots_per_row: int, *, is_gated: bool = False) -> Tensor:
        """As ``grouped_linear``."""
        ...


class _DenseWide:
    def __init__(self, dense: Callable[[torch.dtype], Tensor], from_rows: int) -> None:
        """``dense``: the matrices in a dtype."""
        self.from_rows = from_rows
        self._dense = dense

    def of_tokens(self, x: Tensor, tiles: RowTiles, *, is_gated: bool) -> tuple[Tensor, bool]:
        return grouped_wide(spread_rows(x, tiles), self._dense(x.dtype), tiles, is_gated=is_gated), is_gated

    def of_places(self, x: Tensor, tiles: RowTiles, *, is_merged: bool) -> Tensor:
        return grouped_wide(silu_and_mul(x) if is_merged else x, self._dense(x.dtype), tiles, is_gated=False)


class _Float8Wide:
    """fp8 as it is, for as many rows as ``dense`` is not faster for."""

    def __init__(self, weight: PackedWeight, num_experts: int, dense: Wide) -> None:
        self.from_rows = dense.from_rows
        self._weight, self._num_experts, self._dense = weight, num_experts, dense

    def of_tokens(self, x: Tensor, tiles: RowTiles, *, is_gated: bool) -> tuple[Tensor, bool]:
        if not self._takes(x, tiles):
            return self._dense.of_tokens(x, tiles, is_gated=is_gated)
        codes, scales = split_places(x, tiles, is_gated=False)
        return grouped_float8_wide(codes, scales, self._weight, self._num_experts, tiles), False

    def of_places(self, x: Tensor, tiles: RowTiles, *, is_merged: bool) -> Tensor:
        if not is_merged or not self._takes(x, tiles):
            return self._dense.of_places(x, tiles, is_merged=is_merged)
        codes, scales = split_places(x, tiles, is_gated=True)
        return grouped_float8_wide(codes, scales, self._weight, self._num_experts, tiles)

    def _takes(self, x: Tensor, tiles: RowTiles) -> bool:
        is_many = tiles.num_slots >= _MANY_ROWS * self._num_experts
        return not is_many and suits_float8_wide(x, self._weight, self._num_experts)


class DenseStack:
    def __init__(self, weight: Tensor) -> None:
        self.num_experts = len(weight)
        self.takes_one_row = True
        self.wide: Wide | None = _DenseWide(lambda _: weight, _WIDE_FROM["plain"]) if suits_wide(weight.shape) else None
        self._weight = weight

    def times(self, x: Tensor, tiles: RowTiles, slots_per_row: int, *, is_gated: bool = False) -> Tensor:
        return grouped_linear(x, self._weight, tiles, slots_per_row, is_gated=is_gated)


class PackedStack:
    """Quantised matrices below each other."""

    def __init__(self, matrix: PackedMatrix, num_experts: int) -> None:
        self.num_experts = num_experts
        self._weight = matrix.for_kernels()
        self._inputs, self._kind = matrix.inputs, matrix.kind
        self.takes_one_row = self._kind != "int4"
        self.wide = self._wide()

    def times(self, x: Tensor, tiles: RowTiles, slots_per_row: int, *, is_gated: bool = False) -> Tensor:
        place = self._weight, self.num_experts, tiles, slots_per_row
        if self._inputs is None or self._kind == "int4":
            return grouped_packed_linear(x, *place, is_gated=is_gated)
        codes, scales = round_rows(x, self._kind, self._inputs.scale)
        y = grouped_packed_linear(codes, *place).mul_(scales.repeat_interleave(slots_per_row)[:, None])
        return silu_and_mul(y) if is_gated else y

    def _wide(self) -> Wide | None:
        rows, width = self._weight.shape
        is_rounded = self._inputs is not None and self._kind != "int4"
        if is_rounded or not suits_wide((self.num_experts, rows // self.num_experts, width)):
            return None
        dense = _DenseWide(self._dequantised, _WIDE_FROM.get(self._kind, _DEQUANTISED_FROM))
        return _Float8Wide(self._weight, self.num_experts, dense)

    def _dequantised(self, dtype: torch.dtype) -> Tensor:
        return dequantise(self._weight, dtype).view(self.num_experts, -1, self._weight.shape[1])


class OrderedStack:
    """Act-order: each slot's inputs are put into the order of its expert's columns first."""

    def __init__(self, stack: Stack, orders: Tensor) -> None:
        """``orders`` [experts, in]: column j of an expert is its input ``orders[expert, j]``."""
        self.num_experts = stack.num_experts
        self.takes_one_row = stack.takes_one_row
        self.wide: Wide | None = None
        self._stack, self._orders = stack, orders.long()

    def times(self, x: Tensor, tiles: RowTiles, slots_per_row: int, *, is_gated: bool = False) -> Tensor:
        experts = tiles.experts.repeat_interleave(tiles.rows).clamp(0, self.num_experts - 1).long()
        of_slot = torch.zeros(tiles.num_slots + 1, dtype=torch.int64, device=x.device)
        # the last one takes all padding; while kernels are only compiled, anything may stand in a plan
        of_slot.scatter_(0, tiles.slots.long().clamp(0, tiles.num_slots), experts)
        ordered = x.new_empty(tiles.num_slots, x.shape[1])
        step = max(_GATHERED // x.shape[1], 1)
        for start in range(0, tiles.num_slots, step):
            slots = torch.arange(start, min(start + step, tiles.num_slots), device=x.device)
            index = self._orders[of_slot[slots]]
            torch.gather(x[slots // slots_per_row], 1, index, out=ordered[start : start + step])
        return self._stack.times(ordered, tiles, 1, is_gated=is_gated)


class SideBySide:
    """Gate and up that are kept in different ways."""

    def __init__(self, stacks: Sequence[Stack]) -> None:
        self.num_experts = stacks[0].num_experts
        self.takes_one_row = all(stack.takes_one_row for stack in stacks)
        self.wide: Wide | None = None
        self._stacks = stacks

    def times(self, x: Tensor, tiles: RowTiles, slots_per_row: int, *, is_gated: bool = False) -> Tensor:
        y = torch.cat([stack.times(x, tiles, slots_per_row) for stack in self._stacks], dim=-1)
        return silu_and_mul(y) if is_gated else y


class DequantisedStack:
    """What no kernel takes is dequantised for each product: columns whose groups are looked up, 8 bits with offsets."""

    def __init__(self, experts: Sequence[Sequence[PackedMatrix]]) -> None:
        self.num_experts = len(experts)
        self.takes_one_row = True
        shape = len(experts), sum(part.shape[0] for part in experts[0]), experts[0][0].shape[1]
        self.wide: Wide | None = _DenseWide(self._dequantised, _WIDE_FROM["plain"]) if suits_wide(shape) else None
        self._experts = experts

    def times(self, x: Tensor, tiles: RowTiles, slots_per_row: int, *, is_gated: bool = False) -> Tensor:
        return grouped_linear(x, self._dequantised(x.dtype), tiles, slots_per_row, is_gated=is_gated)

    def _dequantised(self, dtype: torch.dtype) -> Tensor:
        dense = torch.cat([part.dequantise(dtype) for parts in self._experts for part in parts])
        return dense.view(self.num_experts, -1, dense.shape[1])


def packed_stack(weight: Sequence[PackedMatrix], num_experts: int) -> Stack:
    """Of matrices below each other, of one expert after the other."""
    if len(weight) == 1 and weight[0].order is None and weight[0].suits_kernels:
        return PackedStack(weight[0], num_experts)
    experts = cut_rows(weight, num_experts)
    parts = [_column_of_parts(list(column)) for column in zip(*experts, strict=False)]
    if any(len(parts) != len(each) for each in experts) or not all(parts):
        return DequantisedStack(experts)
    stacks = [part for part in parts if part is not None]
    return stacks[0] if len(stacks) == 1 else SideBySide(stacks)


def _column_of_parts(matrices: list[PackedMatrix]) -> Stack | None:
    """The same part of every expert; None where no kernel takes it."""
    orders = [matrix.order for matrix in matrices]
    alike = below_each_other([replace(matrix, order=None) for matrix in matrices])
    if len(alike) > 1 or not alike[0].suits_kernels:
        return None
    stack = PackedStack(alike[0], len(matrices))
    found = [order for order in orders if order is not None]
    if len(found) not in (0, len(orders)):
        return None
    return OrderedStack(stack, torch.stack(found)) if found else stack
