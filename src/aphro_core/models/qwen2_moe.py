"""Qwen2-MoE: Qwen2 with small experts and one that every token takes, weighed by a gate of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from aphro_core.models import llama, qwen2
from aphro_core.models.hf_config import HfConfig
from aphro_core.models.rules import DECODER_RULES, expert_rules, gated_mlp_rules, layer_rule
from aphro_core.models.spec import DecoderSpec, MoeSpec
from aphro_core.models.tensors import Source

_MLP: Final = "model.layers.{i}.mlp"
_SHARED: Final = f"{_MLP}.shared_expert"

EXPERTS: Final = expert_rules(f"{_MLP}.gate", *(f"{_MLP}.experts.{{e}}.{name}_proj" for name in ("gate", "up", "down")))
tensors = (
    *DECODER_RULES,
    *EXPERTS,
    *gated_mlp_rules(
        Source(f"{_SHARED}.gate_proj", "shared_mlp"),
        Source(f"{_SHARED}.up_proj", "shared_mlp"),
        f"{_SHARED}.down_proj",
        parameter="moe.shared",
        layers="experts",
    ),
    layer_rule(
        "moe.shared_gate.weight", Source(f"{_MLP}.shared_expert_gate.weight", "one"), columns="hidden", layers="experts"
    ),
)


def spec(hf: Mapping[str, Any]) -> DecoderSpec:
    config = HfConfig(hf)
    base = replace(llama.decoder_spec(hf, max_position_embeddings=32_768), qkv_bias=config.flag("qkv_bias", True))
    shared = config.integer("shared_expert_intermediate_size", 5632)
    moe = moe_spec(hf, base, num_experts=60, experts_per_token=4, intermediate_size=1408)
    return qwen2.with_window(replace(base, moe=replace(moe, shared_intermediate_size=shared)), hf)


def moe_spec(
    hf: Mapping[str, Any], base: DecoderSpec, *, num_experts: int, experts_per_token: int, intermediate_size: int
) -> MoeSpec:
    """Qwen's keys; the numbers are the family's defaults. A layer has experts unless ``mlp_only_layers`` names it or
    ``decoder_sparse_step`` passes over it."""
    config = HfConfig(hf)
    count = config.integer("num_experts", config.integer("num_local_experts", num_experts), maximum=4096)
    step = config.integer("decoder_sparse_step", 1)
    dense = config.integers("mlp_only_layers")
    layers = tuple(i not in dense and (i + 1) % step == 0 for i in range(base.num_layers))
    return MoeSpec(
        num_experts=count,
        experts_per_token=config.integer("num_experts_per_tok", experts_per_token, maximum=count),
        intermediate_size=config.integer("moe_intermediate_size", intermediate_size),
        renormalize=config.flag("norm_topk_prob", False),
        layers=None if all(layers) else layers,
    )
