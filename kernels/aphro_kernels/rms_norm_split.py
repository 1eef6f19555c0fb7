"""RMSNorm whose rows go into a product of split rows (float8_linear.py): in the same pass, split as well."""
# ruff: noqa: N803  (the constants of a kernel are in capitals)

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aphro_kernels.language import chain_options, jit, let_next_start, next_power_of_2, tl, wait_for_last
from aphro_kernels.split_rows import SplitRows, empty_split, store_split


def rms_norm_split(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out: Tensor | None = None
) -> tuple[Tensor, SplitRows]:
    """As rms_norm.py has it (with ``residual``: ``add_rms_norm_``), for bfloat16 on a GPU, a width that is a multiple
    of 128; and the split of what is returned."""
    num_tokens, width = x.shape
    assert x.stride(1) == 1
    assert weight.is_contiguous()
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    split = empty_split(x)
    if num_tokens:
        block = next_power_of_2(width)
        launch: Any = _rms_norm_split_kernel[(num_tokens,)]
        launch(
            x,
            x if residual is None else residual,
            weight,
            out,
            split.codes.view(torch.uint8),
            split.scales,
            split.sums,
            num_tokens,
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
    return out, split


@jit(do_not_specialize=["num_tokens", "eps"])
def _rms_norm_split_kernel(
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    sums: tl.tensor,
    num_tokens: tl.tensor,
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
    normed = (row * scale * gain).to(out.dtype.element_ty)
    tl.store(out + token * out_stride + dims, normed, mask=inside)
    store_split(normed.to(tl.float32), codes, scales, sums, token, num_tokens, width, BLOCK)
