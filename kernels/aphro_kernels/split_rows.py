"""bfloat16 rows as two float8 numbers each, which the tensor cores multiply with codes as they are: nothing is decoded.

A bfloat16 has 8 significant bits and a float8_e4m3fn 4: x = scale * (high + low / 16), exactly where x is not smaller
than the largest of its row by more than 2**13; else to 2**-21 of that. Scales are powers of two.
"""
# ruff: noqa: N803  (the constants of a kernel are in capitals)

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from aphro_kernels.float8 import FLOAT8, narrow_to_float8, widen_float8
from aphro_kernels.language import chain_options, jit, next_power_of_2, runs_kernels, start_in_chain, tl

GROUP: Final = 128  # inputs of a sum
LOW_UNIT: Final = 2.0**-4  # of the second number


@dataclass(frozen=True, slots=True)
class SplitRows:
    """``codes`` [2, rows, k] float8_e4m3fn, ``scales`` [rows], ``sums`` [rows, k / 128] of x / scale, float32."""

    codes: Tensor
    scales: Tensor
    sums: Tensor


def split_rows_reference(x: Tensor) -> SplitRows:
    wide = x.float()
    peaks = wide.abs().amax(dim=-1)
    exponents = torch.where(peaks > 0, torch.frexp(peaks).exponent, -116).clamp(min=-116)
    scales = torch.ldexp(torch.ones_like(peaks), exponents - 8)
    scales = torch.where(peaks < float("inf"), scales, torch.full_like(scales, float("nan")))
    values = wide / scales[:, None]
    high = narrow_to_float8(values)
    low = narrow_to_float8((values - widen_float8(high, torch.float32)) / LOW_UNIT)
    return SplitRows(torch.stack((high, low)), scales, values.view(len(x), -1, GROUP).sum(dim=-1))


def split_rows(x: Tensor) -> SplitRows:
    """``x`` [rows, k] bfloat16, k a multiple of 128. A row that is not finite has NaN for a scale."""
    if not runs_kernels(x):
        return split_rows_reference(x)
    return _launch(x)


def _launch(x: Tensor) -> SplitRows:
    num_rows, k = x.shape
    assert x.stride(1) == 1
    assert k % GROUP == 0
    split = SplitRows(
        torch.empty(2, num_rows, k, dtype=FLOAT8, device=x.device),
        torch.empty(num_rows, dtype=torch.float32, device=x.device),
        torch.empty(num_rows, k // GROUP, dtype=torch.float32, device=x.device),
    )
    launch: Any = _split_rows_kernel[(num_rows,)]
    launch(
        x,
        split.codes.view(torch.uint8),
        split.scales,
        split.sums,
        num_rows,
        k,
        x.stride(0),
        BLOCK=next_power_of_2(k),
        num_warps=8 if k > 2048 else 4,
        **chain_options(x),
    )
    return split


@jit(do_not_specialize=["num_rows"])
def _split_rows_kernel(
    x: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    sums: tl.tensor,
    num_rows: tl.tensor,
    k: tl.tensor,
    x_stride: tl.tensor,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    """One row, read once."""
    start_in_chain(CHAINED)
    row = tl.program_id(0).to(tl.int64)
    ks = tl.arange(0, BLOCK)
    value = tl.load(x + row * x_stride + ks, mask=ks < k, other=0.0).to(tl.float32)
    high, low, value, scale = split(value)
    at = codes + row * k + ks
    tl.store(at, high.to(tl.float8e4nv).to(tl.uint8, bitcast=True), mask=ks < k)
    tl.store(at + tl.cast(num_rows, tl.int64) * k, low.to(tl.float8e4nv).to(tl.uint8, bitcast=True), mask=ks < k)
    tl.store(scales + row, scale)
    groups = tl.arange(0, BLOCK // 128)
    totals = tl.sum(tl.reshape(value, [BLOCK // 128, 128]), axis=1)
    tl.store(sums + row * (k // 128) + groups, totals, mask=groups < k // 128)


@jit()
def split(value: tl.tensor) -> tl.tensor:
    """Both numbers of a row, the row in units of its scale, and the scale; a row that is not finite has NaN there."""
    peak = tl.max(tl.abs(value), axis=0)
    # between 128 and 256 of its scale; both are normal numbers
    exponent = tl.minimum(tl.maximum(peak.to(tl.int32, bitcast=True) >> 23, 10), 254)
    scale = ((exponent - 7) << 23).to(tl.float32, bitcast=True)
    value = value * ((261 - exponent) << 23).to(tl.float32, bitcast=True)
    # the nearest float8, by float32 alone: ptxas (CUDA 12.8) makes a pair of conversions there and back read registers
    # that nothing wrote
    bits = value.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    subnormal = (value + 24576.0) - 24576.0  # to multiples of 2**-9
    high = tl.where(tl.abs(value) < 0.015625, subnormal, normal)
    low = (value - high) * 16.0
    return high, low, value, tl.where(peak < float("inf"), scale, float("nan"))
