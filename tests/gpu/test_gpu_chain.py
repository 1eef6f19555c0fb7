"""A layer behind its attention in one launch: right for any sizes, the same bits in every run, and in company."""

from __future__ import annotations

import pytest
import torch
from aphro_kernels.chain_layer import ChainLayer, ChainWorkspace, NextLayer, build_chain_workspace, chain_rows
from aphro_kernels.chain_plan import ChainShape
from aphro_kernels.hopper import suits_hopper
from aphro_kernels.rms_norm import rms_norm
from torch import Tensor

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
SHAPES = [
    ChainShape(64, 64, 128, 96),
    ChainShape(1032, 584, 1000, 776),  # programs without a stripe in some phases
    ChainShape(896, 896, 4864, 1152),
    ChainShape(3072, 3072, 8192, 5120),  # a stripe of x is no power of two
    ChainShape(3584, 3584, 18944, 4608),  # two pairs of stripes a program
    ChainShape(4096, 4096, 14336, 6144),
]


def error_of(y: Tensor, expected: Tensor) -> float:
    return float((y.float() - expected.float()).norm() / expected.float().norm())


def build(shape: ChainShape, workspace: ChainWorkspace, *, is_last: bool = False) -> ChainLayer:
    def weight(n: int, k: int) -> Tensor:
        return (torch.randn(n, k, device="cuda") / k**0.5).bfloat16()

    def gain() -> Tensor:
        return (torch.rand(shape.hidden, device="cuda") + 0.5).bfloat16()

    bias = torch.randn(shape.qkv, device="cuda").bfloat16()
    return ChainLayer(
        weight(shape.hidden, shape.attended),
        gain(),
        weight(2 * shape.inner, shape.hidden),
        weight(shape.hidden, shape.inner),
        None if is_last else NextLayer(gain(), weight(shape.qkv, shape.hidden), bias),
        1e-5,
        workspace,
    )


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: str(shape.hidden))
def test_layers(shape: ChainShape) -> None:
    """Two layers and, between them, small kernels of the chain; the second one is the last."""
    if not suits_hopper(torch.empty(1, device="cuda", dtype=torch.bfloat16)):
        pytest.skip("a kernel for Hopper, in the Gluon of Triton 3.6")
    torch.manual_seed(shape.hidden)
    workspace = build_chain_workspace(shape, torch.device("cuda"))
    assert 32 in chain_rows(shape, workspace.scaled)
    layers = [build(shape, workspace), build(shape, workspace, is_last=True)]
    gain = torch.ones(shape.attended, device="cuda", dtype=torch.bfloat16)
    for num_rows in (1, 8, 9, 17, 32, 64) if shape.hidden == 584 else (1, 32):
        start = torch.randn(num_rows, shape.hidden, device="cuda").bfloat16()
        source = torch.randn(num_rows, shape.attended, device="cuda").bfloat16()
        for part in (workspace.scaled, workspace.inner, workspace.parts):
            part.fill_(float("nan"))
        x, qkv = start.clone(), torch.full((num_rows, shape.qkv), float("nan"), device="cuda").bfloat16()

        def run(x: Tensor, qkv: Tensor, source: Tensor = source, start: Tensor = start) -> None:
            x.copy_(start)
            for layer in layers:
                layer(x, rms_norm(source, gain, 1e-5), qkv)

        run(x, qkv)
        expected = start.clone()
        attended = rms_norm(source, gain, 1e-5)
        expected_qkv = layers[0].reference_(expected, attended)
        assert layers[1].reference_(expected, attended) is None
        assert expected_qkv is not None
        assert error_of(x, expected) < 1e-2, num_rows
        assert error_of(qkv, expected_qkv) < 1e-2, num_rows

        again, again_qkv = torch.empty_like(x), torch.empty_like(qkv)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run(again, again_qkv)
        for _ in range(100):
            again_qkv.fill_(float("nan"))
            graph.replay()
            assert torch.equal(again, x), num_rows
            assert torch.equal(again_qkv, qkv), num_rows
