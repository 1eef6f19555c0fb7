"""``y = x W^T + b`` with 4- or 8-bit weights on CPUs with AVX512-VNNI; activations are quantised to 8 bits in blocks.

That is how llama.cpp multiplies these weights (Q8_0, Q8_1): of a block of 32 activations the largest becomes 127.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final

import numpy as np
import torch
from numba import carray, cfunc, njit, types
from torch import Tensor
from torch.nn.functional import pad

from aphro_kernels import huge_pages, openmp
from aphro_kernels.cpu_linear import finish_tile
from aphro_kernels.silu_and_mul import silu_and_mul_reference
from aphro_kernels.vector_blocks import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    SOURCE_DIGEST,
    add_to,
    bits_of,
    element_bytes,
    pointer_to,
    read_counter,
    take_number,
)
from aphro_kernels.vector_math import widened
from aphro_kernels.vector_packed import INT4, INT8, PACKED_ROWS, packed_tile
from aphro_kernels.vector_products import UNIT

_SCALE_KINDS: Final = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
_BLOCKS: Final = (32, 16)  # activations with one scale
_STEP_ROWS: Final = 96  # of x that a thread multiplies with two units: they stay in its second-level cache
_QUANTISED_ROWS: Final = 4  # that a thread quantises at once
_NUM_ARGUMENTS: Final = 16


def cpu_packed_linear_reference(x: Tensor, weight: Tensor, block: int, *, is_gated: bool = False) -> Tensor:
    """What :class:`CpuPackedLinear` computes, of the dequantised ``weight`` [rows, columns] float32."""
    blocks = x.float().view(len(x), -1, block)
    scales = blocks.abs().amax(dim=-1, keepdim=True) / 127
    codes = (blocks / torch.where(scales > 0, scales, 1.0)).round()
    y = (codes * scales).flatten(1) @ weight.T
    return (silu_and_mul_reference(y) if is_gated else y).to(x.dtype)


def block_of(columns: int, groups: int) -> int | None:
    """Activations that can share a scale where so many columns have so many groups; None: none of the sizes fits."""
    return next((block for block in _BLOCKS if columns % (groups * block) == 0), None)


class CpuPackedLinear:
    """Codes and scales in the order that they are multiplied in. A row's bits do not hang on others.

    Built once in a process for weights of one kind, it takes some seconds if the disk holds no compiled code yet.
    """

    def __init__(self, codes: Tensor, scales: Tensor, offsets: Tensor | None, bias: Tensor | None = None) -> None:
        """weight = code * scale (+ offset). ``codes`` [rows, columns]: uint8 below 16 with ``offsets``, int8 without;
        ``scales`` and ``offsets`` [rows, groups] of a floating type; :func:`block_of` must have a block for them."""
        (self._out_features, columns), groups = codes.shape, scales.shape[1]
        self._block = block_of(columns, groups)
        assert self._block is not None
        padding = -self._out_features % (2 * UNIT)
        unsigned = codes if offsets is not None else codes.view(torch.uint8) ^ 128  # plus 128
        ordered = _ordered_codes(pad(unsigned, (0, 0, 0, padding)), self._block, is_int4=offsets is not None)
        self._codes = huge_pages.copied(ordered)
        both = [scales] if offsets is None else [scales, offsets.to(scales.dtype)]
        padded = [pad(each, (0, 0, 0, padding)).view(-1, UNIT, groups).transpose(1, 2) for each in both]
        self._scales = huge_pages.copied(torch.stack(padded, dim=2))  # [units, groups, 1 or 2, UNIT]
        self._bias = None if bias is None else pad(bias.float(), (0, padding))
        # asked of tensors once, as in CpuLinear
        self._columns, self._num_tasks, self._padded_features = columns, len(self._codes) // 2, len(self._codes) * UNIT
        self._groups, self._per_group = groups, columns // (groups * self._block)
        self._places = (
            self._codes.data_ptr(),
            self._scales.data_ptr(),
            0 if self._bias is None else self._bias.data_ptr(),
        )
        function = _compile(INT8 if offsets is None else INT4, _SCALE_KINDS[scales.dtype], self._block)
        self._call = openmp.Call(function.address, _NUM_ARGUMENTS)
        self.nbytes = self._codes.nbytes + self._scales.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """``[rows, in_features]`` to ``[rows, out_features]``, bfloat16; rows of ``x`` may be strided."""
        y = self._multiply(x, self._padded_features, is_gated=False)
        return y if self._padded_features == self._out_features else y[:, : self._out_features].contiguous()

    @property
    def can_gate(self) -> bool:
        """Whether :meth:`gated` may be called."""
        return self._out_features % (2 * UNIT) == 0

    def gated(self, x: Tensor) -> Tensor:
        """SiLU(gate) * up of a weight that holds the rows of the gate, then those of up."""
        assert self.can_gate
        return self._multiply(x, self._out_features // 2, is_gated=True)

    def _multiply(self, x: Tensor, width: int, *, is_gated: bool) -> Tensor:
        assert x.dtype == torch.bfloat16
        assert x.stride(1) == 1
        assert self._block is not None
        num_rows, num_blocks = x.shape[0], self._columns // self._block
        y = openmp.empty(num_rows, width, dtype=x.dtype)
        scales = openmp.empty(num_rows, num_blocks, 2, dtype=torch.float32)
        codes = openmp.empty(num_rows, self._columns, dtype=torch.int8)
        num_steps = -(-num_rows // _STEP_ROWS)
        self._call(
            num_steps * self._num_tasks,
            0,  # tasks of quantising that are done
            x.data_ptr(),
            x.stride(0) * 2,
            codes.data_ptr(),
            scales.data_ptr(),
            *self._places,
            y.data_ptr(),
            num_rows,
            self._groups,
            self._per_group,
            self._num_tasks,
            num_steps,
            is_gated,
        )
        return y


def _ordered_codes(codes: Tensor, block: int, *, is_int4: bool) -> Tensor:
    """[units, blocks, lines, UNIT, 4]: 4 columns of 16 rows, then the next 4, in 4 bits in the same bytes."""
    lines = codes.view(-1, UNIT, codes.shape[1] // block, block // 4, 4).permute(0, 2, 3, 1, 4)
    return lines[:, :, 0::2] | (lines[:, :, 1::2] << 4) if is_int4 else lines


@cache
def _compile(kind: int, scale_kind: int, block: int) -> Any:
    """The C function that each thread runs: it takes rows to quantise, then two units and some rows of x.

    Kept on disk between starts, beside this file or in Numba's cache folder.
    """
    version = SOURCE_DIGEST
    code_bytes = block // 2 if kind == INT4 else block  # of a block, a row of the weight
    scale_bytes = element_bytes(scale_kind) * (2 if kind == INT4 else 1)  # of a group

    @cfunc(types.void(types.voidptr), cache=True, error_model="numpy", fastmath={"contract"})
    def thread(pointer):  # type: ignore[no-untyped-def]
        assert version  # a closure's values are part of the cache's key
        a = carray(pointer, (_NUM_ARGUMENTS,), np.int64)
        num_rows, groups, per_group, num_tasks, is_gated = a[10], a[11], a[12], a[13], a[15] != 0
        num_blocks = groups * per_group
        columns = num_blocks * block
        quantising, multiplying = (num_rows - 1) // _QUANTISED_ROWS + 1, num_tasks * a[14]
        task = take_number(a.ctypes.data)
        while task < quantising:
            for row in range(task * _QUANTISED_ROWS, min((task + 1) * _QUANTISED_ROWS, num_rows)):
                _quantise(a[2] + row * a[3], a[4] + row * columns, a[5] + row * num_blocks * 8, num_blocks, block)
            add_to(a.ctypes.data + 8, 1)
            task = take_number(a.ctypes.data)
        while read_counter(a.ctypes.data + 8) < quantising:
            pass
        unit_codes, unit_scales = num_blocks * code_bytes * UNIT, groups * scale_bytes * UNIT
        second, apart = (num_tasks, 1) if is_gated else (1, 2)  # from a task's first unit to its second, to the next's
        width = num_tasks * UNIT * apart
        sums = np.empty((PACKED_ROWS, 2, UNIT), np.float32)
        task -= quantising
        while task < multiplying:
            after = take_number(a.ctypes.data) - quantising  # taken early: its weights are fetched meanwhile
            number, step = task % num_tasks, task // num_tasks
            unit = number * apart
            codes, scales = a[6] + unit * unit_codes, a[7] + unit * unit_scales
            stop = min((step + 1) * _STEP_ROWS, num_rows)
            for row in range(step * _STEP_ROWS, stop, PACKED_ROWS):
                count = min(PACKED_ROWS, stop - row)
                ahead = after % num_tasks - number if row + PACKED_ROWS >= stop else 0
                packed_tile(
                    kind,
                    scale_kind,
                    block,
                    count,
                    a[4] + row * columns,
                    a[5] + row * num_blocks * 8,
                    codes,
                    codes + second * unit_codes,
                    scales,
                    scales + second * unit_scales,
                    groups,
                    per_group,
                    sums.ctypes.data,
                    ahead * apart * unit_codes,
                )
                finish_tile(sums, count, a[8], number, num_tasks, is_gated, a[9] + row * width * 2, width)
            task = after

    return thread


@njit(inline="always")
def _quantise(source, target, scales, num_blocks, block):  # type: ignore[no-untyped-def]
    """A row of bfloat16 to codes [blocks, block], and each block's scale, and that times its sum of codes."""
    x = carray(pointer_to(source), (num_blocks, block), np.uint16)
    codes = carray(pointer_to(target), (num_blocks, block), np.int8)
    found = carray(pointer_to(scales), (num_blocks, 2), np.float32)
    for at in range(num_blocks):
        largest = np.uint16(0)  # by its bits: NaN is the largest of all, and stays NaN in the scale
        for i in range(block):
            largest = max(largest, x[at, i] & np.uint16(0x7FFF))
        peak, count = widened(largest), np.int32(0)
        inverse = np.float32(127) / peak if peak > 0 else np.float32(0)
        for i in range(block):
            # 1.5 * 2 ** 23 more, a float32 has no room for fractions: its last bits are the nearest integer
            code = bits_of(widened(x[at, i]) * inverse + np.float32(12582912)) - np.int32(0x4B400000)
            count += code
            codes[at, i] = np.int8(code)
        found[at, 0] = peak / np.float32(127)
        found[at, 1] = found[at, 0] * np.float32(count)
