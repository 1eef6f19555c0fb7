"""Tiles of quantised weights times rows that are split into float8 numbers (split_rows.py), by the tensor cores.

The weights are the long side of the product, the rows' two numbers stand beside each other on the short one. float8
weights are multiplied as they are. A 4-bit code in a byte is a float8 number, whose unit is 2**-9. The tensor cores sum
float8 products to some 14 bits: what comes of 128 inputs is added in float32.
"""
# ruff: noqa: N803  (constants in capitals; a kernel is one piece)

from __future__ import annotations

from aphro_kernels.language import jit, tl


@jit()
def multiply_float8(
    x_at: tl.tensor,
    sum_at: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    matrix_rows: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    k: tl.tensor,
    ROWS: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ASM: tl.constexpr,
) -> tl.tensor:
    """``[BN, ROWS]`` float32 without the scales of rows: inputs ``low * 128`` to ``high * 128`` of the rows of W that
    ``matrix_rows`` [BN] int64 names. ``x_at`` [1, 2 ROWS] are the addresses of all rows' first numbers, then of their
    second ones, ``sum_at`` [2 ROWS] those of their sums. KIND "fp8": in rows, a scale for each GROUP inputs or (0) a
    row; "int4": in tiles (tile_linear.py)."""
    chunks = k // 128
    piece = tl.arange(0, 2 * ROWS)
    total = tl.zeros([BN, 2 * ROWS], tl.float32)
    if KIND == "fp8":
        inputs = tl.arange(0, 128)
        code_at = codes + matrix_rows[:, None] * k + inputs[None, :]
        if GROUP > 0:
            scale_at = scales + matrix_rows * (k // GROUP)
            next_scale = tl.load(scale_at + low * 128 // GROUP)
        for chunk in tl.range(low, high, num_stages=STAGES):
            w = tl.load(code_at + chunk * 128)
            tile = tl.load(x_at + (chunk * 128 + inputs)[:, None])
            if GROUP > 0:
                s = next_scale.to(tl.float32)
                next_scale = tl.load(scale_at + tl.minimum(chunk + 1, high - 1) * 128 // GROUP)
                total += tl.dot(w, tile) * s[:, None]
            else:
                total += tl.dot(w, tile)
    else:
        inputs = tl.arange(0, 64)
        code_at = codes + (matrix_rows // 16 * chunks * 1024 + matrix_rows % 16 * 64)[:, None] + inputs[None, :]
        pair_at = scales + matrix_rows // 16 * chunks * 32 + matrix_rows % 16
        next_scale = tl.load(pair_at + low * 32)
        next_offset = tl.load(pair_at + low * 32 + 16)
        for chunk in tl.range(low, high, num_stages=STAGES):
            q = tl.load(code_at + chunk * 1024)
            first = tl.load(x_at + (chunk * 128 + inputs)[:, None])
            second = tl.load(x_at + (chunk * 128 + 64 + inputs)[:, None])
            s, o = next_scale.to(tl.float32) * 512.0, next_offset.to(tl.float32)
            next_at = pair_at + tl.minimum(chunk + 1, high - 1) * 32  # one chunk ahead: only tiles are pipelined
            next_scale, next_offset = tl.load(next_at), tl.load(next_at + 16)
            sum_ = tl.load(sum_at + chunk, mask=piece < ROWS, other=0.0)
            w, w_second = _as_float8(q, HAS_ASM)
            part = tl.dot(w_second, second, tl.dot(w, first))
            total += part * s[:, None]
            total += sum_[None, :] * o[:, None]
    upper, lower = tl.split(tl.permute(tl.reshape(total, [BN, 2, ROWS]), (0, 2, 1)))
    return upper + lower * 0.0625


@jit()
def _as_float8(q: tl.tensor, HAS_ASM: tl.constexpr) -> tl.tensor:
    """The low and the high codes of bytes, in units of 2**-9: 0 to 7 are subnormal, 8 to 15 have the next exponent."""
    if HAS_ASM:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 a; and.b32 $0, $2, 0x0F0F0F0F; shr.b32 a, $2, 4; and.b32 $1, a, 0x0F0F0F0F; }",
            "=r,=r,r",
            [q],
            dtype=(tl.float8e4nv, tl.float8e4nv),
            is_pure=True,
            pack=4,
        )
    else:
        return (q & 15).to(tl.float8e4nv, bitcast=True), (q >> 4).to(tl.float8e4nv, bitcast=True)
