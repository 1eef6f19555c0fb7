"""Causal attention over the paged KV cache: decode rows, chunks behind a cached prefix, and any mixture of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from aphro_kernels import hopper_attention
from aphro_kernels.attention_kernels import attention_kernel
from aphro_kernels.chunk_tiles import list_tiles
from aphro_kernels.decode_attention import decode_attention
from aphro_kernels.decode_work import DecodeWork, build_decode_work, plan_decode_
from aphro_kernels.float8 import float8_as_bytes
from aphro_kernels.language import chain_options, next_power_of_2, runs_kernels


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
    softcap: float | None = None,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
    work: DecodeWork | None = None,
    tiles: Tensor | None = None,
    num_seqs: Tensor | None = None,
    is_long: bool | None = None,
    out: Tensor | None = None,
) -> Tensor:
    num_kv_heads, block_size, head_dim = k_cache.shape[1:]
    out = torch.zeros_like(q) if out is None else out
    starts = query_start_loc.tolist()
    for i, seq_len in enumerate(seq_lens.tolist() if num_seqs is None else seq_lens[: int(num_seqs)].tolist()):
        query = q[starts[i] : starts[i + 1]].float()
        if not len(query) or seq_len < 0:
            continue
        if not seq_len:
            out[starts[i] : starts[i + 1]] = 0.0
            continue
        blocks = block_tables[i, : -(-seq_len // block_size)].long()
        k, v = (
            cache[blocks].transpose(0, 1).reshape(num_kv_heads, -1, head_dim)[:, :seq_len].float() * cache_scale
            for cache, cache_scale in ((k_cache, key_scale), (v_cache, value_scale))
        )
        grouped = query.view(len(query), num_kv_heads, -1, head_dim)
        scores = torch.einsum("qhgd,hkd->hgqk", grouped, k) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
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
    softcap: float | None = None,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
    work: DecodeWork | None = None,
    tiles: Tensor | None = None,
    num_seqs: Tensor | None = None,
    is_long: bool | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``[num_tokens, num_heads, head_dim]``, the shape and dtype of ``q``; tokens of a sequence stand together.

    The last of a sequence's queries sees all its ``seq_lens`` keys, those before it one less each; with ``window``
    only the last ``window`` of these; with ``softcap`` c a score s counts as c * tanh(s / c). Caches ``[num_blocks,
    num_kv_heads, block_size, head_dim]``, in float8_e4m3fn times ``key_scale`` and ``value_scale``; ``block_tables``
    [num_seqs, max_blocks], ``seq_lens`` [num_seqs] (this step's tokens included), ``query_start_loc``
    [num_seqs + 1], all int32. ``max_query_len`` 1 says that every sequence has exactly one query: that takes
    decode_attention.py, for which ``work`` should be this step's plan (without one, each call makes its own). Call
    decode rows and chunks apart: a decode row among chunks costs a chunk's tile. ``max_query_len``, ``max_seq_len``
    are upper bounds. A sequence of length 0 gives zeros, or nothing among chunks; a decode row of negative length
    nothing. ``out`` takes the answer. ``num_seqs`` [1] int32 on the device says how many of the sequences of chunks
    there are, None: all; rows that they leave out get nothing. ``is_long``: whether chunks are long on average, None:
    by their number.
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
        softcap=softcap,
        key_scale=key_scale,
        value_scale=value_scale,
        work=work,
        tiles=tiles,
        num_seqs=num_seqs,
        is_long=is_long,
        out=out,
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
    softcap: float | None = None,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
    work: DecodeWork | None = None,
    tiles: Tensor | None = None,
    num_seqs: Tensor | None = None,
    is_long: bool | None = None,
    out: Tensor | None = None,
) -> Tensor:
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[1]
    k_cache, v_cache, scale = float8_as_bytes(k_cache), float8_as_bytes(v_cache), scale * key_scale
    if max_query_len == 1:
        work = _plan(q, num_kv_heads, seq_lens, window) if work is None else work
        assert work.window == (window or 0)
        return decode_attention(
            q,
            k_cache,
            v_cache,
            block_tables=block_tables,
            seq_lens=seq_lens,
            scale=scale,
            work=work,
            value_scale=value_scale,
            softcap=softcap,
            out=out,
        )
    assert q.stride()[1:] == (head_dim, 1)
    assert k_cache[0].is_contiguous()
    assert k_cache.stride() == v_cache.stride()
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    if not num_tokens:
        return out
    is_long = hopper_attention.are_long(num_tokens, len(seq_lens)) if is_long is None else is_long
    if is_long and value_scale == 1.0 and hopper_attention.suits(q, k_cache, window, softcap):
        if tiles is None:
            tiles = list_tiles(seq_lens, query_start_loc, num_tokens, num_heads // num_kv_heads)
        hopper_attention.hopper_attention(
            q,
            k_cache,
            v_cache,
            out,
            block_tables=block_tables,
            tiles=tiles,
            scale=scale,
        )
        return out
    _launch_chunks(
        q,
        k_cache,
        v_cache,
        out,
        block_tables=block_tables,
        seq_lens=seq_lens,
        query_start_loc=query_start_loc,
        scale=scale,
        window=window,
        softcap=softcap,
        value_scale=value_scale,
        num_seqs=num_seqs,
    )
    return out


def _launch_chunks(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    out: Tensor,
    *,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    value_scale: float,
    num_seqs: Tensor | None,
) -> None:
    """Into ``out``: chunks as the kernel for any GPU takes them."""
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, block_size = k_cache.shape[1:3]
    num_seqs = seq_lens.new_full((1,), len(seq_lens)) if num_seqs is None else num_seqs
    group, group_padded = num_heads // num_kv_heads, next_power_of_2(num_heads // num_kv_heads)
    dims = max(next_power_of_2(head_dim), 16)  # the least that tl.dot takes
    tile = _tile(num_tokens * num_heads, group_padded, dims, q.dtype)
    queries = tile["ROWS"] // group_padded
    attention_kernel[(num_tokens // queries + len(seq_lens), num_kv_heads)](
        q,
        k_cache,
        v_cache,
        out,
        block_tables,
        seq_lens,
        query_start_loc,
        num_seqs,
        q.stride(0),
        k_cache.stride(0),
        block_tables.stride(0),
        scale * math.log2(math.e),
        value_scale,
        QUERIES=queries,
        GROUP=group,
        GROUP_PADDED=group_padded,
        HEAD_DIM=head_dim,
        DIMS=dims,
        BLOCK_SIZE=block_size,
        WINDOW=window or 0,
        SOFTCAP=(softcap or 0.0) * math.log2(math.e),
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        **tile,
        **chain_options(q),
    )


def _plan(q: Tensor, num_kv_heads: int, seq_lens: Tensor, window: int | None) -> DecodeWork:
    num_rows, num_heads, head_dim = q.shape
    work = build_decode_work(
        num_rows,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=q.dtype,
        device=q.device,
        window=window,
    )
    if num_rows:
        plan_decode_(work, seq_lens, num_kv_heads)
    return work


def _tile(num_rows: int, group_padded: int, dims: int, dtype: torch.dtype) -> dict[str, int]:
    """Rows (queries times heads of a group) and keys of one program, and how Triton runs it.

    Measured on an H100 with bfloat16 and head_dim 64 and 128; ``num_rows`` is queries times heads of the step.
    """
    head_bytes = dims * dtype.itemsize
    is_small = num_rows < 2**16  # too few tiles of the larger kind for all multiprocessors
    if head_bytes > 256:
        rows, keys, num_warps, num_stages = 64, 32, 4, 2
    elif head_bytes > 128:
        rows, keys, num_warps, num_stages = (64, 64, 4, 2) if is_small else (256, 64, 8, 5)
    else:
        rows, keys, num_warps, num_stages = 64 if is_small else 128, 64, 4, 3
    return {"ROWS": max(rows, group_padded), "KEYS": keys, "num_warps": num_warps, "num_stages": num_stages}
