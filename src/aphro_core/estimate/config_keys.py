"""A config.json's keys under all the names that families give them, with the defaults that files leave out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from aphro_core.errors import ModelError
from aphro_core.models.hf_config import HfConfig

_TEXT_SECTIONS: Final = ("thinker_config", "text_config", "llm_config", "language_config")  # an outer one first

# What checkpoints of a type omit because transformers' config class has it (values of transformers 5).
_OMITTED: Final[dict[str, dict[str, Any]]] = {
    "gemma": {"tie_word_embeddings": True},
    "gemma2": {"tie_word_embeddings": True, "sliding_window": 4096, "head_dim": 256},
    "gemma3": {"tie_word_embeddings": True},
    "gemma3_text": {
        "tie_word_embeddings": True,
        "vocab_size": 262_208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131_072,
        "sliding_window": 4096,
    },
    "gemma3n_text": {"tie_word_embeddings": True, "vocab_size": 262_400, "sliding_window": 512, "head_dim": 256},
    "gemma4_text": {"tie_word_embeddings": True, "vocab_size": 262_144, "sliding_window": 512, "head_dim": 256},
    "cohere": {"tie_word_embeddings": True, "vocab_size": 256_000},
    "cohere2": {"tie_word_embeddings": True, "vocab_size": 256_000, "sliding_window": 4096},
    "gpt_oss": {"head_dim": 64, "num_key_value_heads": 8, "sliding_window": 128, "attention_bias": True},
    "llama4_text": {
        "vocab_size": 202_048,
        "head_dim": 128,
        "num_local_experts": 16,
        "attention_chunk_size": 8192,
        "interleave_moe_layer_step": 1,
        "num_experts_per_tok": 1,
    },
    "mistral": {"head_dim": None},
    "mpt": {"tie_word_embeddings": True},
    "opt": {"tie_word_embeddings": True, "vocab_size": 50_272, "max_position_embeddings": 2048},
    "bloom": {"tie_word_embeddings": True},
    "gpt2": {"tie_word_embeddings": True},
    "gpt_bigcode": {"tie_word_embeddings": True, "num_key_value_heads": 1},
    "falcon": {"tie_word_embeddings": True},
    "starcoder2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 128},
    "qwen3_moe": {"head_dim": 128},
    "qwen3_next": {"head_dim": 256, "linear_conv_kernel_dim": 4},
    "qwen3_5_text": {"head_dim": 256, "linear_conv_kernel_dim": 4, "vocab_size": 248_320},
}

# The same, of decoders in a section of a larger model, where the classes' own sizes are left out too.
_OMITTED_INSIDE: Final[dict[str, dict[str, Any]]] = {
    "llama": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "intermediate_size": 11_008,
        "vocab_size": 32_000,
        "max_position_embeddings": 2048,
    },
    "mistral": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14_336,
        "vocab_size": 32_000,
        "max_position_embeddings": 131_072,
    },
    "qwen2": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "intermediate_size": 22_016,
        "vocab_size": 151_936,
        "max_position_embeddings": 32_768,
    },
}

_LINEAR_ATTENTION: Final = {  # Kimi Linear's section -> names as other families have them
    "num_heads": "linear_num_heads",
    "head_dim": "linear_head_dim",
    "short_conv_kernel_size": "linear_conv_kernel_dim",
    "full_attn_layers": "full_attn_layers",
}

NAMES: Final[dict[str, tuple[str, ...]]] = {
    "hidden": ("hidden_size", "n_embd", "d_model", "model_dim", "n_embed", "dim"),
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "kv_heads": (
        "num_key_value_heads",
        "num_kv_heads",
        "n_head_kv",
        "multi_query_group_num",
        "kv_n_heads",
        "n_kv_heads",
        "num_attention_groups",
    ),
    "head_dim": ("head_dim", "attention_head_dim", "kv_channels"),
    "vocab": ("padded_vocab_size", "vocab_size"),
    "intermediate": (
        "intermediate_size",
        "ffn_hidden_size",
        "ffn_dim",
        "n_inner",
        "d_ff",
        "ff_intermediate_size",
        "hidden_dim",
    ),
    "position": (
        "max_position_embeddings",
        "max_position_embedding",
        "n_positions",
        "max_seq_len",
        "max_sequence_length",
        "seq_length",
        "model_max_length",
        "n_ctx",
    ),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    "experts_per_token": (
        "num_experts_per_tok",
        "num_experts_per_token",
        "moe_topk",
        "moe_top_k",
        "moe_k",
        "top_k_experts",
    ),
    "expert_size": ("moe_intermediate_size", "expert_intermediate_size"),
    "shared_experts": ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert"),
    "shared_size": ("shared_expert_intermediate_size", "shared_intermediate_size", "share_expert_dim"),
}


def _type_of(architectures: list[str]) -> str:
    """``Qwen3MoeForCausalLM`` -> qwen3_moe, for configs without a model_type."""
    name = re.sub(r"(ForCausalLM|ForConditionalGeneration|LMHeadModel)$", "", architectures[0] if architectures else "")
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.replace("QWen", "Qwen")).lower()


class ConfigKeys:
    """The decoder's section of a config. ``get`` takes a name of ``NAMES``, or a key as it is spelled in the file."""

    def __init__(self, hf_config: Mapping[str, Any]) -> None:
        whole = dict(hf_config)
        text = dict(whole)
        for section in _TEXT_SECTIONS:
            found = text.get(section)
            if isinstance(found, Mapping):
                text = {key: value for key, value in text.items() if key not in found} | dict(found)
                text.setdefault("model_type", whole.get("model_type"))
        for nested in ("attn_config", "ffn_config", "moe"):  # MPT, DBRX, Mistral's own format
            found = text.get(nested)
            if isinstance(found, Mapping):
                text |= {key: value for key, value in found.items() if key not in text}
        linear = text.get("linear_attn_config")
        if isinstance(linear, Mapping):
            text |= {flat: linear[key] for key, flat in _LINEAR_ATTENTION.items() if key in linear}
        names = HfConfig(whole).names("architectures") or HfConfig(text).names("architectures")
        self.model_type = str(text.get("model_type") or whole.get("model_type") or _type_of(names))
        self.whole_type = str(whole.get("model_type") or self.model_type)
        self.architecture = names[0][:80] if names else self.whole_type or "unknown"
        inside = _OMITTED_INSIDE.get(self.model_type, {}) if self.model_type != self.whole_type else {}
        omitted = inside | _OMITTED.get(self.model_type, {})
        self.values: dict[str, Any] = {**omitted, **{key: value for key, value in text.items() if value is not None}}
        self.whole = whole
        self._typed = HfConfig(self.values)

    def has(self, name: str) -> bool:
        return any(self._typed.has(key) for key in NAMES.get(name, (name,)))

    def integer(self, name: str, default: int | None = None, *, minimum: int = 1, maximum: int = 2**31) -> int:
        """The first of the name's keys that is set. Raises ModelError when none is and there is no default."""
        keys = NAMES.get(name, (name,))
        for key in keys:
            value = self.values.get(key)
            if isinstance(value, list) and value and all(type(each) is int for each in value):
                return HfConfig({key: max(value)}).integer(key, minimum=minimum, maximum=maximum)  # one a layer
            if value is not None:
                return self._typed.integer(key, minimum=minimum, maximum=maximum)
        if default is None:
            raise ModelError(
                f"the model's config lacks {keys[0]}" + (f" (or {', '.join(keys[1:])})" if keys[1:] else ""),
                hint="give the publisher's whole config.json",
            )
        return default

    def number(self, name: str, default: float) -> float:
        return self._typed.number(name, default)

    def flag(self, name: str, default: bool) -> bool:
        value = self.values.get(name, default)
        return value if isinstance(value, bool) else default

    def text(self, name: str, default: str = "") -> str:
        value = self.values.get(name, default)
        return value if isinstance(value, str) else default

    def section(self, name: str) -> HfConfig:
        return self._typed.section(name) if isinstance(self.values.get(name), Mapping) else HfConfig({})

    def list(self, name: str) -> list[Any]:
        value = self.values.get(name)
        return list(value) if isinstance(value, list | tuple) else []
