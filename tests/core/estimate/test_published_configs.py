"""Configs of published models, one a line in published_configs.jsonl: parameters and kinds of layers as published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from aphro_core.errors import ModelError
from aphro_core.estimate.config_reader import read_facts
from aphro_core.estimate.estimate import estimate
from aphro_core.estimate.left_alone import parts_left_alone, read_patterns
from aphro_core.estimate.parameters import RankSlice, rank_matrices
from aphro_core.estimate.quantization import SCHEMES
from aphro_core.estimate.weights import weight_bytes
from tests.core.estimate.asking import question
from tests.core.estimate.configs import LLAMA_8B

PUBLISHED = [json.loads(line) for line in (Path(__file__).parent / "published_configs.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("model", PUBLISHED, ids=lambda model: model["name"])
def test_parameters_and_layers_are_the_published_ones(model: dict[str, Any]) -> None:
    facts = read_facts(model["config"])
    whole = RankSlice(range(facts.num_layers), 0, 1, True, True)
    count = sum(matrix.count * matrix.elements for matrix in rank_matrices(facts, whole)) / 1e9
    assert count == pytest.approx(model["billions"], rel=0.016)
    kinds = [layer.attention.kind for layer in facts.layers]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == model["kinds"]


@pytest.mark.parametrize("model", PUBLISHED, ids=lambda model: model["name"])
@pytest.mark.parametrize("engine", ["aphro", "vllm:0.19.0"])
def test_each_has_an_answer(model: dict[str, Any], engine: str) -> None:
    found = estimate(question(model["config"], gpu="H200", engine=engine, max_model_len=1024), 1, 1)
    assert found.limiting.weights_bytes > 0
    assert found.num_blocks > 0 or not found.fits


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, "encoder"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "encoder"),
        ({"model_type": "mamba2", "architectures": ["Mamba2ForCausalLM"]}, "no KV cache"),
        ({"model_type": "falcon_h1", "architectures": ["FalconH1ForCausalLM"]}, "not counted yet"),
    ],
)
def test_what_cannot_be_counted_says_why(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError) as raised:
        read_facts(config)
    assert words in raised.value.message
    assert config["architectures"][0] in raised.value.message


def test_a_layer_of_nemotron_h_is_one_thing_alone() -> None:
    config = LLAMA_8B | {"model_type": "nemotron_h", "hybrid_override_pattern": "M-*-" * 8, "mamba_num_heads": 64}
    layers = read_facts(config).layers
    assert [(layer.attention.kind, layer.mlp.intermediate_size > 0) for layer in layers[:4]] == [
        ("linear", False),
        ("none", True),
        ("full", False),
        ("none", True),
    ]


def test_layers_of_nemotron_nas_have_sizes_of_their_own() -> None:
    blocks = [
        {"attention": {"n_heads_in_group": 8}, "ffn": {"ffn_mult": 2.625}},
        {"attention": {"n_heads_in_group": None, "no_op": True}, "ffn": {"ffn_mult": 1.3125}},
        {"attention": {"n_heads_in_group": 16}, "ffn": {"ffn_mult": None, "no_op": True}},
    ]
    config = LLAMA_8B | {"hidden_size": 8192, "num_attention_heads": 64, "num_hidden_layers": 3}
    config |= {"block_configs": blocks, "intermediate_size": None, "num_key_value_heads": None}
    layers = read_facts(config).layers
    assert [layer.attention.num_kv_heads for layer in layers] == [8, 0, 4]
    assert [layer.mlp.intermediate_size for layer in layers] == [14336, 7168, 0]


@pytest.mark.parametrize(
    ("patterns", "parts"),
    [
        ([], {}),
        (["lm_head", "re:.*lm_head"], {}),
        (["re:.*self_attn.*"], {0: {"attention"}, 1: {"attention"}, 2: {"attention"}}),
        (["*self_attn*"], {0: {"attention"}, 1: {"attention"}, 2: {"attention"}}),
        (["model.layers.0.mlp", "model.layers.2.self_attn"], {0: {"mlp", "experts", "shared"}, 2: {"attention"}}),
        (["model.language_model.layers.1.mlp.experts"], {1: {"experts"}}),
        (["mlp.gate", "model.layers.1.self_attn.kv_a_proj_with_mqa"], {}),
        (["re:(", 7, None, "x" * 500], {}),
    ],
)
def test_parts_that_a_quantisation_leaves_alone(patterns: list[Any], parts: dict[int, set[str]]) -> None:
    found = parts_left_alone(read_patterns({"ignore": patterns}), 3)
    assert {layer: set(each) for layer, each in enumerate(found) if each} == parts


def test_what_is_left_alone_counts_in_16_bit() -> None:
    def size(ignore: list[str]) -> int:
        section = {"quant_method": "modelopt", "quant_algo": "NVFP4", "exclude_modules": ignore}
        facts = read_facts(LLAMA_8B | {"quantization_config": section})
        whole = RankSlice(range(facts.num_layers), 0, 1, True, True)
        return weight_bytes(facts, whole, "bfloat16", facts.quantization)

    attention = 32 * (4096 * 6144 + 4096 * 4096)
    assert size(["*self_attn*", "lm_head"]) - size(["lm_head"]) == pytest.approx(attention * (2 - 0.5625), rel=1e-6)
    many = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(32) for name in "qkvo"]
    assert size(many * 8) == size(["*self_attn*"])


@pytest.mark.parametrize(
    ("config", "bits"),
    [
        ({"quant_method": "quanto", "weights": "int8"}, 8),
        ({"quant_method": "torchao", "quant_type": "int4_weight_only"}, 4.25),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}}, 8),
        ({"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "fp8_e4m3"}}}, 8),
        ({"quant_method": "aqlm", "nbits_per_codebook": 16, "num_codebooks": 1, "in_group_size": 8}, 2.25),
        ({"quant_method": "exl2", "bits": 4.25}, 4.25),
        ({"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64}}}, 4.5),
        ({"quant_method": "eetq", "weights": "int8"}, 8),
        ({"quant_method": "intel/auto-round", "bits": 4, "group_size": 128}, 4.16),
        ({"quant_method": "tpu_int8"}, 8),
        ({"quant_method": "a method of tomorrow"}, 16),
        ({"quant_method": "compressed-tensors", "format": "sparse-24-bitmask", "config_groups": {}}, 16),
    ],
    ids=lambda each: str(each.get("quant_method")) if isinstance(each, dict) else str(each),
)
def test_bits_of_a_weight_in_many_formats(config: dict[str, Any], bits: float) -> None:
    facts = read_facts(LLAMA_8B | {"quantization_config": config})
    whole = RankSlice(range(facts.num_layers), 0, 1, True, True)
    packed = weight_bytes(facts, whole, "bfloat16", facts.quantization)
    linear = sum(m.count * m.elements for m in rank_matrices(facts, whole) if m.precision == "linear")
    rest = weight_bytes(facts, whole, "bfloat16", None) - 2 * linear
    assert (packed - rest) * 8 / linear == pytest.approx(bits, rel=0.01)
    if config["quant_method"] == "a method of tomorrow":
        assert "a method of tomorrow" in facts.assumed[0]
    assert facts.quantization is None or facts.quantization.scheme in SCHEMES
