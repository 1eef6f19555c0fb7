"""Nemotron: layer norms whose gains are stored less one, a plain MLP with squared ReLU, half of a head rotates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from aphro_core.models import llama
from aphro_core.models.hf_config import HfConfig
from aphro_core.models.rules import ATTENTION, ENDS, INPUT_NORMS, plain_mlp_rules
from aphro_core.models.spec import Activation, DecoderSpec

_ACTIVATIONS: Final[dict[str, Activation]] = {"relu2": "relu2"}

tensors = (
    *ENDS,
    *INPUT_NORMS,
    *ATTENTION,
    *plain_mlp_rules("model.layers.{i}.mlp.up_proj", "model.layers.{i}.mlp.down_proj"),
)


def spec(hf: Mapping[str, Any]) -> DecoderSpec:
    config = HfConfig(hf)
    base = llama.decoder_spec(
        {"partial_rotary_factor": hf.get("rope_percent"), **hf},
        max_position_embeddings=4096,
        activations=_ACTIVATIONS,
        is_partly_rotary=True,
        rotary_share=0.5,
    )
    attention_bias = config.flag("attention_bias", False)
    return replace(
        base,
        gated_mlp=False,
        norm="layer",
        norm_bias=True,
        norm_offset=1.0,
        norm_eps=config.norm_eps("norm_eps", 1e-5),
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        mlp_bias=config.flag("mlp_bias", False),
    )
