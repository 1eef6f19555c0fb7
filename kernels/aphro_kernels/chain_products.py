"""The multiplying warps' inner loops of chain_kernel.py: a stripe of weights from the ring times all rows.

Stages and slots are of even number and those of the two groups alternate: a buffer's next content is then waited for by
nobody who has not seen its last, which is all that the parity of a barrier can tell apart.
"""
# ruff: noqa: N803, N806  (constants in capitals; of kernels)

from __future__ import annotations

from aphro_kernels.hopper import barrier, gl, hopper, jit
from aphro_kernels.language import tl


@jit()
def product(
    GROUP: gl.constexpr,
    tiles: tl.tensor,
    slots: tl.tensor,
    rows_full: tl.tensor,
    rows_empty: tl.tensor,
    full: tl.tensor,
    empty: tl.tensor,
    used: tl.tensor,
    stage: tl.tensor,
    SUMS: gl.constexpr,
    K: gl.constexpr,
    PAD: gl.constexpr,
    CHUNKS: gl.constexpr,
    STAGES: gl.constexpr,
) -> tl.tensor:
    """``[64, PAD]`` float32: of this group's half of the inputs, every second stage of rows and slot of weights.

    A stage, or slot, is free when the products after its own have begun.
    """
    SLOTS: gl.constexpr = slots.shape[0]
    FIT: gl.constexpr = min(slots.shape[1] // PAD, CHUNKS)
    TURNS: gl.constexpr = CHUNKS // FIT
    PAIRS: gl.constexpr = (K + 128 * CHUNKS - 1) // (128 * CHUNKS)
    total = gl.zeros([64, PAD], gl.float32, SUMS)
    last_slot = 0
    last_stage = 0
    for pair in range(PAIRS):
        at_stage = stage + 2 * pair + GROUP
        here = at_stage % STAGES
        hopper.mbarrier.wait(rows_full.index(here), (at_stage // STAGES) & 1)
        for turn in gl.static_range(TURNS):
            at = used + (pair * TURNS + turn) * 2 + GROUP
            slot = at % SLOTS
            hopper.mbarrier.wait(full.index(slot), (at // SLOTS) & 1)
            weights = slots.index(slot)._reinterpret(slots.dtype, [FIT, PAD, 64], slots.layout)
            for chunk in gl.static_range(FIT):
                left = tiles.index(here * CHUNKS + (turn * FIT + chunk))
                left = left._reinterpret(slots.dtype, [64, 64], slots.layout)
                total = hopper.warpgroup_mma(left, weights.index(chunk).permute((1, 0)), total, is_async=True)
            total = hopper.warpgroup_mma_wait(FIT, deps=(total,))
            barrier()
            hopper.mbarrier.arrive(empty.index(last_slot), count=1, pred=(pair > 0) | (turn > 0))
            if turn == 0:
                hopper.mbarrier.arrive(rows_empty.index(last_stage), count=2, pred=pair > 0)
            last_slot = slot
        last_stage = here
    total = hopper.warpgroup_mma_wait(0, deps=(total,))
    barrier()
    hopper.mbarrier.arrive(empty.index(last_slot), count=1)
    hopper.mbarrier.arrive(rows_empty.index(last_stage), count=2)
    return total, used + 2 * PAIRS * TURNS, stage + 2 * PAIRS


@jit()
def gated_product(
    GROUP: gl.constexpr,
    tiles: tl.tensor,
    slots: tl.tensor,
    rows_full: tl.tensor,
    rows_empty: tl.tensor,
    full: tl.tensor,
    empty: tl.tensor,
    used: tl.tensor,
    stage: tl.tensor,
    SUMS: gl.constexpr,
    K: gl.constexpr,
    PAD: gl.constexpr,
    CHUNKS: gl.constexpr,
    STAGES: gl.constexpr,
) -> tl.tensor:
    """Gate and up, ``[64, PAD]`` float32 each, of this group's own columns: every second slot, all stages of rows."""
    SLOTS: gl.constexpr = slots.shape[0]
    FIT: gl.constexpr = min(slots.shape[1] // (2 * PAD), CHUNKS)
    TURNS: gl.constexpr = CHUNKS // FIT
    STEPS: gl.constexpr = (K + 64 * CHUNKS - 1) // (64 * CHUNKS)
    gate = gl.zeros([64, PAD], gl.float32, SUMS)
    up = gl.zeros([64, PAD], gl.float32, SUMS)
    last_slot = 0
    last_stage = 0
    for step in range(STEPS):
        here = (stage + step) % STAGES
        hopper.mbarrier.wait(rows_full.index(here), ((stage + step) // STAGES) & 1)
        for turn in gl.static_range(TURNS):
            at = used + (step * TURNS + turn) * 2 + GROUP
            slot = at % SLOTS
            hopper.mbarrier.wait(full.index(slot), (at // SLOTS) & 1)
            weights = slots.index(slot)._reinterpret(slots.dtype, [2 * FIT, PAD, 64], slots.layout)
            for chunk in gl.static_range(FIT):
                left = tiles.index(here * CHUNKS + (turn * FIT + chunk))
                left = left._reinterpret(slots.dtype, [64, 64], slots.layout)
                gate = hopper.warpgroup_mma(left, weights.index(2 * chunk).permute((1, 0)), gate, is_async=True)
                up = hopper.warpgroup_mma(left, weights.index(2 * chunk + 1).permute((1, 0)), up, is_async=True)
            gate, up = hopper.warpgroup_mma_wait(2 * FIT, deps=(gate, up))
            barrier()
            hopper.mbarrier.arrive(empty.index(last_slot), count=1, pred=(step > 0) | (turn > 0))
            if turn == 0:
                hopper.mbarrier.arrive(rows_empty.index(last_stage), count=1, pred=step > 0)
            last_slot = slot
        last_stage = here
    gate, up = hopper.warpgroup_mma_wait(0, deps=(gate, up))
    barrier()
    hopper.mbarrier.arrive(empty.index(last_slot), count=1)
    hopper.mbarrier.arrive(rows_empty.index(last_stage), count=1)
    return gate, up, used + 2 * STEPS * TURNS, stage + STEPS
