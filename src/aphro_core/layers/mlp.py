"""The gated MLP: gate and up in one product, SiLU(gate) * up, down, summed over the tensor-parallel ranks."""

from __future__ import annotations

from aphro_kernels.silu_and_mul import silu_and_mul
from torch import Tensor
from torch.nn.functional import silu

from aphro_core.distributed import TensorParallelGroup
from aphro_core.layers.linear import Linear


class GatedMLP:
    __slots__ = ("_down", "_gate_up", "_group")

    def __init__(self, gate_up: Linear, down: Linear, group: TensorParallelGroup) -> None:
        self._gate_up = gate_up
        self._down = down
        self._group = group

    def __call__(self, x: Tensor) -> Tensor:
        gate_up = self._gate_up(x)
        if gate_up.is_cuda:
            return self._group.all_reduce_(self._down(silu_and_mul(gate_up)))
        gate, up = gate_up.chunk(2, dim=-1)
        return self._group.all_reduce_(self._down(silu(gate).mul_(up)))
