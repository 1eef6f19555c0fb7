"""Gemma 3 (text): Gemma 2 without caps, RMSNorm on q and k, five layers of six slide and rotate faster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from aphro_core.models import gemma2
from aphro_core.models.hf_config import HfConfig
from aphro_core.models.rope import scaled_rope
from aphro_core.models.spec import DecoderSpec, RopeSpec

tensors = gemma2.tensors


def spec(hf: Mapping[str, Any]) -> DecoderSpec:
    config = HfConfig(hf)
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.has(key):
            raise config.refuse(key, "null")
    plain = {key: value for key, value in hf.items() if key not in ("rope_parameters", "rope_scaling")}
    base = gemma2.gemma_spec(plain, max_position_embeddings=131_072, window=4096, default_period=6)
    whole, sliding = _ropes(config, base)
    return replace(base, qk_norm=True, rope=whole, sliding_rope=sliding)


def _ropes(config: HfConfig, base: DecoderSpec) -> tuple[RopeSpec, RopeSpec]:
    """(of full layers, of sliding ones): transformers 5 has a section for each, 4 a base for each and one scaling."""
    length, width = base.max_position_embeddings, base.head_dim
    sections = config.section("rope_parameters")
    if sections.has("full_attention") or sections.has("sliding_attention"):
        full, local = sections.section("full_attention"), sections.section("sliding_attention")
        return (
            scaled_rope(config, full, full.positive("rope_theta", 1e6), width, length),
            scaled_rope(config, local, local.positive("rope_theta", 1e4), width, length),
        )
    scaling = config.section("rope_scaling")
    theta, local_theta = config.positive("rope_theta", 1e6), config.positive("rope_local_base_freq", 1e4)
    return scaled_rope(config, scaling, theta, width, length), RopeSpec(theta=local_theta, rotary_dim=width)
