"""The mixture of experts of one layer on one rank: its columns of every expert, or some experts whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

import torch
from aphro_kernels.expert_rows import weigh_rows
from aphro_kernels.gated_gemm import ROWS
from aphro_kernels.hopper import suits_hopper
from aphro_kernels.route import route
from aphro_kernels.row_tiles import plan_tiles, tile_rows
from torch import Tensor

from aphro_core.layers.expert_stacks import Stack, Wide
from aphro_core.layers.linear import AnyLinear
from aphro_core.layers.mlp import GatedMLP, gated, gated_product
from aphro_core.models.spec import Activation, MoeSpec

_ALONE: Final = 4  # tokens up to which each slot is a tile of its own


class Experts(Protocol):
    """This rank's experts: every row through those of its choice that are here, weighed and added up."""

    def __call__(self, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        """``x`` [num_tokens, hidden_size], ``chosen`` [num_tokens, k] int64 numbers of the model's experts, ``shares``
        [num_tokens, k] float32, to [num_tokens, hidden_size]: this rank's summand."""
        ...


class SparseMoe:
    """Router, experts, and perhaps one expert that every token takes: this rank's summand of all of them."""

    def __init__(
        self,
        spec: MoeSpec,
        router: AnyLinear,
        experts: Experts,
        shared: GatedMLP | None = None,
        shared_gate: AnyLinear | None = None,
    ) -> None:
        self._top, self._renormalize = spec.experts_per_token, spec.renormalize
        self._router, self._experts = router, experts
        self._shared, self._shared_gate = shared, shared_gate

    def __call__(self, x: Tensor) -> Tensor:
        """``[num_tokens, hidden_size]`` to the same shape."""
        chosen, shares = self._route(x)
        y = self._experts(x, chosen, shares)
        if self._shared is not None:
            shared = self._shared(x)
            assert isinstance(shared, Tensor)  # a summand of what is summed below
            y += shared if self._shared_gate is None else shared.mul_(torch.sigmoid(self._shared_gate(x)))
        return y

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Every rank has the whole router and the same rows, so all choose alike."""
        return route(self._router(x), self._top, renormalize=self._renormalize)


class LoopedExperts:
    """One expert after the other, each over the rows that chose it (CPU)."""

    def __init__(
        self, gate_up: Sequence[AnyLinear], down: Sequence[AnyLinear], first: int, activation: Activation
    ) -> None:
        """Linears of the local experts, whose numbers count from ``first``."""
        self._gate_up, self._down, self._first = gate_up, down, first
        self._activation = activation

    def __call__(self, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        if not self._down:  # no expert is here, and nobody need ask the device who was chosen
            return out
        order = chosen.flatten().argsort(stable=True)
        rows = order // chosen.shape[1]
        weights = shares.flatten()[order].to(x.dtype)
        stops = torch.bincount(chosen.flatten(), minlength=self._first + len(self._down)).cumsum(0).tolist()
        for local, (gate_up, down) in enumerate(zip(self._gate_up, self._down, strict=True)):
            expert = self._first + local
            here = slice(stops[expert - 1] if expert else 0, stops[expert])
            if here.start < here.stop:
                y = down(gated_product(gate_up, x[rows[here]], self._activation))
                out.index_add_(0, rows[here], y.mul_(weights[here, None]))
        return out


class GroupedExperts:
    """All experts in two products over tiles of rows (GPU). No step visits the host: a CUDA graph may hold it."""

    def __init__(self, gate_up: Stack, down: Stack, *, first: int, num_experts: int, activation: Activation) -> None:
        """``gate_up`` [local experts, 2 * columns, hidden_size], ``down`` [local experts, hidden_size, columns], of
        the ``num_experts`` of the model those from ``first`` on."""
        self._gate_up, self._down, self._first, self._num_experts = gate_up, down, first, num_experts
        self._activation: Activation = activation
        self._is_silu = activation == "silu"
        both = gate_up.wide, down.wide
        self._wides = None if both[0] is None or both[1] is None else (both[0], both[1])

    def __call__(self, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        wides = self._wides_for(x, chosen)
        y, places = self._few(x, chosen) if wides is None else self._wide(x, chosen, *wides)
        return weigh_rows(y, shares, places, is_spread=wides is not None)

    def _wides_for(self, x: Tensor, chosen: Tensor) -> tuple[Wide, Wide] | None:
        if self._wides is None:
            return None
        from_rows = max(wide.from_rows for wide in self._wides)
        return self._wides if chosen.numel() >= from_rows * self._num_experts and suits_hopper(x) else None

    def _few(self, x: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """A row a slot: few rows an expert, whose matrices are read as fast as memory gives them."""
        is_alone = len(chosen) <= _ALONE and self._gate_up.takes_one_row and self._down.takes_one_row
        rows = 1 if is_alone else tile_rows(chosen.numel(), self._num_experts)
        tiles = plan_tiles(chosen, self._first, self._down.num_experts, rows)
        y = self._gate_up.times(x, tiles, chosen.shape[1], is_gated=self._is_silu)
        return self._down.times(self._activated(y), tiles, 1), tiles.places

    def _wide(self, x: Tensor, chosen: Tensor, gate_up: Wide, down: Wide) -> tuple[Tensor, Tensor]:
        """A row a place: rows stand by expert."""
        tiles = plan_tiles(chosen, self._first, self._down.num_experts, ROWS)
        y, is_done = gate_up.of_tokens(x, tiles, is_gated=self._is_silu)
        y = self._activated(y)
        return down.of_places(y, tiles, is_merged=self._is_silu and not is_done), tiles.places

    def _activated(self, y: Tensor) -> Tensor:
        return y if self._is_silu else gated(y, self._activation)
