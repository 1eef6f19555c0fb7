"""Eight bits a number (float8_e4m3fn): to and from it, also where the library does so one number at a time."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

FLOAT8: Final = torch.float8_e4m3fn
FLOAT8_MAX: Final = 448.0


def narrow_to_float8(x: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """The nearest codes of ``x / scale``; what is beyond the range becomes its end, not NaN."""
    return (x.float() / scale).clamp_(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8)


def widen_float8(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """The same numbers in ``dtype``. On CPUs torch converts float8 one by one: shifting its bits into those of a wider
    float, whose exponent counts from 127 instead of 7, is fifty times as fast."""
    if codes.device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return codes.to(dtype)
    integer, shift = (torch.int32, 20) if dtype == torch.float32 else (torch.int16, 4)
    signed = codes.view(torch.int8).to(integer)  # the sign is extended: one of its copies arrives at the top
    bits = (signed << shift) & (0x87F00000 - 2**32 if dtype == torch.float32 else 0x87F0 - 2**16)
    return bits.view(dtype).mul_(2.0**120)


def float8_as_bytes(x: Tensor) -> Tensor:
    """For kernels: a masked load has no default of type float8."""
    return x.view(torch.uint8) if x.dtype == FLOAT8 else x
