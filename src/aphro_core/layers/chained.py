"""Decode steps of few rows on Hopper: rotation, attention, and one launch for all the rest of a layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from aphro_kernels.chain_layer import ChainLayer, NextLayer, build_chain_workspace, chain_rows
from aphro_kernels.chain_plan import ChainShape
from torch import Tensor

from aphro_core.layers.attention import Attention
from aphro_core.layers.batch import PagedRows
from aphro_core.layers.linear import AnyLinear, Linear
from aphro_core.layers.mlp import GatedMLP
from aphro_core.layers.norm import Norm, RMSNorm
from aphro_core.layers.rotary import Rotation
from aphro_core.peer_sums import Summand


@dataclass(frozen=True, slots=True)
class LayerParts:
    """What a layer is made of, where nothing stands between its parts."""

    input_norm: Norm
    attention: Attention
    post_norm: Norm
    mlp: Callable[[Tensor], Summand]


class ChainedLayers:
    """The same layers as the decoder's blocks, with the same weights, for as many rows as ``row_counts`` has."""

    def __init__(
        self,
        first: LayerParts,
        attentions: Sequence[Attention],
        chains: Sequence[ChainLayer],
        row_counts: range,
        workspace_bytes: int,
    ) -> None:
        self._first, self._attentions, self._chains = first, attentions, chains
        self._row_counts = row_counts
        self.workspace_bytes = workspace_bytes

    def takes(self, x: Tensor, rows: PagedRows) -> bool:
        """Whether such a step is faster here: of decoding rows alone, and of few."""
        is_decode = all(part.max_query_len == 1 for part in rows.parts)
        return is_decode and len(x) in self._row_counts and x.is_contiguous()

    def __call__(self, x: Tensor, rotations: Sequence[Rotation], rows: PagedRows, caches: Sequence[Tensor]) -> Tensor:
        """``x`` [rows, hidden_size] in place; a rotation and a cache for each layer."""
        qkv: Tensor | None = self._first.attention.project(self._first.input_norm(x))
        for attention, chain, rotation, cache in zip(self._attentions, self._chains, rotations, caches, strict=True):
            assert qkv is not None, "only the last chain ends without"
            qkv = chain(x, attention.attend(qkv, rotation, rows, cache))
        return x


def chain_layers(layers: Sequence[LayerParts | None]) -> ChainedLayers | None:
    """None where a layer has something that the kernel does not have, or the kernel is nowhere faster."""
    parts = [layer for layer in layers if layer is not None]
    weights = [found for layer in parts if (found := _weights(layer)) is not None]
    if not layers or len(weights) < len(layers) or len({one.shape for one in weights}) > 1:
        return None
    shape, sample = weights[0].shape, weights[0].out
    row_counts = chain_rows(shape, sample)
    if not row_counts:
        return None
    workspace = build_chain_workspace(shape, sample.device)
    following = [NextLayer(later.input_gain, later.qkv, later.bias) for later in weights[1:]]
    chains = [
        ChainLayer(layer.out, layer.gain, layer.gate_up, layer.down, after, layer.eps, workspace)
        for layer, after in zip(weights, [*following, None], strict=True)
    ]
    return ChainedLayers(parts[0], [layer.attention for layer in parts], chains, row_counts, workspace.nbytes)


@dataclass(frozen=True, slots=True)
class _Weights:
    input_gain: Tensor
    qkv: Tensor
    bias: Tensor | None
    out: Tensor
    gain: Tensor
    gate_up: Tensor
    down: Tensor
    eps: float

    @property
    def shape(self) -> ChainShape:
        return ChainShape(self.out.shape[1], self.out.shape[0], self.down.shape[1], self.qkv.shape[0])


def _weights(layer: LayerParts) -> _Weights | None:
    first, second = layer.input_norm, layer.post_norm
    if not isinstance(first, RMSNorm) or not isinstance(second, RMSNorm) or not isinstance(layer.mlp, GatedMLP):
        return None
    gate_up, down, activation = layer.mlp.parts
    qkv, out = layer.attention.projections
    plain = [_plain(linear) for linear in (qkv, out, gate_up, down)]
    found = [one for one in plain if one is not None]
    if activation != "silu" or len(found) < len(plain) or any(bias is not None for _, bias in found[1:]):
        return None
    (qkv_weight, bias), (out_weight, _), (gate_up_weight, _), (down_weight, _) = found
    return _Weights(first.weight, qkv_weight, bias, out_weight, second.weight, gate_up_weight, down_weight, second.eps)


def _plain(linear: AnyLinear) -> tuple[Tensor, Tensor | None] | None:
    return linear.plain if isinstance(linear, Linear) else None
