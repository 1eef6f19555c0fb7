"""SiLU(x Wg^T) * (x Wu^T) of many rows in one launch on Hopper: the merged product is neither written nor read again.

Programs stay on their multiprocessor: while SiLU is taken of one tile, the next is being loaded (gated_kernel.py).
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final

import torch
from torch import Tensor

from aphro_kernels.gated_kernel import gated_kernel
from aphro_kernels.hopper import TensorDescriptor, gl, num_multiprocessors, suits_hopper
from aphro_kernels.language import chain_options, triton
from aphro_kernels.silu_and_mul import silu_and_mul_reference

ROWS: Final = 128  # of a tile
COLUMNS: Final = 128  # of the gate, and as many of up
INPUTS: Final = 64
_STAGES: Final = 4
_FEWEST_ROWS: Final = 1024
# (rows of the weight, inputs): other numbers of rows at which it is the faster one, padded decode steps' (an H200)
_OTHER_ROWS: Final = {(28672, 4096): (256, 448)}
_MOST_CUT: Final = 4  # tiles of rows
_GROUP: Final = 16  # tiles of rows that take turns over one stripe of columns: they share the second-level cache


def gated_linear_reference(x: Tensor, weight: Tensor) -> Tensor:
    return silu_and_mul_reference(x.float() @ weight.float().T).to(x.dtype)


def is_faster(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel takes these, and is faster than the library's product with SiLU after it (on an H100)."""
    n, k = weight.shape
    is_taken = suits_hopper(x) and x.is_contiguous() and weight.dtype == x.dtype and n % 16 == 0 and k % 8 == 0
    return is_taken and (x.shape[0] >= _FEWEST_ROWS or x.shape[0] in _OTHER_ROWS.get((n, k), ()))


def gated_linear(x: Tensor, weight: Tensor, out: Tensor | None = None, *, is_cut: bool | None = None) -> Tensor:
    """``x`` [rows, K], ``weight`` [2 * N, K] (gate rows, then up rows), contiguous -> [rows, N]; sums in float32.

    ``is_cut``: programs take equal stretches of all tiles' inputs instead of whole tiles, None: where that is faster.
    """
    num_rows, k = x.shape
    n = weight.shape[0] // 2
    assert weight.is_contiguous()
    assert x.is_contiguous()
    out = x.new_empty(num_rows, n) if out is None else out
    multiprocessors = num_multiprocessors(x.device.index)
    row_tiles = triton.cdiv(num_rows, ROWS)
    tiles = row_tiles * triton.cdiv(n, COLUMNS)
    # programs that read the same columns for other rows do so at the same time: the second-level cache serves them
    programs = multiprocessors // row_tiles * row_tiles
    can_cut = 0 < programs <= tiles
    is_cut = can_cut and row_tiles <= _MOST_CUT if is_cut is None else is_cut
    assert can_cut or not is_cut, "too few tiles, or too many rows, for each program to have one"
    sums, arrivals = _handed_over(x.device.index) if is_cut else (out, out)
    gated_kernel[(programs if is_cut else min(multiprocessors, tiles),)](
        _descriptor(x, ROWS // 2, INPUTS),
        _descriptor(weight, COLUMNS, INPUTS),
        _descriptor(out, ROWS // 2, 64),
        sums,
        arrivals,
        num_rows,
        n,
        k,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        INPUTS=INPUTS,
        GROUP=1 if is_cut else _GROUP,
        STAGES=_STAGES,
        IS_CUT=is_cut,
        num_warps=4,
        **chain_options(x),
    )
    return out


@cache
def _handed_over(index: int) -> tuple[Tensor, Tensor]:
    """Sums of a device's programs, and whether they are there. Calls that cut tiles follow each other on one stream."""
    programs, device = num_multiprocessors(index), torch.device("cuda", index)
    sums = torch.empty(programs, 2, 2, ROWS // 2, COLUMNS, dtype=torch.float32, device=device)
    return sums, torch.zeros(programs, 2, dtype=torch.int32, device=device)


def _descriptor(matrix: Tensor, rows: int, columns: int) -> Any:
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns], layout)
