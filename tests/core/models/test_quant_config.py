"""quantization_config and -q to a QuantSpec: what is read, what is refused and how, and which layers are left out."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aphro_core.errors import ModelError, UsageError
from aphro_core.models.hf_config import HfConfig
from aphro_core.models.quant_config import METHODS, ONLINE, quant_spec, with_request
from aphro_core.models.quantization import QuantSpec, online_group, whole_group
from tests.formats import TINY_FORMATS

GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True, "sym": False}


def test_gptq_keys() -> None:
    spec = quant_spec(HfConfig(GPTQ))
    assert (spec.kind, spec.group_size, spec.has_act_order, spec.zeros_less_one) == ("int4", 128, True, True)
    assert quant_spec(HfConfig(GPTQ | {"group_size": -1})).group_size is None
    assert not quant_spec(HfConfig(GPTQ | {"checkpoint_format": "gptq_v2"})).zeros_less_one
    assert quant_spec(HfConfig(GPTQ | {"bits": 8})).kind == "int8"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"bits": 2}, "bits = 2, allowed: 4, 8"),
        ({"group_size": 0}, "group_size = 0, allowed: an even number"),
        ({"group_size": 31}, "group_size = 31"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format = 'marlin', allowed: gptq, gptq_v2"),
        ({"dynamic": {"-:.*": {}}}, "dynamic"),
        ({"is_marlin_format": True}, "is_marlin_format = True, allowed: false"),
        ({"quant_method": "new"}, "quant_method = 'new', allowed: fp8, gptq"),
        ({"modules_in_block_to_quantize": [1]}, "modules_in_block_to_quantize = .*, allowed: a list of lists"),
        ({"quant_method": "aqlm"}, "by aqlm, which is recognised but not supported; supported: fp8, gptq"),
        ({"quant_method": 4}, "quant_method = 4, allowed: a string"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "config_groups"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "format = 'nvfp4-pack-quantized'"),
    ],
)
def test_what_is_not_supported_is_named(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(ModelError, match=problem):
        quant_spec(HfConfig(GPTQ | change))


AWQ: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}


def test_awq_keys_of_older_writers() -> None:
    older = {"quant_method": "awq", "w_bit": 4, "q_group_size": 128, "version": "GEMM", "zero_point": True}
    assert quant_spec(HfConfig(older)) == quant_spec(HfConfig(AWQ))


def compressed(**groups: dict[str, Any]) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}
    base = {"weights": weights, "format": "pack-quantized"}
    section = {"quant_method": "compressed-tensors", "format": "mixed-precision", "ignore": ["lm_head"]}
    return section | {"config_groups": {name: base | group for name, group in groups.items()}}


def test_targets_of_compressed_tensors() -> None:
    """Classes, names and patterns, in one group or several of one scheme."""
    attention, mlp = (
        {"targets": ["re:.*self_attn.*_proj"]},
        {"targets": ["re:.*mlp.*_proj", "model.layers.0.self_attn"]},
    )
    found = quant_spec(HfConfig(compressed(a=attention)))
    assert [found.covers(f"model.layers.1.{name}") for name in ("self_attn.q_proj", "mlp.up_proj")] == [True, False]
    found = quant_spec(HfConfig(compressed(a=attention, b=mlp)))
    assert found.covers("model.layers.1.self_attn.q_proj")
    assert found.covers("model.layers.1.mlp.up_proj")
    assert not found.covers("lm_head")
    everything = quant_spec(HfConfig(compressed(a={"targets": ["Linear"]})))
    assert everything.covers("model.layers.1.mlp.up_proj")
    assert everything.has_head
    assert not everything.covers("lm_head")
    other = {"weights": {"num_bits": 8, "type": "int", "strategy": "channel"}}
    for groups in ({}, {"a": attention, "b": mlp | other}):
        with pytest.raises(ModelError, match="allowed: one group, or several with the same scheme"):
            quant_spec(HfConfig(compressed(**groups)))
    with pytest.raises(ModelError, match="targets"):
        quant_spec(HfConfig(compressed(a={"targets": ["re:("]})))


def test_compressed_tensors_that_are_sparse_as_well() -> None:
    config = compressed(a={"targets": ["Linear"]})
    assert quant_spec(HfConfig(config | {"sparsity_config": {"format": "dense"}})) == quant_spec(HfConfig(config))
    with pytest.raises(ModelError, match="sparse-24-bitmask', allowed: dense"):
        quant_spec(HfConfig(config | {"sparsity_config": {"format": "sparse-24-bitmask"}}))


def test_gptq_of_some_modules_of_each_block() -> None:
    groups = {"modules_in_block_to_quantize": [["mlp.up_proj", "mlp.gate_proj"], ["mlp.down_proj"]]}
    found = quant_spec(HfConfig(GPTQ | groups))
    modules = ["model.layers.1.mlp.down_proj", "model.layers.1.self_attn.q_proj", "lm_head"]
    assert [found.covers(module) for module in modules] == [True, False, False]
    assert quant_spec(HfConfig(GPTQ | groups | {"lm_head": True})).covers("lm_head")


def test_a_request_and_a_checkpoint_must_agree() -> None:
    gptq = quant_spec(HfConfig(GPTQ))
    gguf = QuantSpec(layout="gguf", kind="int4", bits=4, block_formats={"x.weight": "Q4_K"})
    assert with_request(gptq, None) is gptq
    assert with_request(gptq, "gptq") is gptq
    assert with_request(None, None) is None
    assert with_request(None, "none") is None
    assert with_request(gguf, "none") is None
    for name, online in ONLINE.items():
        assert with_request(None, name) == online
        assert with_request(gguf, name) == online
    for found, asked, problem in (
        (gptq, "awq", "-q awq, but the checkpoint is quantised already, by gptq"),
        (gptq, "none", "quantised already, by gptq"),
        (None, "awq", "-q awq names a checkpoint format, but the checkpoint is not of it"),
        (None, "hqq", "-q hqq is recognised but not supported, allowed: fp8"),
        (None, "int5", "-q int5 is unknown, allowed: fp8, int8, int4"),
    ):
        with pytest.raises(UsageError, match=problem):
            with_request(found, asked)


def test_modules_are_left_out_by_name_by_part_and_by_pattern() -> None:
    spec = QuantSpec(layout="awq", kind="int4", ignored=("lm_head", "gate", "re:.*layers\\.0\\..*"))
    assert not spec.covers("lm_head")
    assert not spec.covers("model.layers.1.mlp.gate")
    assert spec.covers("model.layers.1.mlp.gate_proj")
    assert not spec.covers("model.layers.0.mlp.up_proj")


def test_groups_leave_enough_for_many_ranks() -> None:
    assert [online_group(width) for width in (14_336, 1536, 176, 7)] == [128, 64, 8, 2]
    assert [whole_group(width) for width in (4096, 576, 72, 80)] == [128, 64, 72, 80]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 300) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(
    base=st.sampled_from([row.config for row in TINY_FORMATS.values()]),
    method=st.sampled_from([*METHODS, None]),
    changes=st.dictionaries(
        st.sampled_from(["bits", "group_size", "desc_act", "format", "config_groups", "ignore", "weight_block_size"]),
        JSON,
    ),
)
def test_no_config_raises_anything_but_a_model_error(
    base: dict[str, Any], method: str | None, changes: dict[str, Any]
) -> None:
    try:
        spec = quant_spec(HfConfig(base | ({"quant_method": method} if method else {}) | changes))
    except ModelError:
        return
    assert spec.layout in METHODS
