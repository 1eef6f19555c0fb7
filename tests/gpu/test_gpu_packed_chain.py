"""A quantised layer behind its attention in one launch of one row: right for any sizes, the same bits in every run."""

from __future__ import annotations

import pytest
import torch
from aphro_kernels.chain_plan import ChainShape
from aphro_kernels.hopper import suits_hopper
from aphro_kernels.packed_chain_layer import (
    NextPackedLayer,
    PackedChainLayer,
    build_packed_chain_workspace,
    packed_chain_rows,
)
from aphro_kernels.packed_linear import PackedWeight, in_tiles
from aphro_kernels.rms_norm import rms_norm
from torch import Tensor

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
SHAPES = [
    ChainShape(128, 256, 384, 384),  # most programs have no stripe
    ChainShape(896, 896, 4864, 1152),  # inputs that end within a slot
    ChainShape(3584, 3584, 18944, 4608),
    ChainShape(4096, 4096, 14336, 6144),
]


@pytest.fixture(autouse=True)
def _on_hopper() -> None:
    if not suits_hopper(torch.empty(1, device="cuda", dtype=torch.bfloat16)):
        pytest.skip("kernels for Hopper, in the Gluon of Triton 3.6")


def error_of(y: Tensor, expected: Tensor) -> float:
    return float((y.float() - expected.float()).norm() / expected.float().norm())


def random_weight(kind: str, n: int, k: int) -> PackedWeight:
    """ "int4", or "fp8" with a scale a row, or "fp8 in groups"."""
    if kind == "int4":
        codes = torch.randint(0, 256, (n, k // 2), device="cuda", dtype=torch.uint8)
        scales = (torch.rand(n, k // 128, device="cuda") + 0.5) * (0.3 / k**0.5)
        offsets = -7.5 * scales * (1 + 0.1 * torch.randn_like(scales))
        return in_tiles(PackedWeight(codes, scales.bfloat16(), offsets.bfloat16()))
    codes = torch.randn(n, k, device="cuda").mul_(50).clamp_(-448, 448).to(torch.float8_e4m3fn)
    groups = k // 128 if kind == "fp8 in groups" else 1
    scales = (torch.rand(n, groups, device="cuda") + 0.5) / (50 * k**0.5)
    return PackedWeight(codes, scales.bfloat16() if groups > 1 else scales)


@pytest.mark.parametrize("kind", ["int4", "fp8", "fp8 in groups"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: str(shape.hidden))
def test_packed_chain(shape: ChainShape, kind: str) -> None:
    """Two layers and, between them, small kernels of the chain; the second one is the last."""
    torch.manual_seed(shape.hidden)
    rows = "fp8" if kind == "fp8 in groups" else kind  # online, groups are those of dimensions that ranks cut
    workspace = build_packed_chain_workspace(shape, torch.device("cuda"))

    def gain() -> Tensor:
        return (torch.rand(shape.hidden, device="cuda") + 0.5).bfloat16()

    layers = []
    for is_last in (False, True):
        weights = (
            random_weight(kind, shape.hidden, shape.attended),
            random_weight(rows, 2 * shape.inner, shape.hidden),
            random_weight(kind, shape.hidden, shape.inner),
            random_weight(rows, shape.qkv, shape.hidden),
        )
        assert 1 in packed_chain_rows(shape, weights, gain())
        bias = torch.randn(shape.qkv, device="cuda").bfloat16()
        following = None if is_last else NextPackedLayer(gain(), weights[3], bias)
        layers.append(PackedChainLayer(weights[0], gain(), *weights[1:3], following, 1e-5, workspace))
    start = torch.randn(1, shape.hidden, device="cuda").bfloat16()
    source = torch.randn(1, shape.attended, device="cuda").bfloat16()
    start[0, 7] *= 300  # far larger than its neighbours, with which it shares a unit
    source[0, 9] *= 30
    ones = torch.ones(shape.attended, device="cuda").bfloat16()
    workspace.inner.fill_(float("nan"))

    def run(x: Tensor, qkv: Tensor) -> None:
        x.copy_(start)
        for layer in layers:
            layer(x, rms_norm(source, ones, 1e-5), qkv)

    x, qkv = start.clone(), torch.full((1, shape.qkv), float("nan"), device="cuda").bfloat16()
    run(x, qkv)
    expected, attended = start.clone(), rms_norm(source, ones, 1e-5)
    expected_qkv = layers[0].reference_(expected, attended)
    assert layers[1].reference_(expected, attended) is None
    assert expected_qkv is not None
    assert error_of(x, expected) < 1e-2
    assert error_of(qkv, expected_qkv) < 1e-2

    again, again_qkv = torch.empty_like(x), torch.empty_like(qkv)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(again, again_qkv)
    for _ in range(100):
        again_qkv.fill_(float("nan"))
        graph.replay()
        assert torch.equal(again, x)
        assert torch.equal(again_qkv, qkv)


@pytest.mark.parametrize("kind", ["int4", "fp8"])
def test_what_is_not_finite_stays_so(kind: str) -> None:
    shape = SHAPES[0]
    workspace = build_packed_chain_workspace(shape, torch.device("cuda"))
    weights = [random_weight(kind, n, k) for n, k in ((256, 128), (768, 256), (256, 384))]
    layer = PackedChainLayer(weights[0], torch.ones(256, device="cuda").bfloat16(), *weights[1:], None, 1e-5, workspace)
    for value in (float("inf"), float("nan")):
        x, attended = torch.zeros(1, 256, device="cuda").bfloat16(), torch.ones(1, 128, device="cuda").bfloat16()
        attended[0, 3] = value
        layer(x, attended)
        assert not x.isfinite().any()
