"""Attention over the paged cache on one rank: QKV, QK-norm, rotation, KV write, and the two ways of reading."""

from __future__ import annotations

import torch
from aphro_kernels.paged_attention import paged_attention
from aphro_kernels.rotary import rotary_and_cache
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from aphro_core.distributed import TensorParallelGroup
from aphro_core.layers.batch import Chunk, DecodeGroup, GatheredRows, PagedRows
from aphro_core.layers.linear import Linear
from aphro_core.layers.norm import RMSNorm
from aphro_core.layers.rotary import Rotation


class Attention:
    """One layer's heads on one rank: whole KV groups, or part of one.

    K and V of all rows of a step are written before any row is read: rows of one step may share blocks.
    """

    def __init__(
        self,
        qkv: Linear,
        out: Linear,
        group: TensorParallelGroup,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        window: int | None,
        q_norm: RMSNorm | None = None,
        k_norm: RMSNorm | None = None,
    ) -> None:
        self._qkv, self._out, self._group = qkv, out, group
        self._num_heads, self._num_kv_heads, self._head_dim = num_heads, num_kv_heads, head_dim
        self._window = window
        self._q_norm, self._k_norm = q_norm, k_norm

    def __call__(self, x: Tensor, rotation: Rotation, rows: GatheredRows | PagedRows, cache: Tensor) -> Tensor:
        """``x`` [num_tokens, hidden_size] to the same shape. ``cache`` as worker/kv_cache.py allocates it."""
        qkv = self._qkv(x).view(-1, self._num_heads + 2 * self._num_kv_heads, self._head_dim)
        if isinstance(rows, PagedRows):
            attended = self._attend_paged(qkv, rotation, rows, cache)
        else:
            attended = self._attend_gathered(qkv, rotation, rows, cache)
        return self._group.all_reduce_(self._out(attended))

    # ---------------------------------------------------------------- GPU: kernels on the block tables

    def _attend_paged(self, qkv: Tensor, rotation: Rotation, rows: PagedRows, cache: Tensor) -> Tensor:
        k_cache, v_cache = cache[:, 0], cache[:, 1]
        q = rotary_and_cache(
            qkv,
            rotation.cos,
            rotation.sin,
            k_cache=k_cache,
            v_cache=v_cache,
            slot_mapping=rows.slot_mapping,
            q_norm=None if self._q_norm is None else self._q_norm.weight,
            k_norm=None if self._k_norm is None else self._k_norm.weight,
            eps=0.0 if self._q_norm is None else self._q_norm.eps,
        )
        parts = [
            paged_attention(
                q[part.start : part.stop],
                k_cache,
                v_cache,
                block_tables=part.block_tables,
                seq_lens=part.seq_lens,
                query_start_loc=part.query_start_loc,
                max_query_len=part.max_query_len,
                max_seq_len=part.max_seq_len,
                scale=self._head_dim**-0.5,
                window=self._window,
            )
            for part in rows.parts
        ]
        return _join(parts).view(len(qkv), -1)

    # ---------------------------------------------------------------- CPU: torch's operations on gathered blocks

    def _attend_gathered(self, qkv: Tensor, rotation: Rotation, rows: GatheredRows, cache: Tensor) -> Tensor:
        num_heads, num_kv_heads, head_dim = self._num_heads, self._num_kv_heads, self._head_dim
        q, k = qkv[:, :num_heads], qkv[:, num_heads : num_heads + num_kv_heads]
        if self._q_norm is not None and self._k_norm is not None:
            q.copy_(self._q_norm(q))
            k.copy_(self._k_norm(k))
        rotation.apply_(qkv[:, : num_heads + num_kv_heads])
        kv = qkv[:, num_heads:].reshape(-1, head_dim)
        cache.view(-1, head_dim).index_copy_(0, rows.slot_rows, kv)
        parts = [self._decode(part, q, rows, cache) for part in rows.decode]
        parts += [self._prefill(part, qkv, rows, cache) for part in rows.chunks]
        return _join(parts)

    def _decode(self, part: DecodeGroup, q: Tensor, rows: GatheredRows, cache: Tensor) -> Tensor:
        num_rows, num_kv_heads = part.stop - part.start, self._num_kv_heads
        # the query heads of a KV head become rows of one product: several times faster than one head at a time
        folded = q[part.start : part.stop].reshape(num_rows, num_kv_heads, -1, self._head_dim)
        k, v = _gather(cache, part.block_rows).view(2, num_rows, num_kv_heads, part.max_len, self._head_dim)
        mask = rows.mask_of(part, self._window, q.dtype)
        return scaled_dot_product_attention(folded, k, v, attn_mask=mask).reshape(num_rows, -1)

    def _prefill(self, part: Chunk, qkv: Tensor, rows: GatheredRows, cache: Tensor) -> Tensor:
        num_tokens, num_kv_heads = part.stop - part.start, self._num_kv_heads
        heads = qkv[part.start : part.stop].transpose(0, 1)  # [heads, tokens, head_dim]
        q, k, v = torch.split(heads, [self._num_heads, num_kv_heads, num_kv_heads])
        if part.context:
            length = part.context + num_tokens
            k, v = _gather(cache, part.block_rows).view(2, num_kv_heads, -1, self._head_dim)[:, :, :length]
        is_plain = part.context == 0 and (self._window is None or self._window >= num_tokens)
        attended = scaled_dot_product_attention(
            q[None],
            k[None],
            v[None],
            attn_mask=None if is_plain else rows.mask_of(part, self._window, qkv.dtype),
            is_causal=is_plain,  # torch aligns it to the first key: only right without a context
            enable_gqa=self._num_heads > num_kv_heads,
        )
        return attended[0].transpose(0, 1).reshape(num_tokens, -1)


def _gather(cache: Tensor, block_rows: Tensor) -> Tensor:
    """Chosen (block, K or V, head) rows of the cache, one after the other: ``[rows, block_size * head_dim]``."""
    return cache.view(-1, cache.shape[3] * cache.shape[4]).index_select(0, block_rows)


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
