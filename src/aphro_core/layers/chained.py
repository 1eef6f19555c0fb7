"""Decode steps of few rows on Hopper: rotation, attention, and one launch for all the rest of a layer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from aphro_kernels.chain_layer import ChainLayer, NextLayer, build_chain_workspace, chain_rows
from aphro_kernels.chain_plan import ChainShape
from aphro_kernels.packed_chain_layer import (
    NextPackedLayer,
    PackedChainLayer,
    build_packed_chain_workspace,
    packed_chain_rows,
)
from aphro_kernels.packed_linear import PackedWeight
from torch import Tensor

from aphro_core import host
from aphro_core.layers.attention import Attention
from aphro_core.layers.batch import PagedRows
from aphro_core.layers.linear import AnyLinear, Linear
from aphro_core.layers.mlp import GatedMLP
from aphro_core.layers.norm import Norm, RMSNorm
from aphro_core.layers.rotary import Rotation
from aphro_core.peer_sums import Summand

_LOG: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LayerParts:
    """What a layer is made of, where nothing stands between its parts."""

    input_norm: Norm
    attention: Attention
    post_norm: Norm
    mlp: Callable[[Tensor], Summand]


class Chain(Protocol):
    """The rest of a layer: ``x`` [rows, hidden] in place, ``attended`` [rows, inputs]; the next layer's QKV."""

    def __call__(self, x: Tensor, attended: Tensor) -> Tensor | None: ...


class ChainedLayers:
    """The same layers as the decoder's blocks, with the same weights, for as many rows as ``row_counts`` has."""

    def __init__(
        self,
        first: LayerParts,
        attentions: Sequence[Attention],
        chains: Sequence[Chain],
        row_counts: range,
        workspace_bytes: int,
    ) -> None:
        self._first, self._attentions, self.chains = first, attentions, chains
        self._row_counts = row_counts
        self.workspace_bytes = workspace_bytes

    def takes(self, x: Tensor, rows: PagedRows) -> bool:
        """Whether such a step is faster here: of decoding rows alone, and of few."""
        is_decode = all(part.max_query_len == 1 for part in rows.parts)
        return is_decode and len(x) in self._row_counts and x.is_contiguous()

    def __call__(
        self,
        x: Tensor,
        rotations: Sequence[Rotation],
        rows: PagedRows,
        caches: Sequence[Tensor],
        places: Sequence[int],
    ) -> Tensor:
        """``x`` [rows, hidden_size] in place; a rotation and a cache for each layer. ``places`` of those that run, the
        first and the last among them."""
        qkv: Tensor | None = self._first.attention.project(self._first.input_norm(x))
        for place in places:
            assert qkv is not None, "only the last chain ends without"
            attended = self._attentions[place].attend(qkv, rotations[place], rows, caches[place])
            qkv = self.chains[place](x, attended)
        return x


def chain_layers(layers: Sequence[LayerParts | None]) -> ChainedLayers | None:
    """None where a layer has something that the kernels do not have, or they are nowhere faster."""
    parts = [layer for layer in layers if layer is not None]
    weights = [found for layer in parts if (found := _weights(layer)) is not None]
    if not layers or len(weights) < len(layers) or len({one.shape for one in weights}) > 1:
        return None
    chains = _plain_chains(weights) or _packed_chains(weights)
    if chains is not None and (sign := host.sign_of_mps()) is not None:
        # its programs wait for each other: they must all be on the GPU at once, and another process may be in the way
        _LOG.warning("decode steps of few rows are slower: one launch a layer needs a GPU without MPS (%s)", sign)
        return None
    return None if chains is None else ChainedLayers(parts[0], [layer.attention for layer in parts], *chains)


@dataclass(frozen=True, slots=True)
class _Weights:
    input_gain: Tensor
    qkv: Tensor | PackedWeight
    bias: Tensor | None
    out: Tensor | PackedWeight
    gain: Tensor
    gate_up: Tensor | PackedWeight
    down: Tensor | PackedWeight
    eps: float

    @property
    def shape(self) -> ChainShape:
        return ChainShape(self.out.shape[1], self.out.shape[0], self.down.shape[1], self.qkv.shape[0])

    @property
    def matrices(self) -> list[Tensor | PackedWeight]:
        return [self.out, self.gate_up, self.down, self.qkv]


_Found = tuple[list[Chain], range, int]  # the numbers of rows that they are for, bytes that they share


def _plain_chains(weights: Sequence[_Weights]) -> _Found | None:
    shape = weights[0].shape
    plain = [[matrix for matrix in one.matrices if isinstance(matrix, Tensor)] for one in weights]
    if any(len(found) < 4 for found in plain) or not (row_counts := chain_rows(shape, plain[0][0])):
        return None
    workspace = build_chain_workspace(shape, plain[0][0].device)
    following = [NextLayer(one.input_gain, qkv, one.bias) for one, (*_, qkv) in zip(weights, plain, strict=True)]
    chains: list[Chain] = [
        ChainLayer(out, one.gain, gate_up, down, after, one.eps, workspace)
        for one, (out, gate_up, down, _), after in zip(weights, plain, [*following[1:], None], strict=True)
    ]
    return chains, row_counts, workspace.nbytes


def _packed_chains(weights: Sequence[_Weights]) -> _Found | None:
    shape = weights[0].shape
    packed = [[matrix for matrix in one.matrices if isinstance(matrix, PackedWeight)] for one in weights]
    row_counts = packed_chain_rows(shape, [matrix for found in packed for matrix in found], weights[0].gain)
    if any(len(found) < 4 for found in packed) or not row_counts:
        return None
    workspace = build_packed_chain_workspace(shape, weights[0].gain.device)
    following = [NextPackedLayer(one.input_gain, qkv, one.bias) for one, (*_, qkv) in zip(weights, packed, strict=True)]
    chains: list[Chain] = [
        PackedChainLayer(out, one.gain, gate_up, down, after, one.eps, workspace)
        for one, (out, gate_up, down, _), after in zip(weights, packed, [*following[1:], None], strict=True)
    ]
    return chains, row_counts, workspace.nbytes


def _weights(layer: LayerParts) -> _Weights | None:
    first, second = layer.input_norm, layer.post_norm
    if not isinstance(first, RMSNorm) or not isinstance(second, RMSNorm) or not isinstance(layer.mlp, GatedMLP):
        return None
    gate_up, down, activation = layer.mlp.parts
    qkv, out = layer.attention.projections
    found = [one for linear in (qkv, out, gate_up, down) if (one := _as_kept(linear)) is not None]
    if activation != "silu" or len(found) < 4 or any(bias is not None for _, bias in found[1:]):
        return None
    (qkv_weight, bias), (out_weight, _), (gate_up_weight, _), (down_weight, _) = found
    return _Weights(first.weight, qkv_weight, bias, out_weight, second.weight, gate_up_weight, down_weight, second.eps)


def _as_kept(linear: AnyLinear) -> tuple[Tensor | PackedWeight, Tensor | None] | None:
    """Weight and bias of a layer on a GPU."""
    return linear.plain if isinstance(linear, Linear) else linear.packed
