"""Causal attention over the paged KV cache: decode rows, chunks behind a cached prefix, and any mixture of them."""
# ruff: noqa: N803  (the constants of a kernel are in capitals)

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from aphro_kernels.language import Pointer, Scalar, jit, next_power_of_2, runs_kernels, tl, triton

_PIECE: Final = 256  # keys that one program of a decode step reads: equal work whatever the lengths in the batch
_MAX_PIECES: Final = 64  # of one row; beyond 16k keys the pieces grow instead, so the partial results stay few


def paged_attention_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    max_query_len: int,
    max_seq_len: int,
    scale: float,
    window: int | None = None,
) -> Tensor:
    num_kv_heads, block_size, head_dim = k_cache.shape[1:]
    out = torch.zeros_like(q)
    starts = query_start_loc.tolist()
    for i, seq_len in enumerate(seq_lens.tolist()):
        query = q[starts[i] : starts[i + 1]].float()
        if not len(query) or not seq_len:
            continue
        blocks = block_tables[i, : -(-seq_len // block_size)].long()
        k, v = (
            cache[blocks].transpose(0, 1).reshape(num_kv_heads, -1, head_dim)[:, :seq_len].float()
            for cache in (k_cache, v_cache)
        )
        grouped = query.view(len(query), num_kv_heads, -1, head_dim)
        scores = torch.einsum("qhgd,hkd->hgqk", grouped, k) * scale
        positions = torch.arange(seq_len - len(query), seq_len, device=q.device).unsqueeze(1)
        keys = torch.arange(seq_len, device=q.device)
        is_hidden = (keys > positions) | (keys <= positions - (window or seq_len))
        weights = scores.masked_fill(is_hidden, -math.inf).softmax(dim=-1)
        out[starts[i] : starts[i + 1]] = torch.einsum("hgqk,hkd->qhgd", weights, v).reshape(query.shape).to(q.dtype)
    return out


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    max_query_len: int,
    max_seq_len: int,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """``[num_tokens, num_heads, head_dim]``, the shape and dtype of ``q``; tokens of a sequence stand together.

    The last of a sequence's queries sees all its ``seq_lens`` keys, those before it one less each; with ``window``
    only the last ``window`` of these. Caches ``[num_blocks, num_kv_heads, block_size, head_dim]``; ``block_tables``
    [num_seqs, max_blocks], ``seq_lens`` [num_seqs] (this step's tokens included), ``query_start_loc``
    [num_seqs + 1], all int32. ``max_query_len`` 1 says that every sequence has exactly one query: that takes the
    decode path, which splits long rows and adds the parts in a fixed order. ``max_query_len`` and ``max_seq_len``
    are upper bounds. A sequence of length 0 gives zeros.
    """
    op = _launch if runs_kernels(q) else paged_attention_reference
    return op(
        q,
        k_cache,
        v_cache,
        block_tables=block_tables,
        seq_lens=seq_lens,
        query_start_loc=query_start_loc,
        max_query_len=max_query_len,
        max_seq_len=max_seq_len,
        scale=scale,
        window=window,
    )


def _launch(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    max_query_len: int,
    max_seq_len: int,
    scale: float,
    window: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, block_size = k_cache.shape[1:3]
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    if not num_tokens:
        return out
    is_decode = max_query_len == 1
    group, dims = num_heads // num_kv_heads, next_power_of_2(head_dim)
    tile = _tile(is_decode, next_power_of_2(group), dims, q.dtype)
    piece = max(_PIECE, next_power_of_2(triton.cdiv(max_seq_len, _MAX_PIECES)))
    num_pieces = triton.cdiv(max_seq_len, piece) if is_decode else 1
    is_split = num_pieces > 1
    parts = q.new_empty(num_tokens, num_heads, num_pieces, head_dim, dtype=torch.float32) if is_split else out
    weights = q.new_empty(num_tokens, num_heads, num_pieces, dtype=torch.float32) if is_split else out
    queries = 1 if is_decode else tile["ROWS"] // next_power_of_2(group)
    num_tiles = num_tokens if is_decode else num_tokens // queries + len(seq_lens)
    shape = {
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "DIMS": dims,
        "WINDOW": window or 0,
        "PIECE": piece if is_decode else 0,
    }
    _attention_kernel[(num_tiles, num_kv_heads, num_pieces)](
        q,
        k_cache,
        v_cache,
        parts,
        weights,
        block_tables,
        seq_lens,
        query_start_loc,
        len(seq_lens),
        q.stride(0),
        k_cache.stride(0),
        block_tables.stride(0),
        scale * math.log2(math.e),
        QUERIES=queries,
        GROUP_PADDED=next_power_of_2(group),
        BLOCK_SIZE=block_size,
        IS_SPLIT=is_split,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        **shape,
        **tile,
    )
    if is_split:
        grid = (num_tokens, num_heads)
        _combine_kernel[grid](parts, weights, out, seq_lens, num_pieces, HEAD_DIM=head_dim, DIMS=dims, PIECE=piece,
                              WINDOW=window or 0, num_warps=4)  # fmt: skip
    return out


def _tile(is_decode: bool, group_padded: int, dims: int, dtype: torch.dtype) -> dict[str, int]:
    """Rows (queries times heads of a group) and keys of one program, and how Triton runs it."""
    wide = dims * dtype.itemsize > 256  # bytes of a head: 256 is bf16 with head_dim 128
    if is_decode:
        return {"ROWS": max(16, group_padded), "KEYS": 32 if wide else 64, "num_warps": 4, "num_stages": 3}
    rows = max(64 if wide else 128, group_padded)
    return {"ROWS": rows, "KEYS": 32 if wide else 64, "num_warps": 4 if wide else 8, "num_stages": 2}


@jit(do_not_specialize=["num_seqs", "table_stride", "scale"])
def _attention_kernel(
    q: Pointer,
    k_cache: Pointer,
    v_cache: Pointer,
    out: Pointer,
    weights: Pointer,
    block_tables: Pointer,
    seq_lens: Pointer,
    query_start_loc: Pointer,
    num_seqs: Scalar,
    q_stride: Scalar,
    block_stride: Scalar,
    table_stride: Scalar,
    scale: Scalar,
    QUERIES: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    PIECE: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
) -> None:
    """One tile of one sequence's queries, all heads that share a KV head, against its keys or one piece of them."""
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    if PIECE > 0:
        seq, start, query_len, first = tile, tile, 1, 0
    else:
        seq = _sequence_of_tile(query_start_loc, tile, num_seqs, QUERIES)
        start = tl.load(query_start_loc + seq)
        query_len = tl.load(query_start_loc + seq + 1) - start
        first = (tile - (start // QUERIES + seq)) * QUERIES
        if first >= query_len:
            return
    seq_len = tl.load(seq_lens + seq)
    context_len = seq_len - query_len

    rows = tl.arange(0, ROWS)
    query = first + rows // GROUP_PADDED
    positions = context_len + query
    head = kv_head * GROUP + rows % GROUP_PADDED
    is_row = (rows // GROUP_PADDED < QUERIES) & (query < query_len) & (rows % GROUP_PADDED < GROUP)
    dims = tl.arange(0, DIMS)
    is_dim = dims < HEAD_DIM
    token = (start + query).to(tl.int64)
    q_at = q + token[:, None] * q_stride + head[:, None] * HEAD_DIM + dims[None, :]
    q_tile = tl.load(q_at, mask=is_row[:, None] & is_dim[None, :], other=0.0)

    low = 0
    high = tl.minimum(context_len + first + QUERIES, seq_len)
    if WINDOW > 0:
        low = tl.maximum(low, context_len + first - WINDOW + 1)
    if PIECE > 0:
        low = tl.maximum(low, tl.program_id(2) * PIECE)
        high = tl.minimum(high, (tl.program_id(2) + 1) * PIECE)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, DIMS], tl.float32)
    table = block_tables + seq.to(tl.int64) * table_stride
    for tile_start in range(low // KEYS * KEYS, high, KEYS):
        keys = tile_start + tl.arange(0, KEYS)
        is_key = (keys >= low) & (keys < high)
        block = tl.load(table + keys // BLOCK_SIZE, mask=is_key, other=0).to(tl.int64)
        at = block * block_stride + (kv_head * BLOCK_SIZE + keys % BLOCK_SIZE) * HEAD_DIM
        is_inside = is_key[:, None] & is_dim[None, :]
        k = tl.load(k_cache + at[:, None] + dims[None, :], mask=is_inside, other=0.0)
        scores = tl.dot(q_tile, tl.trans(k), input_precision=PRECISION) * scale
        is_seen = is_key[None, :] & (keys[None, :] <= positions[:, None])
        if WINDOW > 0:
            is_seen = is_seen & (keys[None, :] > positions[:, None] - WINDOW)
        scores = tl.where(is_seen, scores, float("-inf"))
        peak = tl.maximum(largest, tl.max(scores, axis=1))
        shift = tl.where(peak == float("-inf"), 0.0, peak)  # a row that has seen no key yet
        exps = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(largest - shift)
        v = tl.load(v_cache + at[:, None] + dims[None, :], mask=is_inside, other=0.0)
        mixed = mixed * decay[:, None] + tl.dot(exps.to(v.dtype), v, input_precision=PRECISION)
        total = total * decay + tl.sum(exps, axis=1)
        largest = peak

    mixed = mixed / tl.where(total > 0.0, total, 1.0)[:, None]
    num_heads = tl.num_programs(1) * GROUP
    part = token * num_heads + head
    if IS_SPLIT:
        part = part * tl.num_programs(2) + tl.program_id(2)
        tl.store(weights + part, tl.where(total > 0.0, largest + tl.log2(total), float("-inf")), mask=is_row)
    mixed_at = out + part[:, None] * HEAD_DIM + dims[None, :]
    tl.store(mixed_at, mixed.to(out.dtype.element_ty), mask=is_row[:, None] & is_dim[None, :])


@jit()
def _sequence_of_tile(query_start_loc: Pointer, tile: Scalar, num_seqs: Scalar, QUERIES: tl.constexpr) -> Scalar:
    """The last sequence whose tiles begin at or before ``tile``; sequence s begins at start // QUERIES + s."""
    low = 0
    high = num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(query_start_loc + middle) // QUERIES + middle <= tile:
            low = middle
        else:
            high = middle
    return low


@jit(do_not_specialize=["num_pieces"])
def _combine_kernel(
    parts: Pointer,
    weights: Pointer,
    out: Pointer,
    seq_lens: Pointer,
    num_pieces: Scalar,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    PIECE: tl.constexpr,
    WINDOW: tl.constexpr,
) -> None:
    """Add the pieces of one row and head, each weighted by exp2 of its log-sum-exp, always in the same order."""
    row = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    dims = tl.arange(0, DIMS)
    seq_len = tl.load(seq_lens + tl.program_id(0))
    low = 0
    if WINDOW > 0:
        low = tl.maximum(seq_len - WINDOW, 0) // PIECE
    high = tl.cdiv(seq_len, PIECE)
    largest = float("-inf")
    total = 0.0
    mixed = tl.zeros([DIMS], tl.float32)
    for start in range(low, high, 16):
        pieces = start + tl.arange(0, 16)
        at = row * num_pieces + pieces
        weight = tl.load(weights + at, mask=pieces < high, other=float("-inf"))
        part_at = parts + at[:, None] * HEAD_DIM + dims[None, :]
        part = tl.load(part_at, mask=(pieces < high)[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
        peak = tl.maximum(largest, tl.max(weight, axis=0))
        share = tl.exp2(weight - peak)
        decay = tl.exp2(largest - peak)
        mixed = mixed * decay + tl.sum(part * share[:, None], axis=0)
        total = total * decay + tl.sum(share, axis=0)
        largest = peak
    mixed = mixed / tl.where(total > 0.0, total, 1.0)
    tl.store(out + row * HEAD_DIM + dims, mixed.to(out.dtype.element_ty), mask=dims < HEAD_DIM)
