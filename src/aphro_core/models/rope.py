"""RopeSpec from a config: both spellings of the rotary settings, and the scaling rules that are supported."""

from __future__ import annotations

import math
from typing import Final, Literal

from aphro_core.errors import ModelError
from aphro_core.models.hf_config import HfConfig
from aphro_core.models.spec import RopeSpec

RopeKind = Literal["default", "linear", "llama3", "yarn", "longrope", "dynamic"]
_KINDS: Final[dict[str, RopeKind]] = {
    "default": "default",
    "linear": "linear",
    "llama3": "llama3",
    "yarn": "yarn",
    "longrope": "longrope",
    "su": "longrope",  # its name in the first Phi-3 checkpoints
    "dynamic": "dynamic",
}
_DEFAULT_THETA: Final = 10_000.0  # transformers' RotaryEmbeddingConfigMixin.default_theta


def rope_spec(
    hf: HfConfig,
    *,
    head_dim: int,
    max_position_embeddings: int,
    default_theta: float = _DEFAULT_THETA,
    is_partial: bool = False,
    default_share: float = 1.0,
) -> RopeSpec:
    """Rotary settings of a model, whose whole heads rotate unless the family ``is_partial``; ``default_share`` is the
    rotated share of a head for configs that do not name it.

    Reads ``rope_scaling`` (transformers 4: beside ``rope_theta``, with ``rope_type`` or ``type``) or
    ``rope_parameters`` (transformers 5: with ``rope_theta`` inside).
    """
    found = hf.section("rope_scaling" if hf.has("rope_scaling") else "rope_parameters")
    theta = found.positive("rope_theta") if found.has("rope_theta") else hf.positive("rope_theta", default_theta)
    if theta <= 1.0:
        raise hf.refuse("rope_theta", "a number above 1")
    share = default_share
    for place in (hf, found):
        if place.has("partial_rotary_factor"):
            share = place.positive("partial_rotary_factor")
            if share > 1.0 or (share != 1.0 and not is_partial):
                allowed = "more than 0, up to 1" if is_partial else "1.0 (this family rotates whole heads)"
                raise place.refuse("partial_rotary_factor", allowed)
    rotary_dim = int(head_dim * share)
    if rotary_dim % 2:
        raise hf.refuse(
            "partial_rotary_factor", f"an even number of rotated dims (of {head_dim} it gives {rotary_dim})"
        )
    return scaled_rope(hf, found, theta, rotary_dim, max_position_embeddings)


def scaled_rope(hf: HfConfig, found: HfConfig, theta: float, rotary_dim: int, max_position_embeddings: int) -> RopeSpec:
    """By the scaling rule that the section ``found`` names.

    ``factors`` come out complete: defaults filled in as transformers' ``modeling_rope_utils`` does, yarn's and
    longrope's ``attention_factor`` computed. Dynamic scaling changes nothing within ``max_position_embeddings``, which
    is all that is served: it is the default rule.
    """
    kind = found.choice("rope_type" if found.has("rope_type") else "type", _KINDS, "default")
    original_length = _original_length(hf, found, max_position_embeddings)
    if kind == "longrope":
        return _longrope(found, theta, rotary_dim, original_length, max_position_embeddings)
    factors: dict[str, float] = {}
    if kind in ("linear", "dynamic"):
        factors = {"factor": found.number("factor", minimum=1.0)}
    elif kind == "llama3":
        factors = _llama3(found, original_length)
    elif kind == "yarn":
        factors = _yarn(found, original_length)
    if kind == "dynamic":
        return RopeSpec(theta=theta, rotary_dim=rotary_dim)
    return RopeSpec(theta=theta, rotary_dim=rotary_dim, kind=kind, factors=factors)


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


def _longrope(
    found: HfConfig, theta: float, rotary_dim: int, original_length: int, max_position_embeddings: int
) -> RopeSpec:
    """LongRoPE (arXiv 2402.13753); without ``factor`` the stretch is the ratio of the two lengths."""
    if original_length < 2:
        raise found.refuse("original_max_position_embeddings", "2 and up")
    stretch = found.positive("factor", max_position_embeddings / original_length)
    suggested = math.sqrt(1 + math.log(stretch) / math.log(original_length)) if stretch > 1.0 else 1.0
    for key in ("short_factor", "long_factor"):
        if len(found.numbers(key)) != rotary_dim // 2:
            raise found.refuse(key, f"{rotary_dim // 2} numbers, one a rotated pair")
    return RopeSpec(
        theta=theta,
        rotary_dim=rotary_dim,
        kind="longrope",
        factors={
            "original_max_position_embeddings": float(original_length),
            "attention_factor": found.positive("attention_factor", suggested),
        },
        short_factors=found.numbers("short_factor"),
        long_factors=found.numbers("long_factor"),
    )


def _mscale(factor: float, mscale: float) -> float:
    """The attention scale that the YaRN paper (arXiv 2309.00071, section 3.4) suggests."""
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0
