"""RMSNorm and LayerNorm over the last dim, alone or with the residual add before it."""

from __future__ import annotations

from typing import Final

import torch
from aphro_kernels.cpu_rms_norm import CpuRMSNorm
from aphro_kernels.rms_norm import add_rms_norm_, rms_norm
from torch import Tensor
from torch.nn import functional

from aphro_core.distributed.tensor_group import TensorParallelGroup
from aphro_core.peer_sums import Summand

_FEW_ROWS: Final = 4  # up to here a norm on a CPU costs its calls, above it its memory


class RMSNorm:
    """``x / sqrt(mean(x ** 2) + eps) * weight``, float32 inside. The weight may be finer than ``x``."""

    __slots__ = ("_cpu", "_doubled_weight", "_width", "eps", "weight")

    def __init__(self, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> None:
        """``dtype`` of what will be normed, if it is not the weight's."""
        self.weight = weight
        self.eps = eps
        self._width = weight.shape[0]
        has_kernel = weight.device.type == "cpu" and (dtype or weight.dtype) == torch.bfloat16
        self._cpu = CpuRMSNorm(weight, eps) if has_kernel else None
        self._doubled_weight = torch.cat((weight, weight))

    def __call__(self, x: Tensor) -> Tensor:
        """``[..., width]`` to the same shape; rows may be strided, also in the answer."""
        if x.is_cuda:
            return rms_norm(x, self.weight, self.eps)
        if self._cpu is not None:
            return self._cpu(x)
        if x.dtype != self.weight.dtype:
            return functional.rms_norm(x.float(), (self._width,), self.weight, self.eps).to(x.dtype)
        if x.shape[0] > _FEW_ROWS:
            return functional.rms_norm(x, (self._width,), self.weight, self.eps)
        # The mean of (x, -x) is 0 and its variance mean(x ** 2): a LayerNorm of both is the RMSNorm of each. Torch has
        # one operation for the first and twelve for the second, 61 times a step in a model of 30 layers.
        doubled = torch.cat((x, -x), dim=-1)
        normed = functional.layer_norm(doubled, (2 * self._width,), self._doubled_weight, None, self.eps)
        return normed[..., : self._width]

    def add_(self, residual: Tensor, delta: Tensor) -> Tensor:
        """``residual += delta`` in place; the norm of that sum."""
        if residual.is_cuda:
            return add_rms_norm_(residual, delta, self.weight, self.eps)
        if self._cpu is not None:
            return self._cpu.add_(residual, delta)
        return self(residual.add_(delta))

    def add_sum_(
        self, residual: Tensor, summand: Summand, group: TensorParallelGroup, *, shares_out: bool = False
    ) -> Tensor:
        """``residual +=`` the sum of the ranks' ``summand``s; the norm of that: one launch where ``group`` can.
        ``shares_out`` as ``group.add_rms_norm_`` has it."""
        normed = group.add_rms_norm_(residual, summand, self.weight, self.eps, shares_out=shares_out)
        return self.add_(residual, group.all_reduce_(summand)) if normed is None else normed


class LayerNorm:
    """``(x - mean) / sqrt(var + eps) * weight + bias``, float32 inside. The weight may be finer than ``x``."""

    __slots__ = ("_bias", "_eps", "_weight")

    def __init__(self, weight: Tensor, bias: Tensor | None, eps: float) -> None:
        self._weight, self._eps = weight, eps
        self._bias = None if bias is None else bias.to(weight.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        wide = x.to(self._weight.dtype)
        return functional.layer_norm(wide, self._weight.shape, self._weight, self._bias, self._eps).to(x.dtype)

    def add_(self, residual: Tensor, delta: Tensor) -> Tensor:
        """``residual += delta`` in place; the norm of that sum."""
        return self(residual.add_(delta))

    def add_sum_(
        self, residual: Tensor, summand: Summand, group: TensorParallelGroup, *, shares_out: bool = False
    ) -> Tensor:
        """``residual +=`` the sum of the ranks' ``summand``s; the norm of that."""
        assert not shares_out
        return self.add_(residual, group.all_reduce_(summand))


Norm = RMSNorm | LayerNorm
