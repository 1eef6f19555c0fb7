"""Decode attention on a CPU: one query token a sequence, straight from the paged cache, nothing gathered."""

from __future__ import annotations

import math
from functools import cache
from typing import Any, Final

import numpy as np
import torch
from numba import carray, cfunc, njit, types
from torch import Tensor

from aphro_kernels import openmp
from aphro_kernels.vector_blocks import (
    BFLOAT16,
    FLOAT8,
    FLOAT16,
    FLOAT32,
    SOURCE_DIGEST,
    block_scores,
    block_values,
    element_bytes,
    float_of,
    narrow,
    pointer_to,
    take_number,
    widen,
)
from aphro_kernels.vector_math import exponential

_KINDS: Final = {
    torch.float32: FLOAT32,
    torch.bfloat16: BFLOAT16,
    torch.float16: FLOAT16,
    torch.float8_e4m3fn: FLOAT8,
}
_NUM_ARGUMENTS: Final = 15


def decode_attention_reference(
    q: Tensor,
    kv_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    cache_scales: tuple[float, float] = (1.0, 1.0),
) -> Tensor:
    """What :class:`DecodeAttention` computes, row by row in float32."""
    rows = []
    for row, num_keys in enumerate(seq_lens.tolist()):
        keys, values = kv_cache.float()[block_tables[row]].permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :num_keys]
        keys, values = keys * cache_scales[0], values * cache_scales[1]
        scores = q[row].float().view(len(keys), -1, q.shape[2]) @ keys.transpose(1, 2) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if window is not None:
            scores[..., : max(num_keys - window, 0)] = -math.inf
        rows.append((scores.softmax(dim=-1) @ values).flatten(0, 1))
    return torch.stack(rows).to(q.dtype)


class DecodeAttention:
    """The attention of one layer's decode rows.

    Built once for heads of one shape, which takes about a second if the disk holds no compiled code of it yet.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        cache_dtype: torch.dtype | None = None,
        cache_scales: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        """``window``: only so many of the last keys are seen; ``softcap`` c makes scores c * tanh(score / c).
        ``cache_dtype`` None: as the queries'; ``cache_scales``: what K and V in the cache are multiplied with."""
        self._num_kv_heads = num_kv_heads
        self._window = 2**62 if window is None else window
        self._scale, self._softcap = _bits(scale * cache_scales[0]), _bits(softcap or 0.0)
        self._value_scale = _bits(cache_scales[1])
        function = _compile(_KINDS[dtype], _KINDS[cache_dtype or dtype], num_heads // num_kv_heads, head_dim)
        self._call = openmp.Call(function.address, _NUM_ARGUMENTS)

    def __call__(self, q: Tensor, kv_cache: Tensor, block_tables: Tensor, seq_lens: Tensor) -> Tensor:
        """``q`` [rows, num_heads, head_dim] to the same shape, contiguous; rows of ``q`` may be strided.

        ``kv_cache`` [num_blocks, 2, num_kv_heads, block_size, head_dim]; ``block_tables`` [rows, max_blocks] and
        ``seq_lens`` [rows] int64, contiguous: the keys of a row, its own token included.
        """
        out = torch.empty(q.shape, dtype=q.dtype)
        self._call(
            len(q) * self._num_kv_heads,
            q.data_ptr(),
            q.stride(0) * q.element_size(),
            kv_cache.data_ptr(),
            block_tables.data_ptr(),
            seq_lens.data_ptr(),
            out.data_ptr(),
            len(q),
            block_tables.shape[1],
            self._num_kv_heads,
            kv_cache.shape[3],
            self._window,
            self._scale,
            self._softcap,
            self._value_scale,
        )
        return out


def _bits(number: float) -> int:
    return int(np.float32(number).view(np.int32))


@cache
def _compile(kind: int, cache_kind: int, group: int, head_dim: int) -> Any:
    """The C function that each thread runs: it takes a pair of a row and a KV head, until all are taken.

    Kept on disk between starts, beside this file or in Numba's cache folder.
    """
    row_bytes, version = head_dim * element_bytes(kind), SOURCE_DIGEST
    key_bytes = head_dim * element_bytes(cache_kind)

    @cfunc(types.void(types.voidptr), cache=True)
    def thread(pointer):  # type: ignore[no-untyped-def]
        assert version  # a closure's values are part of the cache's key
        a = carray(pointer, (_NUM_ARGUMENTS,), np.int64)
        num_rows, max_blocks, num_kv_heads, block_size, window = a[7], a[8], a[9], a[10], a[11]
        tables = carray(pointer_to(a[4]), (num_rows, max_blocks), np.int64)
        seq_lens = carray(pointer_to(a[5]), (num_rows,), np.int64)
        scale, softcap = float_of(np.int32(a[12])), float_of(np.int32(a[13]))
        value_scale = float_of(np.int32(a[14]))
        head_bytes = block_size * key_bytes
        num_tasks = num_rows * num_kv_heads
        task = take_number(a.ctypes.data)
        while task < num_tasks:
            row, head = task // num_kv_heads, task % num_kv_heads
            heads = head * group * row_bytes
            after = min(task + 1, num_tasks - 1)
            next_keys = (tables[after // num_kv_heads, 0] * 2 * num_kv_heads + after % num_kv_heads) * head_bytes
            _attend(
                kind,
                cache_kind,
                group,
                head_dim,
                row_bytes,
                key_bytes,
                a[1] + row * a[2] + heads,
                a[6] + row * num_kv_heads * group * row_bytes + heads,
                a[3] + head * head_bytes,
                2 * num_kv_heads * head_bytes,
                tables[row],
                max(seq_lens[row] - window, 0),
                seq_lens[row],
                block_size,
                scale,
                softcap,
                value_scale,
                a[3] + next_keys,
            )
            task = take_number(a.ctypes.data)

    return thread


@njit(fastmath=True, error_model="numpy", inline="always")
def _attend(  # type: ignore[no-untyped-def]
    kind,
    cache_kind,
    group,
    head_dim,
    row_bytes,
    key_bytes,
    q,
    out,
    cache,
    block_bytes,
    table,
    first,
    stop,
    block_size,
    scale,
    softcap,
    value_scale,
    next_keys,
):
    """One KV head of one row. ``cache`` is where that head's keys in block 0 are, ``next_keys`` what is read next."""
    queries = np.empty((group, head_dim), np.float32)
    sums = np.zeros((group, head_dim), np.float32)
    stride = stop - first
    scores = np.empty((group, stride), np.float32)
    for g in range(group):
        widen(kind, head_dim, q + g * row_bytes, queries.ctypes.data + g * head_dim * 4, scale)
    begin, end = first // block_size, (stop - 1) // block_size + 1
    half = block_bytes // 2  # from the keys of a block to its values
    for block in range(begin, end):
        low, high = max(first, block * block_size), min(stop, (block + 1) * block_size)
        keys = cache + table[block] * block_bytes + (low - block * block_size) * key_bytes
        ahead = cache + (table[block + 1] * block_bytes if block + 1 < end else table[begin] * block_bytes + half)
        target = scores.ctypes.data + (low - first) * 4
        block_scores(cache_kind, group, head_dim, queries.ctypes.data, keys, target, stride, high - low, ahead)
    for g in range(group):
        if softcap > 0:
            for i in range(stride):
                scores[g, i] = math.tanh(scores[g, i] / softcap) * softcap
        _softmax(scores[g], value_scale)
    for block in range(begin, end):
        low, high = max(first, block * block_size), min(stop, (block + 1) * block_size)
        values = cache + table[block] * block_bytes + half + (low - block * block_size) * key_bytes
        ahead = cache + table[block + 1] * block_bytes + half if block + 1 < end else next_keys
        weights = scores.ctypes.data + (low - first) * 4
        block_values(cache_kind, group, head_dim, weights, values, sums.ctypes.data, stride, high - low, ahead)
    for g in range(group):
        narrow(kind, head_dim, sums.ctypes.data + g * head_dim * 4, out + g * row_bytes)


@njit(fastmath=True, error_model="numpy")
def _softmax(scores, factor=np.float32(1)):  # type: ignore[no-untyped-def]  # noqa: B008
    """In place over a vector of float32, times ``factor``."""
    peak = np.float32(-np.inf)
    for i in range(len(scores)):
        peak = max(peak, scores[i])
    total = np.float32(0)
    for i in range(len(scores)):
        scores[i] = exponential(scores[i] - peak)
        total += scores[i]
    scale = factor / total
    for i in range(len(scores)):
        scores[i] *= scale
