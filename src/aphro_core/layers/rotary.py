"""Rotary position embedding: frequencies by each scaling rule, and the rotation of a step's rows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from aphro_kernels.rotary_angles import rotary_angles
from torch import Tensor

from aphro_core.models.spec import RopeSpec


class RotaryEmbedding:
    """Angles of a step's positions. Nothing is kept for each position: a long context would cost its table."""

    def __init__(self, rope: RopeSpec, dtype: torch.dtype, device: torch.device) -> None:
        self.frequencies = inverse_frequencies(rope).to(device)
        self.scale = rope.factors.get("attention_factor", 1.0)
        self._dtype = dtype

    def at(self, positions: Tensor, *, halves: bool) -> Rotation:
        """The rotation of tokens at ``positions`` [num_tokens] int64, for all layers of a step.

        ``halves``: in the form that the kernel takes; otherwise in that of :meth:`Rotation.apply_`.
        """
        cos, sin = rotary_angles(positions, self.frequencies, self.scale)
        if halves:
            return Rotation(cos, sin)
        whole_cos, whole_sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        return Rotation(whole_cos.to(self._dtype)[:, None], whole_sin.to(self._dtype)[:, None])


@dataclass(slots=True)
class Rotation:
    """For the kernel ``cos`` and ``sin`` are [num_tokens, rotary_dim / 2] float32. For torch's operations they are
    [num_tokens, 1, rotary_dim] in the run's dtype, each half with its own, the first half of ``sin`` negated.
    """

    cos: Tensor
    sin: Tensor

    def apply_(self, x: Tensor) -> None:
        """Rotate ``x`` [num_tokens, heads, head_dim] in place (CPU): dim i with dim i + rotary_dim / 2."""
        rotary_dim = self.cos.shape[-1]
        if not rotary_dim:
            return
        x = x[..., :rotary_dim]
        swapped = x.roll(x.shape[-1] // 2, -1)
        x.mul_(self.cos).addcmul_(swapped, self.sin)


def inverse_frequencies(rope: RopeSpec) -> Tensor:
    """``[rotary_dim / 2]`` float32, by transformers' ``modeling_rope_utils`` for each kind."""
    if not rope.rotary_dim:
        return torch.empty(0)
    exponents = torch.arange(0, rope.rotary_dim, 2, dtype=torch.int64).float() / rope.rotary_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return frequencies / rope.factors["factor"]
    if rope.kind == "llama3":
        return _llama3(frequencies, rope.factors)
    if rope.kind == "yarn":
        return _yarn(frequencies, rope)
    if rope.kind == "longrope":
        return 1.0 / (torch.tensor(rope.short_factors) * rope.theta**exponents)
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
