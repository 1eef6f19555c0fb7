"""The one decoder: the layers of one rank's shard of a spec, from token ids or hidden states to hidden states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from aphro_kernels.skinny_linear import build_skinny_workspace
from torch import Tensor

from aphro_core.distributed import TensorParallelGroup
from aphro_core.layers.attention import Attention
from aphro_core.layers.batch import Batch, GatheredRows, PagedRows
from aphro_core.layers.cache_format import CacheFormat
from aphro_core.layers.chained import LayerParts, chain_layers
from aphro_core.layers.embedding import PositionEmbedding, VocabEmbedding, VocabHead
from aphro_core.layers.expert_stacks import DenseStack, Stack, packed_stack
from aphro_core.layers.linear import AnyLinear, Linear
from aphro_core.layers.mlp import GatedMLP, PlainMLP
from aphro_core.layers.moe import Experts, GroupedExperts, LoopedExperts, SparseMoe
from aphro_core.layers.norm import LayerNorm, Norm, RMSNorm
from aphro_core.layers.rotary import RotaryEmbedding, Rotation
from aphro_core.layers.row_invariant import RowSizes
from aphro_core.layers.row_parallel import RowParallel
from aphro_core.models.spec import DecoderSpec, RopeSpec
from aphro_core.parallel.shard import RankShard
from aphro_core.peer_sums import Summand
from aphro_core.quantization.linear import QuantizedLinear
from aphro_core.quantization.matrix import PackedMatrix, Weights, cut_rows


@dataclass(frozen=True, slots=True)
class Delta:
    """What is to be added to the residual stream: this rank's summand, and what the sum passes through (a norm, a
    factor) where the model has something there."""

    summand: Summand
    group: TensorParallelGroup
    out: Callable[[Tensor], Tensor] | None

    def whole(self) -> Tensor:
        total = self.group.all_reduce_(self.summand)
        return total if self.out is None else self.out(total)

    def add_to_(self, x: Tensor, norm: Norm, *, shares_out: bool = False) -> Tensor:
        """To ``x`` in place; the norm of that. On GPUs sum, addition and norm are one kernel where they can be. With
        ``shares_out`` only this rank's share of the rows of ``x`` is kept up."""
        if self.out is None:
            return norm.add_sum_(x, self.summand, self.group, shares_out=shares_out)
        return norm.add_(x, self.whole())


class Block:
    """Pre-norm: ``x += attention(norm(x))``, then ``x += mlp(norm(x))``, each passed through ``attention_out`` and
    ``mlp_out`` where the model has something there (a norm, a factor).

    What a block adds last is handed to the next one, whose first norm adds it.
    """

    def __init__(
        self,
        input_norm: Norm,
        attention: Attention,
        post_norm: Norm,
        mlp: Callable[[Tensor], Summand],
        group: TensorParallelGroup,
        attention_out: Callable[[Tensor], Tensor] | None = None,
        mlp_out: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._input_norm, self._attention, self._post_norm, self._mlp = input_norm, attention, post_norm, mlp
        self._attention_out, self._mlp_out, self._group = attention_out, mlp_out, group

    @property
    def parts(self) -> LayerParts | None:
        """None where something stands between its parts: a norm, a factor, a sum over ranks."""
        if self._attention_out is not None or self._mlp_out is not None or self._group.size > 1:
            return None
        return LayerParts(self._input_norm, self._attention, self._post_norm, self._mlp)

    @property
    def can_share_out(self) -> bool:
        """Whether both its sums can leave each rank with some rows of the residual stream."""
        has_outs = self._attention_out is not None or self._mlp_out is not None
        return not has_outs and all(isinstance(norm, RMSNorm) for norm in (self._input_norm, self._post_norm))

    def __call__(
        self,
        x: Tensor,
        delta: Delta | None,
        rotation: Rotation,
        rows: GatheredRows | PagedRows,
        cache: Tensor,
        kept: Tensor | None = None,
        *,
        shares_out: bool = False,
    ) -> Delta:
        """``x`` [num_tokens, hidden_size] in place, ``delta`` what is still to be added; returns the next delta.

        With ``kept`` [any] int64, both are those rows' alone, in ``x`` the first ones: of the others K and V are
        written, and nothing else. ``shares_out``: of ``x`` only this rank's share is right behind it.
        """
        normed = self._input_norm(x) if delta is None else delta.add_to_(x, self._input_norm, shares_out=shares_out)
        attended = self._attention(normed, rotation, rows, cache, kept)
        if kept is not None:
            x = x[: len(kept)].copy_(x.index_select(0, kept))
        normed = Delta(attended, self._group, self._attention_out).add_to_(x, self._post_norm, shares_out=shares_out)
        return Delta(self._mlp(normed), self._group, self._mlp_out)


class Decoder:
    """What one rank computes. ``weights_bytes`` is what its parameters take in memory, as they are kept."""

    def __init__(
        self,
        spec: DecoderSpec,
        shard: RankShard,
        weights: Weights,
        group: TensorParallelGroup,
        cache_format: CacheFormat | None = None,
        *,
        is_deterministic: bool = False,
    ) -> None:
        """Empties ``weights`` (ARCHITECTURE.md, "Weights of a rank"): a reordered one must not stay in memory twice.
        ``cache_format`` None: the weights' dtype. ``is_deterministic``: a row is the same bits in any step (CPU)."""
        sample = next(weight for weight in weights.values() if isinstance(weight, Tensor))
        parts = _Parts(spec, shard, weights, group, cache_format or CacheFormat(sample.dtype), is_deterministic)
        ropes = [spec.rope_of(layer) for layer in shard.layers]
        self._rotaries = [RotaryEmbedding(rope, sample.dtype, sample.device) for rope in _distinct(ropes)]
        self._rotary_of = [_distinct(ropes).index(rope) for rope in ropes]
        self._embedding = parts.embedding() if shard.has_embedding else None
        self._positions = parts.positions() if shard.has_embedding and spec.position_offset is not None else None
        self._embedding_scale = float(torch.tensor(spec.embedding_scale, dtype=sample.dtype))
        if shard.has_head:
            self._norm, self._head = parts.norm("norm"), parts.head()
        self._blocks = [parts.block(layer) for layer in shard.layers]
        self._group = group
        self._can_share_out = all(block.can_share_out for block in self._blocks)
        # stages of a pipeline have other kernels beside them, and all programs of a chain must run at once
        is_alone = sample.is_cuda and shard.pp_size == 1
        self._chained = chain_layers([block.parts for block in self._blocks]) if is_alone else None
        self.weights_bytes = parts.num_bytes + (0 if self._chained is None else self._chained.workspace_bytes)
        assert not weights, f"no part of the decoder reads {sorted(weights)}"

    def __call__(
        self, batch: Batch, hidden_states: Tensor | None, caches: Sequence[Tensor], kept: Tensor | None = None
    ) -> Tensor:
        """The residual stream behind this stage's layers, ``[num_tokens, hidden_size]``, or of its rows ``kept``
        [any] int64: behind the last layer others than those that are drawn from are hardly ever asked for.

        ``hidden_states`` is what the stage before handed on (written in place), None on the first stage.
        """
        x = self.begin(batch, hidden_states)
        delta = self.run_blocks(x, self.rotations(batch, x.dtype), batch.cache_rows, caches, kept)
        x = x if kept is None else x[: len(kept)]
        return x if delta is None else x.add_(delta.whole())

    def begin(self, batch: Batch, hidden_states: Tensor | None) -> Tensor:
        """What the first block of this stage reads."""
        if hidden_states is not None:
            return hidden_states
        assert self._embedding is not None, "only the first stage starts from token ids"
        x = self._embedding(batch.token_ids)
        if self._embedding_scale != 1.0:
            x = x * self._embedding_scale
        return x if self._positions is None else self._positions.add_(x, batch.positions)

    def rotations(self, batch: Batch, dtype: torch.dtype) -> list[Rotation]:
        """Of this step's rows, as many as the layers have kinds."""
        halves = isinstance(batch.cache_rows, PagedRows) or dtype == torch.bfloat16
        return [rotary.at(batch.positions, halves=halves) for rotary in self._rotaries]

    def run_blocks(
        self,
        x: Tensor,
        rotations: Sequence[Rotation],
        rows: GatheredRows | PagedRows,
        caches: Sequence[Tensor],
        kept: Tensor | None = None,
    ) -> Delta | None:
        """``x`` in place; what is still to be added to it. Of ``kept`` rows the last block makes the first ones."""
        if kept is None and self._chained is not None and isinstance(rows, PagedRows) and self._chained.takes(x, rows):
            self._chained(x, [rotations[rotary] for rotary in self._rotary_of], rows, caches)
            return None
        delta = None
        last = self._blocks[-1]
        shares_out = self._can_share_out and self._group.can_share_out(len(x))
        for block, rotary, cache in zip(self._blocks, self._rotary_of, caches, strict=True):
            is_last = block is last  # which has the whole stream again, for those that it goes to
            among = shares_out and not is_last
            delta = block(x, delta, rotations[rotary], rows, cache, kept if is_last else None, shares_out=among)
        return delta

    def logits(self, rows: Tensor, out: Tensor | None = None) -> Tensor | None:
        """Of chosen rows of the last stage's residual stream: ``[rows, vocab_size]`` float32, None off tp rank 0."""
        return self._head(self._norm(rows), out)


class _Parts:
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


def _distinct(ropes: Sequence[RopeSpec]) -> list[RopeSpec]:
    return [rope for at, rope in enumerate(ropes) if rope not in ropes[:at]]


def _cut(weight: Tensor | list[PackedMatrix], num_parts: int) -> list[Tensor | list[PackedMatrix]]:
    """The experts' matrices, which stand below each other; none on a rank without experts."""
    if not num_parts:
        return []
    return list(weight.chunk(num_parts)) if isinstance(weight, Tensor) else list(cut_rows(weight, num_parts))
