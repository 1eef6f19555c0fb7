"""Bytes a weight takes in each quantisation scheme, and the many names that configs and commands give the schemes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from aphro_core.errors import UsageError
from aphro_core.estimate.config_keys import ConfigKeys
from aphro_core.estimate.facts import QuantizationFacts
from aphro_core.estimate.packed_bits import packed_bits


@dataclass(frozen=True)
class Scheme:
    """``weight_bytes`` of a linear layer's element; ``per_group`` more, divided by the group size."""

    name: str
    weight_bytes: float
    per_group: float = 0.0
    group_size: int | None = None  # of a checkpoint that does not say
    experts_only: bool = False
    is_exact: bool = True  # False where checkpoints of that name differ in what they leave in 16 bit

    def bytes_per_weight(self, group_size: int | None = None) -> float:
        group = group_size or self.group_size
        return self.weight_bytes + (self.per_group / group if group and group > 0 else 0.0)


# Sizes: the formats' own (scale float16 and a 4-bit zero a group for AWQ and GPTQ: 2.5 bytes; MXFP4 one byte of scale
# for 32; NVFP4 one for 16; NF4 with double quantisation 0.5 + 1/64 + 4/64/256).
SCHEMES: Final[dict[str, Scheme]] = {
    scheme.name: scheme
    for scheme in (
        Scheme("fp8", 1.0),
        Scheme("fp8-block", 1.0, 4 / 128, 128),
        Scheme("int8", 1.0),
        Scheme("awq-int4", 0.5, 2.5, 128),
        Scheme("gptq-int4", 0.5, 2.5, 128),
        Scheme("gptq-int8", 1.0, 3.0, 128),
        Scheme("gptq-int3", 0.375, 2.375, 128),
        Scheme("gptq-int2", 0.25, 2.25, 128),
        Scheme("w4a16", 0.5, 2.0, 128),
        Scheme("bnb-4bit", 0.516, is_exact=False),
        Scheme("bnb-8bit", 1.0, is_exact=False),
        Scheme("mxfp4", 0.53125, group_size=None, experts_only=True),
        Scheme("nvfp4", 0.5625, is_exact=False),
        Scheme("squeezellm", 0.5, 0.0, is_exact=False),
        Scheme("mxfp8", 1.0, 1.0, 32),
        Scheme("mxfp4-linear", 0.5, 1.0, 32, is_exact=False),
        Scheme("packed", 1.0, is_exact=False),  # of as many bits as the config says
    )
}

_ALIASES: Final[dict[str, str]] = {
    "awq": "awq-int4",
    "awq-marlin": "awq-int4",
    "gptq": "gptq-int4",
    "gptq-marlin": "gptq-int4",
    "marlin": "gptq-int4",
    "auto-round": "gptq-int4",
    "int4": "gptq-int4",
    "w4a8": "gptq-int4",
    "compressed-tensors-w4a16": "w4a16",
    "wna16": "gptq-int4",
    "moe-wna16": "awq-int4",
    "intel/auto-round": "gptq-int4",
    "hqq": "gptq-int4",
    "w8a16": "gptq-int8",
    "w8a8": "int8",
    "int8-channel": "int8",
    "w8a8-int8": "int8",
    "experts-int8": "int8",
    "tpu-int8": "int8",
    "eetq": "int8",
    "fp8-dynamic": "fp8",
    "w8a8-fp8": "fp8",
    "fp8-per-tensor": "fp8",
    "fp8-channel": "fp8",
    "ptpc-fp8": "fp8",
    "fbgemm-fp8": "fp8",
    "modelopt": "fp8",
    "fp8-128x128": "fp8-block",
    "deepseek-fp8": "fp8-block",
    "deepseekfp8": "fp8-block",
    "bitsandbytes": "bnb-4bit",
    "bnb": "bnb-4bit",
    "nf4": "bnb-4bit",
    "int8-bnb": "bnb-8bit",
    "mxfp4-moe": "mxfp4",
    "modelopt-fp4": "nvfp4",
    "nvfp4-awq": "nvfp4",
    "modelopt-nvfp4": "nvfp4",
}


def parse_quantization(text: str | None) -> QuantizationFacts | None:
    """A scheme from what was typed: ours, vLLM's or the checkpoint's word for it; ``none`` and None are 16 bit.

    ``awq:32`` and ``awq-g32`` name the group. Raises UsageError with the known names.
    """
    if text is None or text.lower() in ("", "none", "null", "auto", "bf16", "bfloat16", "fp16", "float16", "gguf"):
        return None
    name = text.strip().lower().replace("_", "-")
    found = re.fullmatch(r"(.+?)[:-]g?(\d+)(?:g)?", name)
    group = None
    if found and name not in SCHEMES and name not in _ALIASES:
        name, group = found[1], int(found[2])
    name = _ALIASES.get(name, name)
    if name not in SCHEMES:
        raise UsageError(
            f"--quantization is {text!r}, allowed: none, {', '.join(SCHEMES)} (and awq, gptq, w8a8, bitsandbytes)",
            hint="leave the flag out: the model's own config says how it is quantised",
        )
    return QuantizationFacts(scheme=name, group_size=group)


def quantization_section(keys: ConfigKeys) -> Mapping[str, Any]:
    """``quantization_config`` wherever it stands; empty without one."""
    for values, name in ((keys.whole, "quantization_config"), (keys.values, "quantization_config"),
                         (keys.whole, "compression_config")):  # fmt: skip
        found = values.get(name)
        if isinstance(found, Mapping):
            return found
    return {}


def read_quantization(keys: ConfigKeys) -> QuantizationFacts | None:
    """The scheme of ``quantization_config``; None for 16 bit. gpt-oss is MXFP4 by its type."""
    found = quantization_section(keys)
    if not found:
        return QuantizationFacts(scheme="mxfp4") if keys.model_type == "gpt_oss" else None
    method = str(found.get("quant_method") or found.get("quant_algo") or "").lower().replace("_", "-")
    return _of_method(method.removeprefix("intel/"), found)


def _of_method(method: str, config: Mapping[str, Any]) -> QuantizationFacts | None:
    """By the method's name; of one that nobody knows by its bits, else None: read_unknown_quantization says so."""
    facts: QuantizationFacts | None
    if method.startswith(("gptq", "awq", "auto-round")):
        bits = config.get("bits", config.get("w_bit", 4))
        family = "awq" if method.startswith("awq") else "gptq"
        name = f"{family}-int{bits}" if f"{family}-int{bits}" in SCHEMES else "gptq-int4"
        facts = QuantizationFacts(scheme=name, group_size=_positive(config.get("group_size")))
    elif method == "fp8":
        facts = QuantizationFacts(scheme="fp8-block" if config.get("weight_block_size") else "fp8")
    elif method == "bitsandbytes":
        facts = QuantizationFacts(scheme="bnb-8bit" if config.get("load_in_8bit") else "bnb-4bit")
    elif method == "compressed-tensors":
        facts = _compressed(config)
    elif method.startswith("modelopt") or "nvfp4" in method or "quant_algo" in config:
        algorithm = str(config.get("quant_algo", method)).lower()
        facts = QuantizationFacts(scheme="nvfp4" if "fp4" in algorithm else "fp8")
    else:
        name = _ALIASES.get(method, method)
        bits = packed_bits(method, config)
        if bits is not None:
            doubt = f"{method} is counted as {bits:g} bits a weight, scales included; file headers would tell"
            facts = QuantizationFacts(scheme="packed", bits=bits, doubt=doubt)
        else:
            facts = QuantizationFacts(scheme=name) if name in SCHEMES else None
    return facts


def unknown_method(keys: ConfigKeys) -> str | None:
    """The name of a quantisation that is counted as 16 bit, because nothing tells its size."""
    found = keys.whole.get("quantization_config") or keys.values.get("quantization_config")
    if not isinstance(found, Mapping) or read_quantization(keys) is not None:
        return None
    method = str(found.get("quant_method") or found.get("quant_algo") or "a method without a name")[:40]
    return None if method in ("gguf", "compressed-tensors") else method


def _positive(value: object) -> int | None:
    return value if isinstance(value, int) and value > 0 else None


def _compressed(config: Mapping[str, Any]) -> QuantizationFacts | None:
    """The first group of a compressed-tensors config decides: bits, type and group size of its weights."""
    groups = config.get("config_groups")
    first: Any = next(iter(groups.values()), {}) if isinstance(groups, Mapping) else {}
    weights: Any = first.get("weights") if isinstance(first, Mapping) else None
    if not isinstance(weights, Mapping):
        return None  # sparse without quantisation
    bits, kind = weights.get("num_bits", 8), weights.get("type", "int")
    if bits == 4:
        scheme = "nvfp4" if kind == "float" else "w4a16"
        return QuantizationFacts(scheme=scheme, group_size=_positive(weights.get("group_size")))
    return QuantizationFacts(scheme="fp8" if kind == "float" else "int8")
