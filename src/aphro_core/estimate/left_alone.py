"""Which parts of which layers a quantised checkpoint leaves in 16 bit, by the lists that configs give them in."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from typing import Any, Final, Literal

Part = Literal["attention", "mlp", "experts", "shared"]

_KEYS: Final = (
    "ignore",
    "modules_to_not_convert",
    "llm_int8_skip_modules",
    "ignored_layers",
    "exclude_modules",
    "exclude",
)
_MAX_PATTERNS: Final = 4096
_MAX_LENGTH: Final = 200
_MAX_WILD: Final = 64
# a module of each part, as files name it: the first that a pattern names decides
_MODULES: Final[dict[Part, tuple[str, ...]]] = {
    "attention": ("self_attn.q_proj", "self_attn.qkv_proj", "self_attn.q_b_proj", "linear_attn.in_proj_qkvz"),
    "mlp": ("mlp.gate_proj", "mlp.gate_up_proj"),
    "experts": ("mlp.experts.0.gate_proj", "block_sparse_moe.experts.0.w1", "feed_forward.experts.gate_up_proj"),
    "shared": ("mlp.shared_expert.gate_proj", "mlp.shared_experts.gate_proj"),
}
_PREFIXES: Final = ("model.", "model.language_model.", "language_model.model.")


def read_patterns(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names, globs and regular expressions of ``quantization_config``, untrusted; what is no text is left out."""
    found: list[str] = []
    for key in _KEYS:
        value = config.get(key)
        if isinstance(value, list | tuple):
            found += [each for each in value if isinstance(each, str) and 0 < len(each) <= _MAX_LENGTH]
    return tuple(found[:_MAX_PATTERNS])


def parts_left_alone(patterns: tuple[str, ...], num_layers: int) -> tuple[frozenset[Part], ...]:
    """Of each layer the parts that stay in 16 bit. A single matrix of a part is not looked at."""
    names = frozenset(pattern for pattern in patterns if not _is_wild(pattern))
    wild = tuple(pattern for pattern in patterns if _is_wild(pattern) and "lm_head" not in pattern)[:_MAX_WILD]
    return tuple(
        frozenset(
            part
            for part, modules in _MODULES.items()
            if any(
                _is_named(f"{prefix}layers.{layer}.{module}", names, wild) for module in modules for prefix in _PREFIXES
            )
        )
        for layer in range(num_layers)
    )


def _is_wild(pattern: str) -> bool:
    return pattern.startswith("re:") or "*" in pattern


def _is_named(module: str, names: frozenset[str], wild: tuple[str, ...]) -> bool:
    """As servers read them: a whole name or a part of one between dots, a regular expression, a glob."""
    if names:
        words = module.split(".")
        ends = range(1, len(words) + 1)
        if any(".".join(words[start:end]) in names for end in ends for start in range(end)):
            return True
    return any(_matches(pattern, module) for pattern in wild)


def _matches(pattern: str, module: str) -> bool:
    if not pattern.startswith("re:"):
        return fnmatch.fnmatchcase(module, pattern)
    try:
        return re.match(pattern.removeprefix("re:"), module) is not None
    except re.error:
        return False
