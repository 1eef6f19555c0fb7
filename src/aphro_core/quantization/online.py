"""Unquantised weights to codes and scales while they are loaded: ``-q fp8``, ``-q int8``, ``-q int4``."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from aphro_core.models.quantization import Kind
from aphro_core.quantization.matrix import FP8, PackedMatrix
from aphro_core.quantization.packing import pack_nibbles

_FP8_MAX: Final = 448.0  # of float8_e4m3fn
_ROWS: Final = 1024  # that are worked on at once, to bound the memory besides the result


def quantise(weight: Tensor, kind: Kind, group_size: int | None, scale_dtype: torch.dtype) -> PackedMatrix:
    """``weight`` [rows, columns] to the nearest codes. int4: from the least to the largest of a group, so that both are
    exact up to the scale's rounding; the others: symmetric, by the largest magnitude. Row scales are float32."""
    parts = [_quantise(rows.float(), kind, group_size, scale_dtype) for rows in torch.split(weight, _ROWS)]
    offsets = [part.offsets for part in parts if part.offsets is not None]
    return PackedMatrix(
        kind,
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scales for part in parts]),
        torch.cat(offsets) if offsets else None,
    )


def _quantise(weight: Tensor, kind: Kind, group_size: int | None, scale_dtype: torch.dtype) -> PackedMatrix:
    num_rows, num_columns = weight.shape
    grouped = weight.view(num_rows, -1, group_size or num_columns)
    dtype = torch.float32 if group_size is None else scale_dtype
    if kind == "int4":
        low, high = grouped.aminmax(dim=-1)
        scales, offsets = _safe((high - low) / 15).to(dtype), low.to(dtype)
        codes = ((grouped - offsets.float()[..., None]) / scales.float()[..., None]).round_().clamp_(0, 15)
        return PackedMatrix(kind, pack_nibbles(codes.to(torch.uint8).view(num_rows, -1)), scales, offsets)
    largest = 127.0 if kind == "int8" else _FP8_MAX
    scales = _safe(grouped.abs().amax(dim=-1) / largest).to(dtype)
    codes = (grouped / scales.float()[..., None]).clamp_(-largest, largest).view(num_rows, -1)
    return PackedMatrix(kind, codes.round_().to(torch.int8) if kind == "int8" else codes.to(FP8), scales)


def _safe(scales: Tensor) -> Tensor:
    """A group of equal weights has no scale: any does."""
    return torch.where(scales > 0, scales, torch.ones_like(scales))
