"""RMSNorm, alone or with the residual add before it: one pass over memory each."""
# ruff: noqa: N803  (the constants of a kernel are in capitals)

from __future__ import annotations

import torch
from torch import Tensor

from aphro_kernels.language import chain_options, jit, let_next_start, next_power_of_2, runs_kernels, tl, wait_for_last


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * scale * weight.float()).to(x.dtype)


def add_rms_norm_reference_(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    residual.add_(x)
    return rms_norm_reference(residual, weight, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x ** 2) + eps) * weight`` along the last dim: ``[num_tokens, width]``, ``weight`` [width].

    float32 inside, the dtype of ``x`` outside. Rows may be strided, a row's elements are contiguous.
    """
    if not runs_kernels(x):
        return rms_norm_reference(x, weight, eps)
    return _launch(x, None, weight, eps)


def add_rms_norm_(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``residual += x`` in place, rounded to its dtype; returns the RMSNorm of that sum, ``[num_tokens, width]``."""
    if not runs_kernels(x):
        return add_rms_norm_reference_(residual, x, weight, eps)
    return _launch(x, residual, weight, eps)


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    num_tokens, width = x.shape
    assert x.stride(1) == 1
    assert weight.is_contiguous()
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    if num_tokens:
        block = next_power_of_2(width)
        _rms_norm_kernel[(num_tokens,)](
            x,
            x if residual is None else residual,
            weight,
            out,
            width,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            out.stride(0),
            eps,
            HAS_RESIDUAL=residual is not None,
            BLOCK=block,
            num_warps=min(max(block // 512, 1), 16),
            **chain_options(x),
        )
    return out


@jit(do_not_specialize=["eps"])
def _rms_norm_kernel(
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    width: tl.tensor,
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    out_stride: tl.tensor,
    eps: tl.tensor,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    let_next_start(CHAINED)
    token = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, BLOCK)
    inside = dims < width
    gain = tl.load(weight + dims, mask=inside, other=0.0).to(tl.float32)
    wait_for_last(CHAINED)
    row = tl.load(x + token * x_stride + dims, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        at = residual + token * residual_stride + dims
        row = (tl.load(at, mask=inside, other=0.0).to(tl.float32) + row).to(residual.dtype.element_ty)
        tl.store(at, row, mask=inside)
        row = row.to(tl.float32)
    scale = tl.rsqrt(tl.sum(row * row, axis=0) / width + eps)
    tl.store(out + token * out_stride + dims, (row * scale * gain).to(out.dtype.element_ty), mask=inside)
