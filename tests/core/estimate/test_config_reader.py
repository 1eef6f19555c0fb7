"""Configs of many families as facts; damaged ones end in an error that names the key."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aphro_core.errors import ModelError
from aphro_core.estimate.config_reader import read_facts
from aphro_core.estimate.facts import ModelFacts
from aphro_core.estimate.parameters import RankSlice, rank_matrices
from tests.core.estimate.configs import (
    DEEPSEEK_LITE,
    GEMMA3_27B,
    GPT_OSS_20B,
    LLAMA_8B,
    MIXTRAL,
    QWEN_72B,
    QWEN_HYBRID_27B,
)


def parameters_of(facts: ModelFacts) -> float:
    whole = RankSlice(range(facts.num_layers), 0, 1, True, True)
    return sum(matrix.count * matrix.elements for matrix in rank_matrices(facts, whole)) / 1e9


@pytest.mark.parametrize(
    ("config", "billions"),
    [
        (LLAMA_8B, 8.03),
        (QWEN_72B, 72.7),
        (MIXTRAL, 46.7),
        (GEMMA3_27B, 27.4),
        (GPT_OSS_20B, 20.9),
        (DEEPSEEK_LITE, 15.7),
    ],
)
def test_parameters_are_the_published_ones(config: dict[str, Any], billions: float) -> None:
    assert parameters_of(read_facts(config)) == pytest.approx(billions, rel=0.005)


@pytest.mark.parametrize(
    ("config", "kinds"),
    [
        (LLAMA_8B, {"full": 32}),
        (GEMMA3_27B, {"sliding": 52, "full": 10}),
        (GPT_OSS_20B, {"sliding": 12, "full": 12}),
        (QWEN_HYBRID_27B, {"linear": 48, "full": 16}),
        (LLAMA_8B | {"model_type": "mistral", "sliding_window": 4096}, {"sliding": 32}),
        (QWEN_72B | {"sliding_window": 131072}, {"full": 80}),  # switched off by use_sliding_window
        (QWEN_72B | {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 70},
         {"full": 70, "sliding": 10}),
        (LLAMA_8B | {"layer_types": ["mamba", "attention"] * 16, "mamba_n_heads": 64}, {"linear": 16, "full": 16}),
    ],
)  # fmt: skip
def test_layers_are_of_their_kinds(config: dict[str, Any], kinds: dict[str, int]) -> None:
    found = [layer.attention.kind for layer in read_facts(config).layers]
    assert {kind: found.count(kind) for kind in set(found)} == kinds


def test_names_of_other_families() -> None:
    mpt = {"model_type": "mpt", "d_model": 4096, "n_layers": 32, "n_heads": 32, "expansion_ratio": 4,
           "vocab_size": 50432, "max_seq_len": 2048}  # fmt: skip
    facts = read_facts(mpt)
    assert (facts.num_layers, facts.num_kv_heads, facts.layers[0].mlp.num_matrices) == (32, 32, 2)
    assert parameters_of(facts) == pytest.approx(6.65, rel=0.01)
    opt = {"model_type": "opt", "hidden_size": 5120, "ffn_dim": 20480, "num_hidden_layers": 40,
           "num_attention_heads": 40, "vocab_size": 50272}  # fmt: skip
    assert parameters_of(read_facts(opt)) == pytest.approx(12.85, rel=0.01)


def test_tower_counts() -> None:
    text = LLAMA_8B | {"model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"]}
    tower = read_facts(text | {"vision_config": {}}).tower
    assert tower is not None
    assert tower.parameters / 1e6 == pytest.approx(676, rel=0.05)
    assert read_facts(LLAMA_8B).tower is None


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_attention_heads": "many"}, "num_attention_heads"),
        ({"num_key_value_heads": 5}, "num_key_value_heads"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types"),
        ({"layer_types": ["warp"] * 32}, "warp"),
    ],
)
def test_damaged_configs_are_refused(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError) as raised:
        read_facts(LLAMA_8B | change)
    assert named in raised.value.message


KEYS = [*LLAMA_8B, "sliding_window", "rope_scaling", "quantization_config", "vision_config", "num_experts",
        "text_config", "kv_lora_rank"]  # fmt: skip
JUNK = st.none() | st.integers(-5, 2**40) | st.sampled_from(["", "x", True, [], [7], {}, {"type": 3}, {"a": "b"}, 1.5])


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), JUNK, max_size=4))
def test_no_config_is_a_fault_of_ours(change: dict[str, Any]) -> None:
    """Untrusted JSON ends in facts or in a ModelError, nothing else."""
    try:
        facts = read_facts(LLAMA_8B | change)
    except ModelError:
        return
    assert facts.num_layers >= 1


def test_a_decoder_two_sections_deep_with_two_towers() -> None:
    """Qwen2.5-Omni: the thinker's text model, its vision tower and an audio tower."""
    text = {key: value for key, value in LLAMA_8B.items() if key != "architectures"} | {
        "model_type": "qwen2_5_omni_text"
    }
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "patch_size": 14}
    thinker = {"model_type": "qwen2_5_omni_thinker", "text_config": text, "vision_config": vision}
    one, two = (
        read_facts({"model_type": "qwen2_5_omni", "thinker_config": thinker | more})
        for more in ({}, {"audio_config": {"d_model": 1280, "encoder_layers": 32, "encoder_ffn_dim": 5120}})
    )
    assert (one.num_layers, one.hidden_size) == (32, 4096)
    assert one.tower is not None
    assert two.tower is not None
    assert two.tower.parameters - one.tower.parameters == 32 * (4 * 1280**2 + 2 * 1280 * 5120)


def test_experts_in_every_layer_need_no_other_width() -> None:
    config = {key: value for key, value in LLAMA_8B.items() if key != "intermediate_size"}
    facts = read_facts(config | {"model_type": "qwen3_moe", "num_experts": 8, "moe_intermediate_size": 512})
    assert {layer.mlp.intermediate_size for layer in facts.layers} == {512}
