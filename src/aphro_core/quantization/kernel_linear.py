"""``y = x W^T + b`` over quantised weights on a GPU: dequantised in registers for few rows, whole for many."""

from __future__ import annotations

import torch
from aphro_kernels.packed_linear import PackedWeight, can_convert, dequantise, packed_config, packed_linear
from aphro_kernels.silu_and_mul import silu_and_mul
from aphro_kernels.skinny_linear import SkinnyWorkspace
from torch import Tensor
from torch.nn.functional import linear

from aphro_core.models.packed import DEQUANTISED_AT_ONCE
from aphro_core.quantization.matrix import PackedMatrix


class KernelProduct:
    """``workspace`` is that of the stream; None: every product dequantises the whole matrix first."""

    def __init__(self, matrix: PackedMatrix, bias: Tensor | None, workspace: SkinnyWorkspace | None) -> None:
        self._weight: PackedWeight = matrix.for_kernels()
        self._bias = bias
        self._workspace = workspace if can_convert(matrix.codes) else None
        self.nbytes = matrix.nbytes

    @property
    def parts(self) -> tuple[PackedWeight, Tensor | None] | None:
        """Weight and bias, where kernels multiply them as they are."""
        return None if self._workspace is None else (self._weight, self._bias)

    def __call__(self, x: Tensor) -> Tensor:
        found = self._few_rows(x, is_gated=False)
        return self._many_rows(x) if found is None else found

    def gated(self, x: Tensor) -> Tensor:
        found = self._few_rows(x, is_gated=True)
        return silu_and_mul(self(x)) if found is None else found

    def _many_rows(self, x: Tensor) -> Tensor:
        """By a dequantised copy; of a matrix as large as a head's of one part after the other."""
        weight, (n, k) = self._weight, self._weight.shape
        if n * k <= DEQUANTISED_AT_ONCE:
            return linear(x, dequantise(weight, x.dtype), self._bias)
        step, y = DEQUANTISED_AT_ONCE // k // 16 * 16, x.new_empty(len(x), n)
        for start in range(0, n, step):
            part = weight.rows(start, min(start + step, n))
            torch.mm(x, dequantise(part, x.dtype).t(), out=y[:, start : start + step])
        return y if self._bias is None else y.add_(self._bias)

    def _few_rows(self, x: Tensor, *, is_gated: bool) -> Tensor | None:
        if self._workspace is None or x.dtype.itemsize != 2:
            return None
        config = packed_config(self._weight, x, is_gated=is_gated)
        if config is None:
            return None
        return packed_linear(x, self._weight, self._bias, config=config, workspace=self._workspace, is_gated=is_gated)
