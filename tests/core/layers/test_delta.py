"""What a block leaves to be added: summed over the ranks, through what the model has there, alone or with the norm."""

from __future__ import annotations

import pytest
import torch
from aphro_kernels.rms_norm import add_rms_norm_reference_
from torch import Tensor

from aphro_core.distributed.tensor_group import TensorParallelGroup
from aphro_core.layers.block import Delta
from aphro_core.layers.norm import LayerNorm, Norm, RMSNorm
from aphro_core.peer_sums import Summand


class TwoAlike(TensorParallelGroup):
    """Two ranks that have the same; with ``is_fused`` as GPUs that write into each other's memory."""

    def __init__(self, *, is_fused: bool) -> None:
        super().__init__(0, 2)
        self._is_fused = is_fused
        self.calls: list[str] = []

    def all_reduce_(self, x: Summand) -> Tensor:
        assert isinstance(x, Tensor)
        self.calls.append("sum")
        return x.mul_(2.0)

    def add_rms_norm_(
        self, residual: Tensor, x: Summand, weight: Tensor, eps: float, *, shares_out: bool = False
    ) -> Tensor | None:
        assert isinstance(x, Tensor)
        if not self._is_fused:
            return None
        self.calls.append("sum and norm")
        return add_rms_norm_reference_(residual, x * 2.0, weight, eps)


RMS = RMSNorm(torch.rand(8) + 0.5, 1e-6)
LAYER = LayerNorm(torch.rand(8) + 0.5, torch.rand(8), 1e-6)


@pytest.mark.parametrize("is_fused", [False, True])
@pytest.mark.parametrize("norm", [RMS, LAYER])
@pytest.mark.parametrize("out", [None, lambda x: x * 3.0])
def test_a_sum_is_added_once_and_normed(norm: Norm, out: object, is_fused: bool) -> None:
    summand, x, group = torch.randn(5, 8), torch.randn(5, 8), TwoAlike(is_fused=is_fused)
    expected = x + summand * (6.0 if out else 2.0)
    normed = Delta(summand.clone(), group, out).add_to_(x, norm)  # type: ignore[arg-type]
    torch.testing.assert_close(x, expected)
    torch.testing.assert_close(normed, norm(expected.clone()))
    assert group.calls == ["sum and norm" if is_fused and norm is RMS and out is None else "sum"]


def test_one_rank_sums_nothing() -> None:
    x, summand = torch.randn(2, 8), torch.randn(2, 8)
    delta = Delta(summand, TensorParallelGroup(0, 1), None)
    expected = x + summand
    torch.testing.assert_close(delta.add_to_(x, RMS), RMS(expected.clone()))
    torch.testing.assert_close(x, expected)
    assert delta.whole() is summand
