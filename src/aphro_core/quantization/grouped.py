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
    dtype = source.dtype
    order, group_index = None, None if index is None else index.to(torch.int32)
    if index is not None and _are_whole(index, scales.shape[1]):
        order, group_index = index.argsort(stable=True).to(torch.int32), None
        codes = codes[:, order.long()].contiguous()
    is_int4 = source.spec.kind == "int4"
    centre = 0 if is_int4 else 128  # of 8 bits, for codes to fit an int8; usual zero points are there
    offsets = None
    if is_int4 or not bool((zeros == centre).all()):
        offsets = ((centre - zeros.float()) * scales.float()).to(dtype).contiguous()
    kept = pack_nibbles(codes) if is_int4 else (codes.to(torch.int16) - centre).to(torch.int8)
    return PackedMatrix(source.spec.kind, kept, scales.to(dtype).contiguous(), offsets, group_index, order)


def _are_whole(index: Tensor, num_groups: int) -> bool:
    """Whether the inputs are those of whole groups, all of one size: then sorting them is enough."""
    counts = torch.bincount(index.long(), minlength=num_groups)
    return bool((counts == len(index) // num_groups).all())
