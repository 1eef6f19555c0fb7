"""Gemma 2: norms around attention and MLP, capped scores and logits, every second layer slides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from aphro_core.models import llama
from aphro_core.models.hf_config import HfConfig
from aphro_core.models.rules import ATTENTION, ENDS, MLP, norm_rules
from aphro_core.models.spec import Activation, DecoderSpec

ACTIVATIONS: Final[dict[str, Activation]] = {"gelu_pytorch_tanh": "gelu_tanh"}
_LAYER: Final = "model.layers.{i}"
_SLIDES: Final = {"full_attention": False, "sliding_attention": True}

tensors = (
    *ENDS,
    *norm_rules("input_norm", f"{_LAYER}.input_layernorm"),
    *norm_rules("attention_out_norm", f"{_LAYER}.post_attention_layernorm"),
    *norm_rules("post_attention_norm", f"{_LAYER}.pre_feedforward_layernorm"),
    *norm_rules("mlp_out_norm", f"{_LAYER}.post_feedforward_layernorm"),
    *ATTENTION,
    *MLP,
)


def spec(hf: Mapping[str, Any]) -> DecoderSpec:
    config = HfConfig(hf)
    base = gemma_spec(hf, max_position_embeddings=8192, window=4096, default_period=2)
    return replace(
        base,
        attention_softcap=_cap(config, hf, "attn_logit_softcapping", 50.0),
        logits_softcap=_cap(config, hf, "final_logit_softcapping", 30.0),
    )


def gemma_spec(hf: Mapping[str, Any], *, max_position_embeddings: int, window: int, default_period: int) -> DecoderSpec:
    """What Gemma 2 and 3 share; without ``layer_types`` every layer slides but each ``default_period``-th."""
    config = HfConfig(hf)
    if config.flag("use_bidirectional_attention", False):
        raise config.refuse("use_bidirectional_attention", "false")
    renamed = {"hidden_act": hf.get("hidden_activation") or hf.get("hidden_act")}
    base = llama.decoder_spec(
        {**hf, **renamed},
        max_position_embeddings=max_position_embeddings,
        head_dim=256,
        activations=ACTIVATIONS,
        is_tied=True,
    )
    attention_bias = config.flag("attention_bias", False)
    return replace(
        base,
        norm_offset=1.0,
        sandwich_norms=True,
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        embedding_scale=base.hidden_size**0.5,
        attention_scale=config.positive("query_pre_attn_scalar", 256.0) ** -0.5,
        sliding_window=config.integer("sliding_window", window, maximum=2**31),
        sliding_layers=_sliding_layers(config, base.num_layers, default_period),
    )


def _sliding_layers(config: HfConfig, num_layers: int, period: int) -> tuple[bool, ...]:
    if not config.has("layer_types"):
        period = config.integer("sliding_window_pattern", period)
        return tuple(bool((layer + 1) % period) for layer in range(num_layers))
    kinds = config.names("layer_types")
    if len(kinds) != num_layers or not set(kinds) <= set(_SLIDES):
        raise config.refuse("layer_types", f"{num_layers} entries of {', '.join(_SLIDES)}")
    return tuple(_SLIDES[kind] for kind in kinds)


def _cap(config: HfConfig, hf: Mapping[str, Any], key: str, default: float) -> float | None:
    return None if key in hf and hf[key] is None else config.positive(key, default)
