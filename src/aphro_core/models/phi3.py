"""Phi-3 and Phi-4: Llama with q, k, v in one tensor, gate and up in another; long contexts by LongRoPE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from aphro_core.models import llama
from aphro_core.models.hf_config import HfConfig
from aphro_core.models.rules import ENDS, INPUT_NORMS, fused_qkv, gated_mlp_rules, out_rules, qkv_rules
from aphro_core.models.spec import DecoderSpec
from aphro_core.models.tensors import Source

_LAYER: Final = "model.layers.{i}"
_GATE_UP: Final = f"{_LAYER}.mlp.gate_up_proj"

tensors = (
    *ENDS,
    *INPUT_NORMS,
    *qkv_rules(fused_qkv(f"{_LAYER}.self_attn.qkv_proj")),
    *out_rules(f"{_LAYER}.self_attn.o_proj"),
    *gated_mlp_rules(
        Source(_GATE_UP, "mlp", ("mlp", "mlp"), 0),
        Source(_GATE_UP, "mlp", ("mlp", "mlp"), 1),
        f"{_LAYER}.mlp.down_proj",
    ),
)


def spec(hf: Mapping[str, Any]) -> DecoderSpec:
    config = HfConfig(hf)
    base = llama.decoder_spec(hf, max_position_embeddings=4096, is_partly_rotary=True)
    window = config.integer("sliding_window", maximum=2**31) if config.has("sliding_window") else None
    return replace(base, norm_eps=config.norm_eps("rms_norm_eps", 1e-5), sliding_window=window)
