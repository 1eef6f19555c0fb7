"""Many rows an expert on Hopper, float8 weights: rows split into float8 numbers (split_places.py), weights as they are.

As grouped_hopper.py, with the rows' two numbers where gate and up stand there. The tensor cores sum float8 products to
some 14 bits: what comes of 128 inputs is added in float32.
"""
# ruff: noqa: N803, N806, PLR0915  (constants in capitals; a kernel is one piece)

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from aphro_kernels.gated_gemm import ROWS, num_tiles, place
from aphro_kernels.hopper import TensorDescriptor, barrier, gl, hopper, jit, num_multiprocessors, suits_hopper
from aphro_kernels.language import chain_options, tl, triton
from aphro_kernels.packed_linear import PackedWeight
from aphro_kernels.row_tiles import RowTiles

COLUMNS: Final = 128
INPUTS: Final = 128
_STAGES: Final = 4
_GROUP: Final = 16  # tiles of rows that take turns over one stripe of columns


def suits_float8_wide(x: Tensor, weight: PackedWeight, num_experts: int) -> bool:
    """Whether the kernel takes rows like ``x`` and ``num_experts`` matrices below each other."""
    rows, k = weight.shape
    is_taken = weight.kind == "fp8" and x.dtype == torch.bfloat16 and suits_hopper(x)
    return is_taken and k % INPUTS == 0 and weight.tile_group % INPUTS == 0 and rows // num_experts % 8 == 0


def grouped_float8_wide(
    codes: Tensor,
    row_scales: Tensor,
    weight: PackedWeight,
    num_experts: int,
    tiles: RowTiles,
    out: Tensor | None = None,
) -> Tensor:
    """``codes`` [2, capacity, in] and ``row_scales`` [capacity] of split_places.py, whose ``tiles`` have ROWS rows,
    ``weight`` [experts * out, in] -> [capacity, out] bfloat16. Of tiles that are not used, and of padding beyond half
    a tile, nothing is written."""
    k, n, capacity = weight.shape[1], weight.shape[0] // num_experts, len(row_scales)
    assert tiles.rows == ROWS
    assert weight.codes.is_contiguous()
    assert weight.scales.is_contiguous()
    assert codes.shape == (2, len(tiles.slots), k)
    out = torch.empty(capacity, n, dtype=torch.bfloat16, device=codes.device) if out is None else out
    launch: Any = grouped_float8_wide_kernel[
        (min(num_multiprocessors(codes.device.index), len(tiles.experts) * triton.cdiv(n, COLUMNS)),)
    ]
    launch(
        _descriptor(codes.view(-1, k), ROWS // 2, INPUTS),
        _descriptor(weight.codes, COLUMNS, INPUTS),
        _descriptor(out, ROWS // 2, 64),
        row_scales,
        weight.scales,
        tiles.experts,
        tiles.slots,
        tiles.used,
        capacity,
        tiles.num_slots,
        n,
        k,
        SCALED=weight.tile_group,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        INPUTS=INPUTS,
        GROUP=_GROUP,
        STAGES=_STAGES,
        num_warps=4,
        **chain_options(codes),
    )
    return out


def _descriptor(matrix: Tensor, rows: int, columns: int) -> Any:
    bits = 8 * matrix.dtype.itemsize
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=bits, rank=2)
    assert matrix.dtype in (torch.float8_e4m3fn, torch.bfloat16)
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns], layout)


@jit(do_not_specialize=["capacity", "num_slots"])
def grouped_float8_wide_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    row_scales: tl.tensor,
    scales: tl.tensor,
    experts: tl.tensor,
    slots: tl.tensor,
    used: tl.tensor,
    capacity: tl.tensor,
    num_slots: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    SCALED: gl.constexpr,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    INPUTS: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    CHAINED: gl.constexpr,
) -> None:
    """SCALED inputs share a scale of the weight; 0: a whole row of it does."""
    if CHAINED:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    SHARED: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    OUT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    BARRIER: gl.constexpr = hopper.mbarrier.MBarrierLayout()
    HALF: gl.constexpr = ROWS // 2
    num_rows = gl.load(used) * ROWS
    x_tiles = gl.allocate_shared_memory(x.dtype, [4 * STAGES, HALF, INPUTS], SHARED)
    w_tiles = gl.allocate_shared_memory(weight.dtype, [STAGES, COLUMNS, INPUTS], SHARED)
    out_tiles = gl.allocate_shared_memory(out.dtype, [2, HALF, COLUMNS], OUT)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for stage in gl.static_range(STAGES):
        hopper.mbarrier.init(full.index(stage), count=1)
        hopper.mbarrier.init(empty.index(stage), count=2)
    hopper.fence_async_shared()
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    0,
                    out,
                    row_scales,
                    scales,
                    experts,
                    slots,
                    x_tiles,
                    w_tiles,
                    out_tiles,
                    full,
                    empty,
                    num_rows,
                    num_slots,
                    n,
                    k,
                    SCALED,
                    ROWS,
                    COLUMNS,
                    INPUTS,
                    GROUP,
                    STAGES,
                ),
            ),
            (
                _multiply,
                (
                    1,
                    out,
                    row_scales,
                    scales,
                    experts,
                    slots,
                    x_tiles,
                    w_tiles,
                    out_tiles,
                    full,
                    empty,
                    num_rows,
                    num_slots,
                    n,
                    k,
                    SCALED,
                    ROWS,
                    COLUMNS,
                    INPUTS,
                    GROUP,
                    STAGES,
                ),
            ),
            (
                _load,
                (
                    x,
                    weight,
                    experts,
                    x_tiles,
                    w_tiles,
                    full,
                    empty,
                    num_rows,
                    capacity,
                    n,
                    k,
                    ROWS,
                    COLUMNS,
                    INPUTS,
                    GROUP,
                    STAGES,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )


@jit()
def _load(
    x: tl.tensor,
    weight: tl.tensor,
    experts: tl.tensor,
    x_tiles: tl.tensor,
    w_tiles: tl.tensor,
    full: tl.tensor,
    empty: tl.tensor,
    num_rows: tl.tensor,
    capacity: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    INPUTS: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
) -> None:
    """One warp: both numbers of both halves of the rows' tile, and the weight's."""
    TILE_BYTES: gl.constexpr = INPUTS * (2 * ROWS + COLUMNS)
    loaded = 0
    for tile in range(gl.program_id(0), num_tiles(num_rows, n, ROWS, COLUMNS), gl.num_programs(0)):
        row, column = place(tile, num_rows, n, ROWS, COLUMNS, GROUP)
        first = gl.load(experts + row // ROWS) * n + column
        for start in range(0, k, INPUTS):
            stage = loaded % STAGES
            hopper.mbarrier.wait(empty.index(stage), ((loaded // STAGES) & 1) ^ 1)
            hopper.mbarrier.expect(full.index(stage), TILE_BYTES)
            for part in gl.static_range(4):  # number, half
                at = row + part // 2 * capacity + part % 2 * (ROWS // 2)
                hopper.tma.async_copy_global_to_shared(
                    x, [at, start], full.index(stage), x_tiles.index(4 * stage + part)
                )
            hopper.tma.async_copy_global_to_shared(weight, [first, start], full.index(stage), w_tiles.index(stage))
            loaded += 1


@jit()
def _multiply(
    PART: gl.constexpr,
    out: tl.tensor,
    row_scales: tl.tensor,
    scales: tl.tensor,
    experts: tl.tensor,
    slots: tl.tensor,
    x_tiles: tl.tensor,
    w_tiles: tl.tensor,
    out_tiles: tl.tensor,
    full: tl.tensor,
    empty: tl.tensor,
    num_rows: tl.tensor,
    num_slots: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    SCALED: gl.constexpr,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    INPUTS: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
) -> None:
    """Four warps, half of a tile's rows; where all of them are padded, the stages are only handed back."""
    HALF: gl.constexpr = ROWS // 2
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 32])
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    out_tile = out_tiles.index(PART)
    out_parts = out_tile._reinterpret(out.dtype, [COLUMNS // 64, HALF, 64], out_tile.layout)
    none = gl.zeros([HALF, COLUMNS], gl.float32, SUMS)
    used = 0
    for tile in range(gl.program_id(0), num_tiles(num_rows, n, ROWS, COLUMNS), gl.num_programs(0)):
        row, column = place(tile, num_rows, n, ROWS, COLUMNS, GROUP)
        row += PART * HALF
        if gl.load(slots + row) < num_slots:
            matrix_row = gl.load(experts + row // ROWS) * n
            lane = gl.minimum(column + gl.arange(0, COLUMNS, LINE), n - 1)
            scale_at = scales + matrix_row + lane
            if SCALED > 0:
                scale_at = scales + (matrix_row + lane).to(gl.int64) * (k // SCALED)
                next_scale = gl.load(scale_at)
            total = gl.zeros([HALF, COLUMNS], gl.float32, SUMS)
            for start in range(0, k, INPUTS):
                stage = used % STAGES
                hopper.mbarrier.wait(full.index(stage), (used // STAGES) & 1)
                w_tile = w_tiles.index(stage).permute((1, 0))
                high = hopper.warpgroup_mma(x_tiles.index(4 * stage + PART), w_tile, none, use_acc=False, is_async=True)
                low = hopper.warpgroup_mma(
                    x_tiles.index(4 * stage + 2 + PART), w_tile, none, use_acc=False, is_async=True
                )
                if SCALED > 0:
                    scale = gl.convert_layout(next_scale.to(gl.float32), gl.SliceLayout(0, SUMS))
                    next_scale = gl.load(scale_at + gl.minimum(start + INPUTS, k - INPUTS) // SCALED)
                high, low = hopper.warpgroup_mma_wait(0, deps=(high, low))
                barrier()
                hopper.mbarrier.arrive(empty.index(stage), count=1)
                if SCALED > 0:
                    total += (high + low * 0.0625) * gl.expand_dims(scale, 0)
                else:
                    total += high + low * 0.0625
                used += 1
            if SCALED == 0:
                scale = gl.convert_layout(gl.load(scale_at).to(gl.float32), gl.SliceLayout(0, SUMS))
                total *= gl.expand_dims(scale, 0)
            rows = row + gl.arange(0, HALF, gl.SliceLayout(1, SUMS))
            total *= gl.expand_dims(gl.load(row_scales + rows), 1)
            hopper.tma.store_wait(0)
            barrier()
            out_tile.store(total.to(out.dtype))
            hopper.fence_async_shared()
            barrier()
            for half in gl.static_range(COLUMNS // 64):
                hopper.tma.async_copy_shared_to_global(out, [row, column + half * 64], out_parts.index(half))
        else:
            for _start in range(0, k, INPUTS):
                hopper.mbarrier.wait(full.index(used % STAGES), (used // STAGES) & 1)
                barrier()
                hopper.mbarrier.arrive(empty.index(used % STAGES), count=1)
                used += 1
    hopper.tma.store_wait(0)
