"""The one decoder: the layers of one rank's shard of a spec, from token ids or hidden states to hidden states."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from aphro_core.distributed import TensorParallelGroup
from aphro_core.layers.attention import Attention
from aphro_core.layers.batch import Batch, GatheredRows, PagedRows
from aphro_core.layers.embedding import VocabEmbedding, VocabHead
from aphro_core.layers.linear import Linear
from aphro_core.layers.mlp import GatedMLP
from aphro_core.layers.norm import RMSNorm
from aphro_core.layers.rotary import RotaryEmbedding, Rotation
from aphro_core.models.spec import DecoderSpec
from aphro_core.parallel.shard import RankShard


class Block:
    """Pre-norm: ``x += attention(norm(x))``, then ``x += mlp(norm(x))``.

    What a block adds last is handed to the next one, whose first norm adds it: on a GPU the two are one kernel.
    """

    def __init__(self, input_norm: RMSNorm, attention: Attention, post_norm: RMSNorm, mlp: GatedMLP) -> None:
        self._input_norm, self._attention, self._post_norm, self._mlp = input_norm, attention, post_norm, mlp

    def __call__(
        self, x: Tensor, delta: Tensor | None, rotation: Rotation, rows: GatheredRows | PagedRows, cache: Tensor
    ) -> Tensor:
        """``x`` [num_tokens, hidden_size] in place, ``delta`` what is still to be added; returns the next delta."""
        normed = self._input_norm(x) if delta is None else self._input_norm.add_(x, delta)
        delta = self._attention(normed, rotation, rows, cache)
        return self._mlp(self._post_norm.add_(x, delta))


class Decoder:
    """What one rank computes. ``weights_bytes`` is what its parameters take in memory, as they are kept."""

    def __init__(
        self, spec: DecoderSpec, shard: RankShard, weights: dict[str, Tensor], group: TensorParallelGroup
    ) -> None:
        """Empties ``weights`` (ARCHITECTURE.md, "Weights of a rank"): a reordered one must not stay in memory twice."""
        sample = next(iter(weights.values()))
        parts = _Parts(spec, shard, weights, group)
        self._rotary = RotaryEmbedding(spec.rope, sample.dtype, sample.device)
        self._embedding = parts.embedding() if shard.has_embedding else None
        if shard.has_head:
            self._norm, self._head = parts.norm("norm"), parts.head()
        self._blocks = [parts.block(f"layers.{layer}", spec.window_of(layer)) for layer in shard.layers]
        self.weights_bytes = parts.num_bytes
        assert not weights, f"no part of the decoder reads {sorted(weights)}"

    def __call__(self, batch: Batch, hidden_states: Tensor | None, caches: Sequence[Tensor]) -> Tensor:
        """The residual stream behind this stage's layers, ``[num_tokens, hidden_size]``.

        ``hidden_states`` is what the stage before handed on (written in place), None on the first stage.
        """
        x = hidden_states
        if x is None:
            assert self._embedding is not None, "only the first stage starts from token ids"
            x = self._embedding(batch.token_ids)
        rotation, delta = self._rotary.at(batch.positions), None
        for block, cache in zip(self._blocks, caches, strict=True):
            delta = block(x, delta, rotation, batch.cache_rows, cache)
        return x if delta is None else x.add_(delta)

    def logits(self, rows: Tensor) -> Tensor | None:
        """Of chosen rows of the last stage's residual stream: ``[rows, vocab_size]`` float32, None off tp rank 0."""
        return self._head(self._norm(rows))


class _Parts:
    """Builds the parts of a decoder from a rank's parameters, which it takes out of ``weights``."""

    def __init__(
        self, spec: DecoderSpec, shard: RankShard, weights: dict[str, Tensor], group: TensorParallelGroup
    ) -> None:
        self._spec, self._shard, self._weights, self._group = spec, shard, weights, group
        self._plain: dict[int, int] = {}  # address -> bytes, so that tied weights count once
        self._packed_bytes = 0

    @property
    def num_bytes(self) -> int:
        return sum(self._plain.values()) + self._packed_bytes

    def embedding(self) -> VocabEmbedding:
        return VocabEmbedding(self._keep(self._weights.pop("embed_tokens.weight")), self._shard.vocab, self._group)

    def head(self) -> VocabHead:
        return VocabHead(self.linear("lm_head"), self._spec.vocab_size, self._group)

    def block(self, name: str, window: int | None) -> Block:
        spec, shard = self._spec, self._shard
        attention = Attention(
            self.linear(f"{name}.attention.qkv_proj"),
            self.linear(f"{name}.attention.o_proj"),
            self._group,
            num_heads=len(shard.heads),
            num_kv_heads=len(shard.kv_heads),
            head_dim=spec.head_dim,
            window=window,
            q_norm=self.norm(f"{name}.attention.q_norm") if spec.qk_norm else None,
            k_norm=self.norm(f"{name}.attention.k_norm") if spec.qk_norm else None,
        )
        mlp = GatedMLP(self.linear(f"{name}.mlp.gate_up_proj"), self.linear(f"{name}.mlp.down_proj"), self._group)
        return Block(self.norm(f"{name}.input_norm"), attention, self.norm(f"{name}.post_attention_norm"), mlp)

    def norm(self, name: str) -> RMSNorm:
        return RMSNorm(self._keep(self._weights.pop(f"{name}.weight")), self._spec.norm_eps)

    def linear(self, name: str) -> Linear:
        weight, bias = self._weights.pop(f"{name}.weight"), self._weights.pop(f"{name}.bias", None)
        linear = Linear(weight, None if bias is None else self._keep(bias))
        if linear.packed_bytes:
            self._packed_bytes += linear.packed_bytes
        else:
            self._keep(weight)
        return linear

    def _keep(self, parameter: Tensor) -> Tensor:
        self._plain[parameter.data_ptr()] = parameter.nbytes
        return parameter
