"""Each layer's MLP from a config: width, gate or not, experts, and which layers have them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import ceil
from typing import Final

from aphro_core.estimate.config_keys import ConfigKeys
from aphro_core.estimate.facts import MlpFacts

# families whose MLP is two matrices, without a gate
_PLAIN: Final = (
    "opt", "mpt", "gpt2", "gpt_bigcode", "gpt_neox", "gptj", "codegen", "falcon", "RefinedWeb", "bloom", "phi",
    "phi-msft", "starcoder2", "nemotron", "nemotron_h", "persimmon", "arcee",
)  # fmt: skip


def read_mlps(keys: ConfigKeys, num_layers: int) -> tuple[MlpFacts, ...]:
    """One entry a layer; layers that are alike share theirs."""
    dense = _dense(keys)
    num_experts = keys.integer("experts", 0, minimum=0)
    is_off = keys.model_type.startswith("gemma4") and not keys.flag("enable_moe_block", False)
    blocks = keys.list("block_configs")
    if blocks:
        return tuple(_of_block(keys.integer("hidden"), dense, block) for block in blocks)
    pattern = keys.text("hybrid_override_pattern")
    if num_experts < 2 or is_off:
        return tuple(_in_pattern(pattern, layer, dense, dense) for layer in range(num_layers))
    experts = _experts(keys, num_experts, dense)
    if pattern:
        return tuple(_in_pattern(pattern, layer, dense, experts) for layer in range(num_layers))
    return tuple(experts if _has_experts(keys, layer) else dense for layer in range(num_layers))


def _in_pattern(pattern: str, layer: int, dense: MlpFacts, experts: MlpFacts) -> MlpFacts:
    """Nemotron-H: a layer is one thing alone, - an MLP or E experts; what attends or keeps a state has neither."""
    letter = pattern[layer : layer + 1] or "-"
    return dense if letter == "-" else experts if letter == "E" else replace(dense, intermediate_size=0)


def _of_block(hidden: int, dense: MlpFacts, block: object) -> MlpFacts:
    """Nemotron-NAS: each layer's multiple of 2/3 of the hidden size, rounded up to 256 columns; none without."""
    found = block.get("ffn") if isinstance(block, Mapping) else None
    times = found.get("ffn_mult") if isinstance(found, Mapping) else None
    if not isinstance(times, int | float) or isinstance(times, bool) or not 0 < times < 64:
        return replace(dense, intermediate_size=0)
    return replace(dense, intermediate_size=ceil(int(2 * times * hidden / 3) / 256) * 256)


def _dense(keys: ConfigKeys) -> MlpFacts:
    hidden = keys.integer("hidden")
    default = hidden * keys.integer("expansion_ratio", 4)
    is_known = keys.model_type in _PLAIN or bool(keys.list("block_configs"))
    if not is_known and keys.has("expert_size"):  # all layers have experts: some configs then name no other width
        default, is_known = keys.integer("expert_size"), True
    size = keys.integer("intermediate", default if is_known else None)
    if keys.model_type == "qwen":  # the first Qwen counts both halves of the gated pair
        size //= 2
    if keys.model_type == "llama4_text":
        size = keys.integer("intermediate_size_mlp", size)
    is_plain = keys.model_type in _PLAIN
    has_bias = keys.flag("mlp_bias", keys.model_type in ("opt", "gpt2", "gpt_bigcode", "gpt_neox", "phi", "bloom"))
    return MlpFacts(intermediate_size=size, num_matrices=2 if is_plain else 3, has_bias=has_bias)


def _experts(keys: ConfigKeys, num_experts: int, dense: MlpFacts) -> MlpFacts:
    width = keys.integer("expert_size", keys.integer("intermediate", dense.intermediate_size))
    shared = keys.integer("shared_experts", 0, minimum=0) * width
    if keys.model_type == "llama4_text":
        shared = width
    if keys.flag("enable_moe_block", False):  # Gemma-4: the dense MLP stays beside the experts
        shared = dense.intermediate_size
    shared = keys.integer("shared_size", keys.integer("moe_shared_expert_intermediate_size", shared), minimum=0)
    return MlpFacts(
        intermediate_size=width,
        num_matrices=dense.num_matrices,
        num_experts=num_experts,
        experts_per_token=keys.integer("experts_per_token", 2),
        shared_size=shared,
        has_bias=keys.model_type == "gpt_oss",
    )


def _has_experts(keys: ConfigKeys, layer: int) -> bool:
    listed = keys.text("moe_layers_enum")  # Step-3: 4,5,...
    if listed:
        return str(layer) in {each.strip() for each in listed.split(",")}
    kinds = keys.list("mlp_layer_types")
    if layer < len(kinds):
        return bool(kinds[layer] == "sparse")
    is_dense = layer < keys.integer("first_k_dense_replace", 0, minimum=0) or layer in keys.list("mlp_only_layers")
    return not is_dense and _is_in_step(keys, layer)


def _is_in_step(keys: ConfigKeys, layer: int) -> bool:
    """The families' four ways to say that every n-th layer has experts."""
    if keys.has("moe_layer_start_index"):
        start, last = (
            keys.integer("moe_layer_start_index", minimum=0),
            keys.integer("moe_layer_end_index", -1, minimum=-1),
        )
        is_inside = start <= layer and (last < 0 or layer <= last)
        return is_inside and (layer + 1) % keys.integer("moe_layer_interval", 1) == 0
    if keys.has("expert_layer_period"):
        return layer % keys.integer("expert_layer_period") == keys.integer("expert_layer_offset", 0, minimum=0)
    frequency = keys.values.get("moe_layer_freq", 1)
    if isinstance(frequency, list):
        return bool(layer < len(frequency) and frequency[layer])
    if isinstance(frequency, int) and frequency > 1:
        return layer % frequency == 0
    step = keys.integer("decoder_sparse_step", keys.integer("interleave_moe_layer_step", 1, minimum=0), minimum=0)
    return step > 0 and (layer + 1) % step == 0
