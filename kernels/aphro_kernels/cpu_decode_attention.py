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
from aphro_kernels.vector_attention import (
    block_pair_scores,
    block_scores,
    block_values,
    clear,
    multiplies_pairs,
    narrow_sums,
)
from aphro_kernels.vector_blocks import (
    BFLOAT16,
    FLOAT8,
    FLOAT16,
    FLOAT32,
    SOURCE_DIGEST,
    element_bytes,
    float_of,
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
_AHEAD: Final = 4  # blocks from the one that is read to the one that is fetched from memory meanwhile
_LANES: Final = 16  # of a vector of float32


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
        out = openmp.empty(*q.shape, dtype=q.dtype)
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
    by_pairs = multiplies_pairs(cache_kind, head_dim)

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
        queries = np.empty((group, head_dim), np.float32)
        sums = np.empty((group, head_dim), np.float32)
        scores = np.empty(group * (max_blocks * block_size + _LANES), np.float32)
        task = take_number(a.ctypes.data)
        while task < num_tasks:
            after = take_number(a.ctypes.data)  # taken early: its first keys are fetched meanwhile
            row, head = task // num_kv_heads, task % num_kv_heads
            next_row, next_head = min(after, num_tasks - 1) // num_kv_heads, after % num_kv_heads
            heads = head * group * row_bytes
            _attend(
                kind,
                cache_kind,
                by_pairs,
                group,
                head_dim,
                row_bytes,
                key_bytes,
                queries.ctypes.data,
                sums.ctypes.data,
                scores,
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
                a[3] + next_head * head_bytes,
                tables[next_row, max(seq_lens[next_row] - window, 0) // block_size :],
            )
            task = after

    return thread


@njit(fastmath=True, error_model="numpy", inline="always")
def _attend(  # type: ignore[no-untyped-def]
    kind,
    cache_kind,
    by_pairs,
    group,
    head_dim,
    row_bytes,
    key_bytes,
    queries,
    sums,
    scores,
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
    next_cache,
    next_table,
):
    """One KV head of a row. ``cache`` is where that head's keys in block 0 are, ``next_cache`` those of the next task,
    whose blocks are ``next_table``.

    Blocks are multiplied whole: scores of keys that are not to be seen are there and mean nothing.
    """
    begin, end = first // block_size, (stop - 1) // block_size + 1
    base, num_blocks, half = begin * block_size, end - begin, block_bytes // 2  # from a block's keys to its values
    stride = num_blocks * block_size + _LANES
    if not by_pairs:
        for g in range(group):
            widen(kind, head_dim, q + g * row_bytes, queries + g * head_dim * 4, scale)
    for at in range(num_blocks):
        keys, target = cache + table[begin + at] * block_bytes, scores.ctypes.data + at * block_size * 4
        ahead = _read_at(at + _AHEAD, cache, half, table[begin:end], next_cache, next_table)
        count = min(stop - (begin + at) * block_size, block_size)
        if by_pairs:
            count = min((count + _LANES - 1) // _LANES * _LANES, block_size)
            block_pair_scores(group, head_dim, q, keys, target, stride, count, scale, ahead)
        else:
            block_scores(cache_kind, group, head_dim, queries, keys, target, stride, count, ahead)
    for g in range(group):
        if softcap > 0:
            for i in range(first - base, stop - base):
                scores[g * stride + i] = math.tanh(scores[g * stride + i] / softcap) * softcap
        _softmax(scores[g * stride + first - base : (g + 1) * stride], stop - first, value_scale)
        clear(head_dim, sums + g * head_dim * 4)
    for at in range(num_blocks):
        low, high = max(first - base - at * block_size, 0), min(stop - base - at * block_size, block_size)
        values = cache + table[begin + at] * block_bytes + half + low * key_bytes
        weights = scores.ctypes.data + (at * block_size + low) * 4
        ahead = _read_at(num_blocks + at + _AHEAD, cache, half, table[begin:end], next_cache, next_table)
        block_values(cache_kind, group, head_dim, weights, values, sums, stride, high - low, ahead)
    for g in range(group):
        narrow_sums(kind, cache_kind, head_dim, sums + g * head_dim * 4, out + g * row_bytes)


@njit(inline="always")
def _read_at(position, cache, half, table, next_cache, next_table):  # type: ignore[no-untyped-def]
    """Where a block is in the order of reading: a task's keys, its values, the keys of the next task."""
    if position < len(table):
        return cache + table[position] * 2 * half
    position -= len(table)
    if position < len(table):
        return cache + table[position] * 2 * half + half
    return next_cache + next_table[min(position - len(table), len(next_table) - 1)] * 2 * half


@njit(fastmath=True, error_model="numpy")
def _softmax(scores, count, factor):  # type: ignore[no-untyped-def]
    """In place over the first ``count`` float32, times ``factor``; those up to a whole vector are written, too."""
    whole = (count + _LANES - 1) // _LANES * _LANES
    peak = np.float32(-np.inf)
    for i in range(count):
        peak = max(peak, scores[i])
    for i in range(count, whole):
        scores[i] = np.float32(-np.inf)
    total = np.float32(0)
    for i in range(whole):
        scores[i] = exponential(scores[i] - peak)
        total += scores[i]
    scale = factor / total
    for i in range(whole):
        scores[i] *= scale
