"""Frequencies against transformers for each scaling rule; the rotation against transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from aphro_core.layers.rotary import RotaryEmbedding, inverse_frequencies
from aphro_core.models.registry import load_spec
from aphro_core.models.spec import RopeSpec

KINDS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn, its own dials": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.3,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
}


def config_and_rope(kind: str) -> tuple[LlamaConfig, RopeSpec]:
    config = LlamaConfig(
        hidden_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=64,
        num_hidden_layers=2,
        vocab_size=99,
        max_position_embeddings=512,
        rope_parameters={"rope_theta": 5000.0, **KINDS[kind]},
    )
    settings = config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    return config, load_spec(settings).rope


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "default"])
def test_frequencies(kind: str) -> None:
    config, rope = config_and_rope(kind)
    expected, scale = ROPE_INIT_FUNCTIONS[KINDS[kind]["rope_type"]](config, "cpu")
    torch.testing.assert_close(inverse_frequencies(rope), expected, rtol=1e-6, atol=0)
    assert rope.factors.get("attention_factor", 1.0) == pytest.approx(scale)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1 / 64)])
def test_rotation(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    config, rope = config_and_rope(kind)
    positions = torch.tensor([0, 7, 1, 511, 100])
    heads = torch.randn(5, 4 + 2, 32).to(dtype)
    q, k = (part.transpose(0, 1)[None] for part in (heads[:, :4], heads[:, 4:]))
    cos, sin = LlamaRotaryEmbedding(config)(heads, positions[None])
    expected = torch.cat([part[0].transpose(0, 1) for part in apply_rotary_pos_emb(q, k, cos, sin)], dim=1)
    RotaryEmbedding(rope, dtype, torch.device("cpu")).at(positions, halves=False).apply_(heads)
    torch.testing.assert_close(heads, expected, rtol=tolerance, atol=tolerance)
