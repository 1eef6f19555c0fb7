"""The computing half of hopper_decode.py: scores, their softmax, sums of values, and of a segment's parts."""
# ruff: noqa: N803, N806, PLR0915  (constants in capitals; a kernel is one piece)

from __future__ import annotations

from aphro_kernels.hopper import barrier, gl, hopper, jit
from aphro_kernels.language import tl


@jit()
def attend(
    q: tl.tensor,
    out: tl.tensor,
    q_tile: tl.tensor,
    weights: tl.tensor,
    k_tiles: tl.tensor,
    v_tiles: tl.tensor,
    k_full: tl.tensor,
    v_full: tl.tensor,
    k_empty: tl.tensor,
    v_empty: tl.tensor,
    seq_lens: tl.tensor,
    tile: tl.tensor,
    num_segments: tl.tensor,
    row: tl.tensor,
    seq_len: tl.tensor,
    row_tile: tl.tensor,
    stop: tl.tensor,
    first_of_piece: tl.tensor,
    last_of_piece: tl.tensor,
    total: tl.tensor,
    used: tl.tensor,
    arrivals: tl.tensor,
    parts: tl.tensor,
    part_weights: tl.tensor,
    q_stride: tl.tensor,
    scale: tl.tensor,
    value_scale: tl.tensor,
    NUM_KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    HEADS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    STAGES: gl.constexpr,
    KEYS: gl.constexpr,
    CHAINED: gl.constexpr,
) -> None:
    """Four warps: queries of a segment, its tiles, its sum or part."""
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEADS, 16])
    PLAIN: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    stage = 0
    phase = 0
    for _segment in range(0, num_segments):
        row_tiles = gl.maximum((seq_len + KEYS - 1) // KEYS, 1)
        row_end = row_tile + NUM_KV_HEADS * row_tiles
        next_len = gl.load(seq_lens + row + 1, mask=row_end < stop, other=0)
        kv_head = (tile - row_tile) // row_tiles
        begin = row_tile + kv_head * row_tiles
        end = begin + row_tiles
        until = gl.minimum(stop, end)

        head = gl.arange(0, HEADS, gl.SliceLayout(1, PLAIN))[:, None]
        dim = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, PLAIN))[None, :]
        q_at = q + row.to(gl.int64) * q_stride + kv_head * (GROUP * HEAD_DIM)
        if CHAINED:
            tl.extra.cuda.gdc_wait()
        q_tile.store(gl.load(q_at + (head * HEAD_DIM + dim), mask=(head < GROUP) & (dim >= 0), other=0.0))
        hopper.fence_async_shared()
        barrier()

        largest = gl.full([HEADS], float("-inf"), gl.float32, gl.SliceLayout(0, SUMS))
        sums = gl.zeros([KEYS, HEADS], gl.float32, SUMS)
        mixed = gl.zeros([HEAD_DIM, HEADS], gl.float32, SUMS)
        num_plain = gl.minimum(until - begin, seq_len // KEYS)  # tiles that need no mask
        for _step in range(tile - begin, num_plain):
            mixed, largest, sums, stage, phase = _add_tile(
                mixed, largest, sums, stage, phase, 0, scale, q_tile, weights, k_tiles, v_tiles, k_full, v_full,
                k_empty, v_empty, HEADS, HEAD_DIM, STAGES, KEYS, SUMS, False,
            )  # fmt: skip
        if num_plain < until - begin:
            mixed, largest, sums, stage, phase = _add_tile(
                mixed, largest, sums, stage, phase, seq_len - num_plain * KEYS, scale, q_tile, weights, k_tiles,
                v_tiles, k_full, v_full, k_empty, v_empty, HEADS, HEAD_DIM, STAGES, KEYS, SUMS, True,
            )  # fmt: skip
        sum_ = gl.sum(sums, axis=0)
        mixed = mixed * (value_scale / gl.where(sum_ > 0.0, sum_, 1.0))[None, :]

        heads = gl.arange(0, HEADS, gl.SliceLayout(0, SUMS))
        dims = gl.arange(0, HEAD_DIM, gl.SliceLayout(1, SUMS))[:, None]
        at = heads[None, :] * HEAD_DIM + dims
        is_inside = (heads < GROUP)[None, :] & (dims >= 0)
        out_at = out + (row.to(gl.int64) * NUM_KV_HEADS + kv_head) * (GROUP * HEAD_DIM)
        if (tile == begin) & (until == end):
            gl.store(out_at + at, mixed.to(out.dtype.element_ty), mask=is_inside)
        else:
            # of a program's two parts the second is that of the segment which begins in it
            part = 2 * gl.program_id(0) + (tile == begin).to(gl.int32)
            first, last = first_of_piece, last_of_piece
            if first_of_piece < 0:
                first = (((begin + 1).to(gl.int64) * used - 1) // total).to(gl.int32)
                last = ((end.to(gl.int64) * used - 1) // total).to(gl.int32)
            gl.store(parts + part * (GROUP * HEAD_DIM) + at, mixed, mask=is_inside)
            gl.store(part_weights + part * GROUP + heads, largest + gl.log2(sum_), mask=heads < GROUP)
            barrier()  # all threads have stored before one of them says so
            arrived_at = arrivals + row * NUM_KV_HEADS + kv_head
            arrived = gl.atomic_add(arrived_at, 1, sem="acq_rel", scope="gpu")
            if arrived == last - first:
                barrier()
                _combine(parts, part_weights, out_at, first, last, GROUP, HEADS, HEAD_DIM)
                gl.store(arrived_at, 0)
        tile = until
        if until == row_end:
            row_tile = until
            row += 1
            seq_len = next_len
    if CHAINED:
        tl.extra.cuda.gdc_wait()  # also where there was nothing to do


@jit()
def _add_tile(
    mixed: tl.tensor,
    largest: tl.tensor,
    sums: tl.tensor,
    stage: tl.tensor,
    phase: tl.tensor,
    num_keys: tl.tensor,
    scale: tl.tensor,
    q_tile: tl.tensor,
    weights: tl.tensor,
    k_tiles: tl.tensor,
    v_tiles: tl.tensor,
    k_full: tl.tensor,
    v_full: tl.tensor,
    k_empty: tl.tensor,
    v_empty: tl.tensor,
    HEADS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    STAGES: gl.constexpr,
    KEYS: gl.constexpr,
    SUMS: gl.constexpr,
    IS_MASKED: gl.constexpr,
) -> tl.tensor:
    """Scores [KEYS, HEADS] of a tile, of which ``num_keys`` count if masked; their weights; values added by weight."""
    hopper.mbarrier.wait(k_full.index(stage), phase)
    nothing = gl.zeros([KEYS, HEADS], gl.float32, SUMS)
    scores = hopper.warpgroup_mma(k_tiles.index(stage), q_tile.permute((1, 0)), nothing, use_acc=False, is_async=True)
    scores = hopper.warpgroup_mma_wait(0, deps=(scores,))
    if IS_MASKED:
        is_key = gl.arange(0, KEYS, gl.SliceLayout(1, SUMS)) < num_keys
        scores = gl.where(is_key[:, None], scores, float("-inf"))
    peak = gl.maximum(largest, gl.max(scores, axis=0) * scale)
    shift = peak
    if IS_MASKED:
        shift = gl.where(peak == float("-inf"), 0.0, peak)  # a row without keys
    weight = gl.exp2(scores * scale - shift[None, :])
    decay = gl.exp2(largest - shift)
    sums = sums * decay[None, :] + weight
    mixed = mixed * decay[None, :]
    weights.permute((1, 0)).store(weight.to(weights.dtype))
    hopper.mbarrier.wait(v_full.index(stage), phase)
    v_tile = v_tiles.index(stage)
    if IS_MASKED:
        # behind the last key anything may stand: its weight is 0, but 0 times NaN is NaN
        PLAIN: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
        is_key_row = gl.arange(0, KEYS, gl.SliceLayout(1, PLAIN)) < num_keys
        value = v_tile.load(PLAIN)
        v_tile.store(gl.where(is_key_row[:, None], value, gl.zeros_like(value)))
    hopper.fence_async_shared()
    barrier()
    hopper.mbarrier.arrive(k_empty.index(stage), count=1)
    mixed = hopper.warpgroup_mma(v_tile.permute((1, 0)), weights.permute((1, 0)), mixed, is_async=True)
    mixed = hopper.warpgroup_mma_wait(0, deps=(mixed,))
    barrier()
    hopper.mbarrier.arrive(v_empty.index(stage), count=1)
    stage += 1
    if stage == STAGES:
        stage = 0
        phase = phase ^ 1
    return mixed, peak, sums, stage, phase


@jit()
def _combine(
    parts: tl.tensor,
    part_weights: tl.tensor,
    out_at: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    GROUP: gl.constexpr,
    HEADS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
) -> None:
    """The sum of a segment's parts, each weighted by exp2 of its log-sum-exp, in the order of the keys, some at once.

    All loads go past the first-level cache, which other multiprocessors' stores do not reach.
    """
    PLAIN: gl.constexpr = gl.BlockedLayout([1, 4], [128 // HEAD_DIM, HEAD_DIM // 4], [4, 1], [1, 0])
    AT_ONCE: gl.constexpr = 64 // HEADS
    heads = gl.arange(0, HEADS, gl.SliceLayout(1, PLAIN))
    dims = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, PLAIN))
    is_head = heads < GROUP
    is_inside = is_head[:, None] & (dims >= 0)[None, :]
    at = heads[:, None] * HEAD_DIM + dims[None, :]
    peak = gl.full([HEADS], -1e30, gl.float32, gl.SliceLayout(1, PLAIN))
    sums = gl.zeros([HEADS], gl.float32, gl.SliceLayout(1, PLAIN))
    mixed = gl.zeros([HEADS, HEAD_DIM], gl.float32, PLAIN)
    for start in range(first, last + 1, AT_ONCE):
        found = ()
        before = peak
        for i in gl.static_range(AT_ONCE):
            program = start + i
            is_part = program <= last
            part = 2 * program + (program == first).to(gl.int32)
            weight_at = part_weights + part * GROUP + heads
            weight = gl.load(weight_at, mask=is_head & is_part, other=-1e30, cache_modifier=".cg")
            part_at = parts + part * (GROUP * HEAD_DIM) + at
            value = gl.load(part_at, mask=is_inside & is_part, other=0.0, cache_modifier=".cg")
            found = found + ((weight, value),)  # type: ignore[assignment]  # noqa: RUF005
            peak = gl.maximum(peak, weight)
        decay = gl.exp2(before - peak)
        sums = sums * decay
        mixed = mixed * decay[:, None]
        for i in gl.static_range(AT_ONCE):
            share = gl.exp2(found[i][0] - peak)
            mixed += found[i][1] * share[:, None]
            sums += gl.where(start + i <= last, share, 0.0)
    gl.store(out_at + at, (mixed / sums[:, None]).to(out_at.dtype.element_ty), mask=is_inside)
