"""``y = x W^T + b``, with the weight kept in the order that the device multiplies fastest."""

from __future__ import annotations

from typing import Final

import torch
from aphro_kernels import cpu_linear
from aphro_kernels.cpu_linear import CpuLinear
from aphro_kernels.gated_gemm import gated_linear, is_faster
from aphro_kernels.silu_and_mul import silu_and_mul
from aphro_kernels.skinny_linear import SkinnyWorkspace, skinny_linear
from aphro_kernels.tuned import library_product, skinny_config
from torch import Tensor
from torch.nn.functional import linear

from aphro_core import host
from aphro_core.layers.row_invariant import RowSizes, multiply_rows
from aphro_core.quantization.linear import QuantizedLinear

_ROWS: Final = 16  # for which oneDNN chooses the order; one order serves every number of rows as fast as its own
_FEWEST_ROWS: Final = 4  # oneDNN reads a weight more slowly for one row than for four


class Linear:
    """A shard of a linear layer.

    On CPUs weights are put into another order once: bfloat16 for a kernel of our own where the CPU has its
    instructions, bfloat16 elsewhere and float32 for oneDNN. Drop the plain ``weight`` afterwards: nothing here keeps it
    then. On GPUs the tables of aphro_kernels/tuned.py say where a kernel of our own is faster, or another
    algorithm of cuBLAS than it chooses itself.
    """

    __slots__ = ("_bias", "_cpu", "_is_packed", "_row_sizes", "_weight", "_workspace")

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        workspace: SkinnyWorkspace | None = None,
        row_sizes: RowSizes | None = None,
    ) -> None:
        """``workspace``: of the stream that the calls of this layer follow each other on; None: cuBLAS alone.
        ``row_sizes``: a row's result is to be the same bits in any number of rows."""
        self._bias = bias
        self._workspace = workspace
        self._cpu: CpuLinear | None = None
        self._is_packed = False
        self._row_sizes: tuple[int, ...] | None = None
        if host.has_product_kernels() and cpu_linear.suits(weight):
            self._cpu = CpuLinear(weight, bias)  # whose rows do not hang on each other
            return
        self._is_packed = _can_pack(weight)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS) if self._is_packed else weight
        if row_sizes is not None:
            self._row_sizes = row_sizes.of(weight, self._multiply)

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """``[rows, in_features]`` to ``[rows, out_features]``, the dtype of the weight. ``out`` takes them, of a layer
        without bias on a GPU."""
        if self._cpu is not None:
            return self._cpu(x)
        if self._workspace is not None and (y := self._by_table(x, out, self._workspace)) is not None:
            return y
        if out is not None:
            assert self._bias is None
            return torch.mm(x, self._weight.t(), out=out)
        if self._row_sizes is not None:
            return multiply_rows(self._multiply, x, self._row_sizes)
        if not self._is_packed or x.shape[0] > 1:
            return self._multiply(x)
        return self._multiply(x.expand(_FEWEST_ROWS, -1))[:1]

    def gated(self, x: Tensor) -> Tensor:
        """SiLU(gate) * up of a weight that holds the rows of the gate, then those of up."""
        if self._cpu is not None and self._cpu.can_gate:
            return self._cpu.gated(x)
        if self._workspace is not None:
            config = skinny_config(self._weight, x.shape[0], is_gated=True)
            if config is not None:
                workspace = self._workspace
                return skinny_linear(x, self._weight, self._bias, config=config, workspace=workspace, is_gated=True)
            if self._bias is None and is_faster(x, self._weight):
                return gated_linear(x, self._weight)
        return silu_and_mul(self(x))

    @property
    def num_outputs(self) -> int:
        """Of a layer on a GPU."""
        return self._weight.shape[0]

    def of_outputs(self, stop: int) -> Linear:
        """Of a layer on a GPU without bias: what makes the first ``stop`` outputs, of the same memory."""
        assert self._bias is None
        return Linear(self._weight[:stop], workspace=self._workspace)

    def makes(self, out: Tensor) -> bool:
        """Whether a call may have this ``out``."""
        is_alike = out.is_cuda and out.dtype == self._weight.dtype and out.shape[1] == self._weight.shape[0]
        return is_alike and self._bias is None

    def _by_table(self, x: Tensor, out: Tensor | None, workspace: SkinnyWorkspace) -> Tensor | None:
        """None: there is nothing faster than what cuBLAS chooses."""
        weight, bias, num_rows = self._weight, self._bias, x.shape[0]
        if (config := skinny_config(weight, num_rows)) is not None:
            return skinny_linear(x, weight, bias, config=config, workspace=workspace, out=out)
        if x.is_contiguous() and (product := library_product(weight, num_rows, has_bias=bias is not None)) is not None:
            return product(x, weight, bias, out, workspace=workspace.parts)
        return None

    def _multiply(self, x: Tensor) -> Tensor:
        if not self._is_packed:
            return linear(x, self._weight, self._bias)
        y: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, self._weight, self._bias, "none", [], "")
        return y

    @property
    def plain(self) -> tuple[Tensor, Tensor | None] | None:
        """Weight and bias of a layer on a GPU, where they are as they came."""
        return (self._weight, self._bias) if self._workspace is not None else None

    @property
    def packed_bytes(self) -> int:
        """Bytes of the weight in another order, 0 where it is kept as it came."""
        if self._cpu is not None:
            return self._cpu.nbytes
        return int(torch.ops.mkldnn._nbytes(self._weight)) if self._is_packed else 0


def _can_pack(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    is_bf16 = weight.dtype == torch.bfloat16
    return weight.dtype == torch.float32 or (is_bf16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


AnyLinear = Linear | QuantizedLinear
