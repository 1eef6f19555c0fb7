"""Linear layers, packed or not, against float64; what is kept of a weight."""

from __future__ import annotations

import pytest
import torch

from aphro_core import host
from aphro_core.layers import linear as linear_module
from aphro_core.layers.linear import Linear
from aphro_core.layers.mlp import gated

DTYPES = [(torch.float32, 2e-5), (torch.bfloat16, 1 / 128), (torch.float16, 1 / 512)]


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 16, 17, 130])
@pytest.mark.parametrize(("out_features", "in_features"), [(1, 1), (1, 7), (5, 1), (64, 33), (131, 72), (960, 576)])
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_product(
    rows: int, out_features: int, in_features: int, dtype: torch.dtype, tolerance: float, has_bias: bool
) -> None:
    check_product(rows, out_features, in_features, dtype, tolerance, has_bias)


@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize(("out_features", "in_features"), [(131, 72), (960, 576)])
def test_product_of_bfloat16_where_the_cpu_has_no_kernel_of_ours(
    rows: int, out_features: int, in_features: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "has_product_kernels", lambda: False)
    check_product(rows, out_features, in_features, torch.bfloat16, 1 / 128, has_bias=True)
    layer, x = Linear(torch.randn(64, 72).bfloat16()), torch.randn(rows, 72).bfloat16()
    torch.testing.assert_close(layer.gated(x), gated(layer(x), "silu"))


def check_product(
    rows: int, out_features: int, in_features: int, dtype: torch.dtype, tolerance: float, has_bias: bool
) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(out_features, in_features, generator=generator).to(dtype)
    bias = torch.randn(out_features, generator=generator).to(dtype) if has_bias else None
    # rows of a wider tensor: what a norm of few rows hands on
    x = torch.randn(rows, 2 * in_features, generator=generator).to(dtype)[:, :in_features]
    y = Linear(weight, bias)(x)
    expected = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert y.shape == (rows, out_features)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance * in_features**0.5)


def test_a_row_is_the_same_alone_and_among_others() -> None:
    """To float32's accuracy: other row counts may take other kernels, which sum in other orders."""
    linear, x = Linear(torch.randn(96, 64)), torch.randn(40, 64)
    alone = torch.cat([linear(row[None]) for row in x])
    torch.testing.assert_close(linear(x), alone, rtol=1e-5, atol=1e-5)


def test_packs_where_one_dnn_can(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(32, 64)
    packed = Linear(weight)
    assert packed.packed_bytes >= weight.nbytes
    monkeypatch.setattr(linear_module, "_can_pack", lambda weight: False)
    plain = Linear(weight)
    assert plain.packed_bytes == 0
    x = torch.randn(3, 64)
    torch.testing.assert_close(plain(x), packed(x), rtol=1e-5, atol=1e-5)
