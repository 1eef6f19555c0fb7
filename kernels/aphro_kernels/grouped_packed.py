"""Rows through the quantised matrices of the experts that they chose, dequantised in the tile."""
# ruff: noqa: N803  (the constants of a kernel are in capitals)

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from aphro_kernels.float8 import float8_as_bytes
from aphro_kernels.grouped_float8 import launch_grouped_float8, suits_float8
from aphro_kernels.grouped_gemm import GroupedConfig, grouped_linear, grouped_linear_reference
from aphro_kernels.language import chain_options, jit, runs_kernels, start_in_chain, tl, triton
from aphro_kernels.packed_linear import PackedWeight, can_convert, dequantise, dequantise_reference, widest_tile
from aphro_kernels.packed_tiles import multiply_packed
from aphro_kernels.row_tiles import RowTiles

_SPLITS: Final = 4  # stretches of a tile's inputs, for as many warps
_MAX_ROWS: Final = 32  # of a tile; more rows an expert share a dequantised copy


def grouped_packed_linear_reference(
    x: Tensor,
    weight: PackedWeight,
    num_experts: int,
    tiles: RowTiles,
    slots_per_row: int,
    *,
    is_gated: bool = False,
) -> Tensor:
    dense = dequantise_reference(weight, torch.float32).view(num_experts, -1, weight.shape[1])
    return grouped_linear_reference(x, dense, tiles, slots_per_row, is_gated=is_gated)


def grouped_packed_linear(
    x: Tensor,
    weight: PackedWeight,
    num_experts: int,
    tiles: RowTiles,
    slots_per_row: int,
    *,
    is_gated: bool = False,
) -> Tensor:
    """As ``grouped_linear``, of ``num_experts`` quantised matrices below each other: ``weight`` [experts * out, in]."""
    if not runs_kernels(x):
        return grouped_packed_linear_reference(x, weight, num_experts, tiles, slots_per_row, is_gated=is_gated)
    width = len(weight.codes) // num_experts // (1 + is_gated)
    is_float8 = suits_float8(x, weight, tiles)
    is_taken = tiles.rows <= _MAX_ROWS and x.dtype.itemsize == 2 and weight.suits_kernel and can_convert(weight.codes)
    if not is_float8 and not is_taken:
        dense = dequantise(weight, x.dtype).view(num_experts, -1, weight.shape[1])
        return grouped_linear(x, dense, tiles, slots_per_row, is_gated=is_gated)
    launch = launch_grouped_float8 if is_float8 else _launch
    out = x.new_empty(tiles.num_slots, width)
    return launch(x, weight, num_experts, tiles, slots_per_row, out, is_gated=is_gated)


def _config(weight: PackedWeight, tiles: RowTiles) -> GroupedConfig:
    depth = weight.shape[1]
    if tiles.rows == 1:
        return GroupedConfig(8, widest_tile(depth, 512), 2, 4)
    return GroupedConfig(32, widest_tile(weight.tile_group or depth, 128) * _SPLITS, 4, 3)


def _launch(
    x: Tensor,
    weight: PackedWeight,
    num_experts: int,
    tiles: RowTiles,
    slots_per_row: int,
    out: Tensor,
    *,
    is_gated: bool = False,
    config: GroupedConfig | None = None,
) -> Tensor:
    depth, width = weight.shape[1], out.shape[1]
    assert x.stride(1) == 1
    assert weight.codes.is_contiguous()
    assert weight.scales.is_contiguous()
    if tiles.num_slots and num_experts:
        config = config or _config(weight, tiles)
        launch: Any = _grouped_packed_kernel[(len(tiles.experts), triton.cdiv(width, config.columns))]
        launch(
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
            BN=config.columns,
            BK=config.inputs,
            SPLIT=1 if tiles.rows == 1 else _SPLITS,
            IS_EVEN=width % config.columns == 0 and depth % config.inputs == 0,
            STAGES=config.num_stages,
            IS_TILED=weight.is_tiled,
            IS_GATED=is_gated,
            HAS_ASM=x.is_cuda,
            num_warps=config.num_warps,
            **chain_options(x),
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
    IS_GATED: tl.constexpr,
    HAS_ASM: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    """One tile of rows times ``BN`` rows of its expert's matrix."""
    start_in_chain(CHAINED)
    tile = tl.program_id(0)
    expert = tl.load(experts + tile)
    if expert >= num_experts:
        return
    slot = tl.load(slots + tile * ROWS + tl.arange(0, ROWS))
    is_row = slot < num_slots
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    is_column = columns < width
    x_rows = (slot // slots_per_row).to(tl.int64) * x_stride
    if ROWS == 1:
        x += tl.sum(x_rows, axis=0)
    matrix_rows = expert.to(tl.int64) * width * (2 if IS_GATED else 1) + columns
    total = multiply_packed(
        x, x_rows, is_row, codes, scales, offsets, matrix_rows, is_column, 0, tl.cdiv(depth, BK), depth, KIND, GROUP,
        ROWS, BN, BK, SPLIT, IS_EVEN, STAGES, IS_TILED, HAS_ASM,
    )  # fmt: skip
    if GROUP == 0:
        total *= tl.load(scales + matrix_rows, mask=is_column, other=0.0).to(tl.float32)[:, None]
    if IS_GATED:
        up = multiply_packed(
            x, x_rows, is_row, codes, scales, offsets, matrix_rows + width, is_column, 0, tl.cdiv(depth, BK), depth,
            KIND, GROUP, ROWS, BN, BK, SPLIT, IS_EVEN, STAGES, IS_TILED, HAS_ASM,
        )  # fmt: skip
        if GROUP == 0:
            up *= tl.load(scales + width + matrix_rows, mask=is_column, other=0.0).to(tl.float32)[:, None]
        total = total / (1.0 + tl.exp(-total)) * up
    out_at = out + slot.to(tl.int64)[None, :] * width + columns[:, None]
    tl.store(out_at, total.to(out.dtype.element_ty), mask=is_row[None, :] & is_column[:, None])
