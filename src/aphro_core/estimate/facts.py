"""ModelFacts: the sizes that decide a model's memory, of any decoder, also of those that aphro cannot run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

AttentionKind = Literal["full", "sliding", "chunked", "linear", "none"]


@dataclass(frozen=True, kw_only=True)
class LatentFacts:
    """Multi-head latent attention (DeepSeek): the cache holds ``kv_rank + rope_dim`` elements a token."""

    q_rank: int | None
    kv_rank: int
    rope_dim: int
    nope_dim: int
    v_dim: int


@dataclass(frozen=True, kw_only=True)
class StateFacts:
    """Linear attention or a state space: a fixed state a request instead of a cache row a token.

    Element counts over the whole model layer; ``recurrent`` is kept in float32 unless ``recurrent_bytes`` says
    otherwise, ``conv_channels`` x (``conv_kernel`` - 1) in the model's data type. ``parameters`` of the mixer.
    """

    recurrent: int
    conv_channels: int
    conv_kernel: int
    parameters: int
    recurrent_bytes: int = 4


@dataclass(frozen=True, kw_only=True)
class AttentionFacts:
    """One layer's attention. ``window`` is the sliding window or the chunk in tokens."""

    kind: AttentionKind
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    window: int | None = None
    latent: LatentFacts | None = None
    state: StateFacts | None = None
    has_bias: bool = False
    has_output_bias: bool = False
    has_gate: bool = False  # an output gate as wide as the queries
    qk_norm_size: int = 0  # elements of both norms
    index_bytes: int = 0  # a token's row in the cache of an indexer (DeepSeek V3.2)
    shares_cache: bool = False  # reads an earlier layer's cache and has none
    has_value: bool = True  # a projection for V of its own


@dataclass(frozen=True, kw_only=True)
class MlpFacts:
    """One layer's MLP, or its experts. ``num_matrices`` is 3 for gated ones; ``shared_size`` columns always run."""

    intermediate_size: int
    num_matrices: int = 3
    num_experts: int = 0
    experts_per_token: int = 0
    shared_size: int = 0
    has_bias: bool = False


@dataclass(frozen=True, kw_only=True)
class LayerFacts:
    attention: AttentionFacts
    mlp: MlpFacts
    left_alone: frozenset[str] = frozenset()  # parts that the quantisation leaves in 16 bit (left_alone.Part)


@dataclass(frozen=True, kw_only=True)
class QuantizationFacts:
    """What the config says of its quantisation: a scheme of ``quantization.SCHEMES`` and its group size."""

    scheme: str
    group_size: int | None = None
    bits: float | None = None  # of a weight with its scales, where the scheme leaves them open
    doubt: str = ""  # what had to be guessed


@dataclass(frozen=True, kw_only=True)
class TowerFacts:
    """The encoder beside a decoder. ``max_tokens`` that its largest image becomes, for the text model."""

    parameters: int
    width: int
    columns: int
    num_matrices: int
    max_tokens: int


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """A decoder's sizes, and what stands beside it."""

    architecture: str
    model_type: str
    hidden_size: int
    vocab_size: int
    layers: tuple[LayerFacts, ...]
    max_position_embeddings: int
    tie_word_embeddings: bool
    dtype: str
    rotary_dim: int = 0
    rotary_rows: int = 0  # of the cos/sin tables, one for each rotary base
    learned_positions: int = 0  # rows of a position embedding
    norms_per_layer: int = 2
    embedding_size: int = 0  # of a row of embedding and head where it is not the hidden size (OPT-350m)
    layer_input_size: int = 0  # width of an embedding of its own for each layer (Gemma-3n on)
    tower: TowerFacts | None = None
    quantization: QuantizationFacts | None = None
    assumed: tuple[str, ...] = ()  # what the config does not say and a reader should know

    @cached_property
    def num_layers(self) -> int:
        return len(self.layers)

    @cached_property
    def num_heads(self) -> int:
        """Query heads of the layers that have any."""
        return max((layer.attention.num_heads for layer in self.layers if layer.attention.kind != "linear"), default=1)

    @cached_property
    def num_kv_heads(self) -> int:
        """KV heads of the layers with the most."""
        kinds = [
            layer.attention.num_kv_heads for layer in self.layers if layer.attention.kind not in ("linear", "none")
        ]
        return max(kinds, default=1)

    @cached_property
    def is_uniform(self) -> bool:
        """Whether all layers are alike, so that their number says what a stage holds."""
        return len(set(self.layers)) == 1

    @cached_property
    def is_moe(self) -> bool:
        return any(layer.mlp.num_experts for layer in self.layers)

    @cached_property
    def has_state(self) -> bool:
        return any(layer.attention.state for layer in self.layers)

    @cached_property
    def has_latent(self) -> bool:
        return any(layer.attention.latent for layer in self.layers)
