"""Rows through the quantised matrices of the experts that they chose, dequantised in the tile."""
# ruff: noqa: N803  (the constants of a kernel are in capitals)

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from aphro_kernels.float8 import float8_as_bytes
from aphro_kernels.grouped_float8 import launch_grouped_float8, suits_float8
from aphro_kernels.grouped_gemm import RowTiles, grouped_linear, grouped_linear_reference
from aphro_kernels.language import jit, runs_kernels, tl, triton
from aphro_kernels.packed_linear import PackedWeight, can_convert, dequantise, dequantise_reference, widest_tile
from aphro_kernels.packed_tiles import multiply_packed

_MAX_ROWS: Final = 32  # of a tile; more rows an expert share a dequantised copy


def grouped_packed_linear_reference(
    x: Tensor, weight: PackedWeight, num_experts: int, tiles: RowTiles, slots_per_row: int
) -> Tensor:
    dense = dequantise_reference(weight, torch.float32).view(num_experts, -1, weight.shape[1])
    return grouped_linear_reference(x, dense, tiles, slots_per_row)


def grouped_packed_linear(
    x: Tensor,
    weight: PackedWeight,
    num_experts: int,
    tiles: RowTiles,
    slots_per_row: int,
    *,
    has_foreign: bool = False,
) -> Tensor:
    """As ``grouped_linear``, of ``num_experts`` quantised matrices below each other: ``weight`` [experts * out, in]."""
    if not runs_kernels(x):
        return grouped_packed_linear_reference(x, weight, num_experts, tiles, slots_per_row)
    new = x.new_zeros if has_foreign else x.new_empty
    if suits_float8(x, weight, tiles):
        out = new(tiles.num_slots, len(weight.codes) // num_experts)
        return launch_grouped_float8(x, weight, num_experts, tiles, slots_per_row, out)
    if tiles.rows > _MAX_ROWS or x.dtype.itemsize != 2 or not weight.suits_kernel or not can_convert(weight.codes):
        dense = dequantise(weight, x.dtype).view(num_experts, -1, weight.shape[1])
        return grouped_linear(x, dense, tiles, slots_per_row, has_foreign=has_foreign)
    return _launch(x, weight, num_experts, tiles, slots_per_row, new(tiles.num_slots, len(weight.codes) // num_experts))


def _launch(
    x: Tensor, weight: PackedWeight, num_experts: int, tiles: RowTiles, slots_per_row: int, out: Tensor
) -> Tensor:
    depth, width = weight.shape[1], out.shape[1]
    assert x.stride(1) == 1
    assert weight.codes.is_contiguous()
    assert weight.scales.is_contiguous()
    if tiles.num_slots and num_experts:
        columns, splits = 32, 4
        inputs = widest_tile(weight.tile_group or depth, 128) * splits
        _grouped_packed_kernel[(triton.cdiv(width, columns), len(tiles.experts))](
            x,
            float8_as_bytes(weight.codes),
            weight.scales,
            weight.scales if weight.offsets is None else weight.offsets,
            out,
            tiles.slots,
            tiles.experts,
            num_experts,
            tiles.num_slots,
            width,
            depth,
            x.stride(0),
            slots_per_row,
            KIND=weight.kind,
            GROUP=weight.tile_group,
            ROWS=tiles.rows,
            BN=columns,
            BK=inputs,
            SPLIT=splits,
            IS_EVEN=width % columns == 0 and depth % inputs == 0,
            STAGES=3,
            IS_TILED=weight.is_tiled,
            HAS_ASM=x.is_cuda,
            num_warps=4,
        )
    return out


@jit(do_not_specialize=["num_slots", "x_stride"])
def _grouped_packed_kernel(
    x: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    offsets: tl.tensor,
    out: tl.tensor,
    slots: tl.tensor,
    experts: tl.tensor,
    num_experts: tl.tensor,
    num_slots: tl.tensor,
    width: tl.tensor,
    depth: tl.tensor,
    x_stride: tl.tensor,
    slots_per_row: tl.tensor,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
    IS_EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    IS_TILED: tl.constexpr,
    HAS_ASM: tl.constexpr,
) -> None:
    """One tile of rows times ``BN`` rows of its expert's matrix."""
    tile = tl.program_id(1)
    expert = tl.load(experts + tile)
    if expert >= num_experts:
        return
    slot = tl.load(slots + tile * ROWS + tl.arange(0, ROWS))
    is_row = slot < num_slots
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    is_column = columns < width
    x_rows = (slot // slots_per_row).to(tl.int64) * x_stride
    matrix_rows = expert.to(tl.int64) * width + columns
    total = multiply_packed(
        x, x_rows, is_row, codes, scales, offsets, matrix_rows, is_column, 0, tl.cdiv(depth, BK), depth, KIND, GROUP,
        ROWS, BN, BK, SPLIT, IS_EVEN, STAGES, IS_TILED, HAS_ASM,
    )  # fmt: skip
    if GROUP == 0:
        total *= tl.load(scales + matrix_rows, mask=is_column, other=0.0).to(tl.float32)[:, None]
    out_at = out + slot.to(tl.int64)[None, :] * width + columns[:, None]
    tl.store(out_at, total.to(out.dtype.element_ty), mask=is_row[None, :] & is_column[:, None])
