"""Rows through the matrices of the experts that they chose: a plan of row tiles, and one product over all of them."""
# ruff: noqa: N803  (the constants of a kernel are in capitals)

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aphro_kernels.language import jit, next_power_of_2, runs_kernels, tl, triton


@dataclass(slots=True)
class RowTiles:
    """Slots (row * k + choice) sorted by expert, each expert's padded to whole tiles.

    ``slots`` [capacity] int32, the number of slots where a tile is padded; ``experts`` [capacity / rows] int32 counts
    from the first local expert, their number where a tile is not used.
    """

    slots: Tensor
    experts: Tensor
    rows: int  # of a tile
    num_slots: int


def plan_tiles(chosen: Tensor, first: int, num_experts: int) -> RowTiles:
    """``chosen`` [num_tokens, k] int64 numbers of experts, of which ``first`` to ``first + num_experts`` are here.

    Shapes follow from the shape of ``chosen`` alone and nothing is copied to the host: a CUDA graph may hold it.
    """
    num_slots = chosen.numel()
    rows = _tile_rows(num_slots, num_experts)
    capacity = -(-(num_slots + min(num_experts, num_slots) * (rows - 1)) // rows) * rows
    local = chosen.flatten() - first
    local = torch.where((local >= 0) & (local < num_experts), local, num_experts)
    sorted_experts, order = torch.sort(local, stable=True)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=chosen.device)
    counts.scatter_add_(0, local, torch.ones_like(local))
    padded = (counts + rows - 1) // rows * rows
    padded[num_experts].zero_()
    starts, padded_ends = counts.cumsum(0) - counts, padded.cumsum(0)
    shift = padded_ends - padded - starts
    place = torch.arange(num_slots, device=chosen.device) + shift[sorted_experts]
    place = torch.where(sorted_experts < num_experts, place, capacity)  # foreign slots go behind the end
    slots = torch.full((capacity + 1,), num_slots, dtype=torch.int32, device=chosen.device)
    slots.scatter_(0, place, order.to(torch.int32))
    tile_starts = torch.arange(0, capacity, rows, device=chosen.device)
    experts = torch.searchsorted(padded_ends[:num_experts].contiguous(), tile_starts, right=True).to(torch.int32)
    return RowTiles(slots[:capacity], experts, rows, num_slots)


def _tile_rows(num_slots: int, num_experts: int) -> int:
    """As many as an expert gets on average, between what tl.dot takes and what registers hold."""
    return min(max(next_power_of_2(max(num_slots // max(num_experts, 1), 1)), 16), 64)


def grouped_linear_reference(x: Tensor, weight: Tensor, tiles: RowTiles, slots_per_row: int) -> Tensor:
    out = x.new_zeros(tiles.num_slots, weight.shape[1])
    for tile, expert in enumerate(tiles.experts.tolist()):
        slots = tiles.slots[tile * tiles.rows : (tile + 1) * tiles.rows].long()
        slots = slots[slots < tiles.num_slots]
        if expert < weight.shape[0]:
            out[slots] = (x[slots // slots_per_row].float() @ weight[expert].float().T).to(x.dtype)
    return out


def grouped_linear(
    x: Tensor, weight: Tensor, tiles: RowTiles, slots_per_row: int, *, has_foreign: bool = False
) -> Tensor:
    """``[num_slots, out]``: slot s is row s // ``slots_per_row`` of ``x`` [rows, in] times its expert's matrix of
    ``weight`` [num_experts, out, in], float32 inside. Slots of experts that are elsewhere (``has_foreign``) are 0."""
    if not runs_kernels(x):
        return grouped_linear_reference(x, weight, tiles, slots_per_row)
    new = x.new_zeros if has_foreign else x.new_empty
    return _launch(x, weight, tiles, slots_per_row, new(tiles.num_slots, weight.shape[1]))


def _launch(x: Tensor, weight: Tensor, tiles: RowTiles, slots_per_row: int, out: Tensor) -> Tensor:
    num_experts, width, depth = weight.shape
    assert x.stride(1) == 1
    assert weight.is_contiguous()
    if tiles.num_slots and num_experts:
        block_n, block_k = (64, 128) if tiles.rows <= 16 else (128, 64)
        grid = (triton.cdiv(width, block_n), len(tiles.experts))
        _grouped_linear_kernel[grid](
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
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            IS_WHOLE=depth % block_k == 0,
            PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
            num_warps=4,
            num_stages=3,
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
    IS_WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """One tile of rows times ``BLOCK_N`` rows of its expert's matrix."""
    tile = tl.program_id(1)
    expert = tl.load(experts + tile)
    if expert >= num_experts:
        return
    slot = tl.load(slots + tile * ROWS + tl.arange(0, ROWS))
    is_row = slot < num_slots
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_column = columns < width
    ks = tl.arange(0, BLOCK_K)
    x_at = x + (slot // slots_per_row).to(tl.int64)[:, None] * x_stride + ks[None, :]
    weight_at = weight + (expert.to(tl.int64) * width + columns)[None, :] * depth + ks[:, None]
    total = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for start in range(0, depth, BLOCK_K):
        if IS_WHOLE:
            a = tl.load(x_at + start, mask=is_row[:, None], other=0.0)
            b = tl.load(weight_at + start, mask=is_column[None, :], other=0.0)
        else:
            is_k = start + ks < depth
            a = tl.load(x_at + start, mask=is_row[:, None] & is_k[None, :], other=0.0)
            b = tl.load(weight_at + start, mask=is_column[None, :] & is_k[:, None], other=0.0)
        total += tl.dot(a, b, input_precision=PRECISION)
    out_at = out + slot.to(tl.int64)[:, None] * width + columns[None, :]
    tl.store(out_at, total.to(out.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])
