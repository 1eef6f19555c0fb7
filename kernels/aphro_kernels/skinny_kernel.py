"""The kernel of skinny_linear.py: a weight read once, at the speed of memory, against a few rows.

The weight's tiles stand in a line: one stripe of output columns after the other, in a stripe ``BK`` inputs a tile.
Program p of P takes an equal stretch of the line. A stripe that is cut over neighbours is added up by the last of them
to finish, in the order of the line: the sum is the same in each run. A tile's weights are the long side of the matrix
product, the rows its short one.
"""
# ruff: noqa: N803, N806, PLR0912, PLR0915  (constants in capitals; a kernel is one piece)

from __future__ import annotations

from aphro_kernels.language import fetch, jit, tl
from aphro_kernels.packed_tiles import multiply_packed


@jit(do_not_specialize=["num_rows", "ahead"])
def skinny_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    parts: tl.tensor,
    arrivals: tl.tensor,
    scales: tl.tensor,
    offsets: tl.tensor,
    num_rows: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    x_stride: tl.tensor,
    ahead: tl.tensor,
    ROWS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    IS_EVEN: tl.constexpr,
    IS_EARLY: tl.constexpr,
    STAGES: tl.constexpr,
    IS_GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
    IS_TILED: tl.constexpr,
    HAS_ASM: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    """``out`` [num_rows, n] = x W^T (+ bias), for W [n, k]; with IS_GATED W has 2 n rows, gate before up, and ``out`` =
    SiLU(gate) * up. There are at most as many programs as tiles. IS_EVEN: tiles fill the weight. KIND is how it is kept
    (packed_tiles.py), "plain" in the dtype of ``x``."""
    chunks = tl.cdiv(k, BK)
    tiles = tl.cdiv(n, BN) * chunks
    program = tl.program_id(0)
    used = tl.num_programs(0)
    start = program * tiles // used
    stop = (program + 1) * tiles // used
    PER_BYTE: tl.constexpr = 2 if KIND == "int4" else 1
    up = tl.cast(n, tl.int64) * (k // PER_BYTE)  # where its rows begin, behind those of the gate
    if CHAINED:
        if IS_EARLY:
            tl.extra.cuda.gdc_launch_dependents()
        for tile in range(start, tl.minimum(start + ahead, stop)):
            # weights never change: into the cache while the kernel before ends
            start_at = tile % chunks * (BK // PER_BYTE)
            _fetch(weight, tile // chunks * BN, start_at, n, k // PER_BYTE, BN, BK // PER_BYTE)
            if IS_GATED:
                _fetch(weight + up, tile // chunks * BN, start_at, n, k // PER_BYTE, BN, BK // PER_BYTE)
        tl.extra.cuda.gdc_wait()

    rows = tl.arange(0, ROWS)
    for stripe in range(start // chunks, tl.cdiv(stop, chunks)):
        begin = stripe * chunks
        low = tl.maximum(start - begin, 0)
        high = tl.minimum(stop - begin, chunks)
        columns = stripe * BN + tl.arange(0, BN)
        if KIND == "plain":
            total, gated = _multiply(
                x, weight, columns, rows, num_rows, x_stride, low, high, n, k, up, ROWS, BN, BK, IS_EVEN, STAGES,
                IS_GATED,
            )  # fmt: skip
        else:
            x_rows, is_row = rows.to(tl.int64) * x_stride, rows < num_rows
            at_columns, is_column = columns.to(tl.int64), columns < n
            total = multiply_packed(
                x, x_rows, is_row, weight, scales, offsets, at_columns, is_column, low, high, k, KIND, GROUP, ROWS, BN,
                BK, SPLIT, IS_EVEN, STAGES, IS_TILED, HAS_ASM,
            )  # fmt: skip
            gated = total
            if IS_GATED:
                gated = multiply_packed(
                    x, x_rows, is_row, weight, scales, offsets, at_columns + n, is_column, low, high, k, KIND, GROUP,
                    ROWS, BN, BK, SPLIT, IS_EVEN, STAGES, IS_TILED, HAS_ASM,
                )  # fmt: skip
        if CHAINED and not IS_EARLY:
            tl.extra.cuda.gdc_launch_dependents()
        is_whole = (low == 0) & (high == chunks)
        is_done = is_whole
        if not is_whole:
            # of a program's two parts the second is that of the stripe which begins in it
            first = ((begin + 1) * used - 1) // tiles
            last = ((begin + chunks) * used - 1) // tiles
            part = 2 * program + (low == 0).to(tl.int32)
            SIZE: tl.constexpr = BN * ROWS
            PART: tl.constexpr = 2 * SIZE if IS_GATED else SIZE
            at = tl.arange(0, BN)[:, None] * ROWS + rows[None, :]
            tl.store(parts + part * PART + at, total)
            if IS_GATED:
                tl.store(parts + part * PART + SIZE + at, gated)
            tl.debug_barrier()  # all threads have stored before one of them says so
            is_done = tl.atomic_add(arrivals + stripe, 1, sem="acq_rel", scope="gpu") == last - first
            if is_done:
                tl.debug_barrier()
                total = _sum_parts(parts, at, first, last, PART, BN, ROWS)
                if IS_GATED:
                    gated = _sum_parts(parts + SIZE, at, first, last, PART, BN, ROWS)
                tl.store(arrivals + stripe, 0)
        if is_done:
            is_column = columns < n
            if KIND != "plain" and GROUP == 0:
                total *= tl.load(scales + columns, mask=is_column, other=0.0).to(tl.float32)[:, None]
                if IS_GATED:
                    gated *= tl.load(scales + n + columns, mask=is_column, other=0.0).to(tl.float32)[:, None]
            if HAS_BIAS:
                total += tl.load(bias + columns, mask=is_column, other=0.0).to(tl.float32)[:, None]
            if IS_GATED:
                if HAS_BIAS:
                    gated += tl.load(bias + n + columns, mask=is_column, other=0.0).to(tl.float32)[:, None]
                total = total / (1.0 + tl.exp(-total)) * gated
            out_at = out + rows[:, None].to(tl.int64) * n + columns[None, :]
            is_out = (rows < num_rows)[:, None] & is_column[None, :]
            tl.store(out_at, tl.trans(total).to(out.dtype.element_ty), mask=is_out)


@jit()
def _multiply(
    x: tl.tensor,
    weight: tl.tensor,
    columns: tl.tensor,
    rows: tl.tensor,
    num_rows: tl.tensor,
    x_stride: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    up: tl.tensor,
    ROWS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    IS_EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    IS_GATED: tl.constexpr,
) -> tl.tensor:
    """``[BN, ROWS]`` float32: tiles ``low`` to ``high`` of a stripe; the second only if IS_GATED.

    One row is multiplied and summed, more take the tensor cores.
    """
    WIDTH: tl.constexpr = BK if ROWS == 1 else ROWS
    total = tl.zeros([BN, WIDTH], tl.float32)
    gated = tl.zeros([BN, WIDTH], tl.float32)
    at = weight + columns.to(tl.int64)[:, None] * k
    for chunk in tl.range(low, high, num_stages=STAGES):
        inputs = chunk * BK + tl.arange(0, BK)
        w = _load_weight(at + inputs[None, :], columns, inputs, n, k, IS_EVEN)
        if IS_GATED:
            w_up = _load_weight(at + up + inputs[None, :], columns, inputs, n, k, IS_EVEN)
        if ROWS == 1:
            row = _load_vector(x + inputs, inputs, k, IS_EVEN).to(tl.float32)
            total += w.to(tl.float32) * row[None, :]
            if IS_GATED:
                gated += w_up.to(tl.float32) * row[None, :]
        else:
            is_inside = (rows < num_rows)[None, :] & (inputs < k)[:, None]
            tile = tl.load(x + rows[None, :] * x_stride + inputs[:, None], mask=is_inside, other=0.0)
            total = tl.dot(w, tile, total)
            if IS_GATED:
                gated = tl.dot(w_up, tile, gated)
    if ROWS == 1:
        total = tl.sum(total, axis=1, keep_dims=True)
        gated = tl.sum(gated, axis=1, keep_dims=True)
    return total, gated


@jit()
def _load_weight(
    at: tl.tensor, columns: tl.tensor, inputs: tl.tensor, n: tl.tensor, k: tl.tensor, IS_EVEN: tl.constexpr
) -> tl.tensor:
    if IS_EVEN:
        return tl.load(at)
    else:
        return tl.load(at, mask=(columns < n)[:, None] & (inputs < k)[None, :], other=0.0)


@jit()
def _load_vector(at: tl.tensor, inputs: tl.tensor, k: tl.tensor, IS_EVEN: tl.constexpr) -> tl.tensor:
    if IS_EVEN:
        return tl.load(at)
    else:
        return tl.load(at, mask=inputs < k, other=0.0)


@jit()
def _fetch(
    weight: tl.tensor,
    column: tl.tensor,
    start: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    BN: tl.constexpr,
    BK: tl.constexpr,
) -> None:
    """Ask for one tile's 128-byte lines in the second-level cache."""
    LINE: tl.constexpr = 64 if weight.dtype.element_ty.primitive_bitwidth == 16 else 128
    columns = tl.minimum(column + tl.arange(0, BN), n - 1).to(tl.int64)[:, None]
    NUM_LINES: tl.constexpr = BK // LINE if BK > LINE else 1
    inputs = tl.minimum(start + tl.arange(0, NUM_LINES) * LINE, k - 1)[None, :]
    fetch(weight + columns * k + inputs)


@jit()
def _sum_parts(
    parts: tl.tensor,
    at: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    PART: tl.constexpr,
    BN: tl.constexpr,
    ROWS: tl.constexpr,
) -> tl.tensor:
    """The parts of a stripe in the order of its tiles, past the first-level cache: others' stores do not reach it."""
    total = tl.zeros([BN, ROWS], tl.float32)
    for program in range(first, last + 1):
        part = 2 * program + (program == first).to(tl.int32)
        total += tl.load(parts + part * PART + at, cache_modifier=".cg")
    return total
