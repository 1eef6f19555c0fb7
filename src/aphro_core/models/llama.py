"""Llama (also SmolLM): the plain pre-norm decoder that the other families are variations of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final, Literal

from aphro_core.models.hf_config import HfConfig
from aphro_core.models.rope import rope_spec
from aphro_core.models.rules import DECODER_RULES
from aphro_core.models.spec import Activation, DecoderSpec

tensors = DECODER_RULES

MAX_LAYERS: Final = 1024

ACTIVATIONS: Final[dict[str, Activation]] = {"silu": "silu", "swish": "silu"}
_DTYPES: Final[dict[str, Literal["float32", "bfloat16", "float16"]]] = {
    "float32": "float32",
    "bfloat16": "bfloat16",
    "float16": "float16",
}


def spec(hf: Mapping[str, Any]) -> DecoderSpec:
    config = HfConfig(hf)
    attention_bias = config.flag("attention_bias", False)
    return replace(
        decoder_spec(hf, max_position_embeddings=2048),
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        mlp_bias=config.flag("mlp_bias", False),
    )


def decoder_spec(
    hf: Mapping[str, Any],
    *,
    max_position_embeddings: int,
    head_dim: int | None = None,
    activations: Mapping[str, Activation] = ACTIVATIONS,
    is_partly_rotary: bool = False,
    rotary_share: float = 1.0,
    rope_theta: float = 10_000.0,
    is_tied: bool = False,
) -> DecoderSpec:
    """The dials that every family shares. The arguments are its defaults for keys that the config may omit;
    ``head_dim`` None is derived from the hidden size. The first of ``activations`` is the default."""
    config = HfConfig(hf)
    hidden_size, num_heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    num_kv_heads = config.integer("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise config.refuse("num_key_value_heads", f"a divisor of num_attention_heads ({num_heads})")
    if not config.has("head_dim") and head_dim is None and hidden_size % num_heads:
        raise config.refuse("num_attention_heads", f"a divisor of hidden_size ({hidden_size}), as there is no head_dim")
    head_dim = config.integer("head_dim", head_dim or hidden_size // num_heads)
    if head_dim % 2:
        raise config.refuse("head_dim", f"an even number, to rotate in pairs (it comes to {head_dim})")
    length = config.integer("max_position_embeddings", max_position_embeddings, maximum=2**31)
    return DecoderSpec(
        architecture=config.names("architectures")[0],
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=config.integer("intermediate_size"),
        num_layers=config.integer("num_hidden_layers", maximum=MAX_LAYERS),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        norm_eps=config.norm_eps("rms_norm_eps", 1e-6),
        rope=rope_spec(
            config,
            head_dim=head_dim,
            max_position_embeddings=length,
            default_theta=rope_theta,
            is_partial=is_partly_rotary,
            default_share=rotary_share,
        ),
        max_position_embeddings=length,
        tie_word_embeddings=config.flag("tie_word_embeddings", is_tied),
        activation=config.choice("hidden_act", activations, next(iter(activations))),
        dtype=config.choice("dtype" if config.has("dtype") else "torch_dtype", _DTYPES, "float32"),
        bos_token_id=next(iter(config.token_ids("bos_token_id")), None),
        eos_token_ids=config.token_ids("eos_token_id"),
    )
