"""The matrices of a rank's experts as one, for products over tiles of rows (GPU)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final, Protocol

import torch
from aphro_kernels.grouped_gemm import RowTiles, grouped_linear
from aphro_kernels.grouped_packed import grouped_packed_linear
from aphro_kernels.quantise_rows import round_rows
from torch import Tensor

from aphro_core.quantization.matrix import PackedMatrix, below_each_other, cut_rows

_GATHERED: Final = 2**24  # inputs that are put into another order at once: their indices take eight bytes each


class Stack(Protocol):
    """The matrices of a rank's experts, [experts, out, in]."""

    num_experts: int

    def times(self, x: Tensor, tiles: RowTiles, slots_per_row: int, *, has_foreign: bool) -> Tensor:
        """As ``grouped_linear``."""
        ...


class DenseStack:
    def __init__(self, weight: Tensor) -> None:
        self.num_experts = len(weight)
        self._weight = weight

    def times(self, x: Tensor, tiles: RowTiles, slots_per_row: int, *, has_foreign: bool) -> Tensor:
        return grouped_linear(x, self._weight, tiles, slots_per_row, has_foreign=has_foreign)


class PackedStack:
    """Quantised matrices below each other."""

    def __init__(self, matrix: PackedMatrix, num_experts: int) -> None:
        self.num_experts = num_experts
        self._weight = matrix.for_kernels()
        self._inputs, self._kind = matrix.inputs, matrix.kind

    def times(self, x: Tensor, tiles: RowTiles, slots_per_row: int, *, has_foreign: bool) -> Tensor:
        options = {"has_foreign": has_foreign}
        if self._inputs is None or self._kind == "int4":
            return grouped_packed_linear(x, self._weight, self.num_experts, tiles, slots_per_row, **options)
        codes, scales = round_rows(x, self._kind, self._inputs.scale)
        y = grouped_packed_linear(codes, self._weight, self.num_experts, tiles, slots_per_row, **options)
        if has_foreign:  # their rows were never written, and what is found of them is nothing to go by
            scales.nan_to_num_(0.0, 0.0, 0.0)
        return y.mul_(scales.repeat_interleave(slots_per_row)[:, None])


class OrderedStack:
    """Act-order: each slot's inputs are put into the order of its expert's columns first."""

    def __init__(self, stack: Stack, orders: Tensor) -> None:
        """``orders`` [experts, in]: column j of an expert is its input ``orders[expert, j]``."""
        self.num_experts = stack.num_experts
        self._stack, self._orders = stack, orders.long()

    def times(self, x: Tensor, tiles: RowTiles, slots_per_row: int, *, has_foreign: bool) -> Tensor:
        experts = tiles.experts.repeat_interleave(tiles.rows).clamp(max=self.num_experts - 1).long()
        of_slot = torch.zeros(tiles.num_slots + 1, dtype=torch.int64, device=x.device)
        of_slot.scatter_(0, tiles.slots.long(), experts)  # the last one takes all padding
        ordered = x.new_empty(tiles.num_slots, x.shape[1])
        step = max(_GATHERED // x.shape[1], 1)
        for start in range(0, tiles.num_slots, step):
            slots = torch.arange(start, min(start + step, tiles.num_slots), device=x.device)
            index = self._orders[of_slot[slots]]
            torch.gather(x[slots // slots_per_row], 1, index, out=ordered[start : start + step])
        return self._stack.times(ordered, tiles, 1, has_foreign=has_foreign)


class SideBySide:
    """Gate and up that are kept in different ways."""

    def __init__(self, stacks: Sequence[Stack]) -> None:
        self.num_experts = stacks[0].num_experts
        self._stacks = stacks

    def times(self, x: Tensor, tiles: RowTiles, slots_per_row: int, *, has_foreign: bool) -> Tensor:
        parts = [stack.times(x, tiles, slots_per_row, has_foreign=has_foreign) for stack in self._stacks]
        return torch.cat(parts, dim=-1)


class DequantisedStack:
    """What no kernel takes is dequantised for each product: columns whose groups are looked up, 8 bits with offsets."""

    def __init__(self, experts: Sequence[Sequence[PackedMatrix]]) -> None:
        self.num_experts = len(experts)
        self._experts = experts

    def times(self, x: Tensor, tiles: RowTiles, slots_per_row: int, *, has_foreign: bool) -> Tensor:
        dense = torch.cat([part.dequantise(x.dtype) for parts in self._experts for part in parts])
        weight = dense.view(self.num_experts, -1, dense.shape[1])
        return grouped_linear(x, weight, tiles, slots_per_row, has_foreign=has_foreign)


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
