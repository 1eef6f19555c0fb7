"""Attention of one query a row over the paged cache, in one launch whose grid no length changes: fit for CUDA graphs.

    work = build_decode_work(max_rows, num_heads=..., ...)     # once, decode_work.py
    plan_decode_(work, seq_lens, num_kv_heads)                 # in each step, or in its graph, before the layers
    decode_attention(q, k_cache, v_cache, block_tables=..., seq_lens=..., scale=..., work=work)    # in each layer

Lengths and block tables are read on the device only. ``work`` must have been planned with the same ``seq_lens``.
"""
# ruff: noqa: N803, N806, PLR0915  (constants in capitals; a kernel is one piece)

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from aphro_kernels import hopper_decode
from aphro_kernels.attention_kernels import attend
from aphro_kernels.decode_work import FIELDS, DecodeWork, num_tiles_of, programs_of
from aphro_kernels.language import chain_options, fetch, jit, let_next_start, next_power_of_2, tl, wait_for_last

_NUM_WARPS: Final = 4
_NUM_STAGES: Final = 3


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    block_tables: Tensor,
    seq_lens: Tensor,
    scale: float,
    work: DecodeWork,
    value_scale: float = 1.0,
    softcap: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``[num_rows, num_heads, head_dim]``: row i of ``q`` sees its ``seq_lens[i]`` keys; a row of length 0 gives zeros.

    Caches ``[num_blocks, num_kv_heads, block_size, head_dim]``, ``block_tables`` [num_rows, any] int32, ``seq_lens``
    [num_rows] int32. For CUDA tensors; paged_attention.py has the reference. The same bits for the same lengths.
    """
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads, block_size = k_cache.shape[1:3]
    assert q.stride()[1:] == (head_dim, 1)
    assert k_cache[0].is_contiguous()
    assert k_cache.stride() == v_cache.stride()
    assert work.parts.shape[1:] == (num_heads // num_kv_heads, head_dim)
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    if not num_rows:
        return out
    if hopper_decode.suits(q, k_cache, work, softcap):
        hopper_decode.launch(
            q,
            k_cache,
            v_cache,
            out,
            block_tables=block_tables,
            seq_lens=seq_lens,
            scale=scale,
            value_scale=value_scale,
            work=work,
        )
        return out
    group = num_heads // num_kv_heads
    _decode_kernel[(programs_of(work, num_rows),)](
        q,
        k_cache,
        v_cache,
        out,
        block_tables,
        seq_lens,
        work.stretches,
        work.totals,
        work.arrivals,
        work.parts,
        work.part_weights,
        q.stride(0),
        k_cache.stride(0),
        block_tables.stride(0),
        scale * math.log2(math.e),
        value_scale,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        DIMS=max(next_power_of_2(head_dim), 16),  # the least that tl.dot takes
        BLOCK_SIZE=block_size,
        WINDOW=work.window,
        SOFTCAP=(softcap or 0.0) * math.log2(math.e),
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        HEADS=next_power_of_2(group),
        ROWS=max(next_power_of_2(group), 16),
        KEYS=work.keys,
        FIELDS=FIELDS,
        num_warps=_NUM_WARPS,
        num_stages=_NUM_STAGES,
        **chain_options(q),
    )
    return out


@jit(do_not_specialize=["table_stride", "scale", "value_scale"])
def _decode_kernel(
    q: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    out: tl.tensor,
    block_tables: tl.tensor,
    seq_lens: tl.tensor,
    stretches: tl.tensor,
    totals: tl.tensor,
    arrivals: tl.tensor,
    parts: tl.tensor,
    part_weights: tl.tensor,
    q_stride: tl.tensor,
    block_stride: tl.tensor,
    table_stride: tl.tensor,
    scale: tl.tensor,
    value_scale: tl.tensor,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    FIELDS: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    """One stretch of tiles, segment by segment. Rows of the tile are the query heads of the segment's KV head."""
    let_next_start(CHAINED)
    program = tl.program_id(0)
    tile = tl.load(stretches + program * FIELDS, cache_modifier=".cg")
    num_segments = tl.load(stretches + program * FIELDS + 1, cache_modifier=".cg")
    row = tl.load(stretches + program * FIELDS + 2, cache_modifier=".cg")
    row_tile = tl.load(stretches + program * FIELDS + 3, cache_modifier=".cg")
    stop = tl.load(stretches + program * FIELDS + 4, cache_modifier=".cg")
    first_of_piece = tl.load(stretches + program * FIELDS + 5, cache_modifier=".cg")
    last_of_piece = tl.load(stretches + program * FIELDS + 6, cache_modifier=".cg")
    total = tl.load(totals, cache_modifier=".cg").to(tl.int64)
    used = tl.load(totals + 1, cache_modifier=".cg").to(tl.int64)
    if CHAINED:  # noqa: SIM102  (one of the two is a constant)
        if (num_segments > 0) & (stop - tile <= 8):  # else the first tile is a small part of the time
            first_table = block_tables + row.to(tl.int64) * table_stride
            _fetch_first(
                k_cache, v_cache, first_table, tl.load(seq_lens + row), tile - row_tile, block_stride,
                HEAD_DIM, BLOCK_SIZE, WINDOW, KEYS,
            )  # fmt: skip
    wait_for_last(CHAINED)

    heads = tl.arange(0, ROWS)
    dims = tl.arange(0, DIMS)
    is_inside = (heads < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    for _ in range(0, num_segments):
        seq_len = tl.load(seq_lens + row)
        row_tiles = num_tiles_of(seq_len, KEYS, WINDOW)
        kv_head = (tile - row_tile) // row_tiles
        begin = row_tile + kv_head * row_tiles
        end = begin + row_tiles
        until = tl.minimum(stop, end)
        low_tile = 0
        low = 0
        if WINDOW > 0:
            low = tl.maximum(seq_len - WINDOW, 0)
            low_tile = low // KEYS
        low = tl.maximum(low, (low_tile + tile - begin) * KEYS)
        high = tl.minimum(seq_len, (low_tile + until - begin) * KEYS)

        at = heads[:, None] * HEAD_DIM + dims[None, :]
        q_at = q + row.to(tl.int64) * q_stride + kv_head * (GROUP * HEAD_DIM)
        q_tile = tl.load(q_at + at, mask=is_inside, other=0.0)
        positions = tl.zeros([ROWS], tl.int32) + seq_len - 1
        table = block_tables + row.to(tl.int64) * table_stride
        largest = tl.full([ROWS], float("-inf"), tl.float32)
        sums = tl.zeros([ROWS], tl.float32)
        mixed = tl.zeros([ROWS, DIMS], tl.float32)
        plain_high = 0
        if WINDOW == 0:
            plain_high = tl.minimum(high, seq_len // KEYS * KEYS)  # whole tiles need no masks
            mixed, largest, sums = attend(
                mixed, largest, sums, q_tile, positions, k_cache, v_cache, table, kv_head, block_stride, low,
                plain_high, scale, HEAD_DIM, BLOCK_SIZE, WINDOW, SOFTCAP, PRECISION, KEYS, IS_MASKED=False,
            )  # fmt: skip
        mixed, largest, sums = attend(
            mixed, largest, sums, q_tile, positions, k_cache, v_cache, table, kv_head, block_stride,
            tl.maximum(low, plain_high), high, scale, HEAD_DIM, BLOCK_SIZE, WINDOW, SOFTCAP, PRECISION, KEYS,
            IS_MASKED=True,
        )  # fmt: skip
        mixed = mixed * (value_scale / tl.where(sums > 0.0, sums, 1.0))[:, None]

        out_at = out + (row.to(tl.int64) * NUM_KV_HEADS + kv_head) * (GROUP * HEAD_DIM)
        if (tile == begin) & (until == end):
            tl.store(out_at + at, mixed.to(out.dtype.element_ty), mask=is_inside)
        else:
            # of a program's two parts the second is that of the segment which begins in it
            part = 2 * program + (tile == begin).to(tl.int32)
            first, last = first_of_piece, last_of_piece
            if first_of_piece < 0:
                first = (((begin + 1).to(tl.int64) * used - 1) // total).to(tl.int32)
                last = ((end.to(tl.int64) * used - 1) // total).to(tl.int32)
            _add_part(
                mixed, largest + tl.log2(sums), parts, part_weights, arrivals + row * NUM_KV_HEADS + kv_head, out_at,
                is_inside, part, first, last, GROUP, HEAD_DIM, HEADS,
            )  # fmt: skip
        tile = until
        is_last_head = until == row_tile + NUM_KV_HEADS * row_tiles
        row_tile = tl.where(is_last_head, until, row_tile)
        row = tl.where(is_last_head, row + 1, row)


@jit()
def _fetch_first(
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    table: tl.tensor,
    seq_len: tl.tensor,
    tile: tl.tensor,
    block_stride: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    KEYS: tl.constexpr,
) -> None:
    """Keys and values of a row's tile into the second-level cache while the kernel before ends; all but this step's
    token are there. What this misses of it, and it may miss all, attention loads anyway."""
    LINE: tl.constexpr = 1024 // k_cache.dtype.element_ty.primitive_bitwidth
    LINES: tl.constexpr = (HEAD_DIM + LINE - 1) // LINE
    row_tiles = num_tiles_of(seq_len, KEYS, WINDOW)
    first = tile % row_tiles * KEYS
    if WINDOW > 0:
        first += tl.maximum(seq_len - WINDOW, 0) // KEYS * KEYS
    keys = tl.minimum(first + tl.arange(0, KEYS), tl.maximum(seq_len - 1, 0))
    block = tl.load(table + keys // BLOCK_SIZE).to(tl.int64)
    at = block * block_stride + (tile // row_tiles * BLOCK_SIZE + keys % BLOCK_SIZE) * HEAD_DIM
    for line in tl.static_range(LINES):
        fetch(k_cache + at + line * LINE)
        fetch(v_cache + at + line * LINE)


@jit()
def _add_part(
    mixed: tl.tensor,
    log_sum: tl.tensor,
    parts: tl.tensor,
    part_weights: tl.tensor,
    arrivals: tl.tensor,
    out_at: tl.tensor,
    is_inside: tl.tensor,
    part: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr,
) -> None:
    """Store one part of a segment that programs ``first`` to ``last`` share; whoever comes last adds them all."""
    heads = tl.arange(0, mixed.shape[0])
    dims = tl.arange(0, mixed.shape[1])
    tl.store(parts + part * (GROUP * HEAD_DIM) + heads[:, None] * HEAD_DIM + dims[None, :], mixed, mask=is_inside)
    tl.store(part_weights + part * GROUP + heads, log_sum, mask=heads < GROUP)
    tl.debug_barrier()  # all threads have stored before one of them says so
    arrived = tl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu")
    if arrived == last - first:
        tl.debug_barrier()
        _combine(parts, part_weights, out_at, first, last, GROUP, HEAD_DIM, mixed.shape[1], HEADS)
        tl.store(arrivals, 0)


@jit()
def _combine(
    parts: tl.tensor,
    part_weights: tl.tensor,
    out_at: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    HEADS: tl.constexpr,
) -> None:
    """The sum of a segment's parts, each weighted by exp2 of its log-sum-exp, in the order of the keys.

    First the largest weight: then no part waits for the sum of those before it, and several are loaded at once. All
    loads go past the first-level cache, which other multiprocessors' stores do not reach.
    """
    heads = tl.arange(0, HEADS)
    dims = tl.arange(0, DIMS)
    is_inside = (heads < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    at = heads[:, None] * HEAD_DIM + dims[None, :]
    peak = tl.full([HEADS], -1e30, tl.float32)
    for start in range(first, last + 1, 32):
        programs = start + tl.arange(0, 32)
        part = 2 * programs + (programs == first).to(tl.int32)
        is_part = (programs <= last)[:, None] & (heads < GROUP)[None, :]
        weight_at = part_weights + part[:, None] * GROUP + heads[None, :]
        weight = tl.load(weight_at, mask=is_part, other=-1e30, cache_modifier=".cg")
        peak = tl.maximum(peak, tl.max(weight, axis=0))
    sums = tl.zeros([HEADS], tl.float32)
    mixed = tl.zeros([HEADS, DIMS], tl.float32)
    for program in tl.range(first, last + 1, loop_unroll_factor=4):
        part = 2 * program + (program == first).to(tl.int32)
        weight = tl.load(part_weights + part * GROUP + heads, mask=heads < GROUP, other=-1e30, cache_modifier=".cg")
        value = tl.load(parts + part * (GROUP * HEAD_DIM) + at, mask=is_inside, other=0.0, cache_modifier=".cg")
        share = tl.exp2(weight - peak)
        mixed += value * share[:, None]
        sums += share
    tl.store(out_at + at, (mixed / sums[:, None]).to(out_at.dtype.element_ty), mask=is_inside)
