"""From a config.json of any architecture to ModelFacts: tolerant of unknown families, strict about impossible sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from aphro_core.errors import ModelError
from aphro_core.estimate.attention_reader import read_attention
from aphro_core.estimate.config_keys import ConfigKeys
from aphro_core.estimate.facts import LayerFacts, ModelFacts, QuantizationFacts
from aphro_core.estimate.left_alone import parts_left_alone, read_patterns
from aphro_core.estimate.mlp_reader import read_mlps
from aphro_core.estimate.quantization import quantization_section, read_quantization, unknown_method
from aphro_core.estimate.tower_reader import read_tower

MAX_LAYERS: Final = 1024
_LEARNED_POSITIONS: Final = {"opt": 2, "gpt2": 0, "gpt_bigcode": 0}  # rows beside the model's length
_NO_ROTARY: Final = ("opt", "gpt2", "gpt_bigcode", "bloom", "mpt", "jamba", "bamba", "nemotron_h")
_ENCODERS: Final = {
    "albert", "bart", "bert", "camembert", "clip", "deberta", "deberta-v2", "distilbert", "electra", "marian", "mbart",
    "modernbert", "mt5", "nomic_bert", "pegasus", "roberta", "siglip", "t5", "umt5", "vit", "wav2vec2", "whisper",
    "xlm-roberta",
}  # fmt: skip
_STATE_ONLY: Final = ("mamba", "falcon_mamba", "rwkv", "xlstm", "recurrent_gemma")
_SIDE_BY_SIDE: Final = ("falcon_h1", "zamba", "hymba", "plamo2")
_FOUR_NORMS: Final = ("gemma2", "gemma3", "gemma4", "olmo2", "glm4")


def read_facts(hf_config: Mapping[str, Any]) -> ModelFacts:
    """The sizes that decide the memory. ``hf_config`` is untrusted.

    Raises ModelError for a key that is missing without a known default, of the wrong type or out of range.
    """
    keys = ConfigKeys(hf_config)
    _refuse_others(keys)
    num_layers = keys.integer("layers", len(keys.text("hybrid_override_pattern")) or None, maximum=MAX_LAYERS)
    attention = read_attention(keys, num_layers)
    if len(attention) != num_layers:
        raise ModelError(
            f"the model's config names {len(attention)} layers in its pattern and {num_layers} in num_hidden_layers",
            hint="compare config.json with the publisher's original",
        )
    patterns = read_patterns(quantization_section(keys))
    layers = tuple(
        LayerFacts(attention=each, mlp=mlp, left_alone=parts)
        for each, mlp, parts in zip(
            attention, read_mlps(keys, num_layers), parts_left_alone(patterns, num_layers), strict=True
        )
    )
    position = keys.integer("position", 2048)
    if keys.model_type.startswith("cohere"):  # states both, and means the longer
        position = keys.integer("model_max_length", position)
    rotary_dim = _rotary_dim(keys, attention[-1].head_dim)
    # Gemma-3 states the stretched length, and its table is stretched again; its sliding layers have one of their own
    stretched = _longest(keys, position)
    quantization = read_quantization(keys)
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
        embedding_size=keys.integer("word_embed_proj_dim", 0, minimum=0),
        layer_input_size=keys.integer("hidden_size_per_layer_input", 0, minimum=0),
        norms_per_layer=4 if keys.model_type.startswith(_FOUR_NORMS) else 2,
        tower=read_tower(keys),
        quantization=quantization,
        assumed=_assumed(keys, quantization),
    )


def _refuse_others(keys: ConfigKeys) -> None:
    """What is no decoder with a KV cache, or lays it out as nothing here does."""
    kind = keys.model_type
    why = None
    if keys.flag("is_encoder_decoder", False) or kind in _ENCODERS:
        why = "an encoder, or an encoder with a decoder, which has no cache of the kind that is counted here"
    elif kind.startswith(_STATE_ONLY):
        why = "a model without attention: it keeps a state of fixed size for each request, and no KV cache"
    elif kind.startswith(_SIDE_BY_SIDE):
        why = "a model that shares attention among layers or puts it beside a state space, which is not counted yet"
    if why:
        raise ModelError(
            f"{keys.architecture} is {why}",
            hint="give a decoder: a causal language model, with towers or without",
        )


def _assumed(keys: ConfigKeys, quantization: QuantizationFacts | None) -> tuple[str, ...]:
    notes = []
    unknown = unknown_method(keys)
    if unknown is not None:
        notes.append(f"quantised by {unknown}, whose size is unknown here: counted as 16 bit; file headers would tell")
    if quantization is not None and quantization.doubt:
        notes.append(quantization.doubt)
    if not keys.has("position"):
        notes.append("the config does not say how long a request may be: taken as 2,048 tokens")
    return tuple(notes)


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
