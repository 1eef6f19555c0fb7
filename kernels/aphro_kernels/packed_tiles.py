"""Tiles of quantised weights times tiles of rows, for the kernels of few rows and of experts: [columns, rows].

A weight is code * scale (+ offset), with a scale for each ``GROUP`` inputs of a row (0: for the whole row; then the
caller multiplies with it in the end). Two int4 codes stand in a byte, the low one for an input of the first half of its
group, the high one for that of the second: rows are read in order for either. IS_TILED: int4 in the order of
tile_linear.py.
"""
# ruff: noqa: N803, N806  (constants in capitals; a kernel is one piece)

from __future__ import annotations

from aphro_kernels.language import jit, tl


@jit()
def multiply_packed(
    x: tl.tensor,
    x_rows: tl.tensor,
    is_row: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    offsets: tl.tensor,
    columns: tl.tensor,
    is_column: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    k: tl.tensor,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
    IS_EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    IS_TILED: tl.constexpr,
    HAS_ASM: tl.constexpr,
) -> tl.tensor:
    """``[BN, ROWS]`` float32: inputs ``low * BK`` to ``high * BK`` of the matrix rows ``columns`` [BN] int64, with the
    rows of ``x`` that begin at ``x_rows`` [ROWS]. IS_EVEN: no input and no column is beyond.

    One row is multiplied and summed (not int4), more take the tensor cores: there a tile's inputs are SPLIT stretches,
    each within a group, for as many warps, whose sums are added in the end.
    """
    if KIND == "int4":
        return _multiply_int4(
            x, x_rows, is_row, codes, scales, offsets, columns, is_column, low, high, k, GROUP, ROWS, BN, BK, SPLIT,
            IS_EVEN, STAGES, IS_TILED, HAS_ASM,
        )  # fmt: skip
    elif ROWS == 1:
        return _multiply_row(
            x, codes, scales, columns, is_column, low, high, k, KIND, GROUP, BN, BK, IS_EVEN, STAGES
        )  # fmt: skip
    else:
        return _multiply_bytes(
            x, x_rows, is_row, codes, scales, columns, is_column, low, high, k, KIND, GROUP, ROWS, BN, BK, SPLIT,
            IS_EVEN, STAGES, HAS_ASM,
        )  # fmt: skip


@jit()
def _multiply_row(
    x: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    columns: tl.tensor,
    is_column: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    k: tl.tensor,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    IS_EVEN: tl.constexpr,
    STAGES: tl.constexpr,
) -> tl.tensor:
    # a thread's 16 codes, which follow each other, are of one group: their sum takes the scale
    RUN: tl.constexpr = 16 if GROUP > 0 else 1
    total = tl.zeros([BN, BK // RUN], tl.float32)
    at = codes + columns[:, None] * k
    runs = tl.arange(0, BK // RUN) * RUN
    scale_at = scales + columns[:, None] * (k // GROUP if GROUP > 0 else 1)
    if GROUP > 0:
        next_scale = _scales_of_runs(scale_at, low, high, runs, is_column, k, GROUP, BK)
    for chunk in tl.range(low, high, num_stages=STAGES):
        inputs = chunk * BK + tl.arange(0, BK)
        if IS_EVEN:
            q = tl.load(at + inputs[None, :])
            row = tl.load(x + inputs)
        else:
            q = tl.load(at + inputs[None, :], mask=is_column[:, None] & (inputs < k)[None, :], other=0)
            row = tl.load(x + inputs, mask=inputs < k, other=0.0)
        product = _as_float32(q, KIND) * row.to(tl.float32)[None, :]
        if GROUP > 0:
            s = next_scale.to(tl.float32)
            next_scale = _scales_of_runs(scale_at, chunk + 1, high, runs, is_column, k, GROUP, BK)
            total += tl.sum(tl.reshape(product, [BN, BK // RUN, RUN]), axis=2) * s
        else:
            total += product
    return tl.sum(total, axis=1, keep_dims=True)


@jit()
def _scales_of_runs(
    at: tl.tensor,
    chunk: tl.tensor,
    high: tl.tensor,
    runs: tl.tensor,
    is_column: tl.tensor,
    k: tl.tensor,
    GROUP: tl.constexpr,
    BK: tl.constexpr,
) -> tl.tensor:
    """``[BN, BK / 16]`` of a tile, asked for one tile ahead."""
    starts = chunk * BK + runs
    mask = is_column[:, None] & (starts < tl.minimum(k, high * BK))[None, :]
    return tl.load(at + (starts // GROUP)[None, :], mask=mask, other=0.0)


@jit()
def _multiply_bytes(
    x: tl.tensor,
    x_rows: tl.tensor,
    is_row: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    columns: tl.tensor,
    is_column: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    k: tl.tensor,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
    IS_EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_ASM: tl.constexpr,
) -> tl.tensor:
    total = tl.zeros([SPLIT, BN, ROWS], tl.float32)
    EACH: tl.constexpr = BK // SPLIT
    starts = tl.arange(0, SPLIT) * EACH
    inputs = starts[:, None] + tl.arange(0, EACH)[None, :]
    at = codes + columns[None, :, None] * k + inputs[:, None, :]
    x_at = x + x_rows[None, None, :] + inputs[:, :, None]
    if GROUP > 0:
        scale_at = scales + columns[None, :] * (k // GROUP)
        next_scale = _scales_of(scale_at, low, high, is_column, k, GROUP, BK, SPLIT, 1)
    for chunk in tl.range(low, high, num_stages=STAGES):
        if GROUP > 0:
            s = next_scale
            next_scale = _scales_of(scale_at, chunk + 1, high, is_column, k, GROUP, BK, SPLIT, 1)
        start = chunk * BK
        is_input = start + inputs < k
        if IS_EVEN:
            q = tl.load(at + start)
        else:
            q = tl.load(at + start, mask=is_column[None, :, None] & is_input[:, None, :], other=0)
        tile = tl.load(x_at + start, mask=is_row[None, None, :] & is_input[:, :, None], other=0.0)
        if KIND == "fp8" and x.dtype.element_ty == tl.bfloat16 and ROWS <= 8:
            # float16 is what an instruction makes of two codes; few rows are scaled into its range
            tile, size = _as_float16(tile)
            part = tl.dot(q.to(tl.float8e4nv, bitcast=True).to(tl.float16), tile)
            if GROUP > 0:
                size = size * s
            total += part * size
        else:
            w = _as_floats(q, x.dtype.element_ty, KIND, HAS_ASM)
            if GROUP > 0:
                total += tl.dot(w, tile) * s
            else:
                total = tl.dot(w, tile, total)
    return tl.sum(total, axis=0)


@jit()
def _multiply_int4(
    x: tl.tensor,
    x_rows: tl.tensor,
    is_row: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    offsets: tl.tensor,
    columns: tl.tensor,
    is_column: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    k: tl.tensor,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
    IS_EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    IS_TILED: tl.constexpr,
    HAS_ASM: tl.constexpr,
) -> tl.tensor:
    """sum(x (q s + o)) = s sum(x (q + b)) + (o - b s) sum(x): b makes codes of 16-bit floats by their bits alone."""
    total = tl.zeros([SPLIT, BN, ROWS], tl.float32)
    EACH: tl.constexpr = BK // SPLIT
    HALF: tl.constexpr = EACH // 2
    dtype: tl.constexpr = x.dtype.element_ty
    BIAS: tl.constexpr = 128.0 if dtype == tl.bfloat16 else 1024.0
    splits = tl.arange(0, SPLIT)
    bytes_ = splits[:, None] * HALF + tl.arange(0, HALF)[None, :]
    at = codes + columns[None, :, None] * (k // 2) + bytes_[:, None, :]
    scale_at = columns[None, :] * (k // GROUP)
    STEP: tl.constexpr = BK * 8 if IS_TILED else BK // 2  # bytes
    BETWEEN: tl.constexpr = 32 if IS_TILED else 1  # scales of a row
    if IS_TILED:  # GROUP and EACH are the 128 inputs of a tile
        at = codes + (columns // 16 * (k // 128) * 1024 + columns % 16 * 64)[None, :, None]
        at += (splits[:, None] * 1024 + tl.arange(0, HALF)[None, :])[:, None, :]
        scale_at = (columns // 16 * (k // 128) * 32 + columns % 16)[None, :]
    next_scale = _scales_of(scales + scale_at, low, high, is_column, k, GROUP, BK, SPLIT, BETWEEN)
    next_offset = _scales_of(offsets + scale_at, low, high, is_column, k, GROUP, BK, SPLIT, BETWEEN)
    for chunk in tl.range(low, high, num_stages=STAGES):
        s, o = next_scale, next_offset
        next_scale = _scales_of(scales + scale_at, chunk + 1, high, is_column, k, GROUP, BK, SPLIT, BETWEEN)
        next_offset = _scales_of(offsets + scale_at, chunk + 1, high, is_column, k, GROUP, BK, SPLIT, BETWEEN)
        start = chunk * BK
        groups = (start + splits * EACH) // GROUP
        inputs = groups[:, None] * (GROUP // 2) + start // 2 + bytes_
        is_split = start + splits * EACH < k
        if IS_EVEN:
            q = tl.load(at + chunk * STEP)
        else:
            q = tl.load(at + chunk * STEP, mask=is_column[None, :, None] & is_split[:, None, None], other=0)
        x_at = x + x_rows[None, None, :] + inputs[:, :, None]
        is_inside = is_row[None, None, :] & is_split[:, None, None]
        first = tl.load(x_at, mask=is_inside, other=0.0)
        second = tl.load(x_at + GROUP // 2, mask=is_inside, other=0.0)
        q_first, q_second, ones = nibbles(q, dtype, BIAS, HAS_ASM)
        part = tl.dot(q_second, second, tl.dot(q_first, first))
        sums = tl.dot(ones, second, tl.dot(ones, first))
        total += part * s + sums * (o - BIAS * s)
    return tl.sum(total, axis=0)


@jit()
def _scales_of(
    at: tl.tensor,
    chunk: tl.tensor,
    high: tl.tensor,
    is_column: tl.tensor,
    k: tl.tensor,
    GROUP: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
    BETWEEN: tl.constexpr,
) -> tl.tensor:
    """``[SPLIT, BN, 1]`` of a tile's stretches. Asked for one tile ahead: only loads of products are pipelined."""
    starts = chunk * BK + tl.arange(0, SPLIT) * (BK // SPLIT)
    mask = is_column[None, :] & (starts < tl.minimum(k, high * BK))[:, None]
    return tl.load(at + (starts // GROUP * BETWEEN)[:, None], mask=mask, other=0.0).to(tl.float32)[:, :, None]


@jit()
def nibbles(q: tl.tensor, dtype: tl.constexpr, BIAS: tl.constexpr, HAS_ASM: tl.constexpr) -> tl.tensor:
    """The low and the high codes of bytes, plus BIAS: a code is the low byte of a float whose unit it is."""
    if HAS_ASM:
        if dtype == tl.bfloat16:
            low, high, ones = tl.inline_asm_elementwise(
                "{ .reg .b32 a, b; and.b32 a, $6, 0x0F0F0F0F; shr.b32 b, $6, 4; and.b32 b, b, 0x0F0F0F0F;"
                " prmt.b32 $0, a, 0x43434343, 0x4140; prmt.b32 $1, a, 0x43434343, 0x4342;"
                " prmt.b32 $2, b, 0x43434343, 0x4140; prmt.b32 $3, b, 0x43434343, 0x4342;"
                " mov.b32 $4, 0x3F803F80; mov.b32 $5, 0x3F803F80; }",
                "=r,=r,=r,=r,=r,=r,r",
                [q],
                dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16),
                is_pure=True,
                pack=4,
            )
        else:
            low, high, ones = tl.inline_asm_elementwise(
                "{ .reg .b32 a, b; and.b32 a, $6, 0x0F0F0F0F; shr.b32 b, $6, 4; and.b32 b, b, 0x0F0F0F0F;"
                " prmt.b32 $0, a, 0x64646464, 0x4140; prmt.b32 $1, a, 0x64646464, 0x4342;"
                " prmt.b32 $2, b, 0x64646464, 0x4140; prmt.b32 $3, b, 0x64646464, 0x4342;"
                " mov.b32 $4, 0x3C003C00; mov.b32 $5, 0x3C003C00; }",
                "=r,=r,=r,=r,=r,=r,r",
                [q],
                dtype=(tl.float16, tl.float16, tl.float16),
                is_pure=True,
                pack=4,
            )
        return low, high, ones
    else:
        low, high = (q & 15).to(tl.float32) + BIAS, (q >> 4).to(tl.float32) + BIAS
        return low.to(dtype), high.to(dtype), tl.full(q.shape, 1.0, dtype)


@jit()
def _as_float16(tile: tl.tensor) -> tl.tensor:
    """``[SPLIT, EACH, ROWS]`` bfloat16 as float16 times the size ``[SPLIT, 1, ROWS]`` of its largest, a power of two:
    exact down to 2**-14 of that."""
    wide = tile.to(tl.float32)
    peak = tl.max(tl.abs(wide), axis=1, keep_dims=True).to(tl.int32, bitcast=True)
    exponent = tl.minimum(peak & 0x7F800000, 253 << 23)  # infinity stays what it is
    scaled = wide * ((254 << 23) - exponent).to(tl.float32, bitcast=True)
    return scaled.to(tl.float16), exponent.to(tl.float32, bitcast=True)


@jit()
def _as_floats(q: tl.tensor, dtype: tl.constexpr, KIND: tl.constexpr, HAS_ASM: tl.constexpr) -> tl.tensor:
    """Codes of 8 bits as 16-bit floats."""
    if KIND == "int8":
        return q.to(dtype)
    elif HAS_ASM and dtype == tl.bfloat16:
        # its bits in a bfloat16, whose exponent counts from 127 instead of 7; the library's way is by float32
        return tl.inline_asm_elementwise(
            "{ .reg .b32 a, b, c, d, e, f; mov.b32 e, 0x7B807B80; mov.b32 f, 0x80008000;"
            " prmt.b32 a, $2, 0, 0x1404; prmt.b32 b, $2, 0, 0x3424;"
            " shr.b32 c, a, 4; shr.b32 d, b, 4; and.b32 c, c, 0x07F007F0; and.b32 d, d, 0x07F007F0;"
            " lop3.b32 a, a, 0x80008000, c, 0xEA; lop3.b32 b, b, 0x80008000, d, 0xEA;"
            " fma.rn.bf16x2 $0, a, e, f; fma.rn.bf16x2 $1, b, e, f; }",
            "=r,=r,r",
            [q],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=4,
        )
    else:
        return q.to(tl.float8e4nv, bitcast=True).to(dtype)


@jit()
def _as_float32(q: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    if KIND == "int8":
        return q.to(tl.float32)
    else:
        return q.to(tl.float8e4nv, bitcast=True).to(tl.float16).to(tl.float32)
