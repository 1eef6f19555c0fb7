"""RMSNorm over the last dim."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


class RMSNorm:
    __slots__ = ("_eps", "_shape", "_weight")

    def __init__(self, weight: Tensor, eps: float) -> None:
        self._weight = weight
        self._shape = tuple(weight.shape)
        self._eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self._shape, self._weight, self._eps)
