"""A tiny GGUF file of each family, with the names and the changes that llama.cpp's converter makes."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, quants
from safetensors.torch import load_file, save_file

from tests.tiny import GGUF_NAMES, interleave, tiny_model, write_metadata

_SIZES: Final = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 131,
}
_EXPERTS: Final = re.compile(r"(.*)\.experts\.(\d+)\.(\w+)\.weight")
_QWEN_MOE: Final = {
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
}
_GEMMA: Final = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_OF_EXPERTS: Final = {
    "gate_proj": "ffn_gate_exps",
    "up_proj": "ffn_up_exps",
    "down_proj": "ffn_down_exps",
    "w1": "ffn_gate_exps",
    "w3": "ffn_up_exps",
    "w2": "ffn_down_exps",
}


@dataclass(frozen=True)
class TinyGGUF:
    family: str  # of tests/families.py
    arch: str
    sizes: dict[str, Any] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    is_interleaved: bool = False
    plus_one: bool = False
    is_fused: bool = False  # q, k and v, which the family of tests/families.py has apart
    write: Callable[[gguf.GGUFWriter, Any], None] | None = None


def _experts(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_expert_count(getattr(config, "num_local_experts", None) or config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)


def _qwen(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_feed_forward_length(2 * config.intermediate_size)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)


def _gemma2(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_sliding_window(config.sliding_window)


def _gemma3(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_sliding_window(config.sliding_window)


def _phi3(writer: gguf.GGUFWriter, config: Any) -> None:
    rope = config.rope_parameters
    writer.add_rope_dimension_count(2 * len(rope["short_factor"]))
    writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    for name in ("short", "long"):
        writer.add_tensor(f"rope_factors_{name}.weight", np.array(rope[f"{name}_factor"], dtype=np.float32))


def _granite(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_attention_scale(config.attention_multiplier)
    writer.add_embedding_scale(config.embedding_multiplier)
    writer.add_residual_scale(config.residual_multiplier)
    writer.add_logit_scale(config.logits_scaling)


def _nemotron(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_layer_norm_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.head_dim // 2)


TINY_GGUF: Final[dict[str, TinyGGUF]] = {
    "mixtral": TinyGGUF(
        "mixtral", "llama", names={"block_sparse_moe.gate": "ffn_gate_inp"}, is_interleaved=True, write=_experts
    ),
    "qwen": TinyGGUF(
        "qwen",
        "qwen",
        {"num_key_value_heads": 4},
        {"self_attn.qkv_proj": "attn_qkv"},
        write=_qwen,
        is_fused=True,
    ),
    "qwen2moe": TinyGGUF(
        "qwen2_moe",
        "qwen2moe",
        {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 96, "mlp_only_layers": []},
        _QWEN_MOE,
        write=_experts,
    ),
    "qwen3moe": TinyGGUF(
        "qwen3_moe",
        "qwen3moe",
        {"moe_intermediate_size": 32, "decoder_sparse_step": 1, "head_dim": 32},
        _QWEN_MOE,
        write=_experts,
    ),
    "gemma2": TinyGGUF(
        "gemma2",
        "gemma2",
        {"head_dim": 16, "query_pre_attn_scalar": 16},  # as the file has no key for it
        _GEMMA,
        plus_one=True,
        write=_gemma2,
    ),
    "gemma3": TinyGGUF(
        "gemma3",
        "gemma3",
        {"num_hidden_layers": 7, "layer_types": None, "head_dim": 16, "query_pre_attn_scalar": 16},
        _GEMMA,
        plus_one=True,
        write=_gemma3,
    ),
    "phi3": TinyGGUF(
        "phi3",
        "phi3",
        {"hidden_size": 96, "num_attention_heads": 6},
        {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"},
        write=_phi3,
    ),
    "granite": TinyGGUF("granite", "granite", is_interleaved=True, write=_granite),
    "internlm2": TinyGGUF("llama", "internlm2", {"tie_word_embeddings": False}, is_interleaved=True),
    "nemotron": TinyGGUF("nemotron", "nemotron", {"head_dim": 16}, plus_one=True, write=_nemotron),
}


def write_gguf_family(folder: Path, name: str, quant: str = "Q8_0", *, has_stacks: bool = True) -> Any:
    """Write ``folder / "model.gguf"``, without ``has_stacks`` a tensor an expert.

    Returns the transformers model with the dequantised weights in float32.
    """
    row = TINY_GGUF[name]
    model = tiny_model(row.family, **(_SIZES | row.sizes))
    config, meaning = model.config, folder / "meaning"
    model.save_pretrained(meaning)  # under the names of published checkpoints
    state = {key: tensor.float() for key, tensor in load_file(meaning / "model.safetensors").items()}
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    writer = gguf.GGUFWriter(folder / "model.gguf", row.arch)
    write_metadata(writer, config, row.family)
    if row.write is not None:
        row.write(writer, config)
    stacks: dict[str, dict[int, np.ndarray]] = {}
    fused: dict[str, dict[str, tuple[np.ndarray, GGMLQuantizationType]]] = {}
    for key, tensor in state.items():
        data, is_norm = tensor.numpy(), key.endswith("norm.weight")
        data = data + 1.0 if row.plus_one and is_norm else data
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(key.split(".")[-2])
        data = interleave(data, heads) if row.is_interleaved and heads else data
        blocks, kind = _blocks(data, quant, is_plain=key.endswith(("gate.weight", "norm.weight", "bias")))
        values = torch.from_numpy(np.array(quants.dequantize(blocks, kind), dtype=np.float32)).view(tensor.shape)
        values = _deinterleave(values, heads) if row.is_interleaved and heads else values
        state[key] = values - 1.0 if row.plus_one and is_norm else values
        if row.is_fused and (part := key.split(".")[-2]) in ("q_proj", "k_proj", "v_proj"):
            fused.setdefault(key.replace(part, "qkv_proj"), {})[part] = blocks, kind
            continue
        found = _EXPERTS.fullmatch(key)
        if found is not None:
            layer = key.split(".")[2]
            stacks.setdefault(f"blk.{layer}.{_OF_EXPERTS[found[3]]}.weight", {})[int(found[2])] = blocks
            continue
        blocks = blocks[0] if key.endswith("shared_expert_gate.weight") else blocks
        _add(writer, _name(key, row.names), blocks, kind)
    if not has_stacks:
        for stacked, each in stacks.items():
            for expert, blocks in each.items():
                _add(writer, stacked.replace("_exps", f".{expert}"), blocks, GGMLQuantizationType[quant])
    for stacked, each in stacks.items() if has_stacks else ():
        _add(writer, stacked, np.stack([each[expert] for expert in range(len(each))]), GGMLQuantizationType[quant])
    for key, parts in fused.items():
        kind = parts["q_proj"][1]
        _add(writer, _name(key, row.names), np.concatenate([parts[f"{each}_proj"][0] for each in "qkv"]), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file(state, meaning / "model.safetensors", metadata={"format": "pt"})
    return type(model).from_pretrained(meaning, dtype=torch.float32, attn_implementation="eager").eval()


def _blocks(data: np.ndarray, quant: str, *, is_plain: bool) -> tuple[np.ndarray, GGMLQuantizationType]:
    kind = GGMLQuantizationType.F32 if is_plain or data.ndim == 1 else GGMLQuantizationType[quant]
    return quants.quantize(np.ascontiguousarray(data, dtype=np.float32), kind), kind


def _add(writer: gguf.GGUFWriter, name: str, blocks: np.ndarray, kind: GGMLQuantizationType) -> None:
    is_float = kind == GGMLQuantizationType.F32
    writer.add_tensor(name, blocks, raw_shape=None if is_float else blocks.shape, raw_dtype=kind)


def _name(key: str, names: dict[str, str]) -> str:
    stem, kind = key.rsplit(".", 1)
    if not stem.startswith("model.layers."):
        return f"{GGUF_NAMES[stem]}.{kind}"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{(GGUF_NAMES | names)[rest]}.{kind}"


def _deinterleave(data: torch.Tensor, num_heads: int) -> torch.Tensor:
    return data.reshape(num_heads, -1, 2, *data.shape[1:]).transpose(1, 2).reshape(data.shape)
