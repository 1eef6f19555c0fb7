"""Attention over the paged cache: QKV, rotation, KV write, then decode rows in groups and prefill chunks one by one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from aphro_core.distributed import TensorParallelGroup
from aphro_core.layers.batch import Batch, Chunk, DecodeGroup
from aphro_core.layers.linear import Linear
from aphro_core.layers.norm import RMSNorm
from aphro_core.layers.rotary import rotate


class Attention:
    """One layer's attention on one rank: whole KV groups, or part of one."""

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

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, batch: Batch, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        """``x`` [num_tokens, hidden_size]. KV of all rows is written before any row reads: rows may share blocks."""
        heads, kv_heads, width = self._num_heads, self._num_kv_heads, self._head_dim
        qkv = self._qkv(x).view(-1, heads + 2 * kv_heads, width)
        qk, v = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
        if self._q_norm is not None and self._k_norm is not None:
            qk = torch.cat((self._q_norm(qk[:, :heads]), self._k_norm(qk[:, heads:])), dim=1)
        qk = rotate(qk, cos, sin)
        q, k = qk[:, :heads], qk[:, heads:]
        k_cache.view(-1, width).index_copy_(0, batch.slot_rows, k.reshape(-1, width))
        v_cache.view(-1, width).index_copy_(0, batch.slot_rows, v.reshape(-1, width))
        parts = [self._decode(part, q, batch, k_cache, v_cache) for part in batch.decode]
        parts += [self._prefill(part, q, k, v, batch, k_cache, v_cache) for part in batch.chunks]
        attended = parts[0] if len(parts) == 1 else torch.cat(parts)
        return self._group.all_reduce_(self._out(attended))

    def _decode(self, part: DecodeGroup, q: Tensor, batch: Batch, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        rows, kv_heads, width = part.stop - part.start, self._num_kv_heads, self._head_dim
        # the query heads of a KV head become rows of one product
        folded = q[part.start : part.stop].reshape(rows, kv_heads, self._num_heads // kv_heads, width)
        k = _gather(k_cache, part.block_rows).view(rows, kv_heads, part.max_len, width)
        v = _gather(v_cache, part.block_rows).view(rows, kv_heads, part.max_len, width)
        mask = batch.mask_of(part, self._window, q.dtype)
        return F.scaled_dot_product_attention(folded, k, v, attn_mask=mask).reshape(rows, -1)

    def _prefill(
        self, part: Chunk, q: Tensor, k: Tensor, v: Tensor, batch: Batch, k_cache: Tensor, v_cache: Tensor
    ) -> Tensor:
        num_tokens, kv_heads, width = part.stop - part.start, self._num_kv_heads, self._head_dim
        queries = q[part.start : part.stop].transpose(0, 1)[None]
        is_plain = part.context == 0 and (self._window is None or self._window >= num_tokens)
        if part.context == 0:
            keys, values = (x[part.start : part.stop].transpose(0, 1) for x in (k, v))
        else:
            length = part.context + num_tokens
            keys = _gather(k_cache, part.block_rows).view(kv_heads, -1, width)[:, :length]
            values = _gather(v_cache, part.block_rows).view(kv_heads, -1, width)[:, :length]
        mask = None if is_plain else batch.mask_of(part, self._window, q.dtype)
        attended = F.scaled_dot_product_attention(
            queries, keys[None], values[None], attn_mask=mask, is_causal=is_plain, enable_gqa=self._num_heads > kv_heads
        )
        return attended[0].transpose(0, 1).reshape(num_tokens, -1)


def _gather(cache: Tensor, block_rows: Tensor) -> Tensor:
    """Blocks of chosen heads, one after the other: rows of the cache seen as [blocks * kv_heads, tokens * width]."""
    return cache.view(cache.shape[0] * cache.shape[1], -1).index_select(0, block_rows)
