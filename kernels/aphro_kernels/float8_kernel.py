"""The kernel of float8_linear.py: quantised weights times rows that are split into float8 numbers.

The weights are the long side of the tensor core's product, the rows' two numbers stand beside each other on the short
one. float8 weights are multiplied as they are. A 4-bit code in a byte is a float8 number, whose unit is 2**-9. The
tensor cores sum float8 products to some 14 bits: what comes of 128 inputs is added in float32.
"""
# ruff: noqa: N803, N806, PLR0912, PLR0915  (constants in capitals; a kernel is one piece)

from __future__ import annotations

from aphro_kernels.language import jit, tl


@jit(do_not_specialize=["num_rows"])
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
    ROWS: tl.constexpr,
    BN: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    IS_GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ASM: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    """``out`` [num_rows, n] = x W^T (+ bias); with IS_GATED W has 2 n rows, gate before up, and ``out`` = SiLU(gate) *
    up. A program has ``BN`` rows of W (gated: half of them each), ROWS of x and one of SPLITS stretches of the inputs.
    KIND "fp8": in rows, a scale for each 128 inputs or (GROUP 0) a row; "int4": in tiles (tile_linear.py)."""
    tiles = tl.cdiv(num_rows, ROWS)
    program = tl.program_id(0)
    row_tile = program % tiles  # neighbours read the same weights
    split = program // tiles % SPLITS
    stripe = program // tiles // SPLITS
    chunks = k // 128
    low = split * chunks // SPLITS
    high = (split + 1) * chunks // SPLITS
    WIDTH: tl.constexpr = BN // 2 if IS_GATED else BN
    lines = tl.arange(0, BN)
    column = tl.minimum(stripe * WIDTH + lines % WIDTH, n - 1)
    matrix_rows = (column + lines // WIDTH * n).to(tl.int64)
    if CHAINED:
        tl.extra.cuda.gdc_wait()

    PIECES: tl.constexpr = 2 * ROWS
    piece = tl.arange(0, PIECES)
    row = tl.minimum(row_tile * ROWS + piece % ROWS, num_rows - 1)
    x_at = pieces + (piece // ROWS * num_rows + row).to(tl.int64)[None, :] * k
    total = tl.zeros([BN, PIECES], tl.float32)
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
        sum_at = sums + row * chunks
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
    if CHAINED:
        tl.extra.cuda.gdc_launch_dependents()
    both = tl.permute(tl.reshape(total, [BN, 2, ROWS]), (0, 2, 1))
    upper, lower = tl.split(both)
    y = upper + lower * 0.0625
    is_done = True
    if SPLITS > 1:
        at = lines[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
        place = stripe * tiles + row_tile
        mine = parts + place * SPLITS * (BN * ROWS) + at
        tl.store(mine + split * (BN * ROWS), y)
        tl.debug_barrier()  # all threads have stored before one of them says so
        is_done = tl.atomic_add(arrivals + place, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
        if is_done:
            tl.debug_barrier()
            y = tl.zeros([BN, ROWS], tl.float32)
            for index in range(SPLITS):  # in their order, past the first-level cache
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
