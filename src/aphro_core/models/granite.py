"""Granite: Llama with multipliers on the embedding, attention's scores, the residual branches and the logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from aphro_core.models import llama
from aphro_core.models.hf_config import HfConfig
from aphro_core.models.spec import DecoderSpec

tensors = llama.tensors


def spec(hf: Mapping[str, Any]) -> DecoderSpec:
    config = HfConfig(hf)
    return replace(
        llama.spec(hf),
        embedding_scale=config.positive("embedding_multiplier", 1.0),
        attention_scale=config.positive("attention_multiplier", 1.0),
        residual_scale=config.positive("residual_multiplier", 1.0),
        logits_scale=1.0 / config.positive("logits_scaling", 1.0),
    )
