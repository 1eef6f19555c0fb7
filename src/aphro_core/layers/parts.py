"""What a decoder is made of, built from the parameters of a rank."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from aphro_kernels.skinny_linear import build_skinny_workspace
from torch import Tensor

from aphro_core.distributed.tensor_group import TensorParallelGroup
from aphro_core.layers.attention import Attention
from aphro_core.layers.block import Block
from aphro_core.layers.cache_format import CacheFormat
from aphro_core.layers.embedding import PositionEmbedding, VocabEmbedding, VocabHead
from aphro_core.layers.expert_stacks import DenseStack, Stack, packed_stack
from aphro_core.layers.linear import AnyLinear, Linear
from aphro_core.layers.mlp import GatedMLP, PlainMLP
from aphro_core.layers.moe import Experts, GroupedExperts, LoopedExperts, SparseMoe
from aphro_core.layers.norm import LayerNorm, Norm, RMSNorm
from aphro_core.layers.row_invariant import RowSizes
from aphro_core.layers.row_parallel import RowParallel
from aphro_core.models.spec import DecoderSpec
from aphro_core.parallel.shard import RankShard
from aphro_core.quantization.linear import QuantizedLinear
from aphro_core.quantization.matrix import PackedMatrix, Weights, cut_rows


class Parts:
    """Builds the parts of a decoder from a rank's parameters, which it takes out of ``weights``."""

    def __init__(
        self,
        spec: DecoderSpec,
        shard: RankShard,
        weights: Weights,
        group: TensorParallelGroup,
        cache_format: CacheFormat,
        is_deterministic: bool,
    ) -> None:
        self._row_sizes = RowSizes() if is_deterministic else None
        self._spec, self._shard, self._weights, self._group = spec, shard, weights, group
        self._cache_format = cache_format
        sample = next(weight for weight in weights.values() if isinstance(weight, Tensor))  # norms are everywhere
        self._dtype, self._device = sample.dtype, sample.device
        self._plain: dict[int, int] = {}  # address -> bytes, so that tied weights count once
        self._packed_bytes = 0
        self._workspace = build_skinny_workspace(self._device) if self._device.type == "cuda" else None

    @property
    def num_bytes(self) -> int:
        workspace = self._workspace
        scratch = 0 if workspace is None else workspace.parts.nbytes + workspace.arrivals.nbytes
        return sum(self._plain.values()) + self._packed_bytes + scratch

    def embedding(self) -> VocabEmbedding:
        weight, place = self._weights.pop("embed_tokens.weight"), (self._shard.vocab, self._group, self._dtype)
        if isinstance(weight, Tensor):
            return VocabEmbedding(self._keep(weight), *place)
        (matrix,) = weight
        is_heads = self._weights.get("lm_head.weight") is weight  # whose product has it as it is, or in another order
        is_copied = matrix.kind == "int4" if self._device.type == "cuda" else self._dtype == torch.bfloat16
        if not is_heads or is_copied:
            self._packed_bytes += matrix.nbytes
        return VocabEmbedding(matrix, *place)

    def positions(self) -> PositionEmbedding:
        offset = self._spec.position_offset
        assert offset is not None
        return PositionEmbedding(self._keep(self._dense("embed_positions.weight")), offset)

    def head(self) -> VocabHead:
        spec = self._spec
        return VocabHead(
            self.linear("lm_head"),
            spec.vocab_size,
            self._group,
            scale=spec.logits_scale,
            softcap=spec.logits_softcap,
        )

    def block(self, layer: int) -> Block:
        spec, name = self._spec, f"layers.{layer}"
        attention = self._attention(f"{name}.attention", layer)
        mlp = self._moe(f"{name}.moe") if spec.has_experts(layer) else self._mlp(f"{name}.mlp")
        outs: list[Callable[[Tensor], Tensor] | None] = [None, None]
        if spec.sandwich_norms:
            outs = [self.norm(f"{name}.attention_out_norm"), self.norm(f"{name}.mlp_out_norm")]
        elif spec.residual_scale != 1.0:
            outs = [partial(_scale_, scale=spec.residual_scale)] * 2
        norms = [self.norm(f"{name}.{norm}") for norm in ("input_norm", "post_attention_norm")]
        return Block(norms[0], attention, norms[1], mlp, self._group, *outs)

    def _attention(self, name: str, layer: int) -> Attention:
        spec, shard = self._spec, self._shard
        return Attention(
            self.linear(f"{name}.qkv_proj"),
            self._row_parallel(f"{name}.o_proj"),
            num_heads=len(shard.heads),
            num_kv_heads=len(shard.kv_heads),
            head_dim=spec.head_dim,
            window=spec.window_of(layer),
            dtype=self._dtype,
            device=self._device,
            q_norm=self._rms_norm(f"{name}.q_norm") if spec.qk_norm else None,
            k_norm=self._rms_norm(f"{name}.k_norm") if spec.qk_norm else None,
            scale=spec.attention_scale,
            softcap=spec.attention_softcap,
            cache_dtype=self._cache_format.dtype,
            cache_scales=self._cache_format.scales_of(layer),
        )

    def _mlp(self, name: str) -> GatedMLP | PlainMLP:
        activation = self._spec.activation
        if self._spec.gated_mlp:
            return GatedMLP(self.linear(f"{name}.gate_up_proj"), self._row_parallel(f"{name}.down_proj"), activation)
        return PlainMLP(self.linear(f"{name}.up_proj"), self._row_parallel(f"{name}.down_proj"), activation)

    def _shared_mlp(self, name: str) -> GatedMLP:
        activation = self._spec.activation
        return GatedMLP(self.linear(f"{name}.gate_up_proj"), self.linear(f"{name}.down_proj"), activation)

    def _row_parallel(self, name: str) -> AnyLinear | RowParallel:
        linear = self.linear(name)
        return RowParallel(linear, self._group) if self._group.size > 1 else linear

    def _moe(self, name: str) -> SparseMoe:
        moe = self._spec.moe
        assert moe is not None
        has_shared = bool(moe.shared_intermediate_size)
        return SparseMoe(
            moe,
            self.linear(f"{name}.router"),
            self._experts(name),
            self._shared_mlp(f"{name}.shared") if has_shared else None,
            self.linear(f"{name}.shared_gate") if has_shared else None,
        )

    def _experts(self, name: str) -> Experts:
        spec, here, activation = self._spec, self._shard.experts, self._spec.activation
        assert spec.moe is not None
        gate_up, down = (self._weights.pop(f"{name}.{part}.weight") for part in ("gate_up_proj", "down_proj"))
        if self._device.type == "cuda" and here:
            stacks = [self._stack(weight, len(here)) for weight in (gate_up, down)]
            return GroupedExperts(*stacks, first=here.start, num_experts=spec.moe.num_experts, activation=activation)
        gate_ups, downs = (
            [self._linear_of(part, None) for part in _cut(weight, len(here))] for weight in (gate_up, down)
        )
        return LoopedExperts(gate_ups, downs, here.start, activation)

    def _stack(self, weight: Tensor | list[PackedMatrix], num_experts: int) -> Stack:
        if isinstance(weight, Tensor):
            return DenseStack(self._keep(weight).view(num_experts, -1, weight.shape[1]))
        self._packed_bytes += sum(matrix.nbytes for matrix in weight)
        return packed_stack(weight, num_experts)

    def norm(self, name: str) -> Norm:
        if self._spec.norm == "rms":
            return self._rms_norm(name)
        bias = self._keep(self._dense(f"{name}.bias")) if self._spec.norm_bias else None
        return LayerNorm(self._gain(name), bias, self._spec.norm_eps)

    def _rms_norm(self, name: str) -> RMSNorm:
        return RMSNorm(self._gain(name), self._spec.norm_eps, self._dtype)

    def _gain(self, name: str) -> Tensor:
        """A norm's weight. One that is stored less 1 is kept in float32: the sum has more digits than its parts."""
        weight = self._dense(f"{name}.weight")
        offset = self._spec.norm_offset
        return self._keep(weight if offset == 0.0 else weight.float() + offset)

    def _dense(self, name: str) -> Tensor:
        weight = self._weights.pop(name)
        assert isinstance(weight, Tensor), f"{name} is never quantised"
        return weight

    def linear(self, name: str) -> AnyLinear:
        bias = self._dense(f"{name}.bias") if f"{name}.bias" in self._weights else None
        return self._linear_of(self._weights.pop(f"{name}.weight"), bias)

    def _linear_of(self, weight: Tensor | list[PackedMatrix], bias: Tensor | None) -> AnyLinear:
        bias = None if bias is None else self._keep(bias)
        if not isinstance(weight, Tensor):
            packed = QuantizedLinear(weight, bias, self._dtype, self._workspace)
            self._packed_bytes += packed.packed_bytes
            return packed
        linear = Linear(weight, bias, self._workspace, self._row_sizes)
        if linear.packed_bytes:
            self._packed_bytes += linear.packed_bytes
        else:
            self._keep(weight)
        return linear

    def _keep(self, parameter: Tensor) -> Tensor:
        self._plain[parameter.data_ptr()] = parameter.nbytes
        return parameter


def _scale_(x: Tensor, scale: float) -> Tensor:
    return x.mul_(scale)


def _cut(weight: Tensor | list[PackedMatrix], num_parts: int) -> list[Tensor | list[PackedMatrix]]:
    """The experts' matrices, which stand below each other; none on a rank without experts."""
    if not num_parts:
        return []
    return list(weight.chunk(num_parts)) if isinstance(weight, Tensor) else list(cut_rows(weight, num_parts))
