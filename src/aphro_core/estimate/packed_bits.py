"""Bits a weight of quantisations that no server's own table has, from whatever their configs say."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

_SCALE_BITS: Final = 0.25  # of a weight, for scales of 16 bits in groups of 64
_FIXED: Final = {"bitnet": 2.0, "vptq": 2.2, "eetq": 8.0, "fp-quant": 4.5, "sinq": 4.5}


def packed_bits(method: str, config: Mapping[str, Any]) -> float | None:
    """None for a method that says nothing of its size."""
    if method in _FIXED:
        return _FIXED[method]
    if method == "aqlm":
        codes = _number(config, "nbits_per_codebook") * _number(config, "num_codebooks")
        return codes / max(_number(config, "in_group_size"), 1.0) + _SCALE_BITS if codes else None
    if method in ("exl2", "exl3"):
        return _number(config, "bits") or None  # the mean, scales included
    if method == "hqq":
        found = _section(_section(config, "quant_config"), "weight_quant_params")
        bits = _number(found, "nbits")
        return bits + 32.0 / max(_number(found, "group_size"), 32.0) if bits else None
    if method in ("quanto", "torchao", "quark", "higgs", "spqr"):
        named = _number(config, "bits") or _named_bits(config)
        return named + (_SCALE_BITS if named < 8 else 0.0) if named else None
    return None


def _named_bits(config: Mapping[str, Any]) -> float:
    """The first type that the config names: int4_weight_only, Int8WeightOnlyConfig, float8, fp8_e4m3, fp4 ..."""
    for text in _texts(config, depth=4):
        found = re.search(r"(?:u?int|float|fp)_?([2-8])(?!\d)", text, re.IGNORECASE)
        if found:
            return float(found[1])
    return 0.0


def _texts(value: object, depth: int) -> list[str]:
    if isinstance(value, str):
        return [value[:200]]
    if isinstance(value, Mapping) and depth:
        return [text for key, each in value.items() if key != "quant_method" for text in _texts(each, depth - 1)]
    return []


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = config.get(name)
    return found if isinstance(found, Mapping) else {}


def _number(config: Mapping[str, Any], name: str) -> float:
    value = config.get(name)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and 0 < value <= 64 else 0.0  # type: ignore[operator, arg-type]
