"""QuantSpec from a checkpoint's ``quantization_config``, or from what was asked for with ``-q``."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from aphro_core.errors import ModelError, UsageError
from aphro_core.models.hf_config import HfConfig
from aphro_core.models.quantization import Activations, Kind, QuantSpec

# asked for by name -> what it makes of unquantised weights
ONLINE: Final[dict[str, QuantSpec]] = {
    "fp8": QuantSpec(layout="online", kind="fp8"),
    "int8": QuantSpec(layout="online", kind="int8"),
    "int4": QuantSpec(layout="online", kind="int4", bits=4),
}
# What other servers know by these names; said by name instead of "unknown".
RECOGNISED: Final = (
    "aqlm", "auto-round", "bitnet", "bitsandbytes", "deepspeedfp", "eetq", "exl2", "exl3", "experts_int8", "fbgemm_fp8",
    "fp_quant", "higgs", "hqq", "marlin", "modelopt", "mxfp4", "qqq", "quant_llm", "quark", "quip", "quip_sharp",
    "squeezellm", "torchao", "vptq",
)  # fmt: skip

# name -> whether codes stand in words of 32 bits
_COMPRESSED_FORMATS: Final = {
    "float-quantized": False,
    "int-quantized": False,
    "naive-quantized": False,
    "pack-quantized": True,
}


def quant_spec(section: HfConfig) -> QuantSpec:
    """Of ``quantization_config``. Raises ModelError for a method or setting that is not supported, naming it."""
    method = section.text("quant_method")
    if method not in (*METHODS, *RECOGNISED):
        raise section.refuse("quant_method", ", ".join(METHODS))
    if method not in METHODS:
        raise ModelError(
            f"the model is quantised by {method}, which is recognised but not supported; supported: "
            f"{', '.join(METHODS)}",
            hint="aphro quants lists them; or quantise the unquantised model while loading, with -q int4",
        )
    return METHODS[method](section)


def with_request(found: QuantSpec | None, asked: str | None) -> QuantSpec | None:
    """The checkpoint's scheme and what was asked for with ``-q``, together. None for ``none`` and unquantised ones.

    Raises UsageError when the two contradict each other, naming both.
    """
    if asked is None or (found is not None and asked == found.layout):
        return found
    is_gguf = found is not None and found.layout == "gguf"
    if asked == "none" and (found is None or is_gguf):
        return None
    if found is not None and not is_gguf:
        raise UsageError(
            f"-q {asked}, but the checkpoint is quantised already, by {found.layout}",
            hint=f"leave -q out, or -q {found.layout}",
        )
    if asked in ONLINE:
        return ONLINE[asked]
    if asked in METHODS:
        raise UsageError(
            f"-q {asked} names a checkpoint format, but the checkpoint is not of it",
            hint=f"a checkpoint in that format, or -q {', -q '.join(ONLINE)} to quantise while loading",
        )
    recognised = " is recognised but not supported" if asked in RECOGNISED else " is unknown"
    raise UsageError(f"-q {asked}{recognised}, allowed: {', '.join((*ONLINE, *METHODS, 'none'))}", hint="aphro quants")


def _fp8(section: HfConfig) -> QuantSpec:
    """Native FP8 checkpoints: a scale a tensor, or DeepSeek's and Qwen's scales of 128 x 128 blocks."""
    section.choice("fmt", {"e4m3": True}, "e4m3")
    schemes: dict[str, Activations] = {"static": "static", "dynamic": "dynamic"}
    scheme = section.choice("activation_scheme", schemes, "dynamic")
    ignored = _ignored(section, "modules_to_not_convert", "ignored_layers")
    base = QuantSpec(layout="fp8", kind="fp8", ignored=ignored)
    if not section.has("weight_block_size"):
        return replace(base, is_per_tensor=True, activations=scheme)
    block = section.integers("weight_block_size")
    if len(block) != 2 or min(block) < 1:
        raise section.refuse("weight_block_size", "two sizes, such as [128, 128]")
    return replace(base, block_rows=block[0], group_size=block[1])


def _gptq(section: HfConfig) -> QuantSpec:
    if section.section("dynamic").keys:
        raise section.refuse("dynamic", "null (one scheme for all layers)")
    if section.flag("is_marlin_format", False):
        raise section.refuse("is_marlin_format", "false (weights as GPTQ writes them, not laid out for one kernel)")
    bits = section.choice_of("bits", (4, 8))
    has_head = section.flag("lm_head", False)
    version = section.choice("checkpoint_format", {"gptq": True, "gptq_v2": False}, "gptq")
    return QuantSpec(
        layout="gptq",
        kind=_kind(bits),
        bits=bits,
        group_size=_group(section),
        is_symmetric=section.flag("sym", True),
        has_act_order=section.flag("desc_act", False),
        zeros_less_one=version,
        has_head=has_head,
        targets=_block_modules(section, has_head=has_head),
        ignored=_ignored(section, "modules_in_block_to_not_convert"),
    )


def _block_modules(section: HfConfig, *, has_head: bool) -> tuple[str, ...]:
    """GPTQ of some modules of each block only: a list of groups of names, in the order they were quantised in."""
    groups = section.lists("modules_in_block_to_quantize")
    named = tuple(name for group in groups for name in group)
    return (*named, "lm_head") if named and has_head else named


def _awq(section: HfConfig) -> QuantSpec:
    section.choice("version", {"gemm": True, "GEMM": True}, "gemm")
    section.choice_of("w_bit" if section.has("w_bit") else "bits", (4,))
    return QuantSpec(
        layout="awq",
        kind="int4",
        bits=4,
        group_size=_group(section, "q_group_size" if section.has("q_group_size") else "group_size"),
        is_symmetric=not section.flag("zero_point", True),
        ignored=_ignored(section, "modules_to_not_convert"),
    )


def _compressed_tensors(section: HfConfig) -> QuantSpec:
    """One scheme for the linear layers that are targets: FP8 and INT8, static or dynamic, W4A16 or W8A16 in words."""
    dense = {"dense": True}
    section.section("sparsity_config").choice("format", dense, "dense")
    section.choice("format", dict.fromkeys((*_COMPRESSED_FORMATS, "mixed-precision"), True), "mixed-precision")
    groups = section.section("config_groups")
    found = [_compressed_group(section, groups.section(name)) for name in groups.keys]
    if not found or any(each != found[0] for each in found):
        raise section.refuse("config_groups", "one group, or several with the same scheme")
    targets = [target for name in groups.keys for target in groups.section(name).names("targets")]
    _check_patterns(groups.section(groups.keys[0]), "targets", targets)
    return replace(found[0], targets=() if "Linear" in targets else tuple(targets), ignored=_ignored(section, "ignore"))


def _compressed_group(section: HfConfig, group: HfConfig) -> QuantSpec:
    has_words = (group if group.has("format") else section).choice("format", _COMPRESSED_FORMATS)
    weights = group.section("weights")
    is_float = weights.choice("type", {"float": True, "int": False})
    bits = weights.choice_of("num_bits", (8,) if is_float or not has_words else (4, 8))
    strategy = weights.choice("strategy", {name: name for name in ("tensor", "channel", "group", "block")})
    block = weights.integers("block_structure") if strategy == "block" else (1, 0)
    if len(block) != 2 or (strategy == "block" and min(block) < 1):
        raise weights.refuse("block_structure", "two sizes, such as [128, 128]")
    order = weights.choice("actorder", {"null": None, "static": None, "weight": None, "group": "group"}, "null")
    return QuantSpec(
        layout="compressed-tensors",
        kind="fp8" if is_float else _kind(bits),
        bits=bits,
        group_size=block[1] if strategy == "block" else _group(weights) if strategy == "group" else None,
        block_rows=block[0],
        is_per_tensor=strategy == "tensor",
        is_symmetric=weights.flag("symmetric", True),
        has_act_order=order == "group",
        has_words=has_words,
        activations=None if has_words else _activations(group.section("input_activations"), bits, is_float=is_float),
        has_head=True,  # unless it is ignored or no target
    )


def _activations(section: HfConfig, bits: int, *, is_float: bool) -> Activations:
    """None where they stay as they are: not quantised, or in a way of which the weights alone are more exact."""
    if not section.has("num_bits") or section.integer("num_bits") != bits or bits != 8:
        return None
    is_alike = section.choice("type", {"float": True, "int": False}) == is_float
    strategies = {name: name in ("tensor", "token") for name in ("tensor", "token", "channel", "group", "block")}
    if not is_alike or not section.flag("symmetric", True) or not section.choice("strategy", strategies):
        return None
    return "dynamic" if section.flag("dynamic", False) else "static"


def _gguf(section: HfConfig) -> QuantSpec:
    """A GGUF file, whose every tensor has a format of its own (checkpoint/gguf.py writes this section)."""
    formats = section.section("block_formats")
    return QuantSpec(
        layout="gguf", kind="int4", bits=4, block_formats={name: formats.text(name) for name in formats.keys}
    )


METHODS: Final[dict[str, Callable[[HfConfig], QuantSpec]]] = {
    "fp8": _fp8,
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed_tensors,
    "gguf": _gguf,
}


def _kind(bits: int) -> Kind:
    return "int4" if bits == 4 else "int8"


def _group(section: HfConfig, key: str = "group_size") -> int | None:
    """-1 means the whole row."""
    group = section.integer(key, -1, minimum=-1)
    if group == 0 or (group > 0 and group % 2):
        raise section.refuse(key, "an even number, or -1 for whole rows")
    return None if group == -1 else group


def _ignored(section: HfConfig, *keys: str) -> tuple[str, ...]:
    found = tuple(name for key in keys for name in section.names(key))
    _check_patterns(section, keys[0], found)
    return found


def _check_patterns(section: HfConfig, key: str, patterns: Sequence[str]) -> None:
    for pattern in patterns:
        try:
            re.compile(pattern.removeprefix("re:") if pattern.startswith("re:") else "")
        except re.error as error:
            raise section.refuse(key, f"names, or re: and a regular expression ({pattern!r}: {error})") from error
