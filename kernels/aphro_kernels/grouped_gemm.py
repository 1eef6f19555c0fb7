"""Rows through the matrices of the experts that they chose, few rows an expert: bound by the bytes of the weights."""
# ruff: noqa: N803, N806  (the constants of a kernel are in capitals)

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from aphro_kernels.language import chain_options, jit, runs_kernels, start_in_chain, tl, triton
from aphro_kernels.row_tiles import RowTiles
from aphro_kernels.silu_and_mul import silu_and_mul_reference


@dataclass(frozen=True, slots=True)
class GroupedConfig:
    columns: int  # of the output in a tile; of the gate and as many of up in a gated product
    inputs: int  # in a tile
    num_warps: int
    num_stages: int


def grouped_linear_reference(
    x: Tensor, weight: Tensor, tiles: RowTiles, slots_per_row: int, *, is_gated: bool = False
) -> Tensor:
    out = x.new_zeros(tiles.num_slots, weight.shape[1] // (1 + is_gated))
    for tile, expert in enumerate(tiles.experts.tolist()):
        slots = tiles.slots[tile * tiles.rows : (tile + 1) * tiles.rows].long()
        slots = slots[slots < tiles.num_slots]
        if expert < weight.shape[0]:
            y = x[slots // slots_per_row].float() @ weight[expert].float().T
            out[slots] = (silu_and_mul_reference(y) if is_gated else y).to(x.dtype)
    return out


def grouped_linear(x: Tensor, weight: Tensor, tiles: RowTiles, slots_per_row: int, *, is_gated: bool = False) -> Tensor:
    """``[num_slots, out]``: slot s is row s // ``slots_per_row`` of ``x`` [rows, in] times its expert's matrix of
    ``weight`` [num_experts, out, in], float32 inside. ``is_gated``: gate rows, then up rows; SiLU(gate) * up,
    [num_slots, out / 2]. Slots of experts that are elsewhere are not written."""
    if not runs_kernels(x):
        return grouped_linear_reference(x, weight, tiles, slots_per_row, is_gated=is_gated)
    out = x.new_empty(tiles.num_slots, weight.shape[1] // (1 + is_gated))
    return _launch(x, weight, tiles, slots_per_row, out, is_gated=is_gated)


def _config(x: Tensor, tiles: RowTiles) -> GroupedConfig:
    """The fastest of ``bench/experts.py --configs`` (an H100); of float32 what fits the 99 KiB of smaller GPUs, too."""
    is_wide = x.dtype.itemsize == 4
    if tiles.rows == 1:
        return GroupedConfig(8, 1024 if x.shape[1] >= 2048 and not is_wide else 512, 4, 3)
    return GroupedConfig(64, 64 if is_wide or tiles.rows > 32 else 128, 4, 3)


def _launch(
    x: Tensor,
    weight: Tensor,
    tiles: RowTiles,
    slots_per_row: int,
    out: Tensor,
    *,
    is_gated: bool = False,
    config: GroupedConfig | None = None,
) -> Tensor:
    num_experts, _, depth = weight.shape
    width = out.shape[1]
    assert x.stride(1) == 1
    assert weight.is_contiguous()
    config = config or _config(x, tiles)
    if tiles.num_slots and num_experts:
        # tiles of one expert beside each other: all but the first find its matrix in the second-level cache
        launch: Any = _grouped_linear_kernel[(len(tiles.experts), triton.cdiv(width, config.columns))]
        launch(
            x,
            weight,
            out,
            tiles.slots,
            tiles.experts,
            num_experts,
            tiles.num_slots,
            width,
            depth,
            x.stride(0),
            slots_per_row,
            ROWS=tiles.rows,
            BLOCK_N=config.columns,
            BLOCK_K=config.inputs,
            IS_EVEN=depth % config.inputs == 0 and width % config.columns == 0,
            IS_GATED=is_gated,
            STAGES=config.num_stages,
            PRECISION="ieee" if x.dtype.itemsize == 4 else "tf32",
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **chain_options(x),
        )
    return out


@jit(do_not_specialize=["num_slots", "x_stride"])
def _grouped_linear_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    slots: tl.tensor,
    experts: tl.tensor,
    num_experts: tl.tensor,
    num_slots: tl.tensor,
    width: tl.tensor,
    depth: tl.tensor,
    x_stride: tl.tensor,
    slots_per_row: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IS_EVEN: tl.constexpr,
    IS_GATED: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    """One tile of rows, the short side of the product, times ``BLOCK_N`` rows of its expert's matrix.

    One row is multiplied and summed, more take the tensor cores.
    """
    start_in_chain(CHAINED)
    tile = tl.program_id(0)
    expert = tl.load(experts + tile)
    if expert >= num_experts:
        return
    slot = tl.load(slots + tile * ROWS + tl.arange(0, ROWS))
    is_row = slot < num_slots
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_column = columns < width
    ks = tl.arange(0, BLOCK_K)
    x_at = x + (slot // slots_per_row).to(tl.int64)[None, :] * x_stride + ks[:, None]
    matrix_rows = expert.to(tl.int64) * width * (2 if IS_GATED else 1) + columns
    weight_at = weight + matrix_rows[:, None] * depth + ks[None, :]
    up_at = weight_at + tl.cast(width, tl.int64) * depth
    row_at = x + tl.sum(slot, axis=0).to(tl.int64) // slots_per_row * x_stride + ks
    WIDTH: tl.constexpr = BLOCK_K if ROWS == 1 else ROWS
    total = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    gated = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    for chunk in tl.range(0, tl.cdiv(depth, BLOCK_K), num_stages=STAGES):
        start = chunk * BLOCK_K
        is_k = start + ks < depth
        if ROWS == 1:
            row = tl.load(row_at + start, mask=is_k | IS_EVEN, other=0.0).to(tl.float32)
        else:
            rows = tl.load(x_at + start, mask=is_row[None, :] & (is_k[:, None] | IS_EVEN), other=0.0)
        w = _load_weight(weight_at + start, is_column, is_k, IS_EVEN)
        if IS_GATED:
            up = _load_weight(up_at + start, is_column, is_k, IS_EVEN)
        if ROWS == 1:
            total += w.to(tl.float32) * row[None, :]
        else:
            total = tl.dot(w, rows, total, input_precision=PRECISION)
        if IS_GATED:
            if ROWS == 1:
                gated += up.to(tl.float32) * row[None, :]
            else:
                gated = tl.dot(up, rows, gated, input_precision=PRECISION)
    if ROWS == 1:
        total = tl.sum(total, axis=1, keep_dims=True)
        gated = tl.sum(gated, axis=1, keep_dims=True)
    if IS_GATED:
        total = total / (1.0 + tl.exp(-total)) * gated
    out_at = out + slot.to(tl.int64)[:, None] * width + columns[None, :]
    tl.store(out_at, tl.trans(total).to(out.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


@jit()
def _load_weight(at: tl.tensor, is_column: tl.tensor, is_k: tl.tensor, IS_EVEN: tl.constexpr) -> tl.tensor:
    if IS_EVEN:
        return tl.load(at)
    else:
        return tl.load(at, mask=is_column[:, None] & is_k[None, :], other=0.0)
