"""Many rows an expert on Hopper: each tile of 128 rows, which stand by expert, times its expert's matrix.

The kernel of gated_gemm.py with an expert for each tile of rows: SiLU(x Wg^T) * (x Wu^T), or a plain product whose
second half of a tile's columns stands where up does.
"""
# ruff: noqa: N803, N806  (the constants of a kernel are in capitals)

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from torch import Tensor

from aphro_kernels.gated_gemm import COLUMNS, INPUTS, ROWS, descriptor, multiply, num_tiles, place
from aphro_kernels.hopper import gl, hopper, jit, num_multiprocessors
from aphro_kernels.language import chain_options, runs_kernels, tl, triton
from aphro_kernels.row_tiles import RowTiles
from aphro_kernels.silu_and_mul import silu_and_mul_reference

_STAGES: Final = 4
_GROUP: Final = 16  # tiles of rows that take turns over one stripe of columns


def suits_wide(shape: Sequence[int]) -> bool:
    """Whether the copy engine takes 16-bit matrices of this ``shape`` [experts, out, in]."""
    _, n, k = shape
    return n % 16 == 0 and k % 8 == 0


def grouped_wide_reference(x: Tensor, weight: Tensor, tiles: RowTiles, *, is_gated: bool) -> Tensor:
    out = x.new_zeros(len(x), weight.shape[1] // (1 + is_gated))
    for tile, expert in enumerate(tiles.experts.tolist()):
        if expert < len(weight):
            rows = slice(tile * tiles.rows, (tile + 1) * tiles.rows)
            y = x[rows].float() @ weight[expert].float().T
            out[rows] = (silu_and_mul_reference(y) if is_gated else y).to(x.dtype)
    return out


def grouped_wide(x: Tensor, weight: Tensor, tiles: RowTiles, *, is_gated: bool, out: Tensor | None = None) -> Tensor:
    """``x`` [capacity, in], a row a place of ``tiles`` (of :data:`ROWS` rows), ``weight`` [experts, out, in] ->
    [capacity, out]; ``is_gated``: gate rows, then up rows -> [capacity, out / 2]. Sums in float32. Rows of tiles that
    are not used are not written."""
    if not runs_kernels(x):
        return grouped_wide_reference(x, weight, tiles, is_gated=is_gated)
    num_experts, n, k = weight.shape
    n = n // 2 if is_gated else n
    assert tiles.rows == ROWS
    assert weight.is_contiguous()
    assert x.is_contiguous()
    assert len(x) == len(tiles.slots)
    out = x.new_empty(len(x), n) if out is None else out
    most = len(tiles.experts) * triton.cdiv(n, COLUMNS if is_gated else 2 * COLUMNS)
    if num_experts and tiles.num_slots:
        grouped_wide_kernel[(min(num_multiprocessors(x.device.index), most),)](
            descriptor(x, ROWS // 2, INPUTS),
            descriptor(weight.view(-1, k), COLUMNS, INPUTS),
            descriptor(out, ROWS // 2, 64),
            tiles.experts,
            tiles.used,
            n,
            k,
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            INPUTS=INPUTS,
            GROUP=_GROUP,
            STAGES=_STAGES,
            IS_GATED=is_gated,
            num_warps=4,
            **chain_options(x),
        )
    return out


@jit()
def grouped_wide_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    experts: tl.tensor,
    used: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    INPUTS: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    IS_GATED: gl.constexpr,
    CHAINED: gl.constexpr,
) -> None:
    if CHAINED:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    SHARED: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    BARRIER: gl.constexpr = hopper.mbarrier.MBarrierLayout()
    HALF: gl.constexpr = ROWS // 2
    num_rows = gl.load(used) * ROWS
    x_tiles = gl.allocate_shared_memory(x.dtype, [2 * STAGES, HALF, INPUTS], SHARED)
    w_tiles = gl.allocate_shared_memory(x.dtype, [2 * STAGES, COLUMNS, INPUTS], SHARED)
    out_tiles = gl.allocate_shared_memory(x.dtype, [2, HALF, COLUMNS], SHARED)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for stage in gl.static_range(STAGES):
        hopper.mbarrier.init(full.index(stage), count=1)
        hopper.mbarrier.init(empty.index(stage), count=2)
    hopper.fence_async_shared()
    gl.warp_specialize(
        [
            (
                multiply,
                (
                    0,
                    out,
                    x_tiles,
                    w_tiles,
                    out_tiles,
                    full,
                    empty,
                    num_rows,
                    n,
                    k,
                    ROWS,
                    COLUMNS,
                    INPUTS,
                    GROUP,
                    STAGES,
                    IS_GATED,
                ),
            ),
            (
                multiply,
                (
                    1,
                    out,
                    x_tiles,
                    w_tiles,
                    out_tiles,
                    full,
                    empty,
                    num_rows,
                    n,
                    k,
                    ROWS,
                    COLUMNS,
                    INPUTS,
                    GROUP,
                    STAGES,
                    IS_GATED,
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
                    n,
                    k,
                    ROWS,
                    COLUMNS,
                    INPUTS,
                    GROUP,
                    STAGES,
                    IS_GATED,
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
    n: tl.tensor,
    k: tl.tensor,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    INPUTS: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    IS_GATED: gl.constexpr,
) -> None:
    """One warp, as in gated_gemm.py. Columns beyond an expert's matrix are the next one's, and never stored."""
    TILE_BYTES: gl.constexpr = 2 * INPUTS * (ROWS + 2 * COLUMNS)
    SPAN: gl.constexpr = COLUMNS if IS_GATED else 2 * COLUMNS
    loaded = 0
    for tile in range(gl.program_id(0), num_tiles(num_rows, n, ROWS, SPAN), gl.num_programs(0)):
        row, column = place(tile, num_rows, n, ROWS, SPAN, GROUP)
        expert = gl.load(experts + row // ROWS)
        if IS_GATED:
            first = expert * 2 * n + column
            second = first + n
        else:
            first = expert * n + column
            second = first + COLUMNS
        for start in range(0, k, INPUTS):
            stage = loaded % STAGES
            hopper.mbarrier.wait(empty.index(stage), ((loaded // STAGES) & 1) ^ 1)
            hopper.mbarrier.expect(full.index(stage), TILE_BYTES)
            for half in gl.static_range(2):
                hopper.tma.async_copy_global_to_shared(
                    x, [row + half * (ROWS // 2), start], full.index(stage), x_tiles.index(2 * stage + half)
                )
            hopper.tma.async_copy_global_to_shared(weight, [first, start], full.index(stage), w_tiles.index(2 * stage))
            hopper.tma.async_copy_global_to_shared(
                weight, [second, start], full.index(stage), w_tiles.index(2 * stage + 1)
            )
            loaded += 1
