"""Stripes of quantised weights from the ring of packed_chain_kernel.py times the row in shared memory."""
# ruff: noqa: N803, N806, RUF005  (constants in capitals; of kernels)

from __future__ import annotations

from aphro_kernels.hopper import barrier, gl, hopper, jit, mma_v2
from aphro_kernels.language import tl


@jit()
def product(
    scales: tl.tensor,
    first: tl.tensor,
    up: gl.constexpr,
    slots: tl.tensor,
    pairs: tl.tensor,
    row: tl.tensor,
    units: tl.tensor,
    sums: tl.tensor,
    full: tl.tensor,
    empty: tl.tensor,
    used: tl.tensor,
    K: gl.constexpr,
    STRIPES: gl.constexpr,
    GROUP: gl.constexpr,
    KIND: gl.constexpr,
) -> tl.tensor:
    """A tuple of STRIPES (one or two) times the sums of 16 outputs, and how many slots have been used."""
    if KIND == "int4":
        totals, used = _product_int4(slots, pairs, row, units, sums, full, empty, used, K, STRIPES)
    else:
        totals, used = _product_fp8(scales, first, up, slots, row, units, full, empty, used, K, STRIPES, GROUP)
    return totals, used


@jit()
def _product_int4(
    slots: tl.tensor,
    pairs: tl.tensor,
    row: tl.tensor,
    units: tl.tensor,
    sums: tl.tensor,
    full: tl.tensor,
    empty: tl.tensor,
    used: tl.tensor,
    K: gl.constexpr,
    STRIPES: gl.constexpr,
) -> tl.tensor:
    """sum(x (q s + o)) = s sum(x q) + o sum(x), of 32 inputs a thread and output."""
    SLOTS: gl.constexpr = slots.shape[0]
    TILES: gl.constexpr = row.shape[0]
    FIT: gl.constexpr = 16 // STRIPES
    STEPS: gl.constexpr = (K // 128 + FIT - 1) // FIT
    # tile, output, quarter of the inputs: the warps share out tiles
    PARTS: gl.constexpr = gl.BlockedLayout([1, 1, 1], [1, 8, 4], [8, 1, 1], [2, 1, 0])
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    MORE_CODES: gl.constexpr = [[128, 0]] if FIT == 16 else []
    MORE: gl.constexpr = [[8, 0]] if FIT == 16 else []
    CODES: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [8, 0]] + MORE_CODES,
        [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0], [64, 0]],
        [],
        [FIT * 16, 16],
    )
    PAIRS: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 8], [0, 16]] + MORE,
        [[0, 0], [0, 0], [0, 1], [0, 2], [0, 4]],
        [[1, 0], [2, 0], [4, 0]],
        [],
        [FIT, 32],
    )
    ROW: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 16], [0, 32]] + MORE,
        [[0, 4], [0, 8], [0, 0], [0, 0], [0, 0]],
        [[1, 0], [2, 0], [4, 0]],
        [],
        [FIT, 64],
    )
    OUTPUTS: gl.constexpr = gl.SliceLayout(2, PARTS)
    QUARTERS: gl.constexpr = gl.SliceLayout(1, PARTS)
    words = row._reinterpret(gl.int32, [TILES // FIT, FIT, 64], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    unit_blocks = units._reinterpret(gl.float32, [TILES // FIT, FIT], FLAT)
    sum_blocks = sums._reinterpret(gl.float32, [TILES // FIT, FIT, 4], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    total = gl.zeros([FIT, 16, 4], gl.float32, PARTS)
    second = gl.zeros([FIT, 16, 4], gl.float32, PARTS)
    for step in range(STEPS):
        slot = used % SLOTS
        x = words.index(step).load(ROW)
        unit = unit_blocks.index(step).load(gl.SliceLayout(1, OUTPUTS))
        sum_ = sum_blocks.index(step).load(QUARTERS)
        hopper.mbarrier.wait(full.index(slot), (used // SLOTS) & 1)
        code_boxes = slots.index(slot)._reinterpret(gl.int32, [STRIPES, FIT * 16, 16], slots.layout)
        pair_boxes = pairs.index(slot)._reinterpret(gl.bfloat16, [STRIPES, FIT, 32], pairs.layout)
        codes = code_boxes.index(0).load(CODES)
        pair = pair_boxes.index(0).load(PAIRS)
        if STRIPES == 2:
            second_codes = code_boxes.index(1).load(CODES)
            second_pair = pair_boxes.index(1).load(PAIRS)
        barrier()
        hopper.mbarrier.arrive(empty.index(slot), count=1)
        total += _parts_int4(codes, pair, x, unit, sum_, PARTS)
        if STRIPES == 2:
            second += _parts_int4(second_codes, second_pair, x, unit, sum_, PARTS)
        used += 1
    return _sum(total, second, STRIPES), used


@jit()
def _parts_int4(
    codes: tl.tensor, pair: tl.tensor, x: tl.tensor, unit: tl.tensor, sum_: tl.tensor, PARTS: gl.constexpr
) -> tl.tensor:
    FIT: gl.constexpr = unit.shape[0]
    OUTPUTS: gl.constexpr = gl.SliceLayout(2, PARTS)
    QUARTERS: gl.constexpr = gl.SliceLayout(1, PARTS)
    w = gl.reshape(codes, [FIT, 16, 4, 2, 2])
    w_even, w_odd = gl.split(w)  # words 0 and 2, 1 and 3
    w0, w2 = gl.split(w_even)
    w1, w3 = gl.split(w_odd)
    # [tile, low or high codes, high or low byte, quarter, word, word]
    rows = gl.permute(gl.reshape(x, [FIT, 2, 2, 4, 2, 2]), (0, 3, 4, 5, 1, 2))
    high, low = gl.split(rows)
    high0, high1 = gl.split(high)  # of the low and of the high codes
    low0, low1 = gl.split(low)
    h00, h01, h02, h03 = _words(high0, QUARTERS)
    h10, h11, h12, h13 = _words(high1, QUARTERS)
    l00, l01, l02, l03 = _words(low0, QUARTERS)
    l10, l11, l12, l13 = _words(low1, QUARTERS)
    dot = gl.inline_asm_elementwise(
        "{ .reg .b32 a, b, h, l;"
        " and.b32 a, $1, 0x0F0F0F0F; shr.b32 b, $1, 4; and.b32 b, b, 0x0F0F0F0F;"
        " dp4a.u32.s32 h, a, $5, 0; dp4a.u32.u32 l, a, $9, 0; dp4a.u32.s32 h, b, $13, h; dp4a.u32.u32 l, b, $17, l;"
        " and.b32 a, $2, 0x0F0F0F0F; shr.b32 b, $2, 4; and.b32 b, b, 0x0F0F0F0F;"
        " dp4a.u32.s32 h, a, $6, h; dp4a.u32.u32 l, a, $10, l; dp4a.u32.s32 h, b, $14, h; dp4a.u32.u32 l, b, $18, l;"
        " and.b32 a, $3, 0x0F0F0F0F; shr.b32 b, $3, 4; and.b32 b, b, 0x0F0F0F0F;"
        " dp4a.u32.s32 h, a, $7, h; dp4a.u32.u32 l, a, $11, l; dp4a.u32.s32 h, b, $15, h; dp4a.u32.u32 l, b, $19, l;"
        " and.b32 a, $4, 0x0F0F0F0F; shr.b32 b, $4, 4; and.b32 b, b, 0x0F0F0F0F;"
        " dp4a.u32.s32 h, a, $8, h; dp4a.u32.u32 l, a, $12, l; dp4a.u32.s32 h, b, $16, h; dp4a.u32.u32 l, b, $20, l;"
        " mad.lo.s32 $0, h, 256, l; }",
        "=r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
        [
            gl.convert_layout(w0, PARTS), gl.convert_layout(w1, PARTS), gl.convert_layout(w2, PARTS),
            gl.convert_layout(w3, PARTS), h00, h01, h02, h03, l00, l01, l02, l03, h10, h11, h12, h13, l10, l11, l12,
            l13,
        ],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )  # fmt: skip
    scale, offset = gl.split(gl.permute(gl.reshape(pair, [FIT, 2, 16]), (0, 2, 1)))
    scale = gl.convert_layout(scale.to(gl.float32), OUTPUTS) * gl.expand_dims(unit, 1)
    offset = gl.convert_layout(offset.to(gl.float32), OUTPUTS)
    return dot.to(gl.float32) * gl.expand_dims(scale, 2) + gl.expand_dims(offset, 2) * gl.expand_dims(sum_, 1)


@jit()
def _words(x: tl.tensor, QUARTERS: gl.constexpr) -> tl.tensor:
    """Of ``[tile, quarter, 2, 2]`` the four words ``[tile, 1, quarter]``."""
    even, odd = gl.split(x)
    first, third = gl.split(even)
    second, fourth = gl.split(odd)
    return (
        gl.expand_dims(gl.convert_layout(first, QUARTERS), 1),
        gl.expand_dims(gl.convert_layout(second, QUARTERS), 1),
        gl.expand_dims(gl.convert_layout(third, QUARTERS), 1),
        gl.expand_dims(gl.convert_layout(fourth, QUARTERS), 1),
    )


@jit()
def _product_fp8(
    scales: tl.tensor,
    first: tl.tensor,
    up: gl.constexpr,
    slots: tl.tensor,
    row: tl.tensor,
    units: tl.tensor,
    full: tl.tensor,
    empty: tl.tensor,
    used: tl.tensor,
    K: gl.constexpr,
    STRIPES: gl.constexpr,
    GROUP: gl.constexpr,
) -> tl.tensor:
    """By the tensor cores, in float16, which is what an instruction makes of two codes: a warp has 128 inputs of 16
    outputs, and multiplies them with the row in all eight columns."""
    TILES: gl.constexpr = row.shape[0]
    STEPS: gl.constexpr = (K // 128 + 7) // 8
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [8, 1, 1], [1, 16, 8])
    OUTPUTS: gl.constexpr = gl.SliceLayout(2, SUMS)
    # four threads share a row of codes, 32 inputs each; which input an operand's place stands for is free
    ROW: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [0, 8], [0, 16]],
        [[0, 32], [0, 64], [0, 0], [0, 0], [0, 0]],
        [[1, 0], [2, 0], [4, 0]],
        [],
        [8, 128],
    )
    rows = row._reinterpret(gl.float16, [TILES // 8, 8, 128], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    unit_blocks = units._reinterpret(gl.float32, [TILES // 8, 8], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    total = gl.zeros([8, 16, 8], gl.float32, SUMS)
    second = gl.zeros([8, 16, 8], gl.float32, SUMS)
    chunk = gl.arange(0, 8, gl.SliceLayout(1, OUTPUTS))[:, None]
    output = gl.arange(0, 16, gl.SliceLayout(0, OUTPUTS))[None, :]
    if GROUP > 0:
        scale_at = scales + (first + output) * (K // GROUP)
        scale = gl.load(scale_at + chunk * 128 // GROUP, mask=chunk * 128 < K, other=0.0)
        second_scale = gl.load(scale_at + (chunk * 128 + up * K) // GROUP, mask=chunk * 128 < K, other=0.0)
    for step in range(STEPS):
        x = _as_operand(gl.reshape(rows.index(step).load(ROW), [8, 2, 2, 8, 2, 2]), SUMS)
        unit = unit_blocks.index(step).load(gl.SliceLayout(1, OUTPUTS))[:, None]
        factor, second_factor = unit, unit
        if GROUP > 0:
            factor = unit * scale.to(gl.float32)
            second_factor = unit * second_scale.to(gl.float32)
            inputs = ((step + 1) * 8 + chunk) * 128
            scale = gl.load(scale_at + inputs // GROUP, mask=inputs < K, other=0.0)
            second_scale = gl.load(scale_at + (inputs + up * K) // GROUP, mask=inputs < K, other=0.0)
        total += _part_fp8(x, slots, full, empty, used, SUMS) * gl.expand_dims(factor, 2)
        used += 1
        if STRIPES == 2:
            second += _part_fp8(x, slots, full, empty, used, SUMS) * gl.expand_dims(second_factor, 2)
            used += 1
    return _sum(total * 0.125, second * 0.125, STRIPES), used


@jit()
def _part_fp8(
    x: tl.tensor, slots: tl.tensor, full: tl.tensor, empty: tl.tensor, used: tl.tensor, SUMS: gl.constexpr
) -> tl.tensor:
    """``[8, 16, 8]``: of a slot."""
    SLOTS: gl.constexpr = slots.shape[0]
    CODES: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [0, 8], [0, 16], [8, 0]],
        [[0, 32], [0, 64], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0], [64, 0]],
        [],
        [128, 128],
    )
    slot = used % SLOTS
    hopper.mbarrier.wait(full.index(slot), (used // SLOTS) & 1)
    codes = slots.index(slot).load(CODES)
    barrier()
    hopper.mbarrier.arrive(empty.index(slot), count=1)
    w = codes.to(gl.float8e4nv, bitcast=True).to(gl.float16)
    w = gl.permute(gl.reshape(w, [8, 16, 2, 2, 8, 2, 2]), (0, 1, 4, 5, 2, 3, 6))
    w = gl.convert_layout(gl.reshape(w, [8, 16, 128]), gl.DotOperandLayout(0, SUMS, 2))
    return mma_v2(w, x, gl.zeros([8, 16, 8], gl.float32, SUMS))


@jit()
def _as_operand(x: tl.tensor, SUMS: gl.constexpr) -> tl.tensor:
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, SUMS, 2)
    x = gl.reshape(gl.permute(x, (0, 3, 4, 1, 2, 5)), [8, 128])
    x = gl.expand_dims(gl.convert_layout(x, gl.SliceLayout(2, RIGHT)), 2)
    return x + gl.zeros([8, 128, 8], gl.float16, RIGHT)


@jit()
def _sum(total: tl.tensor, second: tl.tensor, STRIPES: gl.constexpr) -> tl.tensor:
    """A tuple of ``[16]``: of all parts."""
    if STRIPES == 2:
        return gl.split(gl.sum(gl.sum(gl.join(total, second), axis=2), axis=0))
    else:
        return (gl.sum(gl.sum(total, axis=2), axis=0),)
