"""Rows through the quantised matrices of the experts that they chose, split into float8 numbers: nothing is decoded."""
# ruff: noqa: N803  (constants in capitals; a kernel is one piece)

from __future__ import annotations

from typing import Any, Final

from torch import Tensor

from aphro_kernels.float8_linear import is_split_exactly
from aphro_kernels.float8_tiles import multiply_float8
from aphro_kernels.language import chain_options, jit, start_in_chain, tl, triton
from aphro_kernels.packed_linear import PackedWeight
from aphro_kernels.row_tiles import RowTiles
from aphro_kernels.split_rows import split_rows

_MAX_ROWS: Final = {"fp8": 64, "int4": 32}  # of a tile
_FEW_PROGRAMS: Final = 264  # then tiles are narrower


def suits_float8(x: Tensor, weight: PackedWeight, tiles: RowTiles) -> bool:
    is_kept_so = weight.is_tiled or (weight.kind == "fp8" and weight.tile_group % 128 == weight.shape[1] % 128 == 0)
    return is_kept_so and 1 < tiles.rows <= _MAX_ROWS[weight.kind] and is_split_exactly(x)


def launch_grouped_float8(
    x: Tensor,
    weight: PackedWeight,
    num_experts: int,
    tiles: RowTiles,
    slots_per_row: int,
    out: Tensor,
    *,
    is_gated: bool = False,
) -> Tensor:
    """As grouped_packed.py has it; ``out`` [num_slots, width]."""
    depth, width = weight.shape[1], out.shape[1]
    assert weight.codes.is_contiguous()
    assert weight.scales.is_contiguous()
    if tiles.num_slots and num_experts:
        split = split_rows(x)
        columns = 128 if triton.cdiv(width, 128) * len(tiles.experts) >= _FEW_PROGRAMS else 64
        launch: Any = _grouped_float8_kernel[(len(tiles.experts), triton.cdiv(width, columns))]
        launch(
            split.codes,
            split.scales,
            split.sums,
            weight.codes,
            weight.scales,
            out,
            tiles.slots,
            tiles.experts,
            num_experts,
            tiles.num_slots,
            len(x),
            width,
            depth,
            slots_per_row,
            KIND=weight.kind,
            GROUP=weight.tile_group,
            ROWS=tiles.rows,
            BN=columns,
            STAGES=4,
            IS_GATED=is_gated,
            HAS_ASM=x.is_cuda,
            num_warps=8 if tiles.rows == 64 and columns == 128 else 4,
            num_stages=4,
            **chain_options(x),
        )
    return out


@jit(do_not_specialize=["num_slots", "num_rows"])
def _grouped_float8_kernel(
    pieces: tl.tensor,
    row_scales: tl.tensor,
    sums: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    out: tl.tensor,
    slots: tl.tensor,
    experts: tl.tensor,
    num_experts: tl.tensor,
    num_slots: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,
    depth: tl.tensor,
    slots_per_row: tl.tensor,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
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
    piece = tl.arange(0, 2 * ROWS)
    row = tl.minimum(tl.load(slots + tile * ROWS + piece % ROWS), num_slots - 1) // slots_per_row
    x_at = pieces + (piece // ROWS * num_rows + row).to(tl.int64)[None, :] * depth
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    matrix_rows = expert.to(tl.int64) * width * (2 if IS_GATED else 1) + tl.minimum(columns, width - 1)
    chunks = depth // 128
    y = multiply_float8(
        x_at, sums + row * chunks, codes, scales, matrix_rows, 0, chunks, depth, ROWS, BN, STAGES, KIND, GROUP, HAS_ASM
    )
    slot = tl.load(slots + tile * ROWS + tl.arange(0, ROWS))
    is_slot = slot < num_slots
    row_scale = tl.load(row_scales + slot // slots_per_row, mask=is_slot, other=0.0)[None, :]
    y *= row_scale
    if KIND == "fp8" and GROUP == 0:
        y *= tl.load(scales + matrix_rows).to(tl.float32)[:, None]
    if IS_GATED:
        sums_at, up_rows = sums + row * chunks, matrix_rows + width
        up = multiply_float8(
            x_at, sums_at, codes, scales, up_rows, 0, chunks, depth, ROWS, BN, STAGES, KIND, GROUP, HAS_ASM
        )
        up *= row_scale
        if KIND == "fp8" and GROUP == 0:
            up *= tl.load(scales + up_rows).to(tl.float32)[:, None]
        y = y / (1.0 + tl.exp(-y)) * up
    out_at = out + slot.to(tl.int64)[:, None] * width + columns[None, :]
    tl.store(out_at, tl.trans(y).to(out.dtype.element_ty), mask=is_slot[:, None] & (columns < width)[None, :])
