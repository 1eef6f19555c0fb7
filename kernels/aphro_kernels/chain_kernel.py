"""Output projection, MLP and the next layer's QKV of a few rows in one launch: weights stream without a pause.

    x += attended Wo^T;  x += (SiLU(g) * u) Wd^T with (g, u) = norm(x) Wgu^T;  qkv = next_norm(x) Wqkv^T + bias

One program a multiprocessor. One warp copies its stripes of all weights, in the order of their use, into a ring in
shared memory: memory never waits for the steps of the chain. A second warp copies the rows, which the first phase finds
ready and the others when all programs have finished the phase before. Four warps multiply: rows are the 64 of the
tensor core's tile, of which those past ROWS are whatever stands in shared memory; each row's result is its own.

A norm is no phase: what is written of x is also written times the next gain, each program adds up its columns' squares,
and the scale of a row, one number, is multiplied in behind the product.
"""
# ruff: noqa: N803, N806  (constants in capitals; of a kernel)

from __future__ import annotations

from aphro_kernels.chain_events import EVENTS
from aphro_kernels.chain_loads import stream_rows, stream_weights
from aphro_kernels.chain_phases import multiply_all, sum_squares
from aphro_kernels.hopper import gl, hopper, jit
from aphro_kernels.language import tl


@jit(do_not_specialize=["num_rows", "eps"])
def chain_kernel(
    attended: tl.tensor,
    scaled: tl.tensor,
    inner: tl.tensor,
    out_weight: tl.tensor,
    gate_up: tl.tensor,
    down: tl.tensor,
    qkv_weight: tl.tensor,
    x: tl.tensor,
    gain: tl.tensor,
    next_gain: tl.tensor,
    bias: tl.tensor,
    scaled_at: tl.tensor,
    inner_at: tl.tensor,
    qkv: tl.tensor,
    parts: tl.tensor,
    arrivals: tl.tensor,
    num_rows: tl.tensor,
    eps: tl.tensor,
    ATTENDED: gl.constexpr,
    HIDDEN: gl.constexpr,
    INNER: gl.constexpr,
    QKV: gl.constexpr,
    COLUMNS: gl.constexpr,
    INNER_COLUMNS: gl.constexpr,
    QKV_COLUMNS: gl.constexpr,
    PAD: gl.constexpr,
    INNER_PAD: gl.constexpr,
    QKV_PAD: gl.constexpr,
    ROWS: gl.constexpr,
    CHUNKS: gl.constexpr,
    STAGES: gl.constexpr,
    SLOTS: gl.constexpr,
    SLOT_ROWS: gl.constexpr,
    PARTS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    CHAINED: gl.constexpr,
) -> None:
    """QKV = 0: the chain ends with x. A stage holds CHUNKS times 64 inputs of the rows, a slot SLOT_ROWS times 64
    weights. ``parts`` [ROWS, PARTS] float32, ``arrivals`` one int64."""
    SHARED: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    BARRIER: gl.constexpr = hopper.mbarrier.MBarrierLayout()
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    dtype: gl.constexpr = attended.dtype
    BEHIND: gl.constexpr = (64 + ROWS - 1) // ROWS  # what a tile of 64 rows reads past the last rows
    tiles = gl.allocate_shared_memory(dtype, [STAGES * CHUNKS + BEHIND - 1, ROWS, 64], SHARED)
    slots = gl.allocate_shared_memory(dtype, [SLOTS, SLOT_ROWS, 64], SHARED)
    scales = gl.allocate_shared_memory(gl.float32, [64], FLAT)
    rows_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    rows_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BARRIER)
    events = gl.allocate_shared_memory(gl.int64, [EVENTS, 1], BARRIER)
    halves = gl.allocate_shared_memory(gl.float32, [64 * (QKV_PAD if QKV_PAD > PAD else PAD)], FLAT)
    for stage in gl.static_range(STAGES):
        hopper.mbarrier.init(rows_full.index(stage), count=1)
        hopper.mbarrier.init(rows_empty.index(stage), count=2)
    for slot in gl.static_range(SLOTS):
        hopper.mbarrier.init(full.index(slot), count=1)
        hopper.mbarrier.init(empty.index(slot), count=1)
    for i in gl.static_range(EVENTS):
        hopper.mbarrier.init(events.index(i), count=1)
    hopper.fence_async_shared()
    gl.warp_specialize(
        [
            (
                multiply_all,
                (
                    0, x, gain, next_gain, bias, scaled_at, inner_at, qkv, parts, arrivals, num_rows, tiles, slots,
                    scales, halves, rows_full, rows_empty, full, empty, events,
                    ATTENDED, HIDDEN, INNER, QKV, COLUMNS, INNER_COLUMNS, QKV_COLUMNS, PAD, INNER_PAD, QKV_PAD, CHUNKS,
                    STAGES, PARTS, HAS_BIAS, CHAINED,
                ),
            ),
            (
                multiply_all,
                (
                    1, x, gain, next_gain, bias, scaled_at, inner_at, qkv, parts, arrivals, num_rows, tiles, slots,
                    scales, halves, rows_full, rows_empty, full, empty, events,
                    ATTENDED, HIDDEN, INNER, QKV, COLUMNS, INNER_COLUMNS, QKV_COLUMNS, PAD, INNER_PAD, QKV_PAD, CHUNKS,
                    STAGES, PARTS, HAS_BIAS, CHAINED,
                ),
            ),
            (
                stream_weights,
                (
                    out_weight, gate_up, down, qkv_weight, slots, full, empty, ATTENDED, HIDDEN, INNER, QKV, COLUMNS,
                    INNER_COLUMNS, QKV_COLUMNS, PAD, INNER_PAD, QKV_PAD, CHUNKS,
                ),
            ),
            (
                stream_rows,
                (
                    attended, scaled, inner, arrivals, tiles, rows_full, rows_empty, events, ATTENDED, HIDDEN,
                    INNER, QKV, COLUMNS, INNER_COLUMNS, QKV_COLUMNS, CHUNKS, STAGES, CHAINED,
                ),
            ),
            (
                sum_squares,
                (
                    parts, scales, events, eps, HIDDEN, COLUMNS, PARTS, ROWS,
                    2 if QKV > 0 else 1,
                ),
            ),
        ],
        [4, 1, 1, 1],
        [184, 104, 104, 104],
    )  # fmt: skip
