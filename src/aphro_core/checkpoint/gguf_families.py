"""The table GGUF architecture -> family: names of its tensors, how they are stored, and config keys of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from aphro_core.checkpoint.gguf_header import GGUFHeader

# GGUF stem -> Hugging Face stem, those inside a layer behind its number
_STEMS: Final[dict[str, str]] = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QWEN_MOE: Final = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{e}.gate_proj",
    "ffn_up_exps": "mlp.experts.{e}.up_proj",
    "ffn_down_exps": "mlp.experts.{e}.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_MIXTRAL: Final = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{e}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{e}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{e}.w2",
}
_GEMMA: Final = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_PHI3: Final = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}

_QWEN: Final = {
    "token_embd": "transformer.wte",
    "output_norm": "transformer.ln_f",
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_gate": "mlp.w2",
    "ffn_up": "mlp.w1",
    "ffn_down": "mlp.c_proj",
}

_Keys = Callable[[GGUFHeader], dict[str, Any]]


def _no_keys(header: GGUFHeader) -> dict[str, Any]:
    return {}


@dataclass(frozen=True, kw_only=True)
class GGUFFamily:
    """``is_interleaved``: rows of q and k are interleaved within each head (``permute`` in llama.cpp's converter).
    ``has_gains_plus_one``: norms are stored plus the 1 that Hugging Face's checkpoints leave out."""

    architecture: str
    stems: Mapping[str, str] = field(default_factory=dict)  # besides those that all have
    layer: str = "model.layers"  # stands before the number of a layer
    is_interleaved: bool = False
    has_gains_plus_one: bool = False
    is_partly_rotary: bool = False  # unless the config says what share of a head rotates
    sliding_theta: float | None = None  # rotary base of sliding layers, where they have one of their own
    keys: _Keys = _no_keys  # of the config, besides those that all have

    def stem(self, name: str) -> str:
        """An unknown one stays as it is."""
        return self.stems.get(name) or _STEMS.get(name, name)


def family_of(header: GGUFHeader) -> GGUFFamily | None:
    """None for an architecture that is not supported."""
    arch = header.value("general.architecture")
    if not isinstance(arch, str):
        return None
    if arch == "llama" and header.value("llama.expert_count", 0):
        return _MIXTRAL_FAMILY
    return FAMILIES.get(arch)


def _of(header: GGUFHeader, **names: str) -> dict[str, Any]:
    """Config key -> value of the key behind the architecture, those that the file has."""
    arch = header.value("general.architecture")
    found = {key: header.value(f"{arch}.{name}") for key, name in names.items()}
    return {key: value for key, value in found.items() if value is not None}


def _mixtral_keys(header: GGUFHeader) -> dict[str, Any]:
    return _of(header, num_local_experts="expert_count", num_experts_per_tok="expert_used_count")


def _qwen_moe_keys(header: GGUFHeader) -> dict[str, Any]:
    """Widths of experts from the tensors: older files have no keys for them."""
    keys = _of(header, num_experts="expert_count", num_experts_per_tok="expert_used_count")
    for key, name in {
        "moe_intermediate_size": "blk.0.ffn_gate_exps.weight",
        "shared_expert_intermediate_size": "blk.0.ffn_gate_shexp.weight",
    }.items():
        if (info := header.tensors.get(name)) is not None:
            keys[key] = info.shape[-2]
    return keys | {"norm_topk_prob": header.value("general.architecture") == "qwen3moe"}


def _window_keys(header: GGUFHeader) -> dict[str, Any]:
    window = _of(header, sliding_window="attention.sliding_window")
    return window if window.get("sliding_window") else {}


def _gemma_keys(header: GGUFHeader, layers_of_27b: int) -> dict[str, Any]:
    """As llama.cpp has it, the largest model's scores are scaled by the hidden size a head, the others' by the head."""
    arch = header.value("general.architecture")
    sizes = _of(header, layers="block_count", heads="attention.head_count", hidden="embedding_length")
    scalar = header.value(f"{arch}.attention.key_length", 256)
    if sizes.get("layers") == layers_of_27b and sizes.get("heads"):
        scalar = sizes.get("hidden", 0) // sizes["heads"]
    return _window_keys(header) | {"query_pre_attn_scalar": scalar, "hidden_activation": "gelu_pytorch_tanh"}


def _gemma2_keys(header: GGUFHeader) -> dict[str, Any]:
    caps = {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}
    return _gemma_keys(header, 46) | _of(header, **caps)


def _gemma3_keys(header: GGUFHeader) -> dict[str, Any]:
    return _gemma_keys(header, 62)


def _granite_keys(header: GGUFHeader) -> dict[str, Any]:
    return _of(
        header,
        attention_multiplier="attention.scale",
        embedding_multiplier="embedding_scale",
        residual_multiplier="residual_scale",
        logits_scaling="logit_scale",
    )


def _qwen_keys(header: GGUFHeader) -> dict[str, Any]:
    """As Qwen's own config says it; ``feed_forward_length`` is twice the MLP's columns, as intermediate_size is."""
    return _of(
        header,
        seq_length="context_length",
        layer_norm_epsilon="attention.layer_norm_rms_epsilon",
        rotary_emb_base="rope.freq_base",
        kv_channels="rope.dimension_count",
    )


def _nemotron_keys(header: GGUFHeader) -> dict[str, Any]:
    return _of(header, norm_eps="attention.layer_norm_epsilon") | {"hidden_act": "relu2"}


_MIXTRAL_FAMILY: Final = GGUFFamily(
    architecture="MixtralForCausalLM", stems=_MIXTRAL, is_interleaved=True, keys=_mixtral_keys
)
FAMILIES: Final[dict[str, GGUFFamily]] = {
    "llama": GGUFFamily(architecture="LlamaForCausalLM", is_interleaved=True),  # Mistral has this name too
    "qwen": GGUFFamily(architecture="QWenLMHeadModel", stems=_QWEN, layer="transformer.h", keys=_qwen_keys),
    "qwen2": GGUFFamily(architecture="Qwen2ForCausalLM"),
    "qwen2moe": GGUFFamily(architecture="Qwen2MoeForCausalLM", stems=_QWEN_MOE, keys=_qwen_moe_keys),
    "qwen3": GGUFFamily(architecture="Qwen3ForCausalLM"),
    "qwen3moe": GGUFFamily(architecture="Qwen3MoeForCausalLM", stems=_QWEN_MOE, keys=_qwen_moe_keys),
    "gemma2": GGUFFamily(architecture="Gemma2ForCausalLM", stems=_GEMMA, has_gains_plus_one=True, keys=_gemma2_keys),
    "gemma3": GGUFFamily(
        architecture="Gemma3ForCausalLM",
        stems=_GEMMA,
        has_gains_plus_one=True,
        sliding_theta=10_000.0,
        keys=_gemma3_keys,
    ),
    "phi3": GGUFFamily(architecture="Phi3ForCausalLM", stems=_PHI3, keys=_window_keys),
    "granite": GGUFFamily(architecture="GraniteForCausalLM", is_interleaved=True, keys=_granite_keys),
    # its converter takes q, k and v apart, which leaves a Llama
    "internlm2": GGUFFamily(architecture="LlamaForCausalLM", is_interleaved=True),
    "nemotron": GGUFFamily(
        architecture="NemotronForCausalLM", has_gains_plus_one=True, is_partly_rotary=True, keys=_nemotron_keys
    ),
}
