"""DecoderSpec: the frozen dials of a decoder. A family file turns a Hugging Face config into one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """Rotary embedding. ``kind`` names the scaling rule, as ``rope_scaling["rope_type"]`` does in Hugging Face configs.

    ``factors`` holds that rule's parameters by their Hugging Face names (``factor``, ``low_freq_factor``, ...).
    """

    theta: float
    rotary_dim: int  # leading dims of a head that rotate
    kind: Literal["default", "linear", "llama3", "yarn"] = "default"
    factors: dict[str, float] = field(default_factory=dict)


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
    activation: Literal["silu", "gelu_tanh"] = "silu"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over head_dim of q and k before the rotation
    sliding_window: int | None = None  # a token sees itself and the sliding_window - 1 before it
    sliding_layers: tuple[bool, ...] | None = None  # which layers slide; None = all, if sliding_window is set
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the checkpoint
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads

    def window_of(self, layer: int) -> int | None:
        """The sliding window of one layer, None where it sees everything."""
        if self.sliding_window is None or (self.sliding_layers is not None and not self.sliding_layers[layer]):
            return None
        return self.sliding_window
