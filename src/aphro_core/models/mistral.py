"""Mistral: Llama without biases, with one sliding window for all layers (null in newer checkpoints)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from aphro_core.models import llama
from aphro_core.models.hf_config import HfConfig
from aphro_core.models.spec import DecoderSpec

tensors = llama.tensors


def spec(hf: Mapping[str, Any]) -> DecoderSpec:
    base = llama.decoder_spec(hf, max_position_embeddings=131_072)
    if "sliding_window" in hf and hf["sliding_window"] is None:
        return base
    return replace(base, sliding_window=HfConfig(hf).integer("sliding_window", 4096, maximum=2**31))
