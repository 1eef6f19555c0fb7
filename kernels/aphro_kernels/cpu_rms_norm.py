"""RMSNorm of bfloat16 on a CPU, alone or with the residual add before it, where torch needs three to twelve calls."""

from __future__ import annotations

from functools import cache
from typing import Any, Final

import numpy as np
import torch
from numba import carray, cfunc, types
from torch import Tensor

from aphro_kernels import openmp
from aphro_kernels.vector_blocks import SOURCE_DIGEST, float_of, pointer_to, take_number
from aphro_kernels.vector_math import rounded, widened

_TASK_ROWS: Final = 16  # that a thread takes at most
_NUM_ARGUMENTS: Final = 11


class CpuRMSNorm:
    """What ``rms_norm_reference`` and ``add_rms_norm_reference_`` (rms_norm.py) compute, for one weight."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        """``weight`` [width] of any dtype."""
        self._weight = weight.float()
        self._eps = int(np.float32(eps).view(np.int32))
        self._call = openmp.Call(_compile().address, _NUM_ARGUMENTS)

    def __call__(self, x: Tensor) -> Tensor:
        """``[rows, width]`` bfloat16 to the same; rows may be strided."""
        return self._run(x, None)

    def add_(self, residual: Tensor, x: Tensor) -> Tensor:
        """``residual += x`` in place, rounded to bfloat16; the norm of that sum."""
        return self._run(x, residual)

    def _run(self, x: Tensor, residual: Tensor | None) -> Tensor:
        assert x.dtype == torch.bfloat16
        assert x.stride(1) == 1
        num_rows, width = x.shape
        out = openmp.empty(num_rows, width, dtype=x.dtype)
        share = openmp.share(num_rows, _TASK_ROWS)
        self._call(
            -(-num_rows // share),
            x.data_ptr(),
            x.stride(0),
            0 if residual is None else residual.data_ptr(),
            0 if residual is None else residual.stride(0),
            out.data_ptr(),
            self._weight.data_ptr(),
            num_rows,
            width,
            self._eps,
            share,
        )
        return out


@cache
def _compile() -> Any:
    """The C function that each thread runs, kept on disk between starts."""
    version = SOURCE_DIGEST

    @cfunc(types.void(types.voidptr), cache=True, error_model="numpy", fastmath={"contract", "reassoc"})
    def thread(pointer):  # type: ignore[no-untyped-def]
        assert version  # a closure's values are part of the cache's key
        a = carray(pointer, (_NUM_ARGUMENTS,), np.int64)
        share = a[10]
        num_rows, width, eps = a[7], a[8], float_of(np.int32(a[9]))
        gain = carray(pointer_to(a[6]), (width,), np.float32)
        values = np.empty(width, np.float32)
        task = take_number(a.ctypes.data)
        while task * share < num_rows:
            for row in range(task * share, min((task + 1) * share, num_rows)):
                x = carray(pointer_to(a[1] + row * a[2] * 2), (width,), np.uint16)
                out = carray(pointer_to(a[5] + row * width * 2), (width,), np.uint16)
                total = np.float32(0)
                if a[3] != 0:
                    residual = carray(pointer_to(a[3] + row * a[4] * 2), (width,), np.uint16)
                    for i in range(width):
                        residual[i] = rounded(widened(residual[i]) + widened(x[i]))
                        value = widened(residual[i])
                        values[i] = value
                        total += value * value
                else:
                    for i in range(width):
                        value = widened(x[i])
                        values[i] = value
                        total += value * value
                scale = np.float32(1) / np.sqrt(total / np.float32(width) + eps)
                for i in range(width):
                    out[i] = rounded(values[i] * scale * gain[i])
            task = take_number(a.ctypes.data)

    return thread
