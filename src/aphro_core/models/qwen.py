"""Qwen (v1): Llama's arithmetic under GPT-2's names, q, k and v in one tensor, biases on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from aphro_core.models import llama
from aphro_core.models.hf_config import HfConfig
from aphro_core.models.rules import ends, fused_qkv, gated_mlp_rules, norm_rules, out_rules, qkv_rules
from aphro_core.models.spec import DecoderSpec
from aphro_core.models.tensors import Source, TensorRule

_LAYER: Final = "transformer.h.{i}"

tensors: Final[tuple[TensorRule, ...]] = (
    *ends("transformer.wte", "transformer.ln_f"),
    *norm_rules("input_norm", f"{_LAYER}.ln_1"),
    *norm_rules("post_attention_norm", f"{_LAYER}.ln_2"),
    *qkv_rules(fused_qkv(f"{_LAYER}.attn.c_attn")),
    *out_rules(f"{_LAYER}.attn.c_proj"),
    # QWenMLP: c_proj(w1(x) * silu(w2(x)))
    *gated_mlp_rules(Source(f"{_LAYER}.mlp.w2", "mlp"), Source(f"{_LAYER}.mlp.w1", "mlp"), f"{_LAYER}.mlp.c_proj"),
)


def spec(hf: Mapping[str, Any]) -> DecoderSpec:
    """The published config class's keys (configuration_qwen.py). Served up to ``seq_length``, the trained context:
    within it neither ``use_dynamic_ntk`` nor ``use_logn_attn`` changes anything."""
    config = HfConfig(hf)
    if not config.flag("no_bias", True):
        raise config.refuse("no_bias", "true")
    width = config.integer("intermediate_size", 22_016)
    if width % 2:
        raise config.refuse("intermediate_size", "an even number (half of it are MLP columns)")
    renamed = {
        "intermediate_size": width // 2,
        "max_position_embeddings": config.integer("seq_length", 2048, maximum=2**31),
        "head_dim": config.integer("kv_channels", 128),
        "num_key_value_heads": None,
        "rms_norm_eps": config.norm_eps("layer_norm_epsilon", 1e-6),
        "rope_theta": config.positive("rotary_emb_base", 10_000.0),
        "partial_rotary_factor": config.positive("rotary_pct", 1.0),
        "rope_scaling": None,
        "rope_parameters": None,
        "hidden_act": "silu",
        "torch_dtype": hf.get("torch_dtype") or hf.get("dtype") or ("bfloat16" if hf.get("bf16") else "float16"),
        "dtype": None,
    }
    base = llama.decoder_spec({**hf, **renamed}, max_position_embeddings=2048, is_partly_rotary=True)
    if base.num_heads * base.head_dim != base.hidden_size:
        raise config.refuse("kv_channels", f"hidden_size / num_attention_heads ({base.hidden_size / base.num_heads:g})")
    return replace(base, qkv_bias=True)
