"""A tiny model of each family: what the end-to-end tests run and docs/models.md lists."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import transformers
from torch import Tensor

State = dict[str, Tensor]


@dataclass(frozen=True)
class TinyFamily:
    """Config keys with awkward sizes: heads, columns and vocabularies that nothing divides, windows shorter than a
    test's prompt, what a sharding bug trips over. ``publish`` turns config and state of a transformers model into
    those of a checkpoint whose format transformers does not have."""

    architecture: str
    config: Any
    model: Any
    sizes: dict[str, Any]
    has_gains_less_one: bool = False
    publish: Callable[[dict[str, Any], State], tuple[dict[str, Any], State]] | None = None
    spec: dict[str, Any] = field(default_factory=dict)  # dials that the config must yield


def _publish_qwen(config: dict[str, Any], state: State) -> tuple[dict[str, Any], State]:
    import torch

    renamed = {
        "embed_tokens": "wte",
        "norm": "ln_f",
        "input_layernorm": "ln_1",
        "post_attention_layernorm": "ln_2",
        "self_attn.o_proj": "attn.c_proj",
        "mlp.gate_proj": "mlp.w2",
        "mlp.up_proj": "mlp.w1",
        "mlp.down_proj": "mlp.c_proj",
    }
    published = {"lm_head.weight": state["lm_head.weight"]}
    for name, tensor in state.items():
        stem, kind = name.removeprefix("model.").rsplit(".", 1)
        layer, _, rest = stem.removeprefix("layers.").partition(".") if stem.startswith("layers.") else ("", "", stem)
        place = f"transformer.h.{layer}" if layer else "transformer"
        if rest == "self_attn.q_proj":
            parts = [state[name.replace("q_proj", f"{each}_proj")] for each in "qkv"]
            published[f"{place}.attn.c_attn.{kind}"] = torch.cat(parts)
        elif rest in renamed:
            published[f"{place}.{renamed[rest]}.{kind}"] = tensor
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "eos_token_id", "bos_token_id")
    return {key: config[key] for key in keys} | {
        "architectures": ["QWenLMHeadModel"],
        "intermediate_size": 2 * config["intermediate_size"],
        "kv_channels": config["hidden_size"] // config["num_attention_heads"],
        "layer_norm_epsilon": config["rms_norm_eps"],
        "seq_length": config["max_position_embeddings"],
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
        "no_bias": True,
        "tie_word_embeddings": False,
        "auto_map": {"AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"},
        "dtype": "float32",
    }, published


def _publish_internlm2(config: dict[str, Any], state: State) -> tuple[dict[str, Any], State]:
    import torch

    renamed = {
        "model.embed_tokens": "model.tok_embeddings",
        "lm_head": "output",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
    }
    width = config["hidden_size"] // config["num_attention_heads"]
    published = {}
    for name, tensor in state.items():
        if "q_proj" in name:
            parts = [state[name.replace("q_proj", f"{each}_proj")] for each in "qkv"]
            num_kv_heads = config["num_key_value_heads"]
            groups = [part.view(num_kv_heads, -1, width, tensor.shape[1]) for part in parts]
            fused = torch.cat(groups, dim=1).reshape(-1, tensor.shape[1])
            published[name.replace("self_attn.q_proj", "attention.wqkv")] = fused
        elif "k_proj" not in name and "v_proj" not in name:
            stem = name
            for theirs, ours in renamed.items():
                stem = stem.replace(theirs, ours)
            published[stem] = tensor
    changed = {"architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "bias": False}
    return config | changed, published


TINY: Final[dict[str, TinyFamily]] = {
    "llama": TinyFamily(
        "LlamaForCausalLM",
        transformers.LlamaConfig,
        transformers.LlamaForCausalLM,
        {
            "hidden_size": 72,
            "intermediate_size": 176,
            "num_hidden_layers": 5,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": 131,
            "tie_word_embeddings": True,
        },
    ),
    "mistral": TinyFamily(
        "MistralForCausalLM",
        transformers.MistralConfig,
        transformers.MistralForCausalLM,
        {
            "hidden_size": 64,
            "intermediate_size": 160,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 151,
            "tie_word_embeddings": False,
            "sliding_window": 8,
        },
    ),
    "qwen2": TinyFamily(
        "Qwen2ForCausalLM",
        transformers.Qwen2Config,
        transformers.Qwen2ForCausalLM,
        {
            "hidden_size": 48,
            "intermediate_size": 112,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "vocab_size": 137,
            "tie_word_embeddings": False,
            "use_sliding_window": True,
            "sliding_window": 12,
            "max_window_layers": 2,
        },
        spec={"qkv_bias": True},
    ),
    "qwen3": TinyFamily(
        "Qwen3ForCausalLM",
        transformers.Qwen3Config,
        transformers.Qwen3ForCausalLM,
        {
            "hidden_size": 40,
            "intermediate_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "vocab_size": 149,
            "tie_word_embeddings": True,
        },
        spec={"qk_norm": True},
    ),
    "qwen": TinyFamily(
        "QWenLMHeadModel",
        transformers.Qwen2Config,
        transformers.Qwen2ForCausalLM,
        {
            "hidden_size": 80,
            "intermediate_size": 112,
            "num_hidden_layers": 3,
            "num_attention_heads": 5,
            "num_key_value_heads": 5,
            "vocab_size": 139,
            "tie_word_embeddings": False,
        },
        publish=_publish_qwen,
        spec={"qkv_bias": True},
    ),
    "opt": TinyFamily(
        "OPTForCausalLM",
        transformers.OPTConfig,
        transformers.OPTForCausalLM,
        {
            "hidden_size": 80,
            "ffn_dim": 144,
            "word_embed_proj_dim": 80,
            "num_hidden_layers": 3,
            "num_attention_heads": 5,
            "vocab_size": 133,
            "dropout": 0.0,
        },
        spec={"gated_mlp": False, "norm": "layer", "position_offset": 2, "tie_word_embeddings": True},
    ),
    "nemotron": TinyFamily(
        "NemotronForCausalLM",
        transformers.NemotronConfig,
        transformers.NemotronForCausalLM,
        {
            "hidden_size": 56,
            "intermediate_size": 120,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "head_dim": 16,
            "vocab_size": 133,
            "tie_word_embeddings": False,
        },
        has_gains_less_one=True,
        spec={"gated_mlp": False, "norm": "layer", "norm_offset": 1.0, "activation": "relu2"},
    ),
    "mixtral": TinyFamily(
        "MixtralForCausalLM",
        transformers.MixtralConfig,
        transformers.MixtralForCausalLM,
        {
            "hidden_size": 48,
            "intermediate_size": 72,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "vocab_size": 141,
            "tie_word_embeddings": False,
        },
    ),
    "qwen2_moe": TinyFamily(
        "Qwen2MoeForCausalLM",
        transformers.Qwen2MoeConfig,
        transformers.Qwen2MoeForCausalLM,
        {
            "hidden_size": 48,
            "intermediate_size": 112,
            "moe_intermediate_size": 40,
            "shared_expert_intermediate_size": 56,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "num_experts": 7,
            "num_experts_per_tok": 3,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [1],
            "vocab_size": 137,
            "tie_word_embeddings": False,
        },
        spec={"qkv_bias": True},
    ),
    "qwen3_moe": TinyFamily(
        "Qwen3MoeForCausalLM",
        transformers.Qwen3MoeConfig,
        transformers.Qwen3MoeForCausalLM,
        {
            "hidden_size": 40,
            "intermediate_size": 96,
            "moe_intermediate_size": 40,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "decoder_sparse_step": 2,
            "norm_topk_prob": True,
            "vocab_size": 149,
            "tie_word_embeddings": True,
        },
        spec={"qk_norm": True},
    ),
    "phi3": TinyFamily(
        "Phi3ForCausalLM",
        transformers.Phi3Config,
        transformers.Phi3ForCausalLM,
        {
            "hidden_size": 96,
            "intermediate_size": 136,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "vocab_size": 143,
            "tie_word_embeddings": False,
            "original_max_position_embeddings": 128,  # the tests' max_model_len: the short factors hold
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.75,
                "original_max_position_embeddings": 128,
                "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5],
                "long_factor": [1.0, 2.0, 4.0, 8.0, 16.0, 32.0],
            },
        },
    ),
    "gemma2": TinyFamily(
        "Gemma2ForCausalLM",
        transformers.Gemma2Config,
        transformers.Gemma2ForCausalLM,
        {
            "hidden_size": 48,
            "intermediate_size": 112,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "sliding_window": 8,
            "attn_logit_softcapping": 4.0,
            "final_logit_softcapping": 12.0,
            "vocab_size": 139,
        },
        has_gains_less_one=True,
        spec={"attention_softcap": 4.0, "logits_softcap": 12.0, "activation": "gelu_tanh", "norm_offset": 1.0},
    ),
    "gemma3": TinyFamily(
        "Gemma3ForCausalLM",
        transformers.Gemma3TextConfig,
        transformers.Gemma3ForCausalLM,
        {
            "hidden_size": 48,
            "intermediate_size": 112,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
            "vocab_size": 139,
        },
        has_gains_less_one=True,
        spec={"qk_norm": True, "activation": "gelu_tanh"},
    ),
    "internlm2": TinyFamily(
        "InternLM2ForCausalLM",
        transformers.LlamaConfig,
        transformers.LlamaForCausalLM,
        {
            "hidden_size": 96,
            "intermediate_size": 112,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "vocab_size": 139,
            "tie_word_embeddings": False,
        },
        publish=_publish_internlm2,
    ),
    "granite": TinyFamily(
        "GraniteForCausalLM",
        transformers.GraniteConfig,
        transformers.GraniteForCausalLM,
        {
            "hidden_size": 64,
            "intermediate_size": 112,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 139,
            "tie_word_embeddings": True,
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.3,
            "residual_multiplier": 0.7,
            "logits_scaling": 2.0,
        },
        spec={"embedding_scale": 3.0, "attention_scale": 0.3, "residual_scale": 0.7, "logits_scale": 0.5},
    ),
}
