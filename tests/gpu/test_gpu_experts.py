"""The experts of a layer on a GPU, of every format that weights are kept in, against float32 over the same weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from aphro_core.layers.expert_stacks import DenseStack, Stack, packed_stack
from aphro_core.layers.moe import GroupedExperts
from aphro_core.models.quantization import Kind
from aphro_core.quantization.online import quantise
from tests.kernels.comparisons import chosen_experts, poisoned_memory, random

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
NUM_EXPERTS = 8
FORMATS: list[tuple[Kind | None, int | None]] = [
    (None, None),
    ("fp8", None),
    ("fp8", 128),
    ("int8", None),
    ("int8", 16),  # Q6_K
    ("int8", 32),  # Q8_0, Q5_0
    ("int4", 32),  # Q4_K, Q4_0
    ("int4", 128),
]


def stacked(shape: tuple[int, int, int], kind: Kind | None, group: int | None, seed: int) -> tuple[Stack, Tensor]:
    """Matrices as they are kept, and as float32."""
    weight = random(*shape, dtype=torch.bfloat16, device="cuda", seed=seed) / shape[2] ** 0.5
    if kind is None:
        return DenseStack(weight), weight.float()
    matrix = quantise(weight.flatten(0, 1), kind, group, torch.bfloat16)
    return packed_stack([matrix], shape[0]), matrix.dequantise(torch.float32).view(shape)


def by_float32(x: Tensor, chosen: Tensor, shares: Tensor, gate_up: Tensor, down: Tensor, here: range) -> Tensor:
    out = torch.zeros_like(x, dtype=torch.float32)
    for local, expert in enumerate(here):
        gate, up = linear(x.float(), gate_up[local]).chunk(2, dim=-1)
        inner = (silu(gate) * up).bfloat16().float()
        out += (shares * (chosen == expert)).sum(dim=1, keepdim=True) * linear(inner, down[local])
    return out


@pytest.mark.parametrize(
    ("here", "hidden", "width"), [(range(NUM_EXPERTS), 512, 1408), (range(2, 5), 1152, 640), (range(2, 5), 384, 72)]
)
@pytest.mark.parametrize(("kind", "group"), FORMATS)
@torch.inference_mode()
def test_experts_of_every_format(kind: Kind | None, group: int | None, here: range, hidden: int, width: int) -> None:
    """One token and many, experts that nobody takes, some of the experts on another rank; memory is NaN at first."""
    if group is not None and width % group:
        group = 8 if kind == "fp8" else 24
    gate_up, plain_gate_up = stacked((len(here), 2 * width, hidden), kind, None if kind == "fp8" else group, 1)
    down, plain_down = stacked((len(here), hidden, width), kind, group, 2)
    experts = GroupedExperts(gate_up, down, first=here.start, num_experts=NUM_EXPERTS, activation="silu")
    for num_tokens, left_out in ((1, 0), (3, 2), (6, 2), (37, 1), (150, 2), (400, 1), (1500, 2)):
        x = random(num_tokens, hidden, dtype=torch.bfloat16, device="cuda", seed=num_tokens)
        chosen = chosen_experts(num_tokens, NUM_EXPERTS, 2, "cuda", left_out=left_out)
        shares = torch.rand(num_tokens, 2, device="cuda")
        with poisoned_memory():
            found = experts(x, chosen, shares).float()
        expected = by_float32(x, chosen, shares, plain_gate_up, plain_down, here)
        error = (found - expected).norm() / expected.norm().clamp(min=1e-6)
        assert error < 6e-3, (num_tokens, error.item())


@pytest.mark.parametrize("kind", [None, "fp8", "int4"])
@pytest.mark.parametrize("num_tokens", [1, 48, 300])
@torch.inference_mode()
def test_a_graph_holds_them(num_tokens: int, kind: Kind | None) -> None:
    """Captured with one choice of experts, replayed with others."""
    group = 128 if kind == "int4" else None
    stacks = [stacked(shape, kind, group, 1)[0] for shape in ((8, 512, 256), (8, 256, 256))]
    experts = GroupedExperts(stacks[0], stacks[1], first=0, num_experts=NUM_EXPERTS, activation="silu")
    inputs = [
        (
            random(num_tokens, 256, dtype=torch.bfloat16, device="cuda", seed=seed),
            chosen_experts(num_tokens, NUM_EXPERTS, 2, "cuda", left_out=seed),
            torch.rand(num_tokens, 2, device="cuda"),
        )
        for seed in range(3)
    ]
    kept = [each.clone() for each in inputs[0]]
    experts(*kept)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = experts(*kept)
    for given in inputs:
        for place, value in zip(kept, given, strict=True):
            place.copy_(value)
        graph.replay()
        assert torch.equal(out, experts(*given))
