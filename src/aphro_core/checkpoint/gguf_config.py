"""GGUF metadata as a Hugging Face config: architectures, sizes, rotary scaling, token ids."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

from aphro_core.checkpoint.gguf_families import FAMILIES, family_of
from aphro_core.checkpoint.gguf_header import GGUFHeader
from aphro_core.errors import ModelError

# Hugging Face key -> key behind "<architecture>."
_SIZES: Final[dict[str, str]] = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "vocab_size": "vocab_size",
}

_EOS_KEYS: Final = ("eos_token_id", "eot_token_id", "eom_token_id")

# The parameters behind the rope_freqs tensor of every Llama 3.1 to 3.3 model; the file has only their outcome.
_LLAMA3: Final = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def hf_config(header: GGUFHeader, path: object) -> dict[str, Any]:
    """The config in Hugging Face's keys; values as the file has them, for ``load_spec`` to check.

    Scaling by a ``rope_freqs`` tensor is the caller's to add (``llama3_rope``). Raises ModelError for what has no
    counterpart: another architecture, a split file.
    """
    arch, family = str(header.value("general.architecture")), family_of(header)
    if family is None:
        raise ModelError(
            f"{path} is of GGUF architecture {arch[:80]!r}, supported: {', '.join(FAMILIES)}",
            hint="use a model of a supported architecture",
        )
    if header.value("split.count", 1) not in (0, 1):
        raise ModelError(
            f"{path} is one of {header.value('split.count')} split files",
            hint="merge them with llama.cpp's llama-gguf-split --merge, and give the merged file",
        )
    config = {key: header.value(f"{arch}.{name}") for key, name in _SIZES.items()}
    embedding = header.tensors.get("token_embd.weight")
    if embedding is not None:
        config["vocab_size"] = embedding.shape[0]
    partial_rotary_factor = _partial_rotary_factor(header, arch)
    if partial_rotary_factor != 1.0 or family.is_partly_rotary:
        config["partial_rotary_factor"] = partial_rotary_factor
    rope = _rope(header, arch)
    if family.sliding_theta is not None:
        sliding = {"rope_type": "default", "rope_theta": family.sliding_theta}
        rope = {"full_attention": rope, "sliding_attention": sliding}
    config |= {
        "architectures": [family.architecture],
        "model_type": arch,
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in header.tensors,
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "rope_parameters": rope,
        "dtype": _dtype(header),
        "bos_token_id": header.value("tokenizer.ggml.bos_token_id"),
        "eos_token_id": [x for key in _EOS_KEYS if (x := header.value(f"tokenizer.ggml.{key}")) is not None],
    }
    config |= family.keys(header)
    return {key: value for key, value in config.items() if value is not None}


def llama3_rope(freq_factors: Sequence[float], theta: float, path: object) -> dict[str, Any]:
    """The llama3 scaling rule whose outcome ``freq_factors`` (one divisor a rotated pair) is.

    Raises ModelError when they follow from no llama3 rule: serving the model with others would change its answers.
    """
    factor = max(freq_factors)
    rule = _LLAMA3 | {"factor": round(factor, 4)}
    expected = _llama3_factors(len(freq_factors), theta, factor)
    if not all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(freq_factors, expected, strict=True)):
        raise ModelError(
            f"{path} has rope_freqs.weight that Llama 3's rule with factor {factor:g} does not yield",
            hint="use the model's safetensors checkpoint, whose config names the rule",
        )
    return {"rope_type": "llama3", "rope_theta": theta, **rule}


def _llama3_factors(num_pairs: int, theta: float, factor: float) -> list[float]:
    """As llama.cpp's converter computes them (convert_hf_to_gguf.py, LlamaModel.generate_extra_tensors)."""
    low, high, length = _LLAMA3.values()
    factors = []
    for pair in range(num_pairs):
        wavelength = 2 * math.pi * theta ** (pair / num_pairs)
        if wavelength < length / high:
            factors.append(1.0)
        elif wavelength > length / low:
            factors.append(factor)
        else:
            smooth = (length / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors


def _rope(header: GGUFHeader, arch: str) -> dict[str, Any]:
    prefix = f"{arch}.rope"
    kind = header.value(f"{prefix}.scaling.type", "none")
    linear_factor = _number(header, f"{prefix}.scale_linear", 1.0)  # how older files say it
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": _number(header, f"{prefix}.freq_base", 10_000.0)}
    if kind == "none":
        return rope if linear_factor == 1.0 else rope | {"rope_type": "linear", "factor": linear_factor}
    factor = _number(header, f"{prefix}.scaling.factor", 1.0)
    rope |= {
        "rope_type": kind,
        "factor": factor,
        "original_max_position_embeddings": header.value(f"{prefix}.scaling.original_context_length"),
        "beta_fast": header.value(f"{prefix}.scaling.yarn_beta_fast"),
        "beta_slow": header.value(f"{prefix}.scaling.yarn_beta_slow"),
    }
    attention = _number(header, f"{prefix}.scaling.attn_factor", 1.0)
    if attention != 1.0:  # llama.cpp multiplies what the rule gives, transformers replaces it
        rope["attention_factor"] = attention * (0.1 * math.log(max(factor, 1.0)) + 1.0)
    return rope


def _partial_rotary_factor(header: GGUFHeader, arch: str) -> float:
    """The rotated share of a head; 1.0 where the file says nothing."""
    num_heads = _number(header, f"{arch}.attention.head_count", 1)
    derived = _number(header, f"{arch}.embedding_length", 0) // max(num_heads, 1)
    head_dim = _number(header, f"{arch}.attention.key_length", derived)
    return _number(header, f"{arch}.rope.dimension_count", head_dim) / max(head_dim, 1)


def _number(header: GGUFHeader, key: str, default: float) -> float:
    value = header.value(key, default)
    if not isinstance(value, int | float):
        raise header.damaged(f"{key} is {str(value)[:80]!r}, expected a number")
    return value


def _dtype(header: GGUFHeader) -> str:
    """Of the weights: bfloat16 for block formats, whose values fit its range and precision."""
    info = header.tensors.get("blk.0.attn_q.weight") or header.tensors.get("blk.0.attn_qkv.weight")
    name = info.format.name if info is not None and info.format is not None else ""
    return {"F32": "float32", "F16": "float16"}.get(name, "bfloat16")
