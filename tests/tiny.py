"""Small random checkpoints with awkward sizes, written by transformers and by the gguf package: the tests' models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, quants
from safetensors.torch import save_file
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests.families import TINY

FAMILIES: Final = tuple(TINY)
PLAIN: Final = ("llama", "mistral", "qwen2", "qwen3")  # checkpoints under Llama's names

_COMMON: Final[dict[str, Any]] = {
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "dtype": "float32",
}


def tiny_model(family: str, *, seed: int = 0, num_layers: int | None = None, **overrides: Any) -> Any:
    """A transformers model in float32, eval mode, on eager attention. ``overrides`` are config keys.

    Weights are large enough that greedy tokens vary and the best two logits lie well apart; norms and biases are
    random too, so that a forgotten one shows.
    """
    row = TINY[family]
    layers = {} if num_layers is None else {"num_hidden_layers": num_layers}
    config = row.config(**(_COMMON | row.sizes | layers | overrides))
    config._attn_implementation = "eager"
    model = row.model(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight") or name.endswith("layernorm.weight"):
                parameter.copy_((0.0 if row.has_gains_less_one else 1.0) + 0.2 * noise)
            elif parameter.ndim == 1 or "embed_" in name:
                parameter.copy_(0.5 * noise)
            else:
                gain = 6.0 if name == "lm_head.weight" else 1.6
                parameter.copy_(gain * noise / parameter.shape[-1] ** 0.5)
    return model


def write_tiny_checkpoint(
    folder: Path,
    family: str,
    *,
    seed: int = 0,
    num_layers: int | None = None,
    max_shard_size: str = "5GB",
    **overrides: Any,
) -> Any:
    """Write config.json and safetensors (several, with an index, for a small ``max_shard_size`` such as "100KB").

    Returns the transformers model, the reference for what the files must compute.
    """
    model = tiny_model(family, seed=seed, num_layers=num_layers, **overrides)
    publish = TINY[family].publish
    if publish is None:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        return model
    config, state = publish(model.config.to_dict(), model.state_dict())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    return model


GGUF_NAMES: Final = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GGUF_SIZES: Final[dict[str, Any]] = {  # rows must be whole blocks: 32 elements, 256 in the k-formats
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_hidden_layers": 2,
    "vocab_size": 131,
}

_SCALE_FIELDS: Final = {  # float16, of formats that the package only reads
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,)
}  # fmt: skip


def write_tiny_gguf(
    path: Path,
    family: str = "llama",
    *,
    quant: str = "Q8_0",
    others: dict[str, str] | None = None,
    seed: int = 0,
    metadata: dict[str, Any] | None = None,
    **overrides: Any,
) -> Any:
    """Write a GGUF file as llama.cpp's converter does: its names, q and k rows of Llama interleaved, matrices as
    ``quant`` ("F32", "F16", "BF16", "Q4_0" ... "Q6_K"; ``others``: part of a name -> another), vectors as F32.
    ``metadata`` adds integer or string keys.

    Returns the transformers model that holds the dequantised weights.
    """
    model = tiny_model(family, seed=seed, **(GGUF_SIZES | overrides))
    config, arch = model.config, family
    writer = gguf.GGUFWriter(path, arch)
    write_metadata(writer, config, family)
    for key, value in (metadata or {}).items():
        writer.add_string(key, value) if isinstance(value, str) else writer.add_uint32(key, value)
    rng = np.random.default_rng(seed)
    dequantised = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        data = tensor.numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        num_heads = heads.get(name.split(".")[-2]) if family == "llama" else None
        if num_heads:
            data = interleave(data, num_heads)
        chosen = next((other for part, other in (others or {}).items() if part in name), quant)
        of_type = GGMLQuantizationType[chosen if data.ndim == 2 else "F32"]
        blocks = quantise(data, of_type, rng)
        writer.add_tensor(
            gguf_name(name), blocks, raw_shape=None if of_type.name[0] == "F" else blocks.shape, raw_dtype=of_type
        )
        values = torch.from_numpy(np.array(quants.dequantize(blocks, of_type), dtype=np.float32))
        dequantised[name] = deinterleave(values, num_heads) if num_heads else values
    if config.rope_parameters["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", _rope_factors(config))
    if config.tie_word_embeddings:
        dequantised["lm_head.weight"] = dequantised["model.embed_tokens.weight"]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model.load_state_dict(dequantised)
    return model


def gguf_name(name: str) -> str:
    """llama.cpp's name of a Hugging Face tensor: model.layers.0.self_attn.q_proj.weight -> blk.0.attn_q.weight."""
    stem, kind = name.rsplit(".", 1)
    if not stem.startswith("model.layers."):
        return f"{GGUF_NAMES[stem]}.{kind}"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{GGUF_NAMES[rest]}.{kind}"


def quantise(data: np.ndarray, qtype: GGMLQuantizationType, rng: np.random.Generator) -> np.ndarray:
    """``data`` in a block format; those that the gguf package only reads get random blocks instead."""
    if qtype.name not in _SCALE_FIELDS:
        return quants.quantize(np.ascontiguousarray(data, dtype=np.float32), qtype)
    block_size, type_size = gguf.GGML_QUANT_SIZES[qtype]
    blocks = rng.integers(0, 256, (data.shape[0], data.shape[1] // block_size, type_size), dtype=np.uint8)
    for at in _SCALE_FIELDS[qtype.name]:
        scales = (rng.random(blocks.shape[:2]) * 2e-4 + 1e-5).astype(np.float16)
        blocks[..., at : at + 2] = scales[..., None].view(np.uint8)
    return blocks.reshape(data.shape[0], -1)


def write_metadata(writer: gguf.GGUFWriter, config: Any, family: str) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"<{i}>" if i else "ünïcode" for i in range(config.vocab_size)])
    writer.add_token_types([1] * config.vocab_size)
    writer.add_token_merges(["a b", "b c"])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    if family == "llama":
        writer.add_rope_dimension_count(head_dim)


def _rope_factors(config: Any) -> np.ndarray:
    """What llama.cpp divides each rotated pair's frequency by, taken from transformers' scaled frequencies."""
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config)
    pairs = torch.arange(0, config.head_dim, 2) / config.head_dim
    return (config.rope_parameters["rope_theta"] ** -pairs / scaled).numpy()


def interleave(data: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp's ``permute``: rows of a head go from halves (x0 x1 ... y0 y1 ...) to pairs (x0 y0 x1 y1 ...)."""
    return data.reshape(num_heads, 2, -1, *data.shape[1:]).swapaxes(1, 2).reshape(data.shape)


def deinterleave(data: torch.Tensor, num_heads: int) -> torch.Tensor:
    return data.reshape(num_heads, -1, 2, *data.shape[1:]).transpose(1, 2).reshape(data.shape)
