"""The multiplying warps of chain_kernel.py from phase to phase, and the warp that makes the scales of norms."""
# ruff: noqa: N803, N806, PLR0912, PLR0915  (constants in capitals; a kernel is one piece)

from __future__ import annotations

from aphro_kernels.chain_events import IS_HALF, IS_OPEN, IS_SCALED, IS_STORED, IS_SUMMED, arrive, fence_async
from aphro_kernels.chain_products import gated_product, product
from aphro_kernels.hopper import barrier, gl, hopper, jit
from aphro_kernels.language import tl


@jit()
def multiply_all(
    GROUP: gl.constexpr,
    x: tl.tensor,
    gain: tl.tensor,
    next_gain: tl.tensor,
    bias: tl.tensor,
    scaled: tl.tensor,
    inner: tl.tensor,
    qkv: tl.tensor,
    parts: tl.tensor,
    arrivals: tl.tensor,
    num_rows: tl.tensor,
    tiles: tl.tensor,
    slots: tl.tensor,
    scales: tl.tensor,
    halves: tl.tensor,
    rows_full: tl.tensor,
    rows_empty: tl.tensor,
    full: tl.tensor,
    empty: tl.tensor,
    events: tl.tensor,
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
    CHUNKS: gl.constexpr,
    STAGES: gl.constexpr,
    PARTS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    CHAINED: gl.constexpr,
) -> None:
    """Four warps of two groups: the phases. Of gate and up each group has columns of its own; of the other products
    each sums half of the inputs, and the first group adds the halves and goes on with them.

    A program's columns of x are the same in the first and the third phase: they stay here.
    """
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PAD, 16])
    INNER_SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, INNER_PAD, 16])
    QKV_SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, QKV_PAD, 16])
    dtype: gl.constexpr = slots.dtype
    program = gl.program_id(0)
    column = program * COLUMNS
    dims, is_dim = _columns(column, SUMS, PAD, COLUMNS, HIDDEN)
    row = gl.arange(0, 64, gl.SliceLayout(1, SUMS))
    at = row[:, None] * HIDDEN + dims[None, :]
    is_inside = (row < num_rows)[:, None] & is_dim[None, :]
    part_at = parts + row * PARTS + program
    is_part = (row < num_rows) & (column < HIDDEN)
    if GROUP == 0:
        first_gain = gl.load(gain + dims, mask=is_dim, other=0.0).to(gl.float32)
        second_gain = gl.load(next_gain + dims, mask=is_dim, other=0.0)
    if CHAINED:
        tl.extra.cuda.gdc_wait()
    value = gl.zeros([64, PAD], dtype, SUMS)
    if GROUP == 0:
        value = gl.load(x + at, mask=is_inside, other=0.0)

    used, stage = 0, 0
    if column < HIDDEN:
        total, used, stage = product(
            GROUP, tiles, slots, rows_full, rows_empty, full, empty, used, stage, SUMS, ATTENDED, PAD, CHUNKS, STAGES
        )
        total = _add_halves(GROUP, total, halves, events, 0, PAD)
        if GROUP == 0:
            value = (value.to(gl.float32) + total).to(dtype)
            wide = gl.where(is_inside, value.to(gl.float32), 0.0)  # past a stripe's columns stands anything
            gl.store(part_at, gl.sum(wide * wide, axis=1), mask=is_part)
            gl.store(scaled + at, (wide * first_gain[None, :]).to(dtype), mask=is_inside)
    if GROUP == 0:
        hopper.mbarrier.wait(events.index(IS_OPEN), 0)
        arrive(arrivals)

    wide_row = gl.arange(0, 64, gl.SliceLayout(1, INNER_SUMS))
    for pair in range(program, (INNER + 2 * INNER_COLUMNS - 1) // (2 * INNER_COLUMNS), gl.num_programs(0)):
        gate, up, used, stage = gated_product(
            GROUP, tiles, slots, rows_full, rows_empty, full, empty, used, stage, INNER_SUMS, HIDDEN, INNER_PAD,
            CHUNKS, STAGES,
        )  # fmt: skip
        hopper.mbarrier.wait(events.index(IS_SCALED), 0)
        scale = scales.load(gl.SliceLayout(1, INNER_SUMS))[:, None]
        gate, up = gate * scale, up * scale
        to, is_to = _columns((2 * pair + GROUP) * INNER_COLUMNS, INNER_SUMS, INNER_PAD, INNER_COLUMNS, INNER)
        inner_at = inner + wide_row[:, None] * INNER + to[None, :]
        gated = (gate / (1.0 + gl.exp(-gate)) * up).to(dtype)
        gl.store(inner_at, gated, mask=(wide_row < num_rows)[:, None] & is_to[None, :])
    if GROUP == 0:
        hopper.mbarrier.wait(events.index(IS_STORED), 0)
        hopper.mbarrier.wait(events.index(IS_OPEN), 1)  # also where this program has no stripe
        arrive(arrivals)
    else:
        fence_async()
        barrier()
        hopper.mbarrier.arrive(events.index(IS_STORED), count=1)

    if column < HIDDEN:
        total, used, stage = product(
            GROUP, tiles, slots, rows_full, rows_empty, full, empty, used, stage, SUMS, INNER, PAD, CHUNKS, STAGES
        )
        total = _add_halves(GROUP, total, halves, events, 1, PAD)
        if GROUP == 0:
            value = (value.to(gl.float32) + total).to(dtype)
            gl.store(x + at, value, mask=is_inside)
            if QKV > 0:
                wide = gl.where(is_inside, value.to(gl.float32), 0.0)
                gl.store(part_at, gl.sum(wide * wide, axis=1), mask=is_part)
                gl.store(scaled + at, (wide * second_gain.to(gl.float32)[None, :]).to(dtype), mask=is_inside)
    if CHAINED:
        tl.extra.cuda.gdc_launch_dependents()
    if QKV > 0:
        if GROUP == 0:
            hopper.mbarrier.wait(events.index(IS_OPEN), 0)
            arrive(arrivals)
        if program * QKV_COLUMNS < QKV:
            sums, used, stage = product(
                GROUP, tiles, slots, rows_full, rows_empty, full, empty, used, stage, QKV_SUMS, HIDDEN, QKV_PAD,
                CHUNKS, STAGES,
            )  # fmt: skip
            sums = _add_halves(GROUP, sums, halves, events, 0, QKV_PAD)
            if GROUP == 0:
                hopper.mbarrier.wait(events.index(IS_SCALED), 1)
                sums *= scales.load(gl.SliceLayout(1, QKV_SUMS))[:, None]
                to, is_to = _columns(program * QKV_COLUMNS, QKV_SUMS, QKV_PAD, QKV_COLUMNS, QKV)
                if HAS_BIAS:
                    sums += gl.load(bias + to, mask=is_to, other=0.0).to(gl.float32)[None, :]
                qkv_row = gl.arange(0, 64, gl.SliceLayout(1, QKV_SUMS))
                qkv_at = qkv + qkv_row[:, None] * QKV + to[None, :]
                gl.store(qkv_at, sums.to(dtype), mask=(qkv_row < num_rows)[:, None] & is_to[None, :])


@jit()
def _add_halves(
    GROUP: gl.constexpr,
    total: tl.tensor,
    halves: tl.tensor,
    events: tl.tensor,
    PARITY: gl.constexpr,
    PAD: gl.constexpr,
) -> tl.tensor:
    """The second group's sums added to the first's. All programs stand between two times, so one buffer will do.
    PARITY: of the times before."""
    LAYOUT: gl.constexpr = gl.SwizzledSharedLayout(4, 1, min(PAD // 4, 8), [1, 0])
    half = halves._reinterpret(gl.float32, [64, PAD], LAYOUT)
    if GROUP == 0:
        hopper.mbarrier.wait(events.index(IS_HALF), PARITY)
        total += half.load(total.type.layout)
    else:
        half.store(total)
        barrier()
        hopper.mbarrier.arrive(events.index(IS_HALF), count=1)
    return total


@jit()
def _columns(
    first: tl.tensor, SUMS: gl.constexpr, PAD: gl.constexpr, COLUMNS: gl.constexpr, N: gl.constexpr
) -> tl.tensor:
    """A stripe's PAD columns, and which of them are its own."""
    inside = gl.arange(0, PAD, gl.SliceLayout(0, SUMS))
    return first + inside, (inside < COLUMNS) & (first + inside < N)


@jit()
def sum_squares(
    parts: tl.tensor,
    scales: tl.tensor,
    events: tl.tensor,
    eps: tl.tensor,
    HIDDEN: gl.constexpr,
    COLUMNS: gl.constexpr,
    PARTS: gl.constexpr,
    ROWS: gl.constexpr,
    TIMES: gl.constexpr,
) -> None:
    """One warp: 1 / sqrt(mean of squares + eps) of each row, from ``parts`` [rows, PARTS] of all programs."""
    FLAT: gl.constexpr = gl.BlockedLayout([1, PARTS // 32], [1, 32], [1, 1], [1, 0])
    program = gl.arange(0, PARTS, gl.SliceLayout(0, FLAT))[None, :]
    BLOCK: gl.constexpr = min(ROWS, 2048 // PARTS)
    row = gl.arange(0, BLOCK, gl.SliceLayout(1, FLAT))[:, None]
    used: gl.constexpr = (HIDDEN + COLUMNS - 1) // COLUMNS
    blocks = scales._reinterpret(gl.float32, [64 // BLOCK, BLOCK], scales.layout)
    for time in range(TIMES):
        hopper.mbarrier.wait(events.index(IS_SUMMED), time & 1)
        for first in range(0, ROWS, BLOCK):
            at = parts + (first + row) * PARTS + program
            squares = gl.load(at, mask=program < used, other=0.0, cache_modifier=".cg")
            mean = gl.sum(squares, axis=1) / HIDDEN
            blocks.index(first // BLOCK).store(gl.rsqrt(mean + eps))
        barrier()
        hopper.mbarrier.arrive(events.index(IS_SCALED), count=1)
