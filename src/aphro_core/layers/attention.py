"""Attention of one layer on one rank: QKV, then QK-norm, rotation, KV write and reading as the device does it."""

from __future__ import annotations

import torch
from aphro_kernels import hopper_attention
from aphro_kernels.chunk_tiles import list_tiles
from aphro_kernels.paged_attention import paged_attention
from aphro_kernels.rotary import rotary_and_cache
from torch import Tensor

from aphro_core.layers.batch import GatheredRows, PagedPart, PagedRows
from aphro_core.layers.cache_format import PLAIN_SCALES
from aphro_core.layers.gathered_attention import GatheredAttention
from aphro_core.layers.linear import AnyLinear
from aphro_core.layers.norm import RMSNorm
from aphro_core.layers.rotary import Rotation
from aphro_core.layers.row_parallel import RowParallel
from aphro_core.peer_sums import Summand


class Attention:
    """One layer's heads on one rank: whole KV groups, or part of one.

    K and V of all rows of a step are written before any row is read: rows of one step may share blocks.
    """

    def __init__(
        self,
        qkv: AnyLinear,
        out: AnyLinear | RowParallel,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        window: int | None,
        dtype: torch.dtype,
        device: torch.device,
        q_norm: RMSNorm | None = None,
        k_norm: RMSNorm | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        cache_dtype: torch.dtype | None = None,
        cache_scales: tuple[float, float] = PLAIN_SCALES,
    ) -> None:
        """``scale`` of the scores, None = head_dim ** -0.5; ``softcap`` c makes them c * tanh(score / c). In a cache of
        ``cache_dtype`` (None: ``dtype``) K and V stand divided by ``cache_scales``."""
        scale = head_dim**-0.5 if scale is None else scale
        self._qkv, self._out = qkv, out
        self._all_heads, self._head_dim = num_heads + 2 * num_kv_heads, head_dim
        self._paged = PagedAttention(window, q_norm, k_norm, scale, softcap, cache_scales)
        self._gathered: GatheredAttention | None = None  # on GPUs: it would be compiled for nothing
        if device.type == "cpu":
            self._gathered = GatheredAttention(
                num_heads,
                num_kv_heads,
                head_dim,
                window,
                dtype,
                q_norm,
                k_norm,
                scale,
                softcap,
                cache_dtype or dtype,
                cache_scales,
            )

    def __call__(
        self,
        x: Tensor,
        rotation: Rotation,
        rows: GatheredRows | PagedRows,
        cache: Tensor,
        kept: Tensor | None = None,
    ) -> Summand:
        """``x`` [num_tokens, hidden_size] to this rank's summand of the same shape, or of its rows ``kept`` [any]
        int64. ``cache`` as worker/kv_cache.py allocates it."""
        attended = self.attend(self.project(x), rotation, rows, cache)
        return self._out(attended if kept is None else attended.index_select(0, kept))

    def project(self, x: Tensor) -> Tensor:
        return self._qkv(x)

    def attend(self, qkv: Tensor, rotation: Rotation, rows: GatheredRows | PagedRows, cache: Tensor) -> Tensor:
        """What stands between the two projections: ``qkv`` [num_tokens, outputs] to [num_tokens, this rank's heads]."""
        qkv = qkv.view(len(qkv), self._all_heads, self._head_dim)
        if isinstance(rows, PagedRows):
            return self._paged(qkv, rotation, rows, cache)
        assert self._gathered is not None, "gathered rows are a CPU's"
        return self._gathered(qkv, rotation, rows, cache)

    @property
    def projections(self) -> tuple[AnyLinear, AnyLinear]:
        assert not isinstance(self._out, RowParallel), "there is no other rank"
        return self._qkv, self._out


class PagedAttention:
    """From a layer's QKV to the output of its heads by two kernels on the block tables (GPU)."""

    def __init__(
        self,
        window: int | None,
        q_norm: RMSNorm | None,
        k_norm: RMSNorm | None,
        scale: float,
        softcap: float | None = None,
        cache_scales: tuple[float, float] = PLAIN_SCALES,
    ) -> None:
        self._scale, self._softcap = scale, softcap
        self._key_scale, self._value_scale = cache_scales
        self._window = window
        self._q_gain = None if q_norm is None else q_norm.weight
        self._k_gain = None if k_norm is None else k_norm.weight
        self._eps = 0.0 if q_norm is None else q_norm.eps

    def __call__(self, qkv: Tensor, rotation: Rotation, rows: PagedRows, cache: Tensor) -> Tensor:
        """``qkv`` [num_tokens, num_heads + 2 * num_kv_heads, head_dim] to [num_tokens, num_heads * head_dim]."""
        k_cache, v_cache = cache[:, 0], cache[:, 1]
        q = rotary_and_cache(
            qkv,
            rotation.cos,
            rotation.sin,
            k_cache=k_cache,
            v_cache=v_cache,
            slot_mapping=rows.slot_mapping,
            q_norm=self._q_gain,
            k_norm=self._k_gain,
            eps=self._eps,
            key_scale=self._key_scale,
            value_scale=self._value_scale,
        )
        attended = torch.empty_like(q)
        for part in rows.parts:
            queries = q[part.start : part.stop]
            if part.tiles is None and part.max_query_len > 1:
                part.tiles = self._list_tiles(queries, k_cache, part)
            paged_attention(
                queries,
                k_cache,
                v_cache,
                block_tables=part.block_tables,
                seq_lens=part.seq_lens,
                query_start_loc=part.query_start_loc,
                max_query_len=part.max_query_len,
                max_seq_len=part.max_seq_len,
                scale=self._scale,
                window=self._window,
                softcap=self._softcap,
                key_scale=self._key_scale,
                value_scale=self._value_scale,
                work=part.works.get(self._window),
                tiles=part.tiles,
                num_seqs=part.num_seqs,
                is_long=part.is_long,
                out=attended[part.start : part.stop],
            )
        return attended.view(len(qkv), -1)

    def _list_tiles(self, queries: Tensor, k_cache: Tensor, part: PagedPart) -> Tensor | None:
        """Once a step: the layers that follow find the list in the part."""
        if not part.is_long or not hopper_attention.suits(queries, k_cache, self._window, self._softcap):
            return None
        group = queries.shape[1] // k_cache.shape[1]
        return list_tiles(part.seq_lens, part.query_start_loc, len(queries), group)
