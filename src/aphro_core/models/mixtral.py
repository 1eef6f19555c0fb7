"""Mixtral: Mistral with a mixture of experts in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from aphro_core.models import llama
from aphro_core.models.hf_config import HfConfig
from aphro_core.models.rules import ATTENTION, ENDS, INPUT_NORMS, expert_rules
from aphro_core.models.spec import DecoderSpec, MoeSpec

_MOE: Final = "model.layers.{i}.block_sparse_moe"

tensors = (
    *ENDS,
    *INPUT_NORMS,
    *ATTENTION,
    *expert_rules(f"{_MOE}.gate", *(f"{_MOE}.experts.{{e}}.{name}" for name in ("w1", "w3", "w2"))),
)


def spec(hf: Mapping[str, Any]) -> DecoderSpec:
    config = HfConfig(hf)
    base = llama.decoder_spec(hf, max_position_embeddings=131_072, rope_theta=1e6)
    window = config.integer("sliding_window", maximum=2**31) if config.has("sliding_window") else None
    num_experts = config.integer("num_local_experts", 8, maximum=4096)
    moe = MoeSpec(
        num_experts=num_experts,
        experts_per_token=config.integer("num_experts_per_tok", 2, maximum=num_experts),
        intermediate_size=base.intermediate_size,
        renormalize=True,
    )
    return replace(base, norm_eps=config.norm_eps("rms_norm_eps", 1e-5), sliding_window=window, moe=moe)
