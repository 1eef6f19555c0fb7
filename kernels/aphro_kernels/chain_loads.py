"""The copying warps of chain_kernel.py: weights that never wait for anybody, rows that wait for the phase before."""
# ruff: noqa: N803, N806  (constants in capitals; of kernels)

from __future__ import annotations

from aphro_kernels.chain_events import IS_OPEN, IS_SUMMED, count_arrivals, wait_for_arrivals
from aphro_kernels.hopper import gl, hopper, jit
from aphro_kernels.language import tl


@jit()
def stream_weights(
    out: tl.tensor,
    gate_up: tl.tensor,
    down: tl.tensor,
    qkv: tl.tensor,
    slots: tl.tensor,
    full: tl.tensor,
    empty: tl.tensor,
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
) -> None:
    """One warp: this program's stripes of all four weights in the order in which they will be multiplied."""
    used = 0
    used = _stream(out, slots, full, empty, used, HIDDEN, ATTENDED, COLUMNS, PAD, CHUNKS, False)
    used = _stream(gate_up, slots, full, empty, used, INNER, HIDDEN, INNER_COLUMNS, INNER_PAD, CHUNKS, True)
    used = _stream(down, slots, full, empty, used, HIDDEN, INNER, COLUMNS, PAD, CHUNKS, False)
    if QKV > 0:
        _stream(qkv, slots, full, empty, used, QKV, HIDDEN, QKV_COLUMNS, QKV_PAD, CHUNKS, False)


@jit()
def _stream(
    weight: tl.tensor,
    slots: tl.tensor,
    full: tl.tensor,
    empty: tl.tensor,
    used: tl.tensor,
    N: gl.constexpr,
    K: gl.constexpr,
    COLUMNS: gl.constexpr,
    PAD: gl.constexpr,
    CHUNKS: gl.constexpr,
    IS_GATED: gl.constexpr,
) -> tl.tensor:
    """Slots of the two groups of warps by turns. IS_GATED: of two stripes, each with rows of the gate and of up, which
    stands N rows behind; else of one stripe, the inputs of every other stage.

    A slot takes as many chunks of 64 inputs as fit, at most CHUNKS. Past the ends of a weight come zeros.
    """
    SLOTS: gl.constexpr = slots.shape[0]
    MATRICES: gl.constexpr = 2 if IS_GATED else 1
    FIT: gl.constexpr = min(slots.shape[1] // (MATRICES * PAD), CHUNKS)
    TURNS: gl.constexpr = CHUNKS // FIT
    WIDE: gl.constexpr = COLUMNS * MATRICES  # of both groups' stripes
    STRIDE: gl.constexpr = CHUNKS if IS_GATED else 2 * CHUNKS  # chunks of a step
    STEPS: gl.constexpr = (K + 64 * STRIDE - 1) // (64 * STRIDE)
    BOX: gl.constexpr = weight.block_shape[0]
    BOXES: gl.constexpr = PAD // BOX
    for stripe in range(gl.program_id(0), (N + WIDE - 1) // WIDE, gl.num_programs(0)):
        # programs begin in different places: they do not ask for the same rows at the same time
        begin = gl.program_id(0) * STEPS // gl.num_programs(0)
        for i in range(STEPS):
            step = gl.where(i + begin < STEPS, i + begin, i + begin - STEPS)
            for turn in gl.static_range(TURNS):
                for group in gl.static_range(2):
                    slot = used % SLOTS
                    hopper.mbarrier.wait(empty.index(slot), ((used // SLOTS) & 1) ^ 1)
                    hopper.mbarrier.expect(full.index(slot), FIT * WIDE * 128)
                    boxes = slots.index(slot)._reinterpret(slots.dtype, [FIT * MATRICES * BOXES, BOX, 64], slots.layout)
                    row = stripe * WIDE + (group * COLUMNS if IS_GATED else 0)
                    first = step * STRIDE + (turn * FIT if IS_GATED else group * CHUNKS + turn * FIT)
                    for chunk in gl.static_range(FIT):
                        for matrix in gl.static_range(MATRICES):
                            for box in gl.static_range(COLUMNS // BOX):
                                at = [row + (matrix * N + box * BOX), (first + chunk) * 64]
                                box_at = boxes.index((chunk * MATRICES + matrix) * BOXES + box)
                                hopper.tma.async_copy_global_to_shared(weight, at, full.index(slot), box_at)
                    used += 1
    return used


@jit()
def stream_rows(
    attended: tl.tensor,
    scaled: tl.tensor,
    inner: tl.tensor,
    arrivals: tl.tensor,
    stages: tl.tensor,
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
    CHUNKS: gl.constexpr,
    STAGES: gl.constexpr,
    CHAINED: gl.constexpr,
) -> None:
    """One warp: each phase's rows, as soon as all programs have finished the phase before.

    ``arrivals`` only grows, by one a program and phase: it counts across launches.
    """
    if CHAINED:
        tl.extra.cuda.gdc_wait()
    programs = gl.num_programs(0).to(gl.int64)
    start = count_arrivals(arrivals) // programs * programs  # of launches before: this program has not arrived
    used = 0
    hopper.mbarrier.arrive(events.index(IS_OPEN), count=1)
    used = _rows(attended, stages, full, empty, used, HIDDEN, ATTENDED, COLUMNS, 2, CHUNKS, STAGES)
    wait_for_arrivals(arrivals, start + programs)
    hopper.mbarrier.arrive(events.index(IS_SUMMED), count=1)
    hopper.mbarrier.arrive(events.index(IS_OPEN), count=1)
    used = _rows(scaled, stages, full, empty, used, INNER, HIDDEN, 2 * INNER_COLUMNS, 1, CHUNKS, STAGES)
    wait_for_arrivals(arrivals, start + 2 * programs)
    hopper.mbarrier.arrive(events.index(IS_OPEN), count=1)
    used = _rows(inner, stages, full, empty, used, HIDDEN, INNER, COLUMNS, 2, CHUNKS, STAGES)
    if QKV > 0:
        wait_for_arrivals(arrivals, start + 3 * programs)
        hopper.mbarrier.arrive(events.index(IS_SUMMED), count=1)
        _rows(scaled, stages, full, empty, used, QKV, HIDDEN, QKV_COLUMNS, 2, CHUNKS, STAGES)


@jit()
def _rows(
    rows: tl.tensor,
    stages: tl.tensor,
    full: tl.tensor,
    empty: tl.tensor,
    used: tl.tensor,
    N: gl.constexpr,
    K: gl.constexpr,
    COLUMNS: gl.constexpr,
    MULTIPLE: gl.constexpr,
    CHUNKS: gl.constexpr,
    STAGES: gl.constexpr,
) -> tl.tensor:
    """All inputs of all rows, once a stripe; CHUNKS times 64 inputs a stage, and a MULTIPLE of stages."""
    BYTES: gl.constexpr = CHUNKS * stages.shape[1] * 128
    STEPS: gl.constexpr = (K + 64 * CHUNKS * MULTIPLE - 1) // (64 * CHUNKS * MULTIPLE)
    for _stripe in range(gl.program_id(0), (N + COLUMNS - 1) // COLUMNS, gl.num_programs(0)):
        begin = gl.program_id(0) * STEPS // gl.num_programs(0)
        for i in range(STEPS):
            step = gl.where(i + begin < STEPS, i + begin, i + begin - STEPS)
            for part in gl.static_range(MULTIPLE):
                stage = used % STAGES
                hopper.mbarrier.wait(empty.index(stage), ((used // STAGES) & 1) ^ 1)
                hopper.mbarrier.expect(full.index(stage), BYTES)
                for chunk in gl.static_range(CHUNKS):
                    at = [0, ((step * MULTIPLE + part) * CHUNKS + chunk) * 64]
                    tile = stages.index(stage * CHUNKS + chunk)
                    hopper.tma.async_copy_global_to_shared(rows, at, full.index(stage), tile)
                used += 1
    return used
