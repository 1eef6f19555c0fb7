"""The one decoder: the layers of one rank's shard of a spec, from token ids or hidden states to hidden states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
    """Pre-norm: ``x += attention(norm(x))``, then ``x += mlp(norm(x))``, in place."""

    def __init__(self, input_norm: RMSNorm, attention: Attention, post_norm: RMSNorm, mlp: GatedMLP) -> None:
        self._input_norm, self._attention, self._post_norm, self._mlp = input_norm, attention, post_norm, mlp

    def __call__(self, x: Tensor, rotation: Rotation, rows: GatheredRows | PagedRows, cache: Tensor) -> None:
        x += self._attention(self._input_norm(x), rotation, rows, cache)
        x += self._mlp(self._post_norm(x))


class Decoder:
    """What one rank computes. ``weights`` are its parameters by their local names."""

    def __init__(
        self, spec: DecoderSpec, shard: RankShard, weights: Mapping[str, Tensor], group: TensorParallelGroup
    ) -> None:
        sample = next(iter(weights.values()))
        self._embedding = (
            VocabEmbedding(weights["embed_tokens.weight"], shard.vocab, group) if shard.has_embedding else None
        )
        self._rotary = RotaryEmbedding(spec.rope, spec.max_position_embeddings, sample.dtype, sample.device)
        self._blocks = [build_block(spec, shard, layer, weights, group) for layer in shard.layers]
        if shard.has_head:
            self._norm = RMSNorm(weights["norm.weight"], spec.norm_eps)
            self._head = VocabHead(weights["lm_head.weight"], spec.vocab_size, group)

    def __call__(self, batch: Batch, hidden_states: Tensor | None, caches: Sequence[Tensor]) -> Tensor:
        """The residual stream behind this stage's layers, ``[num_tokens, hidden_size]``.

        ``hidden_states`` is what the stage before handed on (written in place), None on the first stage.
        """
        x = hidden_states
        if x is None:
            assert self._embedding is not None, "only the first stage starts from token ids"
            x = self._embedding(batch.token_ids)
        rotation = self._rotary.at(batch.positions)
        for block, cache in zip(self._blocks, caches, strict=True):
            block(x, rotation, batch.cache_rows, cache)
        return x

    def logits(self, rows: Tensor) -> Tensor | None:
        """Of chosen rows of the last stage's residual stream: ``[rows, vocab_size]`` float32, None off tp rank 0."""
        return self._head(self._norm(rows))


def build_block(
    spec: DecoderSpec, shard: RankShard, layer: int, weights: Mapping[str, Tensor], group: TensorParallelGroup
) -> Block:
    def linear(name: str) -> Linear:
        return Linear(weights[f"layers.{layer}.{name}.weight"], weights.get(f"layers.{layer}.{name}.bias"))

    def norm(name: str) -> RMSNorm:
        return RMSNorm(weights[f"layers.{layer}.{name}.weight"], spec.norm_eps)

    attention = Attention(
        linear("attention.qkv_proj"),
        linear("attention.o_proj"),
        group,
        num_heads=len(shard.heads),
        num_kv_heads=len(shard.kv_heads),
        head_dim=spec.head_dim,
        window=spec.window_of(layer),
        q_norm=norm("attention.q_norm") if spec.qk_norm else None,
        k_norm=norm("attention.k_norm") if spec.qk_norm else None,
    )
    mlp = GatedMLP(linear("mlp.gate_up_proj"), linear("mlp.down_proj"), group)
    return Block(norm("input_norm"), attention, norm("post_attention_norm"), mlp)
