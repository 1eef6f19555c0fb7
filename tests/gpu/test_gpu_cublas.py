"""Each product that the tables give to an algorithm of cuBLAS against its reference, and what cuBLAS refuses."""

from __future__ import annotations

import logging

import pytest
import torch
from aphro_kernels import tuned
from aphro_kernels.cublas_lt import LtAlgorithm, lt_linear_reference, lt_product
from aphro_kernels.skinny_linear import build_skinny_workspace

from aphro_core.layers.linear import Linear
from tests.kernels.comparisons import assert_close

QKV_OF_7B = (4608, 3584)  # Qwen2.5's, which has a bias
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def table() -> dict[tuple[int, ...], LtAlgorithm]:
    found = tuned._algorithms(torch.cuda.get_device_name())
    if not found:
        pytest.skip("no table is for this GPU and this cuBLAS")
    return found


def operands(rows: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, k, device="cuda").bfloat16(), (torch.randn(n, k, device="cuda") * k**-0.5).bfloat16()


def test_each_entry_is_taken_and_right() -> None:
    workspace = build_skinny_workspace(torch.device("cuda")).parts
    refused = []
    for n, k, rows in table():
        x, weight = operands(rows, n, k)
        product = tuned.library_product(weight, rows)
        with_bias = tuned.library_product(weight, rows, has_bias=True) if (n, k) == QKV_OF_7B else product
        if product is None or with_bias is None:
            refused.append((n, k, rows))
            continue
        workspace.fill_(float("nan"))
        out = torch.full((rows, n), float("nan"), device="cuda").bfloat16()
        assert_close(product(x, weight, out=out, workspace=workspace), lt_linear_reference(x, weight))
        assert torch.equal(product(x, weight, workspace=workspace), out)
    assert not refused


@pytest.mark.parametrize("has_bias", [False, True])
def test_a_layer_takes_it_in_a_graph(has_bias: bool) -> None:
    (n, k, rows), _ = next(iter(table().items()))
    x, weight = operands(rows, n, k)
    bias = torch.randn(n, device="cuda").bfloat16() if has_bias else None
    assert tuned.library_product(weight, rows, has_bias=has_bias) is not None
    layer = Linear(weight, bias, build_skinny_workspace(weight.device))
    with torch.inference_mode():
        layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        x.neg_()
        graph.replay()
    assert_close(y, lt_linear_reference(x, weight, bias))


def test_what_cublas_refuses_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    unknown = LtAlgorithm(number=66, tile=60000, stages=35, cluster=2)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert lt_product(256, 4096, 4096, torch.bfloat16, False, 0, unknown) is None
    assert len(caplog.records) == 1
