"""One row through a layer behind its attention, up to the next QKV, in one launch over quantised weights (Hopper).

    x += attended Wo^T;  x += (SiLU(g) * u) Wd^T with (g, u) = norm(x) Wgu^T;  qkv = next_norm(x) Wqkv^T + bias

One program a multiprocessor. One warp copies its stripes of all weights, in the order of their use, into a ring in
shared memory, as in chain_kernel.py: memory never waits for the steps of the chain. Eight warps multiply and sum. The
row of a phase is read by every program as soon as all have finished the phase before; a norm's gain is multiplied in
then, its scale, one number, behind the product.
"""
# ruff: noqa: N803, N806  (constants in capitals; of a kernel)

from __future__ import annotations

from aphro_kernels.hopper import gl, hopper, jit
from aphro_kernels.language import tl
from aphro_kernels.packed_chain_loads import open_phases, stream_all
from aphro_kernels.packed_chain_phases import multiply_all


@jit(do_not_specialize=["eps"])
def packed_chain_kernel(
    attended: tl.tensor,
    x: tl.tensor,
    gain: tl.tensor,
    next_gain: tl.tensor,
    bias: tl.tensor,
    inner: tl.tensor,
    qkv: tl.tensor,
    arrivals: tl.tensor,
    eps: tl.tensor,
    out_codes: tl.tensor,
    gate_up_codes: tl.tensor,
    down_codes: tl.tensor,
    qkv_codes: tl.tensor,
    out_scales: tl.tensor,
    gate_up_scales: tl.tensor,
    down_scales: tl.tensor,
    qkv_scales: tl.tensor,
    ATTENDED: gl.constexpr,
    HIDDEN: gl.constexpr,
    INNER: gl.constexpr,
    QKV: gl.constexpr,
    STRIPES: gl.constexpr,
    QKV_STRIPES: gl.constexpr,
    OUT_GROUP: gl.constexpr,
    GATE_UP_GROUP: gl.constexpr,
    DOWN_GROUP: gl.constexpr,
    QKV_GROUP: gl.constexpr,
    KIND: gl.constexpr,
    SLOTS: gl.constexpr,
    IN_FLIGHT: gl.constexpr,
    TILES: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    CHAINED: gl.constexpr,
) -> None:
    """QKV = 0: the chain ends with x. A program has STRIPES (QKV_STRIPES) times 16 outputs at a time, a slot 16 KiB of
    codes. TILES times 128 inputs of a row find room. ``arrivals`` one int64."""
    BARRIER: gl.constexpr = hopper.mbarrier.MBarrierLayout()
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    IS_INT4: gl.constexpr = KIND == "int4"
    if IS_INT4:
        CODES: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=32, rank=2)
        PAIRS: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=2)
        slots = gl.allocate_shared_memory(gl.int32, [SLOTS, 256, 16], CODES)
        pairs = gl.allocate_shared_memory(gl.bfloat16, [SLOTS, 16, 32], PAIRS)
        row = gl.allocate_shared_memory(gl.int8, [TILES, 256], FLAT)
        sums = gl.allocate_shared_memory(gl.float32, [TILES, 4], FLAT)
    else:
        BYTES: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
        slots = gl.allocate_shared_memory(gl.uint8, [SLOTS, 128, 128], BYTES)
        pairs = slots
        row = gl.allocate_shared_memory(gl.float16, [TILES, 128], FLAT)
        sums = row
    units = gl.allocate_shared_memory(gl.float32, [TILES, 1], FLAT)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BARRIER)
    is_open = gl.allocate_shared_memory(gl.int64, [1, 1], BARRIER)
    for slot in gl.static_range(SLOTS):
        hopper.mbarrier.init(full.index(slot), count=1)
        hopper.mbarrier.init(empty.index(slot), count=1)
    hopper.mbarrier.init(is_open.index(0), count=1)
    hopper.fence_async_shared()
    gl.warp_specialize(
        [
            (
                multiply_all,
                (
                    attended, x, gain, next_gain, bias, inner, qkv, arrivals, eps, out_scales, gate_up_scales,
                    down_scales, qkv_scales, slots, pairs, row, units, sums, full, empty, is_open, ATTENDED, HIDDEN,
                    INNER, QKV, STRIPES, QKV_STRIPES, OUT_GROUP, GATE_UP_GROUP, DOWN_GROUP, QKV_GROUP, KIND, HAS_BIAS,
                    CHAINED,
                ),
            ),
            (
                stream_all,
                (
                    out_codes, gate_up_codes, down_codes, qkv_codes, out_scales, gate_up_scales, down_scales,
                    qkv_scales, slots, pairs, full, empty, ATTENDED, HIDDEN, INNER, QKV, STRIPES, QKV_STRIPES, KIND,
                    IN_FLIGHT,
                ),
            ),
            (open_phases, (arrivals, is_open, QKV, CHAINED)),
        ],
        [1, 1],
        [40, 40],
    )  # fmt: skip
