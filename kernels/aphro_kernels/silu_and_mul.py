"""SiLU of the gate times the up projection, from one merged tensor."""
# ruff: noqa: N803  (the constants of a kernel are in capitals)

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import silu

from aphro_kernels.language import chain_options, jit, runs_kernels, start_in_chain, tl, triton


def silu_and_mul_reference(x: Tensor) -> Tensor:
    gate, up = x.float().chunk(2, dim=-1)
    return (silu(gate) * up).to(x.dtype)


def silu_and_mul(x: Tensor) -> Tensor:
    """``[num_tokens, 2 * width]`` (gate columns, then up columns) -> ``[num_tokens, width]``; float32 inside.

    On CPUs two operations of torch, which round in between.
    """
    if not runs_kernels(x):
        gate, up = x.chunk(2, dim=-1)
        return silu(gate).mul_(up)
    return _launch(x, x.new_empty(x.shape[0], x.shape[1] // 2))


def _launch(x: Tensor, out: Tensor) -> Tensor:
    num_tokens, width = out.shape
    assert x.stride(1) == 1
    if num_tokens:
        block = 1024
        grid = (num_tokens, triton.cdiv(width, block))
        _silu_and_mul_kernel[grid](
            x, out, width, x.stride(0), out.stride(0), BLOCK=block, num_warps=4, **chain_options(x)
        )
    return out


@jit()
def _silu_and_mul_kernel(
    x: tl.tensor,
    out: tl.tensor,
    width: tl.tensor,
    x_stride: tl.tensor,
    out_stride: tl.tensor,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    start_in_chain(CHAINED)
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(x + token * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + token * x_stride + width + columns, mask=inside, other=0.0).to(tl.float32)
    product = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + token * out_stride + columns, product.to(out.dtype.element_ty), mask=inside)
