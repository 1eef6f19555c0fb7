"""The router of a mixture of experts: which ones a token takes, and with what shares, from its logits in one launch."""
# ruff: noqa: N803  (the constants of a kernel are in capitals)

from __future__ import annotations

import torch
from torch import Tensor

from aphro_kernels.language import chain_options, jit, next_power_of_2, runs_kernels, start_in_chain, tl


def route_reference(logits: Tensor, top: int, *, renormalize: bool) -> tuple[Tensor, Tensor]:
    shares, chosen = torch.softmax(logits.float(), dim=-1).topk(top, dim=-1)
    if renormalize:
        shares = shares / shares.sum(dim=-1, keepdim=True)
    return chosen, shares


def route(logits: Tensor, top: int, *, renormalize: bool) -> tuple[Tensor, Tensor]:
    """``logits`` [num_tokens, num_experts] to the ``top`` most likely experts [num_tokens, top] int64, the first of
    equal ones first, and their shares of the softmax over all, float32; ``renormalize``: they sum to 1."""
    if not runs_kernels(logits):
        return route_reference(logits, top, renormalize=renormalize)
    return _launch(logits, top, renormalize)


def _launch(logits: Tensor, top: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    num_tokens, num_experts = logits.shape
    assert logits.stride(1) == 1
    chosen = torch.empty(num_tokens, top, dtype=torch.int64, device=logits.device)
    shares = torch.empty(num_tokens, top, dtype=torch.float32, device=logits.device)
    if num_tokens:
        _route_kernel[(num_tokens,)](
            logits,
            chosen,
            shares,
            num_experts,
            logits.stride(0),
            TOP=top,
            RENORMALIZE=renormalize,
            BLOCK=next_power_of_2(num_experts),
            num_warps=1,
            **chain_options(logits),
        )
    return chosen, shares


@jit()
def _route_kernel(
    logits: tl.tensor,
    chosen: tl.tensor,
    shares: tl.tensor,
    num_experts: tl.tensor,
    stride: tl.tensor,
    TOP: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    """One token: the largest of what is left, ``TOP`` times."""
    start_in_chain(CHAINED)
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK)
    logit = tl.load(logits + token * stride + expert, mask=expert < num_experts, other=float("-inf")).to(tl.float32)
    weight = tl.exp(logit - tl.max(logit, axis=0))
    total = tl.sum(weight, axis=0)
    left = tl.where(expert < num_experts, weight, -1.0)
    is_taken = expert < 0
    for place in tl.static_range(TOP):
        best = tl.argmax(left, axis=0)
        tl.store(chosen + token * TOP + place, best.to(tl.int64))
        is_taken = is_taken | (expert == best)
        left = tl.where(expert == best, -1.0, left)
    if RENORMALIZE:
        total = tl.sum(tl.where(is_taken, weight, 0.0), axis=0)
    left = tl.where(is_taken, weight, -1.0)
    for place in tl.static_range(TOP):
        best = tl.argmax(left, axis=0)
        tl.store(shares + token * TOP + place, tl.max(left, axis=0) / total)
        left = tl.where(expert == best, -1.0, left)
