"""Configs to specs: what transformers means by a config, and refusals that name key, value and what is allowed."""

from __future__ import annotations

import math
from dataclasses import MISSING, fields, replace
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from aphro_core.errors import ExitCode, ModelError
from aphro_core.models.registry import FAMILIES, family_of, load_spec
from aphro_core.models.spec import DecoderSpec
from tests.families import TINY

REQUIRED = [each.name for each in fields(DecoderSpec) if each.default is MISSING]
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "rope_theta": 100000,
    "max_position_embeddings": 8192,
}


def config_of(family: str, **overrides: Any) -> dict[str, Any]:
    row = TINY[family]
    return row.config(**(row.sizes | overrides)).to_dict() | {"architectures": [row.architecture]}


def test_every_family_has_a_tiny_checkpoint_so_that_the_other_tests_cover_it() -> None:
    assert {row.architecture for row in TINY.values()} == set(FAMILIES)


OWN_CONFIGS = [name for name, row in TINY.items() if row.publish is None]


@pytest.mark.parametrize("family", OWN_CONFIGS)
def test_a_config_of_transformers_gives_its_own_dials(family: str) -> None:
    hf, row = config_of(family), TINY[family]
    spec = load_spec(hf)
    assert (spec.hidden_size, spec.num_layers, spec.vocab_size) == (
        hf["hidden_size"],
        hf["num_hidden_layers"],
        hf["vocab_size"],
    )
    assert (spec.num_heads, spec.num_kv_heads) == (
        hf["num_attention_heads"],
        hf.get("num_key_value_heads", hf["num_attention_heads"]),
    )
    assert spec.head_dim == (hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"])
    assert spec.tie_word_embeddings == hf["tie_word_embeddings"]
    if "rope_parameters" in hf and "rope_theta" in hf["rope_parameters"]:
        assert spec.rope.theta == hf["rope_parameters"]["rope_theta"]
        share = hf["rope_parameters"].get("partial_rotary_factor", 1.0)
        assert spec.rope.rotary_dim == spec.head_dim * share
    plain = DecoderSpec(**{name: getattr(spec, name) for name in REQUIRED})
    expected = {"qkv_bias": family == "opt", "qk_norm": False, "gated_mlp": True, "norm_offset": plain.norm_offset}
    if not row.has_gains_less_one:
        expected["sandwich_norms"] = False
    for dial, value in (expected | row.spec).items():
        if dial != "norm_offset" or not row.has_gains_less_one:
            assert getattr(spec, dial) == value, dial
    assert (spec.norm_offset == 1.0) == row.has_gains_less_one
    assert (spec.moe is not None) == ("moe" in family or family == "mixtral")
    assert family_of(spec) is FAMILIES[row.architecture]


DEFAULTED = [name for name in OWN_CONFIGS if name not in ("opt", "gemma3")]  # those have other keys, tested below


@pytest.mark.parametrize("family", DEFAULTED)
def test_what_a_config_may_omit_defaults_as_in_transformers(family: str) -> None:
    row = TINY[family]
    required = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    )
    sizes = {key: row.sizes[key] for key in required}
    if sizes["hidden_size"] % sizes["num_attention_heads"]:
        sizes["head_dim"] = row.sizes["head_dim"]
    theirs = row.config(**sizes)
    ours = load_spec({"architectures": [row.architecture], **sizes})
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.norm_eps == getattr(theirs, "rms_norm_eps", None) or theirs.norm_eps
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert (ours.sliding_window or None) == (theirs.to_dict().get("sliding_window") or None)
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    if ours.moe is not None:
        num_experts = getattr(theirs, "num_experts", None) or theirs.num_local_experts
        assert (ours.moe.num_experts, ours.moe.experts_per_token) == (num_experts, theirs.num_experts_per_tok)


def test_mistral_slides_in_every_layer_and_null_means_no_window() -> None:
    spec = load_spec(config_of("mistral"))
    assert [spec.window_of(layer) for layer in range(spec.num_layers)] == [8] * spec.num_layers
    assert load_spec(config_of("mistral") | {"sliding_window": None}).sliding_window is None


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_qwen_windows_follow_layer_types_as_transformers_fills_them(family: str) -> None:
    window = {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 2}
    hf = config_of(family, **window)
    expected = [12 if kind == "sliding_attention" else None for kind in hf["layer_types"]]
    assert expected == [None, None, 12, 12]
    spec, without_types = load_spec(hf), load_spec({k: v for k, v in hf.items() if k != "layer_types"})
    for each in (spec, without_types):
        assert [each.window_of(layer) for layer in range(each.num_layers)] == expected
    off = {"use_sliding_window": False, "layer_types": None}
    assert load_spec(hf | off).sliding_window is None


def test_qwen_in_chunks_is_served_up_to_the_length_of_one() -> None:
    chunks = {"chunk_size": 262_144, "local_size": 8192, "original_max_position_embeddings": 262_144}
    hf = config_of("qwen2") | {"max_position_embeddings": 1_010_000, "dual_chunk_attention_config": chunks}
    assert load_spec(hf).max_position_embeddings == 262_144


def test_qwen_refuses_sliding_layers_without_a_window() -> None:
    hf = config_of("qwen2") | {"use_sliding_window": False}
    with pytest.raises(ModelError, match="use_sliding_window = False, allowed: true"):
        load_spec(hf)
    with pytest.raises(ModelError, match="layer_types"):
        load_spec(config_of("qwen2") | {"layer_types": ["full_attention"]})


def test_bias_dials_are_read_from_the_config() -> None:
    spec = load_spec(LLAMA | {"attention_bias": True, "mlp_bias": True})
    assert (spec.qkv_bias, spec.o_bias, spec.mlp_bias) == (True, True, True)
    plain = load_spec(LLAMA)
    assert (plain.qkv_bias, plain.o_bias, plain.mlp_bias) == (False, False, False)


def test_token_ids_may_be_one_or_several() -> None:
    assert load_spec(LLAMA | {"eos_token_id": 2}).eos_token_ids == (2,)
    assert load_spec(LLAMA | {"eos_token_id": [2, 7], "bos_token_id": 1}).eos_token_ids == (2, 7)
    assert load_spec(LLAMA).eos_token_ids == ()


def test_dtype_has_an_old_and_a_new_name() -> None:
    assert load_spec(LLAMA | {"torch_dtype": "bfloat16"}).dtype == "bfloat16"
    assert load_spec(LLAMA | {"torch_dtype": "bfloat16", "dtype": "float16"}).dtype == "float16"


def test_both_spellings_of_rope_mean_the_same() -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    new = load_spec(
        LLAMA | {"rope_theta": None, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5} | scaling}
    )
    old = load_spec(LLAMA | {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3"} | scaling})
    older = load_spec(LLAMA | {"rope_theta": 5e5, "rope_scaling": {"type": "llama3"} | scaling})
    assert new.rope == old.rope == older.rope
    assert (new.rope.kind, new.rope.theta, new.rope.factors) == ("llama3", 5e5, scaling)
    assert load_spec(LLAMA | {"rope_scaling": None}).rope.kind == "default"
    assert load_spec({k: v for k, v in LLAMA.items() if k != "rope_theta"}).rope.theta == 10000.0


@pytest.mark.parametrize(
    "scaling",
    [
        {"factor": 4.0},
        {"factor": 4.0, "attention_factor": 0.7},
        {"factor": 40.0, "mscale": 1.2, "mscale_all_dim": 0.8, "beta_fast": 16, "beta_slow": 2, "truncate": False},
    ],
)
def test_yarn_factors_come_out_complete_and_as_in_transformers(scaling: dict[str, Any]) -> None:
    parameters = {"rope_type": "yarn", "rope_theta": 1e6, "original_max_position_embeddings": 2048} | scaling
    spec = load_spec(LLAMA | {"rope_parameters": dict(parameters)})
    config = transformers.LlamaConfig(
        **{key: LLAMA[key] for key in ("hidden_size", "num_attention_heads", "max_position_embeddings")},
        rope_parameters=dict(parameters),
    )
    _, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](config)
    assert math.isclose(spec.rope.factors["attention_factor"], attention_factor)
    assert spec.rope.factors["beta_fast"] == scaling.get("beta_fast", 32)
    assert spec.rope.factors["beta_slow"] == scaling.get("beta_slow", 1)
    assert spec.rope.factors["truncate"] == float(scaling.get("truncate", True))
    assert spec.rope.factors["original_max_position_embeddings"] == 2048


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"hidden_size": "576"}, "hidden_size = '576', allowed: an integer"),
        ({"hidden_size": True}, "hidden_size = True"),
        ({"num_hidden_layers": -1}, "num_hidden_layers = -1, allowed: an integer from 1"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000"),
        ({"vocab_size": 0}, "vocab_size = 0"),
        ({"num_key_value_heads": 2}, r"num_key_value_heads = 2, allowed: a divisor of num_attention_heads \(9\)"),
        (
            {"num_attention_heads": 7, "num_key_value_heads": 7},
            r"num_attention_heads = 7, allowed: a divisor of hidden",
        ),
        ({"head_dim": 63}, "head_dim = 63, allowed: an even number"),
        ({"hidden_act": "relu"}, "hidden_act = 'relu', allowed: silu"),
        ({"dtype": "int8"}, "dtype = 'int8', allowed: float32, bfloat16, float16"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps = nan"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps = -1.0"),
        ({"rms_norm_eps": 1e308}, r"rms_norm_eps = 1e\+308, allowed: a number from 0 to 1"),
        ({"rope_theta": 1e308}, r"rope_theta = 1e\+308, allowed: a number from 0 to 1e\+30"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings = 'no', allowed: true or false"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"rope_theta": 0}, "rope_theta = 0"),
        (
            {"rope_scaling": {"type": "mrope", "factor": 2.0}},
            "rope_scaling.type = 'mrope', allowed: default, linear",
        ),
        ({"rope_scaling": {"rope_type": "linear"}}, "lacks rope_scaling.factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "factor = 0.5, allowed: a number from 1 to"),
        ({"rope_scaling": [1]}, r"rope_scaling = \[1\], allowed: an object"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5, allowed: 1.0"),
        ({"quantization_config": {"quant_method": "xyz"}}, "quantization_config.quant_method = 'xyz', allowed: fp8"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes, which is recognised but not"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 3}}, "quantization_config.bits = 3, allowed: 4, 8"),
        ({"architectures": []}, "lacks architectures"),
        ({"architectures": "LlamaForCausalLM"}, "architectures = 'LlamaForCausalLM', allowed: a list"),
    ],
)
def test_a_bad_key_is_named_with_its_value_and_what_is_allowed(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named) as error:
        load_spec(LLAMA | change)
    assert error.value.exit_code is ExitCode.MODEL
    assert error.value.hint


def test_an_unknown_architecture_lists_the_known_and_the_nearest() -> None:
    with pytest.raises(ModelError, match="supported: LlamaForCausalLM, Mistral") as error:
        load_spec(LLAMA | {"architectures": ["Qwen4ForCausalLM"]})
    assert error.value.hint == "the nearest is Qwen3ForCausalLM"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None)
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    changes=st.dictionaries(st.sampled_from([*LLAMA, "rope_scaling", "sliding_window", "eos_token_id"]), JSON),
)
def test_no_config_raises_anything_but_a_model_error(family: str, changes: dict[str, Any]) -> None:
    try:
        spec = load_spec({**LLAMA, "architectures": [family], **changes})
    except ModelError:
        return
    assert spec.num_heads % spec.num_kv_heads == 0
    assert replace(spec) == spec
