"""RMSNorm against its formula in float64, on both sides of the row count where its way changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aphro_core.layers.norm import RMSNorm


def formula(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.double()
    return wide / (wide.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 63])
@pytest.mark.parametrize("width", [1, 7, 576])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1 / 256)])
@pytest.mark.parametrize("size", [1e-4, 1.0, 3e3])
def test_equals_the_formula(rows: int, width: int, dtype: torch.dtype, tolerance: float, size: float) -> None:
    """``size`` from rows where eps decides to residual streams with outliers; the mean of a row is not zero."""
    generator = torch.Generator().manual_seed(rows * width)
    x = ((torch.randn(rows, width, generator=generator) + 0.7) * size).to(dtype)
    x[0, 0] *= 50
    weight = torch.randn(width, generator=generator).to(dtype)
    kept = x.clone()
    torch.testing.assert_close(
        RMSNorm(weight, 1e-5)(x).double(), formula(x, weight, 1e-5), rtol=2 * tolerance, atol=tolerance
    )
    assert torch.equal(x, kept)


@pytest.mark.parametrize("rows", [2, 40])
def test_add_changes_the_residual_in_place(rows: int) -> None:
    residual, delta, weight = torch.randn(rows, 24), torch.randn(rows, 24), torch.randn(24)
    expected = residual + delta
    normed = RMSNorm(weight, 1e-6).add_(residual, delta)
    assert torch.equal(residual, expected)
    torch.testing.assert_close(normed.double(), formula(expected, weight, 1e-6), rtol=1e-5, atol=1e-5)
