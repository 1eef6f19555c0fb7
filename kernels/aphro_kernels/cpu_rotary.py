"""From the QKV projection to attention's inputs on a CPU in bfloat16, in one call: QK-norm, rotation, KV write."""

from __future__ import annotations

from functools import cache
from typing import Any, Final

import numpy as np
import torch
from numba import carray, cfunc, njit, types
from torch import Tensor

from aphro_kernels import openmp
from aphro_kernels.vector_blocks import SOURCE_DIGEST, float_of, pointer_to, take_number
from aphro_kernels.vector_math import rounded, widened

_TASK_TOKENS: Final = 16  # that a thread takes at most
_NUM_ARGUMENTS: Final = 16


class CpuRotaryAndCache:
    """What ``rotary_and_cache_reference`` (rotary.py) computes, for heads of one layer; q is rotated in place."""

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 0.0,
    ) -> None:
        """``q_norm``, ``k_norm`` [head_dim]: RMSNorm per head before the rotation, both or neither."""
        self._num_heads, self._num_kv_heads = num_heads, num_kv_heads
        self._gains = [None if norm is None else norm.float() for norm in (q_norm, k_norm)]
        self._eps = int(np.float32(eps).view(np.int32))
        self._call = openmp.Call(_compile().address, _NUM_ARGUMENTS)

    def __call__(self, qkv: Tensor, cos: Tensor, sin: Tensor, kv_cache: Tensor | None, slot_rows: Tensor) -> None:
        """q in ``qkv`` [num_tokens, num_heads + 2 * num_kv_heads, head_dim] is rotated there; rotated k, and v, go to
        rows ``slot_rows`` [num_tokens, 2 * num_kv_heads] int64 of ``kv_cache``, seen as rows of head_dim elements;
        without a cache k is rotated in place, too.

        ``cos``, ``sin`` [num_tokens, rotary_dim / 2] float32, contiguous; tokens of ``qkv`` may be strided.
        """
        num_tokens, _, head_dim = qkv.shape
        assert qkv.dtype == torch.bfloat16
        assert kv_cache is None or kv_cache.dtype == torch.bfloat16
        assert qkv.stride()[1:] == (head_dim, 1)
        q_gain, k_gain = (0 if gain is None else gain.data_ptr() for gain in self._gains)
        share = openmp.share(num_tokens, _TASK_TOKENS)
        self._call(
            -(-num_tokens // share),
            qkv.data_ptr(),
            qkv.stride(0),
            cos.data_ptr(),
            sin.data_ptr(),
            0 if kv_cache is None else kv_cache.data_ptr(),
            slot_rows.data_ptr(),
            num_tokens,
            self._num_heads,
            self._num_kv_heads,
            head_dim,
            cos.shape[1],
            q_gain,
            k_gain,
            self._eps,
            share,
        )


@cache
def _compile() -> Any:
    """The C function that each thread runs, kept on disk between starts."""
    version = SOURCE_DIGEST

    @cfunc(types.void(types.voidptr), cache=True)
    def thread(pointer):  # type: ignore[no-untyped-def]
        assert version  # a closure's values are part of the cache's key
        a = carray(pointer, (_NUM_ARGUMENTS,), np.int64)
        share = a[15]
        num_tokens, num_heads, num_kv_heads, head_dim, half = a[7], a[8], a[9], a[10], a[11]
        eps = float_of(np.int32(a[14]))
        slots = carray(pointer_to(a[6]), (num_tokens, 2 * num_kv_heads), np.int64)
        values = np.empty(head_dim, np.float32)
        task = take_number(a.ctypes.data)
        while task * share < num_tokens:
            for token in range(task * share, min((task + 1) * share, num_tokens)):
                cos, sin = a[3] + token * half * 4, a[4] + token * half * 4
                row = a[1] + token * a[2] * 2
                for head in range(num_heads + 2 * num_kv_heads):
                    x = row + head * head_dim * 2
                    plane = head - num_heads
                    out = x if plane < 0 or a[5] == 0 else a[5] + slots[token, plane] * head_dim * 2
                    if plane < num_kv_heads:
                        _rotate(x, out, cos, sin, a[12] if plane < 0 else a[13], eps, values, half)
                    else:
                        _copy(x, out, head_dim)
            task = take_number(a.ctypes.data)

    return thread


@njit(error_model="numpy", fastmath={"contract", "reassoc"})
def _rotate(source, target, cos, sin, gain, eps, values, half):  # type: ignore[no-untyped-def]
    """One head: dim i with dim i + half; what is behind the rotary dims passes."""
    width = len(values)
    x, out = carray(pointer_to(source), (width,), np.uint16), carray(pointer_to(target), (width,), np.uint16)
    cosines, sines = carray(pointer_to(cos), (half,), np.float32), carray(pointer_to(sin), (half,), np.float32)
    total = np.float32(0)
    for i in range(width):
        value = widened(x[i])
        values[i] = value
        total += value * value
    if gain != 0:
        gains = carray(pointer_to(gain), (width,), np.float32)
        scale = np.float32(1) / np.sqrt(total / np.float32(width) + eps)
        for i in range(width):
            values[i] *= scale * gains[i]
    for i in range(half):
        out[i] = rounded(values[i] * cosines[i] - values[i + half] * sines[i])
    for i in range(half):
        out[i + half] = rounded(values[i + half] * cosines[i] + values[i] * sines[i])
    for i in range(2 * half, width):
        out[i] = rounded(values[i])


@njit
def _copy(source, target, width):  # type: ignore[no-untyped-def]
    x, out = carray(pointer_to(source), (width,), np.uint16), carray(pointer_to(target), (width,), np.uint16)
    for i in range(width):
        out[i] = x[i]
