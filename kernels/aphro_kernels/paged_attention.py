"""Causal attention over the paged KV cache: decode rows, chunks behind a cached prefix, and any mixture of them."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from aphro_kernels.attention_kernels import attention_kernel, combine_kernel
from aphro_kernels.language import next_power_of_2, runs_kernels, triton

# decode: programs to aim at, and keys of one of them at least and at most
_NUM_PROGRAMS: Final = 256
_PIECES: Final = (128, 1024)
_MAX_PIECES: Final = 64  # of one row


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
    decode path, which splits long rows and adds the parts in a fixed order. Call decode rows and chunks apart: a
    decode row among chunks costs a chunk's tile. ``max_query_len``, ``max_seq_len`` are upper bounds. A sequence of
    length 0 gives zeros.
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
    assert q.stride()[1:] == (head_dim, 1)
    assert k_cache[0].is_contiguous()
    assert k_cache.stride() == v_cache.stride()
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    if not num_tokens:
        return out
    is_decode = max_query_len == 1
    group, group_padded = num_heads // num_kv_heads, next_power_of_2(num_heads // num_kv_heads)
    dims = max(next_power_of_2(head_dim), 16)  # the least that tl.dot takes
    tile = _tile(is_decode, num_tokens * num_heads, group_padded, dims, q.dtype)
    piece = _piece(num_tokens * num_kv_heads, max_seq_len)
    assert piece % tile["KEYS"] == 0
    num_pieces = triton.cdiv(max_seq_len, piece) if is_decode else 1
    is_split = num_pieces > 1
    parts = q.new_empty(num_tokens, num_heads, num_pieces, head_dim, dtype=torch.float32) if is_split else out
    weights = q.new_empty(num_tokens, num_heads, num_pieces, dtype=torch.float32) if is_split else out
    queries = 1 if is_decode else tile["ROWS"] // group_padded
    num_tiles = num_tokens if is_decode else num_tokens // queries + len(seq_lens)
    attention_kernel[(num_tiles, num_kv_heads, num_pieces)](
        q,
        k_cache,
        v_cache,
        parts,
        weights,
        block_tables,
        seq_lens,
        query_start_loc,
        len(seq_lens),
        piece,
        q.stride(0),
        k_cache.stride(0),
        block_tables.stride(0),
        scale * math.log2(math.e),
        QUERIES=queries,
        GROUP=group,
        GROUP_PADDED=group_padded,
        HEAD_DIM=head_dim,
        DIMS=dims,
        BLOCK_SIZE=block_size,
        WINDOW=window or 0,
        IS_DECODE=is_decode,
        IS_SPLIT=is_split,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        **tile,
    )
    if is_split:
        at_once = min(next_power_of_2(num_pieces), 16)
        combine_kernel[(num_tokens, num_heads)](
            parts,
            weights,
            out,
            seq_lens,
            num_pieces,
            piece,
            HEAD_DIM=head_dim,
            DIMS=dims,
            WINDOW=window or 0,
            PIECES=at_once,
            num_warps=min(max(at_once * dims // 512, 1), 4),
        )
    return out


def _piece(num_rows: int, max_seq_len: int) -> int:
    """Keys of one program in decode, for ``num_rows`` rows times KV heads: a power of two.

    Enough pieces for every multiprocessor to have some. Longer ones save partial results, shorter ones balance rows
    of different lengths, and beyond ``_MAX_PIECES`` a row the partial results would take too much memory.
    """
    wanted = next_power_of_2(max(max_seq_len * num_rows // _NUM_PROGRAMS, 1))
    return max(min(max(wanted, _PIECES[0]), _PIECES[1]), next_power_of_2(triton.cdiv(max_seq_len, _MAX_PIECES)))


def _tile(is_decode: bool, num_rows: int, group_padded: int, dims: int, dtype: torch.dtype) -> dict[str, int]:
    """Rows (queries times heads of a group) and keys of one program, and how Triton runs it.

    Measured on an H200 with bfloat16 and head_dim 64 and 128; ``num_rows`` is queries times heads of the step.
    """
    head_bytes = dims * dtype.itemsize
    if is_decode:
        return {"ROWS": max(16, group_padded), "KEYS": 32 if head_bytes > 256 else 128, "num_warps": 4, "num_stages": 2}
    is_small = num_rows < 2**16  # too few tiles of the larger kind for all multiprocessors
    if head_bytes > 256:
        rows, keys, num_warps, num_stages = 64, 32, 4, 2
    elif head_bytes > 128:
        rows, keys, num_warps, num_stages = (64, 64, 4, 2) if is_small else (256, 64, 8, 3)
    else:
        rows, keys, num_warps, num_stages = 64 if is_small else 128, 128, 4, 2
    return {"ROWS": max(rows, group_padded), "KEYS": keys, "num_warps": num_warps, "num_stages": num_stages}
