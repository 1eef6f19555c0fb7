"""The MLPs: gated (gate and up in one product) and plain. What they return is this rank's summand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

from aphro_kernels.silu_and_mul import silu_and_mul
from torch import Tensor
from torch.nn import functional

from aphro_core.layers.linear import AnyLinear
from aphro_core.layers.row_parallel import RowParallel
from aphro_core.models.spec import Activation
from aphro_core.peer_sums import Summand


def _relu_squared(x: Tensor) -> Tensor:
    return functional.relu(x).square_()


ACTIVATIONS: Final[dict[Activation, Callable[[Tensor], Tensor]]] = {
    "silu": functional.silu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "gelu": functional.gelu,
    "relu": functional.relu,
    "relu2": _relu_squared,
}


def gated(gate_up: Tensor, activation: Activation) -> Tensor:
    """``[rows, 2 * columns]``, gate before up, to act(gate) * up."""
    if gate_up.is_cuda and activation == "silu":
        return silu_and_mul(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate).mul_(up)


def gated_product(gate_up: AnyLinear, x: Tensor, activation: Activation) -> Tensor:
    """act(gate x) * (up x), in one step where the product has one."""
    return gate_up.gated(x) if activation == "silu" else gated(gate_up(x), activation)


class GatedMLP:
    """``down(act(gate x) * (up x))``."""

    __slots__ = ("_activation", "_down", "_gate_up")

    def __init__(self, gate_up: AnyLinear, down: AnyLinear | RowParallel, activation: Activation = "silu") -> None:
        self._gate_up = gate_up
        self._down = down
        self._activation = activation

    @property
    def parts(self) -> tuple[AnyLinear, AnyLinear, Activation]:
        assert not isinstance(self._down, RowParallel), "there is no other rank"
        return self._gate_up, self._down, self._activation

    def __call__(self, x: Tensor) -> Summand:
        return self._down(gated_product(self._gate_up, x, self._activation))


class PlainMLP:
    """``down(act(up x))``."""

    __slots__ = ("_act", "_down", "_up")

    def __init__(self, up: AnyLinear, down: AnyLinear | RowParallel, activation: Activation) -> None:
        self._up = up
        self._down = down
        self._act = ACTIVATIONS[activation]

    def __call__(self, x: Tensor) -> Summand:
        return self._down(self._act(self._up(x)))
