"""The mixture of experts against a plain sum over all experts, whole, by columns and by expert parallelism."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from aphro_core.layers import moe
from aphro_core.layers.expert_stacks import (
    DenseStack,
    DequantisedStack,
    OrderedStack,
    SideBySide,
    Stack,
    packed_stack,
)
from aphro_core.layers.linear import Linear
from aphro_core.layers.moe import GroupedExperts, LoopedExperts, SparseMoe
from aphro_core.models.quantization import Kind
from aphro_core.models.spec import MoeSpec
from aphro_core.quantization.linear import QuantizedLinear
from aphro_core.quantization.matrix import PackedMatrix, below_each_other, cut_rows
from aphro_core.quantization.online import quantise

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


def _matrix(kind: Kind, rows: int, order: str, seed: int) -> PackedMatrix:
    generator = torch.Generator().manual_seed(seed)
    matrix = quantise(torch.randn(rows, 64, generator=generator), kind, 16, torch.float32)
    shuffled = torch.randperm(64, generator=generator)
    if order == "order":
        return replace(matrix, order=shuffled.to(torch.int32))
    return replace(matrix, group_index=(shuffled // 16).to(torch.int32)) if order == "groups" else matrix


@pytest.mark.parametrize("here", [range(4), range(1, 3)])
@pytest.mark.parametrize("num_tokens", [1, 300])
@pytest.mark.parametrize(
    ("kinds", "orders", "stack"),
    [
        (("int4", "int8"), ("", ""), SideBySide),  # gate and up of a GGUF file in two block formats
        (("int4", "int4"), ("order", ""), SideBySide),
        (("int4", "int8"), ("order", "order"), SideBySide),
        (("int4",), ("order",), OrderedStack),  # act-order
        (("int8",), ("groups",), DequantisedStack),  # act-order, of a rank with some of the columns
    ],
)
def test_experts_that_are_kept_in_several_ways(
    kinds: tuple[Kind, ...], orders: tuple[str, ...], stack: type, num_tokens: int, here: range
) -> None:
    """As by one expert after the other, whose matrices are dequantised."""
    torch.manual_seed(num_tokens)
    rows = 128 // len(kinds)
    parts = [
        _matrix(kind, rows, order, 7 * e + at)
        for e in here
        for at, (kind, order) in enumerate(zip(kinds, orders, strict=True))
    ]
    gate_up = below_each_other(parts)
    down = [_matrix("int4", 64, "", 90 + e) for e in here]
    x = torch.randn(num_tokens, 64)
    chosen, shares = torch.randint(0, 4, (num_tokens, 2)), torch.rand(num_tokens, 2)
    looped = LoopedExperts(
        [QuantizedLinear(each, None, torch.float32) for each in cut_rows(gate_up, len(here))],
        [QuantizedLinear([each], None, torch.float32) for each in down],
        here.start,
        "silu",
    )
    stacked = packed_stack(gate_up, len(here))
    assert type(stacked) is stack
    grouped = GroupedExperts(
        stacked, packed_stack(below_each_other(down), len(here)), first=here.start, num_experts=4, activation="silu"
    )
    out = torch.zeros_like(x)
    for local, expert in enumerate(here):
        weights = [part.dequantise(torch.float32) for part in parts[local * len(kinds) : (local + 1) * len(kinds)]]
        gate, up = linear(x, torch.cat(weights)).chunk(2, dim=-1)
        share = (shares * (chosen == expert)).sum(dim=1, keepdim=True)
        out += share * linear(silu(gate) * up, down[local].dequantise(torch.float32))
    torch.testing.assert_close(grouped(x, chosen, shares), out, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(looped(x, chosen, shares), out, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["", "fp8", "int4", "int8"])
@pytest.mark.parametrize("here", [range(4), range(1, 3)])
def test_rows_that_stand_by_expert(monkeypatch: pytest.MonkeyPatch, kind: Kind | Literal[""], here: range) -> None:
    """As Hopper has many of them: they give what few rows an expert give."""
    torch.manual_seed(5)
    x, chosen = torch.randn(200, 64), torch.rand(200, 4).topk(2).indices
    shares = torch.rand(200, 2)
    matrices = [[torch.randn(rows, 64) for _ in here] for rows in (128, 64)]
    stacks: list[Stack] = [DenseStack(torch.stack(each)) for each in matrices]
    if kind:
        packed = [below_each_other([quantise(one, kind, 16, x.dtype) for one in each]) for each in matrices]
        stacks = [packed_stack(each, len(here)) for each in packed]
    experts = GroupedExperts(*stacks, first=here.start, num_experts=4, activation="silu")
    few = experts(x, chosen, shares)
    assert experts._wides_for(x, chosen) is None
    monkeypatch.setattr(moe, "suits_hopper", lambda x: True)
    assert experts._wides_for(x, chosen) is not None
    assert experts._wides_for(x[:9], chosen[:9]) is None
    torch.testing.assert_close(experts(x, chosen, shares), few, atol=2e-3, rtol=1e-3)
