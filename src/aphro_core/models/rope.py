"""RopeSpec from a config: both spellings of the rotary settings, and the four scaling rules that are supported."""

from __future__ import annotations

import math
from typing import Final, Literal

from aphro_core.errors import ModelError
from aphro_core.models.hf_config import HfConfig
from aphro_core.models.spec import RopeSpec

RopeKind = Literal["default", "linear", "llama3", "yarn"]
_KINDS: Final[dict[str, RopeKind]] = {"default": "default", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}
_DEFAULT_THETA: Final = 10_000.0  # transformers' RotaryEmbeddingConfigMixin.default_theta


def rope_spec(hf: HfConfig, *, head_dim: int, max_position_embeddings: int) -> RopeSpec:
    """Rotary settings of a model whose whole heads rotate.

    Reads ``rope_scaling`` (transformers 4: beside ``rope_theta``, with ``rope_type`` or ``type``) or
    ``rope_parameters`` (transformers 5: with ``rope_theta`` inside). ``factors`` come out complete: defaults filled in
    as transformers' ``modeling_rope_utils`` does, yarn's ``attention_factor`` computed.
    """
    found = hf.section("rope_scaling" if hf.has("rope_scaling") else "rope_parameters")
    theta = found.positive("rope_theta") if found.has("rope_theta") else hf.positive("rope_theta", _DEFAULT_THETA)
    if theta <= 1.0:
        raise hf.refuse("rope_theta", "a number above 1")
    for place in (found, hf):
        if place.has("partial_rotary_factor") and place.number("partial_rotary_factor") != 1.0:
            raise place.refuse("partial_rotary_factor", "1.0 (this family rotates whole heads)")
    kind = found.choice("rope_type" if found.has("rope_type") else "type", _KINDS, "default")
    factors: dict[str, float] = {}
    if kind == "linear":
        factors = {"factor": found.number("factor", minimum=1.0)}
    elif kind == "llama3":
        factors = _llama3(found, _original_length(hf, found, max_position_embeddings))
    elif kind == "yarn":
        factors = _yarn(found, _original_length(hf, found, max_position_embeddings))
    return RopeSpec(theta=theta, rotary_dim=head_dim, kind=kind, factors=factors)


def _original_length(hf: HfConfig, found: HfConfig, max_position_embeddings: int) -> int:
    """The pretraining context: the top-level key wins, as in transformers."""
    key = "original_max_position_embeddings"
    return hf.integer(key, maximum=2**31) if hf.has(key) else found.integer(key, max_position_embeddings, maximum=2**31)


def _llama3(found: HfConfig, original_length: int) -> dict[str, float]:
    low, high = found.positive("low_freq_factor"), found.positive("high_freq_factor")
    if high <= low:
        raise found.refuse("high_freq_factor", f"more than low_freq_factor ({low})")
    return {
        "factor": found.number("factor", minimum=1.0),
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": float(original_length),
    }


def _yarn(found: HfConfig, original_length: int) -> dict[str, float]:
    factor = found.number("factor", minimum=1.0)
    beta_fast, beta_slow = found.positive("beta_fast", 32.0), found.positive("beta_slow", 1.0)
    if beta_fast < beta_slow:
        raise ModelError(f"the model's config has rope beta_fast {beta_fast}, allowed: from beta_slow ({beta_slow}) up")
    if found.has("attention_factor"):
        attention_factor = found.positive("attention_factor")
    elif found.number("mscale", 0.0) and found.number("mscale_all_dim", 0.0):
        attention_factor = _mscale(factor, found.number("mscale")) / _mscale(factor, found.number("mscale_all_dim"))
    else:
        attention_factor = _mscale(factor, 1.0)
    return {
        "factor": factor,
        "original_max_position_embeddings": float(original_length),
        "beta_fast": beta_fast,
        "beta_slow": beta_slow,
        "attention_factor": attention_factor,
        "truncate": float(found.flag("truncate", True)),
    }


def _mscale(factor: float, mscale: float) -> float:
    """The attention scale that the YaRN paper (arXiv 2309.00071, section 3.4) suggests."""
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0
