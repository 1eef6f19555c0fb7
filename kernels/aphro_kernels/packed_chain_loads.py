"""The warps of packed_chain_kernel.py that do not multiply: one copies weights, one waits for the other programs."""
# ruff: noqa: N803, N806  (constants in capitals; of kernels)

from __future__ import annotations

from aphro_kernels.chain_events import count_arrivals
from aphro_kernels.hopper import gl, hopper, jit
from aphro_kernels.language import tl


@jit()
def open_phases(arrivals: tl.tensor, is_open: tl.tensor, QKV: gl.constexpr, CHAINED: gl.constexpr) -> None:
    """Lets the other warps begin a phase when all programs have finished the one before.

    ``arrivals`` only grows, by one a program and phase: it counts across launches.
    """
    if CHAINED:
        tl.extra.cuda.gdc_wait()
    programs = gl.num_programs(0).to(gl.int64)
    target = count_arrivals(arrivals) // programs * programs  # of launches before: this program has not arrived
    hopper.mbarrier.arrive(is_open.index(0), count=1)
    for _phase in range(3 if QKV > 0 else 2):
        target += programs
        count = count_arrivals(arrivals)
        while count < target:
            count = count_arrivals(arrivals)
        hopper.mbarrier.arrive(is_open.index(0), count=1)


@jit()
def stream_all(
    out: tl.tensor,
    gate_up: tl.tensor,
    down: tl.tensor,
    qkv: tl.tensor,
    out_pairs: tl.tensor,
    gate_up_pairs: tl.tensor,
    down_pairs: tl.tensor,
    qkv_pairs: tl.tensor,
    slots: tl.tensor,
    pairs: tl.tensor,
    full: tl.tensor,
    empty: tl.tensor,
    ATTENDED: gl.constexpr,
    HIDDEN: gl.constexpr,
    INNER: gl.constexpr,
    QKV: gl.constexpr,
    STRIPES: gl.constexpr,
    QKV_STRIPES: gl.constexpr,
    KIND: gl.constexpr,
    IN_FLIGHT: gl.constexpr,
) -> None:
    """One warp: this program's stripes of all four weights in the order in which they will be multiplied."""
    used = 0
    used = _stream(out, out_pairs, slots, pairs, full, empty, used, HIDDEN, ATTENDED, STRIPES, False, KIND, IN_FLIGHT)
    used = _stream(gate_up, gate_up_pairs, slots, pairs, full, empty, used, INNER, HIDDEN, 2, True, KIND, IN_FLIGHT)
    used = _stream(down, down_pairs, slots, pairs, full, empty, used, HIDDEN, INNER, STRIPES, False, KIND, IN_FLIGHT)
    if QKV > 0:
        _stream(qkv, qkv_pairs, slots, pairs, full, empty, used, QKV, HIDDEN, QKV_STRIPES, False, KIND, IN_FLIGHT)


@jit()
def _stream(
    codes: tl.tensor,
    scales: tl.tensor,
    slots: tl.tensor,
    pairs: tl.tensor,
    full: tl.tensor,
    empty: tl.tensor,
    used: tl.tensor,
    N: gl.constexpr,
    K: gl.constexpr,
    STRIPES: gl.constexpr,
    IS_GATED: gl.constexpr,
    KIND: gl.constexpr,
    IN_FLIGHT: gl.constexpr,
) -> tl.tensor:
    """Of STRIPES stripes of 16 outputs the same inputs, in one slot (fp8: in a slot each); IS_GATED: of the gate one,
    and of up, which stands N rows behind, the other. What lies past the end of a stripe is multiplied with zeros."""
    FIT: gl.constexpr = 16 // STRIPES if KIND == "int4" else 8  # times 128 inputs
    GROUPS: gl.constexpr = K // 128
    STEPS: gl.constexpr = (GROUPS + FIT - 1) // FIT
    EACH: gl.constexpr = 1 if IS_GATED else STRIPES
    BETWEEN: gl.constexpr = N // 16 if IS_GATED else 1
    for unit in range(gl.program_id(0), N // (16 * EACH), gl.num_programs(0)):
        first = unit * EACH
        for step in range(STEPS):
            if KIND == "int4":
                slot = _wait_for_room(full, empty, used, IN_FLIGHT)
                hopper.mbarrier.expect(full.index(slot), STRIPES * FIT * (1024 + 64))
                code_boxes = slots.index(slot)._reinterpret(gl.int32, [STRIPES, FIT * 16, 16], slots.layout)
                pair_boxes = pairs.index(slot)._reinterpret(gl.bfloat16, [STRIPES, FIT, 32], pairs.layout)
                for i in gl.static_range(STRIPES):
                    tile = (first + i * BETWEEN) * GROUPS + step * FIT
                    hopper.tma.async_copy_global_to_shared(codes, [tile * 16, 0], full.index(slot), code_boxes.index(i))
                    hopper.tma.async_copy_global_to_shared(scales, [tile, 0], full.index(slot), pair_boxes.index(i))
                used += 1
            else:
                for i in gl.static_range(STRIPES):
                    slot = _wait_for_room(full, empty, used, IN_FLIGHT)
                    hopper.mbarrier.expect(full.index(slot), FIT * 2048)
                    boxes = slots.index(slot)._reinterpret(gl.uint8, [FIT, 16, 128], slots.layout)
                    for chunk in gl.static_range(FIT):
                        at = [(first + i * BETWEEN) * 16, (step * FIT + chunk) * 128]
                        hopper.tma.async_copy_global_to_shared(codes, at, full.index(slot), boxes.index(chunk))
                    used += 1
    return used


@jit()
def _wait_for_room(full: tl.tensor, empty: tl.tensor, used: tl.tensor, IN_FLIGHT: gl.constexpr) -> tl.tensor:
    """The next slot of the ring, when it is empty and fewer than IN_FLIGHT others are being filled.

    What waits in memory is in the way of what programs wait for: a longer queue brings no weight sooner.
    """
    SLOTS: gl.constexpr = full.shape[0]
    slot = used % SLOTS
    hopper.mbarrier.wait(empty.index(slot), ((used // SLOTS) & 1) ^ 1)
    if used >= IN_FLIGHT:
        before = used - IN_FLIGHT
        hopper.mbarrier.wait(full.index(before % SLOTS), (before // SLOTS) & 1)
    return slot
