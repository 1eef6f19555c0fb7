"""InternLM2: Llama under names of its own, q, k and v in one tensor by KV group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from aphro_core.models import llama
from aphro_core.models.hf_config import HfConfig
from aphro_core.models.rules import ends, fused_qkv, gated_mlp_rules, norm_rules, out_rules, qkv_rules
from aphro_core.models.spec import DecoderSpec
from aphro_core.models.tensors import Source, TensorRule

_LAYER: Final = "model.layers.{i}"
_MLP: Final = f"{_LAYER}.feed_forward"

tensors: Final[tuple[TensorRule, ...]] = (
    *ends("model.tok_embeddings", "model.norm", "output"),
    *norm_rules("input_norm", f"{_LAYER}.attention_norm"),
    *norm_rules("post_attention_norm", f"{_LAYER}.ffn_norm"),
    *qkv_rules(fused_qkv(f"{_LAYER}.attention.wqkv", by_group=True)),
    *out_rules(f"{_LAYER}.attention.wo"),
    *gated_mlp_rules(Source(f"{_MLP}.w1", "mlp"), Source(f"{_MLP}.w3", "mlp"), f"{_MLP}.w2"),
)


def spec(hf: Mapping[str, Any]) -> DecoderSpec:
    has_bias = HfConfig(hf).flag("bias", True)
    base = llama.decoder_spec(hf, max_position_embeddings=2048)
    return replace(base, qkv_bias=has_bias, o_bias=has_bias)
