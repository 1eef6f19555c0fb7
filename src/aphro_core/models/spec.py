"""DecoderSpec: the frozen dials of a decoder. A family file turns a Hugging Face config into one."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from aphro_core.models.quantization import QuantSpec

Activation = Literal["silu", "gelu_tanh", "gelu", "relu", "relu2"]


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """Rotary embedding. ``kind`` names the scaling rule, as ``rope_scaling["rope_type"]`` does in Hugging Face configs.

    ``factors`` holds that rule's parameters by their Hugging Face names (``factor``, ``low_freq_factor``, ...).
    """

    theta: float
    rotary_dim: int  # leading dims of a head that rotate; 0 = none (learned positions)
    kind: Literal["default", "linear", "llama3", "yarn", "longrope"] = "default"
    factors: dict[str, float] = field(default_factory=dict)
    short_factors: tuple[float, ...] = ()  # longrope: a divisor a rotated pair, within the pretraining context
    long_factors: tuple[float, ...] = ()  # and for models that are served beyond it

    def for_length(self, max_model_len: int) -> RopeSpec:
        """The rule for requests of up to ``max_model_len`` tokens. Only longrope has two: keys in the cache stay as
        they were rotated, so one must hold for all of them."""
        if self.kind != "longrope":
            return self
        is_long = max_model_len > self.factors["original_max_position_embeddings"]
        return replace(self, short_factors=self.long_factors if is_long else self.short_factors)


@dataclass(frozen=True, kw_only=True)
class MoeSpec:
    """A mixture of experts in place of the MLP."""

    num_experts: int
    experts_per_token: int
    intermediate_size: int  # of one expert
    renormalize: bool  # the chosen experts' probabilities are divided by their sum
    shared_intermediate_size: int = 0  # of an expert that every token takes, 0 = none
    layers: tuple[bool, ...] | None = None  # which layers have experts; None = all


@dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """What a model is: shapes and dials, nothing of files, devices or ranks."""

    architecture: str  # "LlamaForCausalLM"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope: RopeSpec
    max_position_embeddings: int
    tie_word_embeddings: bool
    activation: Activation = "silu"
    gated_mlp: bool = True  # act(gate) * up, or act(up) alone
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over head_dim of q and k before the rotation
    norm: Literal["rms", "layer"] = "rms"
    norm_bias: bool = False
    norm_offset: float = 0.0  # added to every stored gain
    sandwich_norms: bool = False  # attention's and the MLP's outputs are normed too, before they are added
    position_offset: int | None = None  # learned positions: position p is row p + offset; None = rotary alone
    sliding_window: int | None = None  # a token sees itself and the sliding_window - 1 before it
    sliding_layers: tuple[bool, ...] | None = None  # which layers slide; None = all, if sliding_window is set
    sliding_rope: RopeSpec | None = None  # of sliding layers, where they rotate otherwise
    attention_scale: float | None = None  # of q k; None = head_dim ** -0.5
    attention_softcap: float | None = None  # scores s become cap * tanh(s / cap)
    logits_softcap: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of what attention and MLP add
    logits_scale: float = 1.0
    moe: MoeSpec | None = None
    quantization: QuantSpec | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the checkpoint
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def has_plain_logits(self) -> bool:
        """Whether they are what the head's product gives."""
        return self.logits_scale == 1.0 and self.logits_softcap is None

    def window_of(self, layer: int) -> int | None:
        """The sliding window of one layer, None where it sees everything."""
        if self.sliding_window is None or (self.sliding_layers is not None and not self.sliding_layers[layer]):
            return None
        return self.sliding_window

    def rope_of(self, layer: int) -> RopeSpec:
        """How q and k of one layer rotate."""
        slides = self.window_of(layer) is not None
        return self.sliding_rope if slides and self.sliding_rope is not None else self.rope

    def has_experts(self, layer: int) -> bool:
        return self.moe is not None and (self.moe.layers is None or self.moe.layers[layer])

    def for_length(self, max_model_len: int) -> DecoderSpec:
        """The spec as it is served, with requests of up to ``max_model_len`` tokens."""
        return replace(self, rope=self.rope.for_length(max_model_len))
