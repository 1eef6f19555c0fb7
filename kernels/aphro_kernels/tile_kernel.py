"""The kernel of tile_linear.py: 4-bit weights in tiles, each decoded into the registers that the tensor core reads.

A tile is 16 outputs x 128 inputs, 1 KiB: two loads of a warp, 512 bytes each, with no detour by shared memory. Which
input a thread's registers stand for is free as long as weights and rows agree on it, since inputs are summed: the
permutations below make the order in memory that of the registers, so that no value changes its thread. Where a
compiler lays things out in another way it moves them, and the sum is the same.
"""
# mypy: disable-error-code="assignment"
# ruff: noqa: N803, N806, PLR0912, PLR0915, RUF005  (constants in capitals; a kernel is one piece, tuples are sums)

from __future__ import annotations

from aphro_kernels.language import jit, tl
from aphro_kernels.packed_tiles import nibbles


@jit(do_not_specialize=["num_rows"])
def tile_kernel(
    x: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    num_rows: tl.tensor,
    n: tl.tensor,
    x_stride: tl.tensor,
    TILES: tl.constexpr,
    WARPS: tl.constexpr,
    AHEAD: tl.constexpr,
    IS_UNROLLED: tl.constexpr,
    IS_GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ASM: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    """``out`` [num_rows, n] = x W^T (+ bias) for one to eight rows and 16 outputs a program, as skinny_kernel has it.

    The warps share out the TILES of a stripe by turns; their sums are added in the end. The first AHEAD turns are asked
    for before the kernel before has ended; IS_UNROLLED: afterwards always as many ahead.
    """
    if CHAINED:
        tl.extra.cuda.gdc_launch_dependents()
    stripe = tl.program_id(0)
    turns: tl.constexpr = (TILES + WARPS - 1) // WARPS
    warp = tl.arange(0, WARPS)
    lane_row = tl.arange(0, 8)
    at = codes + stripe.to(tl.int64) * (TILES * 1024) + (lane_row * 64)[:, None, None]
    at = at + (warp * 1024)[None, :, None] + tl.arange(0, 64)[None, None, :]
    scale_at = scales + stripe * (TILES * 32) + (warp * 32)[:, None] + tl.arange(0, 16)[None, :]
    # where the rows of up begin, behind those of the gate
    up, up_scale = tl.cast(n // 16, tl.int64) * (TILES * 1024), n * (TILES * 2)
    quarter = tl.arange(0, 32)  # of a thread's 32 inputs 8 follow each other, 16 and 64 on the next ones do
    x_row = tl.minimum(lane_row, num_rows - 1) * x_stride
    x_at = x + x_row[:, None, None] + (warp * 128)[None, :, None] + (quarter // 8 * 16 + quarter % 8)[None, None, :]
    total = tl.zeros([WARPS, 16, 8], tl.float32)
    gated = tl.zeros([WARPS, 16, 8], tl.float32)
    asked = ()
    asked_up = ()
    for turn in tl.static_range(AHEAD):
        asked = asked + (_ask(at, scale_at, turn, TILES, WARPS),)
        if IS_GATED:
            asked_up = asked_up + (_ask(at + up, scale_at + up_scale, turn, TILES, WARPS),)
    if CHAINED:
        tl.extra.cuda.gdc_wait()
    for turn in tl.static_range(turns if IS_UNROLLED else AHEAD):
        if IS_UNROLLED and turn + AHEAD < turns:
            asked = asked + (_ask(at, scale_at, turn + AHEAD, TILES, WARPS),)
            if IS_GATED:
                more = _ask(at + up, scale_at + up_scale, turn + AHEAD, TILES, WARPS)
                asked_up = asked_up + (more,)
        rows = _rows(x_at, turn, TILES, WARPS)
        sums = _sums(asked[turn][0], rows, WARPS, HAS_ASM)
        total += _product(asked[turn], rows, sums, WARPS, HAS_ASM)
        if IS_GATED:
            gated += _product(asked_up[turn], rows, sums, WARPS, HAS_ASM)
    if not IS_UNROLLED:
        for turn in tl.range(AHEAD, turns, num_stages=1):
            rows = _rows(x_at, turn, TILES, WARPS)
            tile = _ask(at, scale_at, turn, TILES, WARPS)
            sums = _sums(tile[0], rows, WARPS, HAS_ASM)
            total += _product(tile, rows, sums, WARPS, HAS_ASM)
            if IS_GATED:
                tile = _ask(at + up, scale_at + up_scale, turn, TILES, WARPS)
                gated += _product(tile, rows, sums, WARPS, HAS_ASM)
    y = tl.sum(total, axis=0)
    columns = stripe * 16 + tl.arange(0, 16)
    if HAS_BIAS:
        y += tl.load(bias + columns).to(tl.float32)[:, None]
    if IS_GATED:
        z = tl.sum(gated, axis=0)
        if HAS_BIAS:
            z += tl.load(bias + n + columns).to(tl.float32)[:, None]
        y = y / (1.0 + tl.exp(-y)) * z
    out_row = tl.arange(0, 8)
    at_out = out + out_row[None, :].to(tl.int64) * n + columns[:, None]
    tl.store(at_out, y.to(out.dtype.element_ty), mask=(out_row < num_rows)[None, :])


@jit()
def _ask(at: tl.tensor, scale_at: tl.tensor, turn: tl.tensor, TILES: tl.constexpr, WARPS: tl.constexpr) -> tl.tensor:
    """A turn's tiles: codes of outputs 0 to 7 and 8 to 15, scales, offsets. Past the end the last again."""
    if TILES % WARPS != 0:  # its warps then multiply rows of zeros
        warp = tl.arange(0, WARPS)
        tile = tl.minimum(turn * WARPS + warp, TILES - 1) - warp
        at += (tile * 1024)[None, :, None]
        scale_at += (tile * 32)[:, None]
    else:
        at += turn * (WARPS * 1024)
        scale_at += turn * (WARPS * 32)
    return tl.load(at), tl.load(at + 512), tl.load(scale_at), tl.load(scale_at + 16)


@jit()
def _product(
    tile: tl.tensor, rows: tl.tensor, sums: tl.tensor, WARPS: tl.constexpr, HAS_ASM: tl.constexpr
) -> tl.tensor:
    """``[WARPS, 16, 8]``: sum(x (q s + o)) = s sum(x (q + b)) + (o - b s) sum(x), as in packed_tiles.py."""
    first, second, s, o = tile
    dtype: tl.constexpr = rows.dtype
    BIAS: tl.constexpr = 128.0 if dtype == tl.bfloat16 else 1024.0
    s, o = s.to(tl.float32)[:, :, None], o.to(tl.float32)[:, :, None]
    low, high, _ = nibbles(first, dtype, BIAS, HAS_ASM)
    low_second, high_second, _ = nibbles(second, dtype, BIAS, HAS_ASM)
    part = tl.dot(_weights(low, low_second, high, high_second, WARPS), rows)
    return part * s + sums * (o - BIAS * s)


@jit()
def _sums(codes: tl.tensor, rows: tl.tensor, WARPS: tl.constexpr, HAS_ASM: tl.constexpr) -> tl.tensor:
    """The sum of each row over a tile's inputs, at all its outputs: a product with ones that have the codes' layout."""
    _, _, ones = nibbles(codes, rows.dtype, 0.0, HAS_ASM)
    return tl.dot(_weights(ones, ones, ones, ones, WARPS), rows)


@jit()
def _weights(
    low: tl.tensor, low_second: tl.tensor, high: tl.tensor, high_second: tl.tensor, WARPS: tl.constexpr
) -> tl.tensor:
    """Four ``[8, WARPS, 64]`` (outputs 0 to 7 and 8 to 15, inputs 0 to 63 and 64 to 127) as ``[WARPS, 16, 128]``."""
    joined = tl.join(tl.join(low, low_second), tl.join(high, high_second))
    parts = tl.reshape(joined, [8, WARPS, 4, 2, 2, 2, 2, 2, 2])
    return tl.reshape(tl.permute(parts, [1, 7, 0, 8, 5, 2, 3, 4, 6]), [WARPS, 16, 128])


@jit()
def _rows(at: tl.tensor, turn: tl.tensor, TILES: tl.constexpr, WARPS: tl.constexpr) -> tl.tensor:
    """``[WARPS, 128, 8]`` of x, its inputs in the order of :func:`_weights`; zeros past the end."""
    is_tile = (turn * WARPS + tl.arange(0, WARPS) < TILES)[None, :, None]
    at += turn * (WARPS * 128)
    low = tl.join(tl.load(at, is_tile, 0.0), tl.load(at + 8, is_tile, 0.0))
    high = tl.join(tl.load(at + 64, is_tile, 0.0), tl.load(at + 72, is_tile, 0.0))
    parts = tl.reshape(tl.join(low, high), [8, WARPS, 4, 2, 2, 2, 2, 2])
    return tl.reshape(tl.permute(parts, [1, 7, 4, 2, 6, 3, 5, 0]), [WARPS, 128, 8])
