"""The gated MLP: gate and up in one product, SiLU(gate) * up, down, summed over the tensor-parallel ranks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from aphro_core.distributed import TensorParallelGroup
from aphro_core.layers.linear import Linear


class GatedMLP:
    __slots__ = ("_down", "_gate_up", "_group")

    def __init__(self, gate_up: Linear, down: Linear, group: TensorParallelGroup) -> None:
        self._gate_up = gate_up
        self._down = down
        self._group = group

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = self._gate_up(x).chunk(2, dim=-1)
        return self._group.all_reduce_(self._down(F.silu(gate).mul_(up)))
