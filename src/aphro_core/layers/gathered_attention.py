"""Attention over the paged cache on a CPU: a kernel for rows of few keys, gathered blocks and products for others."""

from __future__ import annotations

import torch
from aphro_kernels.cpu_decode_attention import DecodeAttention
from aphro_kernels.cpu_rotary import CpuRotaryAndCache
from aphro_kernels.float8 import FLOAT8, float8_as_bytes, narrow_to_float8, widen_float8
from torch import Tensor
from torch.nn.functional import rms_norm

from aphro_core.layers.batch import Chunk, GatheredRows
from aphro_core.layers.cache_format import PLAIN_SCALES
from aphro_core.layers.norm import RMSNorm
from aphro_core.layers.rotary import Rotation


class GatheredAttention:
    """From a layer's QKV to the output of its heads. The query heads of a KV head are rows of one product."""

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        window: int | None,
        dtype: torch.dtype,
        q_norm: RMSNorm | None,
        k_norm: RMSNorm | None,
        scale: float,
        softcap: float | None,
        cache_dtype: torch.dtype | None = None,
        cache_scales: tuple[float, float] = PLAIN_SCALES,
    ) -> None:
        self._num_heads, self._num_kv_heads, self._head_dim = num_heads, num_kv_heads, head_dim
        self._window = window
        self._scale, self._softcap = scale, softcap
        self._direct = DecodeAttention(
            num_heads, num_kv_heads, head_dim, dtype, scale, window, softcap, cache_dtype, cache_scales
        )
        self._key_scale, self._value_scale = cache_scales
        self._divisors = torch.tensor(cache_scales).repeat_interleave(num_kv_heads).view(-1, 1)  # of the K and V heads
        self._rotary: CpuRotaryAndCache | None = None
        if dtype == torch.bfloat16:
            q_gain, k_gain = (None if norm is None else norm.weight for norm in (q_norm, k_norm))
            eps = 0.0 if q_norm is None else q_norm.eps
            self._rotary = CpuRotaryAndCache(num_heads, num_kv_heads, q_gain, k_gain, eps)
        self._qk_gain: Tensor | None = None  # [heads, head_dim]
        if q_norm is not None and k_norm is not None:
            each = [q_norm.weight.expand(num_heads, -1), k_norm.weight.expand(num_kv_heads, -1)]
            self._qk_gain, self._eps = torch.cat(each), q_norm.eps

    def __call__(self, qkv: Tensor, rotation: Rotation, rows: GatheredRows, cache: Tensor) -> Tensor:
        """``qkv`` [num_tokens, num_heads + 2 * num_kv_heads, head_dim], overwritten, to [num_tokens, q width]."""
        is_written = self._rotary is not None and cache.dtype == qkv.dtype
        if self._rotary is not None:
            self._rotary(qkv, rotation.cos, rotation.sin, cache if is_written else None, rows.slot_rows)
        else:
            self._rotate_(qkv[:, : self._num_heads + self._num_kv_heads], rotation)
        if not is_written:
            self._write(qkv[:, self._num_heads :], rows.slot_rows, cache)
        q, parts = qkv[:, : self._num_heads], []
        if rows.direct is not None:
            tables, lens = rows.direct.block_tables, rows.direct.seq_lens
            attended = self._direct(q[: len(lens)], cache, tables, lens)
            parts.append(attended.view(len(lens), -1))
        parts += [self._prefill(part, q[part.start : part.stop], cache) for part in rows.chunks[self._window]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _rotate_(self, qk: Tensor, rotation: Rotation) -> None:
        if self._qk_gain is not None:
            torch.mul(rms_norm(qk, (self._head_dim,), None, self._eps), self._qk_gain, out=qk)
        rotation.apply_(qk)

    def _write(self, kv: Tensor, slot_rows: Tensor, cache: Tensor) -> None:
        if cache.dtype == FLOAT8:
            kv, cache = float8_as_bytes(narrow_to_float8(kv, self._divisors)), float8_as_bytes(cache)
        cache.view(-1, self._head_dim).index_put_((slot_rows,), kv)

    def _prefill(self, part: Chunk, q: Tensor, cache: Tensor) -> Tensor:
        num_kv_heads, head_dim = self._num_kv_heads, self._head_dim
        _gather(cache, part.block_rows, part.gathered)
        attended = torch.empty_like(q, memory_format=torch.contiguous_format)
        for tile in part.tiles:
            folded = torch.mul(q[tile.start : tile.stop].transpose(0, 1), self._scale * self._key_scale)
            torch.bmm(folded.reshape(num_kv_heads, -1, head_dim), tile.keys_t, out=tile.scores)
            self._cap_(tile.scores)
            tile.masked_scores.add_(tile.mask)
            out = torch.bmm(_softmax_(tile.scores), tile.values)
            out = out if self._value_scale == 1.0 else out.mul_(self._value_scale)
            attended[tile.start : tile.stop] = out.view(-1, tile.stop - tile.start, head_dim).transpose(0, 1)
        return attended.view(len(q), -1)

    def _cap_(self, scores: Tensor) -> Tensor:
        cap = self._softcap
        return scores if cap is None else scores.div_(cap).tanh_().mul_(cap)


def _gather(cache: Tensor, block_rows: Tensor, out: Tensor) -> None:
    """Chosen (block, K or V, head) rows of the cache, one after the other."""
    if cache.dtype == FLOAT8:
        chosen = torch.index_select(float8_as_bytes(cache).view(-1, out.shape[1]), 0, block_rows)
        out.copy_(widen_float8(chosen.view(FLOAT8), out.dtype))
        return
    torch.index_select(cache.view(-1, out.shape[1]), 0, block_rows, out=out)


def _softmax_(scores: Tensor) -> Tensor:
    """In place: a third of a long prompt's attention would go into fresh memory for the probabilities."""
    return torch.softmax(scores, dim=-1, out=scores)
