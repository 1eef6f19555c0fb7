"""Unsigned codes with zero points, as GPTQ, AWQ and compressed-tensors store them, to a matrix in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from aphro_core.quantization.matrix import PackedMatrix
from aphro_core.quantization.packing import pack_nibbles
from aphro_core.quantization.source import QuantSource


def from_unsigned(
    source: QuantSource, codes: Tensor, scales: Tensor, zeros: Tensor, index: Tensor | None
) -> PackedMatrix:
    """``codes`` [rows, columns] uint8, ``scales`` and integer ``zeros`` [rows, groups], the group of each column in
    ``index`` unless they follow each other. weight = (code - zero) * scale."""
    dtype, group_index = source.dtype, None if index is None else index.to(torch.int32)
    if source.spec.kind == "int4":
        offsets = (-zeros.float() * scales.float()).to(dtype).contiguous()
        return PackedMatrix("int4", pack_nibbles(codes), scales.to(dtype).contiguous(), offsets, group_index)
    if not bool((zeros == 128).all()):
        # 8 bits with other zero points do not fit an int8: the matrix is quantised anew, symmetrically
        from aphro_core.quantization.online import quantise

        columns = torch.arange(codes.shape[1], device=codes.device)
        at = columns * zeros.shape[1] // codes.shape[1] if index is None else index.long()
        weight = (codes.float() - zeros.float()[:, at]) * scales.float()[:, at]
        return quantise(weight, "int8", source.group, source.scale_dtype)
    signed = (codes.to(torch.int16) - 128).to(torch.int8)
    return PackedMatrix("int8", signed, scales.to(dtype).contiguous(), None, group_index)
