"""The computing half of hopper_attention.py: scores, their softmax and the sum of values, 64 rows for four warps."""
# ruff: noqa: N803, N806, PLR0915  (constants in capitals; a kernel is one piece)

from __future__ import annotations

from aphro_kernels.hopper import barrier, gl, hopper, jit
from aphro_kernels.hopper_tiles import num_items_of, tile_of
from aphro_kernels.language import tl


@jit()
def attend(
    PART: gl.constexpr,
    q: tl.tensor,
    out: tl.tensor,
    q_tiles: tl.tensor,
    k_tiles: tl.tensor,
    v_tiles: tl.tensor,
    k_full: tl.tensor,
    v_full: tl.tensor,
    k_empty: tl.tensor,
    v_empty: tl.tensor,
    turns: tl.tensor,
    list_: tl.tensor,
    q_stride: tl.tensor,
    scale: tl.tensor,
    NUM_KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    STAGES: gl.constexpr,
    KEYS: gl.constexpr,
    FIELDS: gl.constexpr,
) -> None:
    """Four warps, 64 rows: scores of a tile of keys while the weights of the tile before multiply its values."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    MIXED: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    rows = gl.arange(0, 64, gl.SliceLayout(1, SCORES))
    programs = gl.num_programs(0)
    num_items = num_items_of(list_, NUM_KV_HEADS)
    kv_head, _seq, start, seq_len, num_rows, first, steps = tile_of(
        gl.program_id(0), list_, num_items, NUM_KV_HEADS, FIELDS
    )
    if steps > 0:
        _copy_queries(
            q, q_tiles.index(2 * PART), kv_head, start, num_rows, first + PART * 64, q_stride, GROUP, HEAD_DIM
        )
    used = 0
    turn = 0
    buffer = 0
    for item in range(gl.program_id(0), num_items + programs - 1, programs):
        first += PART * 64
        if steps > 0:
            q_tile = q_tiles.index(2 * PART + buffer)
            hopper.async_copy.wait_group(0)
            hopper.fence_async_shared()
            barrier()
            stage = used % STAGES
            hopper.mbarrier.wait(k_full.index(stage), (used // STAGES) & 1)
            nothing = gl.zeros([64, KEYS], gl.float32, SCORES)
            scores = hopper.warpgroup_mma(
                q_tile, k_tiles.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True
            )
            n_kv_head, _seq, n_start, n_seq_len, n_num_rows, n_first, n_steps = tile_of(
                item + programs, list_, num_items, NUM_KV_HEADS, FIELDS
            )
            if n_steps > 0:
                _copy_queries(
                    q, q_tiles.index(2 * PART + 1 - buffer), n_kv_head, n_start, n_num_rows, n_first + PART * 64,
                    q_stride, GROUP, HEAD_DIM,
                )  # fmt: skip
            scores = hopper.warpgroup_mma_wait(0, deps=(scores,))
            barrier()
            hopper.mbarrier.arrive(k_empty.index(stage), count=1)

            context = seq_len - num_rows // GROUP
            position = context + (first + rows) // GROUP
            num_plain = (context + first // GROUP + 1) // KEYS  # tiles that all these rows see
            largest = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
            total = gl.zeros([64], gl.float32, gl.SliceLayout(1, SCORES))
            mixed = gl.zeros([64, HEAD_DIM], gl.float32, MIXED)
            weight, largest, total, _none_before = _softmax(
                scores, largest, total, (steps - 1) * KEYS, position, scale, SCORES, KEYS, True
            )
            for step in range(1, gl.minimum(steps - num_plain, steps)):
                mixed, weight, largest, total, used, turn = _next(
                    mixed, weight, largest, total, used, turn, (steps - 1 - step) * KEYS, position, scale, q_tile,
                    k_tiles, v_tiles, k_full, v_full, k_empty, v_empty, turns, PART, SCORES, MIXED, STAGES, KEYS,
                    True,
                )  # fmt: skip
            for step in range(gl.maximum(steps - num_plain, 1), steps):
                mixed, weight, largest, total, used, turn = _next(
                    mixed, weight, largest, total, used, turn, (steps - 1 - step) * KEYS, position, scale, q_tile,
                    k_tiles, v_tiles, k_full, v_full, k_empty, v_empty, turns, PART, SCORES, MIXED, STAGES, KEYS,
                    False,
                )  # fmt: skip
            stage = used % STAGES
            hopper.mbarrier.wait(v_full.index(stage), (used // STAGES) & 1)
            left = gl.convert_layout(weight.to(q.dtype.element_ty), gl.DotOperandLayout(0, MIXED, 2))
            mixed = hopper.warpgroup_mma(left, v_tiles.index(stage), mixed)
            barrier()
            hopper.mbarrier.arrive(v_empty.index(stage), count=1)
            used += 1

            _store(out, mixed, total, kv_head, start, num_rows, first, NUM_KV_HEADS, GROUP, HEAD_DIM, MIXED)
        else:
            n_kv_head, _seq, n_start, n_seq_len, n_num_rows, n_first, n_steps = tile_of(
                item + programs, list_, num_items, NUM_KV_HEADS, FIELDS
            )
            if n_steps > 0:
                _copy_queries(
                    q, q_tiles.index(2 * PART + 1 - buffer), n_kv_head, n_start, n_num_rows, n_first + PART * 64,
                    q_stride, GROUP, HEAD_DIM,
                )  # fmt: skip
        kv_head, start, seq_len, num_rows, first, steps = n_kv_head, n_start, n_seq_len, n_num_rows, n_first, n_steps
        buffer = 1 - buffer


@jit()
def _copy_queries(
    q: tl.tensor,
    q_tile: tl.tensor,
    kv_head: tl.tensor,
    start: tl.tensor,
    num_rows: tl.tensor,
    first: tl.tensor,
    q_stride: tl.tensor,
    GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr,
) -> None:
    """Begin to copy 64 rows' queries; rows that are not there stay what they were, and are never stored."""
    PLAIN: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    row = first + gl.arange(0, 64, gl.SliceLayout(1, PLAIN))
    dims = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, PLAIN))
    at = (start + row // GROUP).to(gl.int64) * q_stride + (kv_head * GROUP + row % GROUP) * HEAD_DIM
    is_row = (row < num_rows)[:, None] & (dims >= 0)[None, :]
    hopper.async_copy.async_copy_global_to_shared(q_tile, q + at[:, None] + dims[None, :], mask=is_row)
    hopper.async_copy.commit_group()


@jit()
def _store(
    out: tl.tensor,
    mixed: tl.tensor,
    sums: tl.tensor,
    kv_head: tl.tensor,
    start: tl.tensor,
    num_rows: tl.tensor,
    first: tl.tensor,
    NUM_KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    MIXED: gl.constexpr,
) -> None:
    share = gl.convert_layout(1.0 / gl.where(sums > 0.0, sums, 1.0), gl.SliceLayout(1, MIXED))
    row = first + gl.arange(0, 64, gl.SliceLayout(1, MIXED))
    dims = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, MIXED))
    at = (start + row // GROUP).to(gl.int64) * (NUM_KV_HEADS * GROUP) + kv_head * GROUP + row % GROUP
    value = (mixed * share[:, None]).to(out.dtype.element_ty)
    gl.store(out + at[:, None] * HEAD_DIM + dims[None, :], value, mask=(row < num_rows)[:, None])


@jit()
def _next(
    mixed: tl.tensor,
    weight: tl.tensor,
    largest: tl.tensor,
    total: tl.tensor,
    used: tl.tensor,
    turn: tl.tensor,
    first_key: tl.tensor,
    position: tl.tensor,
    scale: tl.tensor,
    q_tile: tl.tensor,
    k_tiles: tl.tensor,
    v_tiles: tl.tensor,
    k_full: tl.tensor,
    v_full: tl.tensor,
    k_empty: tl.tensor,
    v_empty: tl.tensor,
    turns: tl.tensor,
    PART: gl.constexpr,
    SCORES: gl.constexpr,
    MIXED: gl.constexpr,
    STAGES: gl.constexpr,
    KEYS: gl.constexpr,
    IS_MASKED: gl.constexpr,
) -> tl.tensor:
    """Scores and weights of tile ``used + 1``, while the weights of tile ``used`` multiply its values."""
    v_stage = used % STAGES
    v_phase = (used // STAGES) & 1
    used += 1
    k_stage = used % STAGES
    hopper.mbarrier.wait(k_full.index(k_stage), (used // STAGES) & 1)
    hopper.mbarrier.wait(turns.index(PART), (turn & 1) ^ (1 - PART))
    nothing = gl.zeros([64, KEYS], gl.float32, SCORES)
    scores = hopper.warpgroup_mma(q_tile, k_tiles.index(k_stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
    left = gl.convert_layout(weight.to(v_tiles.dtype), gl.DotOperandLayout(0, MIXED, 2))
    hopper.mbarrier.wait(v_full.index(v_stage), v_phase)
    mixed = hopper.warpgroup_mma(left, v_tiles.index(v_stage), mixed, is_async=True)
    hopper.mbarrier.arrive(turns.index(1 - PART), count=1)
    scores = hopper.warpgroup_mma_wait(1, deps=(scores,))
    barrier()
    hopper.mbarrier.arrive(k_empty.index(k_stage), count=1)
    weight, largest, total, decay = _softmax(
        scores, largest, total, first_key, position, scale, SCORES, KEYS, IS_MASKED
    )
    mixed = hopper.warpgroup_mma_wait(0, deps=(mixed,))
    barrier()
    hopper.mbarrier.arrive(v_empty.index(v_stage), count=1)
    mixed = mixed * gl.convert_layout(decay, gl.SliceLayout(1, MIXED))[:, None]
    return mixed, weight, largest, total, used, turn + 1


@jit()
def _softmax(
    scores: tl.tensor,
    largest: tl.tensor,
    total: tl.tensor,
    first_key: tl.tensor,
    position: tl.tensor,
    scale: tl.tensor,
    SCORES: gl.constexpr,
    KEYS: gl.constexpr,
    IS_MASKED: gl.constexpr,
) -> tl.tensor:
    """Weights of a tile's scores; the largest score so far, the sum of weights, and what those before are worth now."""
    if IS_MASKED:
        key = first_key + gl.arange(0, KEYS, gl.SliceLayout(0, SCORES))
        scores = gl.where(key[None, :] <= position[:, None], scores, float("-inf"))
    peak = gl.maximum(largest, gl.max(scores, axis=1) * scale)
    shift = peak
    if IS_MASKED:
        shift = gl.where(peak == float("-inf"), 0.0, peak)  # a row that has seen no key yet
    weight = gl.exp2(scores * scale - shift[:, None])
    decay = gl.exp2(largest - shift)
    total = total * decay + gl.sum(weight, axis=1)
    return weight, peak, total, decay
