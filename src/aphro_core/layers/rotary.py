"""Rotary position embedding: frequencies by each scaling rule, and a table of cosines and sines."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from aphro_core.models.spec import RopeSpec


class RotaryEmbedding:
    """Cosines and sines of every position, made once. The first half of a sine row is negated for rotate-half."""

    def __init__(self, rope: RopeSpec, max_positions: int, dtype: torch.dtype, device: torch.device) -> None:
        angles = torch.outer(torch.arange(max_positions, dtype=torch.float32), inverse_frequencies(rope))
        scale = rope.factors.get("attention_factor", 1.0)
        cos, sin = angles.cos() * scale, angles.sin() * scale
        self._cos = torch.cat((cos, cos), dim=-1).to(device, dtype)
        self._sin = torch.cat((-sin, sin), dim=-1).to(device, dtype)

    def rows(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """``[num_tokens, 1, rotary_dim]`` each, for tokens at ``positions``."""
        return self._cos.index_select(0, positions)[:, None], self._sin.index_select(0, positions)[:, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x`` [num_tokens, heads, head_dim] rotated by its rows of cosines and (half negated) sines; a new tensor."""
    half = x.shape[-1] // 2
    swapped = torch.cat((x[..., half:], x[..., :half]), dim=-1)
    return torch.addcmul(x * cos, swapped, sin)


def inverse_frequencies(rope: RopeSpec) -> Tensor:
    """``[rotary_dim / 2]`` float32, by transformers' ``modeling_rope_utils`` for each kind."""
    exponents = torch.arange(0, rope.rotary_dim, 2, dtype=torch.int64).float() / rope.rotary_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return frequencies / rope.factors["factor"]
    if rope.kind == "llama3":
        return _llama3(frequencies, rope.factors)
    if rope.kind == "yarn":
        return _yarn(frequencies, rope)
    return frequencies


def _llama3(frequencies: Tensor, factors: dict[str, float]) -> Tensor:
    """Llama 3.1: long wavelengths are stretched by ``factor``, short ones stay, those between are blended."""
    low, high = factors["low_freq_factor"], factors["high_freq_factor"]
    original = factors["original_max_position_embeddings"]
    wavelengths = 2 * math.pi / frequencies
    smooth = ((original / wavelengths - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - smooth) * frequencies / factors["factor"] + smooth * frequencies


def _yarn(frequencies: Tensor, rope: RopeSpec) -> Tensor:
    """YaRN (arXiv 2309.00071, section 3.2): a ramp over the dims between interpolation and extrapolation."""
    original = rope.factors["original_max_position_embeddings"]

    def dim_of(rotations: float) -> float:
        return rope.rotary_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dim_of(rope.factors["beta_fast"]), dim_of(rope.factors["beta_slow"])
    if rope.factors.get("truncate", 1.0):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    ramp = ((torch.arange(rope.rotary_dim // 2).float() - low) / max(high - low, 1e-3)).clamp(0.0, 1.0)
    return frequencies / rope.factors["factor"] * ramp + frequencies * (1 - ramp)
