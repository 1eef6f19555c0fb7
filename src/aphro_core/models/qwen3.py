"""Qwen3 (dense): Qwen2's windows, RMSNorm on q and k instead of their biases, heads of 128."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from aphro_core.models import llama, qwen2
from aphro_core.models.hf_config import HfConfig
from aphro_core.models.spec import DecoderSpec

tensors = llama.tensors


def spec(hf: Mapping[str, Any]) -> DecoderSpec:
    base = llama.decoder_spec(hf, max_position_embeddings=32_768, head_dim=128)
    attention_bias = HfConfig(hf).flag("attention_bias", False)
    return qwen2.with_window(replace(base, qk_norm=True, qkv_bias=attention_bias, o_bias=attention_bias), hf)
