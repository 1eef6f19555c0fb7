"""SiLU(x Wg^T) * (x Wu^T) of many rows in one launch on Hopper: the merged product is neither written nor read again.

One warp copies tiles into shared memory by the copy engine (TMA), two groups of four warps multiply 64 rows each.
Programs stay on their multiprocessor: while SiLU is taken of one tile, the next is being loaded.
"""
# ruff: noqa: N803, N806  (the constants of a kernel are in capitals)

from __future__ import annotations

from typing import Any, Final

from torch import Tensor

from aphro_kernels.hopper import TensorDescriptor, barrier, gl, hopper, jit, num_multiprocessors, suits_hopper
from aphro_kernels.language import chain_options, tl, triton
from aphro_kernels.silu_and_mul import silu_and_mul_reference

ROWS: Final = 128  # of a tile
COLUMNS: Final = 128  # of the gate, and as many of up
INPUTS: Final = 64
_STAGES: Final = 4
_FEWEST_ROWS: Final = 1024
# (rows of the weight, inputs): other numbers of rows at which it is the faster one, padded decode steps', beside cuBLAS
# by its table (the first two: an H200; the third, of ranks of two: an H100 and cuBLAS's own choice)
_OTHER_ROWS: Final = {
    (28672, 4096): (128,),
    (14336, 4096): (448, 512),
    (18944, 3584): (320, 384, 448),
}
_GROUP: Final = 16  # tiles of rows that take turns over one stripe of columns: they share the second-level cache


def gated_linear_reference(x: Tensor, weight: Tensor) -> Tensor:
    return silu_and_mul_reference(x.float() @ weight.float().T).to(x.dtype)


def is_faster(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel takes these, and is faster than the library's product with SiLU after it (on an H100)."""
    n, k = weight.shape
    is_taken = suits_hopper(x) and x.is_contiguous() and weight.dtype == x.dtype and n % 16 == 0 and k % 8 == 0
    return is_taken and (x.shape[0] >= _FEWEST_ROWS or x.shape[0] in _OTHER_ROWS.get((n, k), ()))


def gated_linear(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """``x`` [rows, K], ``weight`` [2 * N, K] (gate rows, then up rows), contiguous -> [rows, N]; sums in float32."""
    num_rows, k = x.shape
    n = weight.shape[0] // 2
    assert weight.is_contiguous()
    assert x.is_contiguous()
    out = x.new_empty(num_rows, n) if out is None else out
    tiles = triton.cdiv(num_rows, ROWS) * triton.cdiv(n, COLUMNS)
    gated_kernel[(min(num_multiprocessors(x.device.index), tiles),)](
        descriptor(x, ROWS // 2, INPUTS),
        descriptor(weight, COLUMNS, INPUTS),
        descriptor(out, ROWS // 2, 64),
        num_rows,
        n,
        k,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        INPUTS=INPUTS,
        GROUP=_GROUP,
        STAGES=_STAGES,
        num_warps=4,
        **chain_options(x),
    )
    return out


def descriptor(matrix: Tensor, rows: int, columns: int) -> Any:
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns], layout)


@jit(do_not_specialize=["num_rows"])
def gated_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    num_rows: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    INPUTS: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    CHAINED: gl.constexpr,
) -> None:
    if CHAINED:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    SHARED: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    BARRIER: gl.constexpr = hopper.mbarrier.MBarrierLayout()
    HALF: gl.constexpr = ROWS // 2
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
                    True,
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
                    True,
                ),
            ),
            (
                _load,
                (x, weight, x_tiles, w_tiles, full, empty, num_rows, n, k, ROWS, COLUMNS, INPUTS, GROUP, STAGES),
            ),
        ],
        [4, 1],
        [240, 24],
    )


@jit()
def place(
    tile: tl.tensor,
    num_rows: tl.tensor,
    n: tl.tensor,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    GROUP: gl.constexpr,
) -> tl.tensor:
    """First row and first column of a tile."""
    row_tiles = (num_rows + ROWS - 1) // ROWS
    column_tiles = (n + COLUMNS - 1) // COLUMNS
    first = tile // (GROUP * column_tiles) * GROUP
    size = gl.minimum(row_tiles - first, GROUP)
    inside = tile % (GROUP * column_tiles)
    return (first + inside % size) * ROWS, inside // size * COLUMNS


@jit()
def num_tiles(num_rows: tl.tensor, n: tl.tensor, ROWS: gl.constexpr, COLUMNS: gl.constexpr) -> tl.tensor:
    return ((num_rows + ROWS - 1) // ROWS) * ((n + COLUMNS - 1) // COLUMNS)


@jit()
def _load(
    x: tl.tensor,
    weight: tl.tensor,
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
) -> None:
    """One warp: both halves of the rows' tile, the gate's and up's. What lies beyond the matrices is zeros."""
    TILE_BYTES: gl.constexpr = 2 * INPUTS * (ROWS + 2 * COLUMNS)
    loaded = 0
    for tile in range(gl.program_id(0), num_tiles(num_rows, n, ROWS, COLUMNS), gl.num_programs(0)):
        row, column = place(tile, num_rows, n, ROWS, COLUMNS, GROUP)
        for start in range(0, k, INPUTS):
            stage = loaded % STAGES
            hopper.mbarrier.wait(empty.index(stage), ((loaded // STAGES) & 1) ^ 1)
            hopper.mbarrier.expect(full.index(stage), TILE_BYTES)
            for half in gl.static_range(2):
                hopper.tma.async_copy_global_to_shared(
                    x, [row + half * (ROWS // 2), start], full.index(stage), x_tiles.index(2 * stage + half)
                )
                hopper.tma.async_copy_global_to_shared(
                    weight, [column + half * n, start], full.index(stage), w_tiles.index(2 * stage + half)
                )
            loaded += 1


@jit()
def multiply(
    PART: gl.constexpr,
    out: tl.tensor,
    x_tiles: tl.tensor,
    w_tiles: tl.tensor,
    out_tiles: tl.tensor,
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
    """Four warps, half of a tile's rows. A stage is free again when the products after its own have begun.

    Not gated (grouped_hopper.py), a tile has twice the columns, which are stored one half after the other."""
    HALF: gl.constexpr = ROWS // 2
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    HALVES: gl.constexpr = COLUMNS // 64
    SPAN: gl.constexpr = COLUMNS if IS_GATED else 2 * COLUMNS
    out_tile = out_tiles.index(PART)
    out_parts = out_tile._reinterpret(out.dtype, [HALVES, HALF, 64], out_tile.layout)
    used = 0
    for tile in range(gl.program_id(0), num_tiles(num_rows, n, ROWS, SPAN), gl.num_programs(0)):
        row, column = place(tile, num_rows, n, ROWS, SPAN, GROUP)
        gate = gl.zeros([HALF, COLUMNS], gl.float32, SUMS)
        up = gl.zeros([HALF, COLUMNS], gl.float32, SUMS)
        for start in range(0, k, INPUTS):
            stage = used % STAGES
            hopper.mbarrier.wait(full.index(stage), (used // STAGES) & 1)
            left = x_tiles.index(2 * stage + PART)
            gate = hopper.warpgroup_mma(left, w_tiles.index(2 * stage).permute((1, 0)), gate, is_async=True)
            up = hopper.warpgroup_mma(left, w_tiles.index(2 * stage + 1).permute((1, 0)), up, is_async=True)
            gate, up = hopper.warpgroup_mma_wait(2, deps=(gate, up))
            barrier()
            hopper.mbarrier.arrive(empty.index((used + STAGES - 1) % STAGES), count=1, pred=start > 0)
            used += 1
        gate, up = hopper.warpgroup_mma_wait(0, deps=(gate, up))
        barrier()
        hopper.mbarrier.arrive(empty.index((used + STAGES - 1) % STAGES), count=1)
        if IS_GATED:
            product = gate / (1.0 + gl.exp(-gate)) * up
            _store(out, out_tile, out_parts, product.to(out.dtype), row + PART * HALF, column, HALVES)
        else:
            _store(out, out_tile, out_parts, gate.to(out.dtype), row + PART * HALF, column, HALVES)
            _store(out, out_tile, out_parts, up.to(out.dtype), row + PART * HALF, column + COLUMNS, HALVES)
    hopper.tma.store_wait(0)


@jit()
def _store(
    out: tl.tensor,
    out_tile: tl.tensor,
    out_parts: tl.tensor,
    value: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    HALVES: gl.constexpr,
) -> None:
    """By the copy engine, which cuts what is beyond ``out``; the tile is free again when what it held was read."""
    hopper.tma.store_wait(0)
    barrier()
    out_tile.store(value)
    hopper.fence_async_shared()
    barrier()
    for half in gl.static_range(HALVES):
        hopper.tma.async_copy_shared_to_global(out, [row, column + half * 64], out_parts.index(half))
