"""Linear layers over quantised weights: few rows dequantise in registers, many take a dequantised copy to cuBLAS."""
# ruff: noqa: N803, PLR0912, PLR0915  (the constants of a kernel are in capitals; it cannot be cut)

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import linear

from aphro_kernels.language import jit, next_power_of_2, runs_kernels, tl, triton

MAX_ROWS: Final = 64  # of the kernel; above, dequantising is shared by enough rows


def dequantise_reference(codes: Tensor, scales: Tensor, offsets: Tensor | None, dtype: torch.dtype) -> Tensor:
    if offsets is not None:
        codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)
    grouped = codes.float().view(len(codes), scales.shape[1], -1) * scales.float()[..., None]
    if offsets is not None:
        grouped = grouped + offsets.float()[..., None]
    return grouped.flatten(1).to(dtype)


def packed_linear_reference(x: Tensor, codes: Tensor, scales: Tensor, offsets: Tensor | None) -> Tensor:
    return linear(x.float(), dequantise_reference(codes, scales, offsets, torch.float32)).to(x.dtype)


def packed_linear(x: Tensor, codes: Tensor, scales: Tensor, offsets: Tensor | None = None) -> Tensor:
    """``x`` [rows, in] times a quantised matrix: ``[rows, out]``, float32 inside.

    ``codes`` [out, in] int8 or float8_e4m3fn, or with ``offsets`` [out, in / 2] uint8, two 4-bit codes a byte, the even
    input low. ``scales``, ``offsets`` [out, groups]; weight = code * scale + offset.
    """
    if not _takes_kernel(x, codes):
        return packed_linear_reference(x, codes, scales, offsets)
    if x.shape[0] > MAX_ROWS:
        return linear(x, dequantise(codes, scales, offsets, x.dtype))
    return _launch(x, codes, scales, offsets, x.new_empty(x.shape[0], codes.shape[0]))


def dequantise(codes: Tensor, scales: Tensor, offsets: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``[out, in]`` of the same matrix in ``dtype``."""
    if not _takes_kernel(codes, codes):
        return dequantise_reference(codes, scales, offsets, dtype)
    width, depth = _shape(codes, offsets)
    return _launch_dequantise(codes, scales, offsets, torch.empty(width, depth, dtype=dtype, device=codes.device))


def _takes_kernel(x: Tensor, codes: Tensor) -> bool:
    """Before compute capability 8.9 a GPU has no instruction for float8."""
    if codes.dtype == torch.float8_e4m3fn and codes.is_cuda and torch.cuda.get_device_capability(codes.device) < (8, 9):
        return False
    return runs_kernels(x)


def _bytes(codes: Tensor) -> Tensor:
    """A masked load has no default of type float8."""
    return codes.view(torch.uint8) if codes.dtype == torch.float8_e4m3fn else codes


def _shape(codes: Tensor, offsets: Tensor | None) -> tuple[int, int]:
    return codes.shape[0], codes.shape[1] * (2 if offsets is not None else 1)


def _launch(x: Tensor, codes: Tensor, scales: Tensor, offsets: Tensor | None, out: Tensor) -> Tensor:
    width, depth = _shape(codes, offsets)
    assert x.stride(1) == 1
    assert codes.is_contiguous()
    assert scales.is_contiguous()
    if x.shape[0]:
        group = depth // scales.shape[1]
        columns = 16 if width <= 4096 else 32
        inputs = 64 if x.dtype == torch.float32 else 256
        if scales.shape[1] > 1 and group >= 32 and group & (group - 1) == 0:
            inputs = min(group, 256)  # one group a tile: its scale is taken once
        _packed_linear_kernel[(triton.cdiv(width, columns),)](
            x,
            _bytes(codes),
            scales,
            scales if offsets is None else offsets,
            out,
            x.shape[0],
            width,
            depth,
            x.stride(0),
            IS_INT4=offsets is not None,
            IS_FP8=codes.dtype == torch.float8_e4m3fn,
            GROUP=group,
            NUM_GROUPS=scales.shape[1],
            IS_WHOLE=depth % inputs == 0,
            ROWS=max(next_power_of_2(x.shape[0]), 16),
            COLUMNS=columns,
            INPUTS=inputs,
            PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
            num_warps=4,
            num_stages=4,
        )
    return out


def _launch_dequantise(codes: Tensor, scales: Tensor, offsets: Tensor | None, out: Tensor) -> Tensor:
    width, depth = out.shape
    block = 1024
    _dequantise_kernel[(width, triton.cdiv(codes.shape[1], block))](
        _bytes(codes),
        scales,
        scales if offsets is None else offsets,
        out,
        codes.shape[1],
        IS_INT4=offsets is not None,
        IS_FP8=codes.dtype == torch.float8_e4m3fn,
        GROUP=depth // scales.shape[1],
        NUM_GROUPS=scales.shape[1],
        BLOCK=block,
        num_warps=4,
    )
    return out


@jit(do_not_specialize=["num_rows", "x_stride"])
def _packed_linear_kernel(
    x: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    offsets: tl.tensor,
    out: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,
    depth: tl.tensor,
    x_stride: tl.tensor,
    IS_INT4: tl.constexpr,
    IS_FP8: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INPUTS: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """All rows of ``x`` times ``COLUMNS`` rows of the matrix, ``INPUTS`` inputs at a time.

    Of int4 the even and the odd inputs of a byte are two products, so that nothing is interleaved in registers. Where a
    tile is one group: sum(x (q s + o)) = s sum(x q) + o sum(x).
    """
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = columns < width
    rows = tl.arange(0, ROWS)
    is_row = rows < num_rows
    per: tl.constexpr = 2 if IS_INT4 else 1
    step: tl.constexpr = INPUTS // per  # bytes of a tile's row
    ks = tl.arange(0, step)
    row_bytes = depth // per
    codes_at = codes + columns.to(tl.int64)[:, None] * row_bytes + ks[None, :]
    x_at = x + rows.to(tl.int64)[None, :] * x_stride + ks[:, None] * per
    scale_at = columns.to(tl.int64) * NUM_GROUPS
    total = tl.zeros([COLUMNS, ROWS], tl.float32)
    for start in range(0, row_bytes, step):
        if IS_WHOLE:
            is_code = is_column[:, None]
            is_x = is_row[None, :]
        else:
            is_k = start + ks < row_bytes
            is_code = is_column[:, None] & is_k[None, :]
            is_x = is_row[None, :] & is_k[:, None]
        q = tl.load(codes_at + start, mask=is_code, other=0)
        if IS_FP8:
            q = q.to(tl.float8e4nv, bitcast=True)
        a = tl.load(x_at + start * per, mask=is_x, other=0.0)
        if IS_INT4:
            b = tl.load(x_at + start * per + 1, mask=is_x, other=0.0)
            low = (q & 15).to(tl.float32)
            high = (q >> 4).to(tl.float32)
        if NUM_GROUPS == 1:
            if IS_INT4:
                s = tl.load(scales + scale_at, mask=is_column, other=0.0).to(tl.float32)
                o = tl.load(offsets + scale_at, mask=is_column, other=0.0).to(tl.float32)
                part = tl.dot(low.to(a.dtype), a, input_precision=PRECISION)
                part = tl.dot(high.to(a.dtype), b, part, input_precision=PRECISION)
                sums = tl.sum(a.to(tl.float32), axis=0) + tl.sum(b.to(tl.float32), axis=0)
                total += part * s[:, None] + sums[None, :] * o[:, None]
            else:
                total = tl.dot(q.to(a.dtype), a, total, input_precision=PRECISION)
        elif GROUP == INPUTS:
            group = start * per // GROUP
            s = tl.load(scales + scale_at + group, mask=is_column, other=0.0).to(tl.float32)
            if IS_INT4:
                o = tl.load(offsets + scale_at + group, mask=is_column, other=0.0).to(tl.float32)
                part = tl.dot(low.to(a.dtype), a, input_precision=PRECISION)
                part = tl.dot(high.to(a.dtype), b, part, input_precision=PRECISION)
                sums = tl.sum(a.to(tl.float32), axis=0) + tl.sum(b.to(tl.float32), axis=0)
                total += part * s[:, None] + sums[None, :] * o[:, None]
            else:
                total += tl.dot(q.to(a.dtype), a, input_precision=PRECISION) * s[:, None]
        else:
            at = scale_at[:, None] + ((start + ks) * per // GROUP)[None, :]  # both inputs of a byte: groups are even
            s = tl.load(scales + at, mask=is_code, other=0.0).to(tl.float32)
            if IS_INT4:
                o = tl.load(offsets + at, mask=is_code, other=0.0).to(tl.float32)
                total = tl.dot((low * s + o).to(a.dtype), a, total, input_precision=PRECISION)
                total = tl.dot((high * s + o).to(a.dtype), b, total, input_precision=PRECISION)
            else:
                total = tl.dot((q.to(tl.float32) * s).to(a.dtype), a, total, input_precision=PRECISION)
    if NUM_GROUPS == 1 and not IS_INT4:
        total *= tl.load(scales + scale_at, mask=is_column, other=0.0).to(tl.float32)[:, None]
    out_at = out + rows.to(tl.int64)[None, :] * width + columns[:, None]
    tl.store(out_at, total.to(out.dtype.element_ty), mask=is_column[:, None] & is_row[None, :])


@jit()
def _dequantise_kernel(
    codes: tl.tensor,
    scales: tl.tensor,
    offsets: tl.tensor,
    out: tl.tensor,
    row_bytes: tl.tensor,
    IS_INT4: tl.constexpr,
    IS_FP8: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    per: tl.constexpr = 2 if IS_INT4 else 1
    ks = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = ks < row_bytes
    q = tl.load(codes + row * row_bytes + ks, mask=inside, other=0)
    if IS_FP8:
        q = q.to(tl.float8e4nv, bitcast=True)
    at = row * NUM_GROUPS + ks * per // GROUP
    s = tl.load(scales + at, mask=inside, other=0.0).to(tl.float32)
    to = out + (row * row_bytes + ks) * per
    if IS_INT4:
        o = tl.load(offsets + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(to, ((q & 15).to(tl.float32) * s + o).to(out.dtype.element_ty), mask=inside)
        tl.store(to + 1, ((q >> 4).to(tl.float32) * s + o).to(out.dtype.element_ty), mask=inside)
    else:
        tl.store(to, (q.to(tl.float32) * s).to(out.dtype.element_ty), mask=inside)
