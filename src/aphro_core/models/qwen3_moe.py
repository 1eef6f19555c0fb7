"""Qwen3-MoE: Qwen3 with small experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from aphro_core.models import llama, qwen2, qwen2_moe
from aphro_core.models.hf_config import HfConfig
from aphro_core.models.rules import DECODER_RULES
from aphro_core.models.spec import DecoderSpec

tensors = (*DECODER_RULES, *qwen2_moe.EXPERTS)


def spec(hf: Mapping[str, Any]) -> DecoderSpec:
    base = llama.decoder_spec(hf, max_position_embeddings=32_768)
    attention_bias = HfConfig(hf).flag("attention_bias", False)
    moe = qwen2_moe.moe_spec(hf, base, num_experts=128, experts_per_token=8, intermediate_size=768)
    base = replace(base, qk_norm=True, qkv_bias=attention_bias, o_bias=attention_bias, moe=moe)
    return qwen2.with_window(base, hf)
