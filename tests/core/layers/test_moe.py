"""The mixture of experts against a plain sum over all experts, whole, by columns and by expert parallelism."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from aphro_core.layers.linear import Linear
from aphro_core.layers.moe import DenseStack, GroupedExperts, LoopedExperts, SparseMoe
from aphro_core.models.spec import MoeSpec

NUM_EXPERTS, HIDDEN, WIDTH = 5, 24, 16


def expected(x: Tensor, router: Tensor, gate_up: Tensor, down: Tensor, *, top: int, renormalize: bool) -> Tensor:
    probabilities = torch.softmax(linear(x, router), dim=-1)
    kept = torch.zeros_like(probabilities)
    best = probabilities.topk(top, dim=-1)
    kept.scatter_(1, best.indices, best.values)
    if renormalize:
        kept /= kept.sum(dim=-1, keepdim=True)
    out = torch.zeros_like(x)
    for expert in range(NUM_EXPERTS):
        gate, up = linear(x, gate_up[expert]).chunk(2, dim=-1)
        out += kept[:, expert, None] * linear(silu(gate) * up, down[expert])
    return out


@pytest.mark.parametrize("num_tokens", [1, 2, 37])
@pytest.mark.parametrize(("top", "renormalize"), [(1, False), (2, True), (5, False)])
def test_tokens_go_through_the_experts_of_their_choice(num_tokens: int, top: int, renormalize: bool) -> None:
    torch.manual_seed(num_tokens)
    x, router = torch.randn(num_tokens, HIDDEN), torch.randn(NUM_EXPERTS, HIDDEN)
    gate_up, down = torch.randn(NUM_EXPERTS, 2 * WIDTH, HIDDEN), torch.randn(NUM_EXPERTS, HIDDEN, WIDTH)
    spec = MoeSpec(num_experts=NUM_EXPERTS, experts_per_token=top, intermediate_size=WIDTH, renormalize=renormalize)
    reference = expected(x, router, gate_up, down, top=top, renormalize=renormalize)
    by_experts, in_groups = torch.zeros_like(x), torch.zeros_like(x)
    for here in (range(3), range(3, 5), range(0)):
        experts = LoopedExperts([Linear(gate_up[e]) for e in here], [Linear(down[e]) for e in here], here.start, "silu")
        by_experts += SparseMoe(spec, Linear(router), experts)(x)
        stacked = [DenseStack(each[here.start : here.stop]) for each in (gate_up, down)]
        grouped = (
            GroupedExperts(*stacked, first=here.start, num_experts=NUM_EXPERTS, activation="silu") if here else experts
        )
        in_groups += SparseMoe(spec, Linear(router), grouped)(x)
    by_columns = torch.zeros_like(x)
    for columns in (slice(0, 6), slice(6, 16)):
        gate, up = gate_up.chunk(2, dim=1)
        fused = torch.cat([gate[:, columns], up[:, columns]], dim=1)
        parts = (
            [Linear(part.contiguous()) for part in fused],
            [Linear(part.contiguous()) for part in down[..., columns]],
        )
        by_columns += SparseMoe(spec, Linear(router), LoopedExperts(*parts, 0, "silu"))(x)
    torch.testing.assert_close(by_experts, reference, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(in_groups, reference, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(by_columns, reference, atol=1e-4, rtol=1e-4)
