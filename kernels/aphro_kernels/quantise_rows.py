"""Activations to 8 bits, a scale a row (or one for all): the codes as they are, or as floats that hold them exactly."""
# ruff: noqa: N803  (the constants of a kernel are in capitals)

from __future__ import annotations

from typing import Final, Literal

import torch
from torch import Tensor

from aphro_kernels.float8 import FLOAT8, float8_as_bytes, narrow_to_float8, widen_float8
from aphro_kernels.language import jit, next_power_of_2, runs_kernels, tl

RowKind = Literal["fp8", "int8"]
LARGEST: Final = {"fp8": 448.0, "int8": 127.0}
# what codes are multiplied with as floats: below 1 then, so that float16 sums of their products do not overflow
_SHRINK: Final = {"fp8": 2.0**-9, "int8": 2.0**-7}


def quantise_rows_reference(x: Tensor, kind: RowKind, scale: float | None = None) -> tuple[Tensor, Tensor]:
    wide = x.float()
    if scale is None:
        scales = wide.abs().amax(dim=-1) / LARGEST[kind]
        scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    else:
        scales = wide.new_full((len(x),), scale)
    if kind == "int8":
        return (wide / scales[:, None]).round_().clamp_(-127, 127).to(torch.int8), scales
    return narrow_to_float8(wide, scales[:, None]), scales


def quantise_rows(x: Tensor, kind: RowKind, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """``x`` [rows, width] to its nearest codes (float8_e4m3fn or int8) and the scales [rows] float32 they stand for.

    ``scale`` None: of each row, its largest magnitude by the largest code; else that one, and larger ones are cut.
    """
    if not runs_kernels(x):
        return quantise_rows_reference(x, kind, scale)
    return _launch(x, kind, scale, torch.empty(x.shape, dtype=_dtype(kind), device=x.device))


def round_rows(x: Tensor, kind: RowKind, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """The same codes as numbers of the dtype of ``x``, exactly: ``x`` is about codes * scales[:, None]."""
    if not runs_kernels(x):
        codes, scales = quantise_rows_reference(x, kind, scale)
        floats = widen_float8(codes, x.dtype) if kind == "fp8" else codes.to(x.dtype)
        return floats * _SHRINK[kind], scales / _SHRINK[kind]
    return _launch(x, kind, scale, torch.empty_like(x, memory_format=torch.contiguous_format))


def _dtype(kind: RowKind) -> torch.dtype:
    return FLOAT8 if kind == "fp8" else torch.int8


def _launch(x: Tensor, kind: RowKind, scale: float | None, out: Tensor) -> tuple[Tensor, Tensor]:
    num_rows, width = x.shape
    assert x.stride(1) == 1
    scales = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    is_codes = out.dtype.itemsize == 1
    if num_rows:
        _quantise_rows_kernel[(num_rows,)](
            x,
            float8_as_bytes(out),
            scales,
            width,
            x.stride(0),
            1.0 if scale is None else scale,
            1.0 if is_codes else _SHRINK[kind],
            IS_STATIC=scale is not None,
            IS_FP8=kind == "fp8",
            IS_CODES=is_codes,
            LARGEST_CODE=LARGEST[kind],
            BLOCK=min(next_power_of_2(width), 2048),
            num_warps=4,
        )
    return out, scales


@jit(do_not_specialize=["x_stride", "scale", "shrink"])
def _quantise_rows_kernel(
    x: tl.tensor,
    out: tl.tensor,
    scales: tl.tensor,
    width: tl.tensor,
    x_stride: tl.tensor,
    scale: tl.tensor,
    shrink: tl.tensor,
    IS_STATIC: tl.constexpr,
    IS_FP8: tl.constexpr,
    IS_CODES: tl.constexpr,
    LARGEST_CODE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One row, read twice where its scale must be found first."""
    row = tl.program_id(0).to(tl.int64)
    at = x + row * x_stride
    if not IS_STATIC:
        peak = tl.zeros([BLOCK], tl.float32)
        for start in range(0, width, BLOCK):
            ks = start + tl.arange(0, BLOCK)
            peak = tl.maximum(peak, tl.abs(tl.load(at + ks, mask=ks < width, other=0.0).to(tl.float32)))
        scale = tl.max(peak, axis=0) / LARGEST_CODE
        scale = tl.where(scale > 0.0, scale, 1.0)
    tl.store(scales + row, scale / shrink)
    for start in range(0, width, BLOCK):
        ks = start + tl.arange(0, BLOCK)
        value = tl.load(at + ks, mask=ks < width, other=0.0).to(tl.float32) / scale
        value = tl.minimum(tl.maximum(value, -LARGEST_CODE), LARGEST_CODE)
        if IS_FP8:
            code = value.to(tl.float8e4nv)
            stored = code.to(tl.uint8, bitcast=True) if IS_CODES else code.to(tl.float32)
        else:
            stored = (value + 12582912.0) - 12582912.0  # 1.5 * 2**23: to the nearest integer, ties to even
        if not IS_CODES:
            stored = stored * shrink
        tl.store(out + row * width + ks, stored.to(out.dtype.element_ty), mask=ks < width)
