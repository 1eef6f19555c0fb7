"""Cosines and sines of a step's positions, once for all layers."""
# ruff: noqa: N803  (the constants of a kernel are in capitals)

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from aphro_kernels.language import jit, next_power_of_2, runs_kernels, tl

_TOKENS: Final = 16  # of a program


def rotary_angles_reference(positions: Tensor, frequencies: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    angles = torch.outer(positions.float(), frequencies)
    return angles.cos().mul_(scale), angles.sin().mul_(scale)


def rotary_angles(positions: Tensor, frequencies: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """cos and sin of ``positions`` [num_tokens] int64 times ``frequencies`` [half] float32, times ``scale``: both
    ``[num_tokens, half]`` float32."""
    if not runs_kernels(positions):
        return rotary_angles_reference(positions, frequencies, scale)
    return _launch(positions, frequencies, scale)


def _launch(positions: Tensor, frequencies: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    num_tokens, half = len(positions), len(frequencies)
    cos, sin = frequencies.new_empty(2, num_tokens, half)
    if num_tokens and half:
        # not chained: the layers read them before they wait for the kernel before them
        _rotary_angles_kernel[(-(-num_tokens // _TOKENS),)](
            positions, frequencies, cos, sin, num_tokens, scale, HALF=half, DIMS=next_power_of_2(half), TOKENS=_TOKENS
        )
    return cos, sin


@jit(do_not_specialize=["num_tokens", "scale"])
def _rotary_angles_kernel(
    positions: tl.tensor,
    frequencies: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    num_tokens: tl.tensor,
    scale: tl.tensor,
    HALF: tl.constexpr,
    DIMS: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    dims = tl.arange(0, DIMS)
    position = tl.load(positions + tokens, mask=tokens < num_tokens, other=0).to(tl.float32)
    frequency = tl.load(frequencies + dims, mask=dims < HALF, other=0.0)
    angles = position[:, None] * frequency[None, :]
    is_inside = (tokens < num_tokens)[:, None] & (dims < HALF)[None, :]
    at = tokens.to(tl.int64)[:, None] * HALF + dims[None, :]
    tl.store(cos + at, tl.cos(angles) * scale, mask=is_inside)
    tl.store(sin + at, tl.sin(angles) * scale, mask=is_inside)
