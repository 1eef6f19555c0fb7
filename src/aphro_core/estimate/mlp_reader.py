"""Each layer's MLP from a config: width, gate or not, experts, and which layers have them."""

from __future__ import annotations

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
    if num_experts < 2 or is_off:
        return (dense,) * num_layers
    experts = _experts(keys, num_experts, dense)
    return tuple(experts if _has_experts(keys, layer) else dense for layer in range(num_layers))


def _dense(keys: ConfigKeys) -> MlpFacts:
    hidden = keys.integer("hidden")
    default = hidden * keys.integer("expansion_ratio", 4)
    size = keys.integer("intermediate", default if keys.model_type in _PLAIN else None)
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
