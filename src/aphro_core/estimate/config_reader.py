"""From a config.json of any architecture to ModelFacts: tolerant of unknown families, strict about impossible sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from aphro_core.errors import ModelError
from aphro_core.estimate.attention_reader import read_attention
from aphro_core.estimate.config_keys import ConfigKeys
from aphro_core.estimate.facts import LayerFacts, ModelFacts
from aphro_core.estimate.mlp_reader import read_mlps
from aphro_core.estimate.quantization import read_quantization
from aphro_core.estimate.tower_reader import read_tower

MAX_LAYERS: Final = 1024
_LEARNED_POSITIONS: Final = {"opt": 2, "gpt2": 0, "gpt_bigcode": 0}  # rows beside the model's length
_NO_ROTARY: Final = ("opt", "gpt2", "gpt_bigcode", "bloom", "mpt", "jamba", "bamba", "nemotron_h")
_FOUR_NORMS: Final = ("gemma2", "gemma3", "gemma4", "olmo2", "glm4")


def read_facts(hf_config: Mapping[str, Any]) -> ModelFacts:
    """The sizes that decide the memory. ``hf_config`` is untrusted.

    Raises ModelError for a key that is missing without a known default, of the wrong type or out of range.
    """
    keys = ConfigKeys(hf_config)
    num_layers = keys.integer("layers", len(keys.text("hybrid_override_pattern")) or None, maximum=MAX_LAYERS)
    attention = read_attention(keys, num_layers)
    if len(attention) != num_layers:
        raise ModelError(
            f"the model's config names {len(attention)} layers in its pattern and {num_layers} in num_hidden_layers",
            hint="compare config.json with the publisher's original",
        )
    layers = tuple(
        LayerFacts(attention=each, mlp=mlp) for each, mlp in zip(attention, read_mlps(keys, num_layers), strict=True)
    )
    position = keys.integer("position", 2048)
    rotary_dim = _rotary_dim(keys, attention[-1].head_dim)
    # Gemma-3 states the stretched length, and its table is stretched again; its sliding layers have one of their own
    stretched = _longest(keys, position)
    return ModelFacts(
        architecture=keys.architecture,
        model_type=keys.model_type,
        hidden_size=keys.integer("hidden"),
        vocab_size=keys.integer("vocab"),
        layers=layers,
        max_position_embeddings=position if keys.model_type.startswith("gemma3") else stretched,
        tie_word_embeddings=keys.flag("tie_word_embeddings", False),
        dtype=_dtype(keys),
        rotary_dim=rotary_dim,
        rotary_rows=(stretched + position * keys.model_type.startswith(("gemma3", "gemma4"))) if rotary_dim else 0,
        learned_positions=position + _LEARNED_POSITIONS[keys.model_type]
        if keys.model_type in _LEARNED_POSITIONS
        else 0,
        layer_input_size=keys.integer("hidden_size_per_layer_input", 0, minimum=0),
        norms_per_layer=4 if keys.model_type.startswith(_FOUR_NORMS) else 2,
        tower=read_tower(keys),
        quantization=read_quantization(keys),
    )


def _longest(keys: ConfigKeys, position: int) -> int:
    """Tokens that positions reach: a scaling rule stretches the original length (Llama 3's states it stretched)."""
    for name in ("rope_scaling", "rope_parameters"):
        found = keys.section(name)
        spelled = keys.values[name] if keys.has(name) else {}
        kind = spelled.get("rope_type", spelled.get("type")) if isinstance(spelled, Mapping) else None
        if kind in ("yarn", "linear", "dynamic"):
            original = found.number("original_max_position_embeddings", 0.0 if kind == "yarn" else float(position))
            return max(position, int(original * found.number("factor", 1.0)))
    return position


def _rotary_dim(keys: ConfigKeys, head_dim: int) -> int:
    if keys.model_type in _NO_ROTARY:
        return 0
    if keys.has("qk_rope_head_dim"):
        return keys.integer("qk_rope_head_dim")
    share = keys.number("partial_rotary_factor", keys.number("rotary_pct", 1.0))
    rope = keys.section("rope_parameters")
    if rope.has("partial_rotary_factor"):
        share = rope.number("partial_rotary_factor")
    return int(head_dim * min(share, 1.0))


def _dtype(keys: ConfigKeys) -> str:
    for values in (keys.values, keys.whole):
        for name in ("dtype", "torch_dtype"):
            value = values.get(name)
            if isinstance(value, str) and value in ("float32", "bfloat16", "float16"):
                return value
    return "bfloat16"
