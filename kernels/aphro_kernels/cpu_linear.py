"""``y = x W^T + b`` in bfloat16 on CPUs with AVX512-BF16: one order of the weight serves any number of rows."""

from __future__ import annotations

from functools import cache
from typing import Any, Final

import numpy as np
import torch
from numba import carray, cfunc, njit, types
from torch import Tensor
from torch.nn.functional import pad

from aphro_kernels import huge_pages, openmp
from aphro_kernels.silu_and_mul import silu_and_mul_reference
from aphro_kernels.vector_blocks import BFLOAT16, SOURCE_DIGEST, narrow, pointer_to, take_number
from aphro_kernels.vector_products import TILE_ROWS, UNIT, bfloat16_tile
from aphro_kernels.vector_silu import silu_and_mul_lanes

_STEP_ROWS: Final = 96  # of x that a thread multiplies with two units: they stay in its second-level cache
_TWO_UNITS: Final = 2 * UNIT
_NUM_ARGUMENTS: Final = 11


def cpu_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None, *, is_gated: bool = False) -> Tensor:
    """What :class:`CpuLinear` computes: float32 inside, rounded once."""
    y = x.float() @ weight.float().T
    y = y if bias is None else y + bias.float()
    return (silu_and_mul_reference(y) if is_gated else y).to(x.dtype)


def suits(weight: Tensor) -> bool:
    """Whether :class:`CpuLinear` takes this weight, on a CPU with AVX512-BF16."""
    return weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and weight.shape[1] % 2 == 0


class CpuLinear:
    """A weight in the order that it is multiplied in; the plain one is not kept. A row's bits do not hang on others.

    Built once in a process, it takes about a second if the disk holds no compiled code yet.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """``weight`` [out_features, in_features], in_features even, ``bias`` [out_features]."""
        self._out_features, in_features = weight.shape
        padding = -self._out_features % _TWO_UNITS
        padded = pad(weight, (0, 0, 0, padding))
        units = padded.view(-1, UNIT, in_features // 2, 2).transpose(1, 2)
        self._units = huge_pages.copied(units)  # [units, pairs, UNIT, 2]
        self._bias = None if bias is None else pad(bias.float(), (0, padding))
        # asked of tensors once: in calls of few rows that was a third of what is not the product
        self._pairs, self._num_tasks = in_features // 2, len(self._units) // 2
        self._padded_features = self._num_tasks * _TWO_UNITS
        self._places = self._units.data_ptr(), 0 if self._bias is None else self._bias.data_ptr()
        self._call = openmp.Call(_compile().address, _NUM_ARGUMENTS)
        self.nbytes = self._units.nbytes + (0 if self._bias is None else self._bias.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        """``[rows, in_features]`` to ``[rows, out_features]``, bfloat16; rows of ``x`` may be strided."""
        y = self._multiply(x, self._padded_features, is_gated=False)
        return y if self._padded_features == self._out_features else y[:, : self._out_features].contiguous()

    @property
    def can_gate(self) -> bool:
        """Whether :meth:`gated` may be called."""
        return self._out_features % _TWO_UNITS == 0

    def gated(self, x: Tensor) -> Tensor:
        """SiLU(gate) * up of a weight that holds the rows of the gate, then those of up."""
        assert self.can_gate
        return self._multiply(x, self._out_features // 2, is_gated=True)

    def _multiply(self, x: Tensor, width: int, *, is_gated: bool) -> Tensor:
        assert x.dtype == torch.bfloat16
        assert x.stride(1) == 1
        num_rows, (units, bias) = x.shape[0], self._places
        y = openmp.empty(num_rows, width, dtype=x.dtype)
        num_steps = -(-num_rows // _STEP_ROWS)
        self._call(
            num_steps * self._num_tasks,
            x.data_ptr(),
            x.stride(0) * 2,
            units,
            bias,
            y.data_ptr(),
            num_rows,
            self._pairs,
            self._num_tasks,
            num_steps,
            is_gated,
        )
        return y


@cache
def _compile() -> Any:
    """The C function that each thread runs: it takes two units and some rows of x, until all are taken.

    Kept on disk between starts, beside this file or in Numba's cache folder.
    """
    version = SOURCE_DIGEST

    @cfunc(types.void(types.voidptr), cache=True)
    def thread(pointer):  # type: ignore[no-untyped-def]
        assert version  # a closure's values are part of the cache's key
        a = carray(pointer, (_NUM_ARGUMENTS,), np.int64)
        units, num_rows, pairs, num_tasks, num_steps, is_gated = a[3], a[6], a[7], a[8], a[9], a[10] != 0
        unit_bytes = pairs * UNIT * 4
        second = num_tasks * unit_bytes if is_gated else unit_bytes  # from a task's first unit to its second
        apart = unit_bytes if is_gated else 2 * unit_bytes
        width = num_tasks * UNIT * (1 if is_gated else 2)
        sums = np.empty((TILE_ROWS, 2, UNIT), np.float32)
        task = take_number(a.ctypes.data)
        while task < num_tasks * num_steps:
            after = take_number(a.ctypes.data)  # taken early: its weights are fetched meanwhile
            number, step = task % num_tasks, task // num_tasks
            here, ahead = units + number * apart, units + after % num_tasks * apart
            stop = min((step + 1) * _STEP_ROWS, num_rows)
            for row in range(step * _STEP_ROWS, stop, TILE_ROWS):
                count = min(TILE_ROWS, stop - row)
                is_last, is_only = row + TILE_ROWS >= stop, stop - step * _STEP_ROWS <= TILE_ROWS
                fetched = ahead if is_only or (row + TILE_ROWS < stop <= row + 2 * TILE_ROWS) else here
                fetched_second = second + (ahead if is_last else here)
                x = a[1] + row * a[2]
                bfloat16_tile(count, x, a[2], here, here + second, pairs, sums.ctypes.data, fetched, fetched_second)
                finish_tile(sums, count, a[4], number, num_tasks, is_gated, a[5] + row * width * 2, width)
            task = after

    return thread


@njit(error_model="numpy", fastmath={"contract"})
def finish_tile(sums, count, bias, number, num_tasks, is_gated, out, width):  # type: ignore[no-untyped-def]
    """A tile's sums, their bias and activation into ``out``, where its first row of ``width`` elements begins."""
    second = number + num_tasks if is_gated else 2 * number + 1
    first = number if is_gated else 2 * number
    for row in range(count):
        if bias != 0:
            _add(sums[row, 0], bias + first * UNIT * 4)
            _add(sums[row, 1], bias + second * UNIT * 4)
        at = out + (row * width + first * UNIT) * 2
        if is_gated:
            silu_and_mul_lanes(sums[row, 0].ctypes.data, sums[row, 1].ctypes.data)
            narrow(BFLOAT16, UNIT, sums[row].ctypes.data, at)
        else:
            narrow(BFLOAT16, _TWO_UNITS, sums[row].ctypes.data, at)


@njit(inline="always")
def _add(sums, address):  # type: ignore[no-untyped-def]
    values = carray(pointer_to(address), (UNIT,), np.float32)
    for lane in range(UNIT):
        sums[lane] += values[lane]
