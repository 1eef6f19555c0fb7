"""The kernel of float8_linear.py: quantised weights times rows that are split into float8 numbers (float8_tiles.py)."""
# ruff: noqa: N803, N806  (constants in capitals; a kernel is one piece)

from __future__ import annotations

from aphro_kernels.float8_tiles import multiply_float8
from aphro_kernels.language import jit, tl


@jit(do_not_specialize=["num_rows", "splits"])
def float8_kernel(
    pieces: tl.tensor,
    row_scales: tl.tensor,
    sums: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    parts: tl.tensor,
    arrivals: tl.tensor,
    num_rows: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    splits: tl.tensor,
    ROWS: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
    IS_GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ASM: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    """``out`` [num_rows, n] = x W^T (+ bias); with IS_GATED W has 2 n rows, gate before up, and ``out`` = SiLU(gate) *
    up. A program has ``BN`` rows of W (gated: half of them each), ROWS of x and one of ``splits`` stretches of inputs.
    KIND "fp8": in rows, a scale for each 128 inputs or (GROUP 0) a row; "int4": in tiles (tile_linear.py)."""
    tiles = tl.cdiv(num_rows, ROWS)
    program = tl.program_id(0)
    row_tile = program % tiles  # neighbours read the same weights
    split = program // tiles % splits
    stripe = program // tiles // splits
    chunks = k // 128
    low = split * chunks // splits
    high = (split + 1) * chunks // splits
    WIDTH: tl.constexpr = BN // 2 if IS_GATED else BN
    lines = tl.arange(0, BN)
    column = tl.minimum(stripe * WIDTH + lines % WIDTH, n - 1)
    matrix_rows = (column + lines // WIDTH * n).to(tl.int64)
    if CHAINED:
        tl.extra.cuda.gdc_wait()

    piece = tl.arange(0, 2 * ROWS)
    row = tl.minimum(row_tile * ROWS + piece % ROWS, num_rows - 1)
    x_at = pieces + (piece // ROWS * num_rows + row).to(tl.int64)[None, :] * k
    y = multiply_float8(
        x_at, sums + row * chunks, codes, scales, matrix_rows, low, high, k, ROWS, BN, STAGES, KIND, GROUP, HAS_ASM
    )
    if CHAINED:
        tl.extra.cuda.gdc_launch_dependents()
    is_done = True
    if splits > 1:
        at = lines[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
        place = stripe * tiles + row_tile
        mine = parts + place * splits * (BN * ROWS) + at
        tl.store(mine + split * (BN * ROWS), y)
        tl.debug_barrier()  # all threads have stored before one of them says so
        is_done = tl.atomic_add(arrivals + place, 1, sem="acq_rel", scope="gpu") == splits - 1
        if is_done:
            tl.debug_barrier()
            y = tl.zeros([BN, ROWS], tl.float32)
            for index in range(splits):  # in their order, past the first-level cache
                y += tl.load(mine + index * (BN * ROWS), cache_modifier=".cg")
            tl.store(arrivals + place, 0)
    if is_done:
        rows = row_tile * ROWS + tl.arange(0, ROWS)
        is_row = rows < num_rows
        y *= tl.load(row_scales + rows, mask=is_row, other=0.0)[None, :]
        if KIND == "fp8" and GROUP == 0:
            y *= tl.load(scales + matrix_rows).to(tl.float32)[:, None]
        if HAS_BIAS:
            y += tl.load(bias + matrix_rows).to(tl.float32)[:, None]
        if IS_GATED:
            gate, up = tl.split(tl.permute(tl.reshape(y, [2, WIDTH, ROWS]), (1, 2, 0)))
            result = gate / (1.0 + tl.exp(-gate)) * up
        else:
            result = y
        columns = stripe * WIDTH + tl.arange(0, WIDTH)
        at_out = out + rows[:, None].to(tl.int64) * n + columns[None, :]
        tl.store(at_out, tl.trans(result).to(out.dtype.element_ty), mask=is_row[:, None] & (columns < n)[None, :])
