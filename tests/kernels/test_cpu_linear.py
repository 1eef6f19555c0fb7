"""Products of bfloat16 on a CPU against float32: any shape, outputs NaN before, no less exact than oneDNN's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from aphro_kernels import cpu_linear
from aphro_kernels.cpu_linear import CpuLinear, cpu_linear_reference
from torch import Tensor

from aphro_core import host

pytestmark = pytest.mark.skipif(not host.has_product_kernels(), reason="this CPU has no AVX512-BF16, or has AMX")


@pytest.fixture(autouse=True)
def nan_in_fresh_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def case(rows: int, out_features: int, in_features: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * out_features + in_features)
    weight = torch.randn(out_features, in_features, generator=generator).bfloat16()
    bias = torch.randn(out_features, generator=generator).bfloat16()
    # rows of a wider tensor, with NaN behind each
    x = torch.full((rows, in_features + 6), float("nan")).bfloat16()
    x[:, :in_features] = torch.randn(rows, in_features, generator=generator)
    return x[:, :in_features], weight, bias


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 63, 205])
@pytest.mark.parametrize(("out_features", "in_features"), [(1, 2), (31, 10), (32, 64), (100, 66), (192, 576)])
def test_equals_its_reference(rows: int, out_features: int, in_features: int) -> None:
    x, weight, bias = case(rows, out_features, in_features)
    for found, expected in (
        (CpuLinear(weight, None)(x), cpu_linear_reference(x, weight, None)),
        (CpuLinear(weight, bias)(x), cpu_linear_reference(x, weight, bias)),
    ):
        torch.testing.assert_close(found, expected, rtol=1 / 128, atol=1e-3)


@pytest.mark.parametrize(("rows", "out_features"), [(1, 32), (5, 64), (100, 96)])
def test_gate_times_up(rows: int, out_features: int) -> None:
    x, weight, bias = case(rows, out_features, 66)
    for some_bias in (None, bias):
        product = CpuLinear(weight, some_bias)
        assert product.can_gate
        expected = cpu_linear_reference(x, weight, some_bias, is_gated=True)
        torch.testing.assert_close(product.gated(x), expected, rtol=1 / 128, atol=2e-3)


def test_the_gate_of_large_numbers() -> None:
    """SiLU's exponential neither overflows nor loses the sign, and NaN stays NaN."""
    gate = torch.tensor([-1e30, -200.0, -1.0, 0.0, 1.0, 200.0, 1e30, float("nan")]).bfloat16()
    weight = torch.zeros(32, 2).bfloat16()
    weight[:8, 0], weight[16:, 1] = gate, 1.0
    found = CpuLinear(weight, None).gated(torch.ones(1, 2).bfloat16())
    expected = torch.nn.functional.silu(gate.float()).bfloat16()
    torch.testing.assert_close(found[0, :8], expected, equal_nan=True, rtol=1 / 128, atol=1e-30)


def test_a_row_has_the_same_bits_alone_and_among_others() -> None:
    x, weight, bias = case(101, 96, 130)
    product = CpuLinear(weight, bias)
    together = product(x)
    for row in range(len(x)):
        assert torch.equal(product(x[row : row + 1])[0], together[row])


def test_is_as_exact_as_one_dnn() -> None:
    x, weight, _ = case(40, 256, 1536)
    expected = x.double() @ weight.double().T

    def error(y: Tensor) -> float:
        return float((y.double() - expected).square().mean().sqrt())

    assert error(CpuLinear(weight, None)(x)) <= 1.01 * error(torch.nn.functional.linear(x, weight))


def test_what_it_takes() -> None:
    assert cpu_linear.suits(torch.zeros(3, 4).bfloat16())
    assert not cpu_linear.suits(torch.zeros(3, 5).bfloat16())
    assert not cpu_linear.suits(torch.zeros(3, 4))
