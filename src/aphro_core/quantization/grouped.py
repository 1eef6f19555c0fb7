"""Unsigned codes with zero points, as GPTQ, AWQ and compressed-tensors store them, to a matrix in memory."""

from __future__ import annotations

from dataclasses import replace

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
    dtype = source.dtype
    order, group_index = None, None if index is None else index.to(torch.int32)
    if index is not None and _are_whole(index, scales.shape[1]):
        order, group_index = index.argsort(stable=True).to(torch.int32), None
        codes = codes[:, order.long()].contiguous()
    if source.spec.kind == "int4":
        offsets = (-zeros.float() * scales.float()).to(dtype).contiguous()
        return PackedMatrix("int4", pack_nibbles(codes), scales.to(dtype).contiguous(), offsets, group_index, order)
    if not bool((zeros == 128).all()):
        # 8 bits with other zero points do not fit an int8: the matrix is quantised anew, symmetrically
        from aphro_core.quantization.online import quantise

        columns = torch.arange(codes.shape[1], device=codes.device)
        at = columns * zeros.shape[1] // codes.shape[1] if group_index is None else group_index.long()
        weight = (codes.float() - zeros.float()[:, at]) * scales.float()[:, at]
        group = source.group if group_index is None else None
        return replace(quantise(weight, "int8", group, source.scale_dtype), order=order)
    signed = (codes.to(torch.int16) - 128).to(torch.int8)
    return PackedMatrix("int8", signed, scales.to(dtype).contiguous(), None, group_index, order)


def _are_whole(index: Tensor, num_groups: int) -> bool:
    """Whether the inputs are those of whole groups, all of one size: then sorting them is enough."""
    counts = torch.bincount(index.long(), minlength=num_groups)
    return bool((counts == len(index) // num_groups).all())
