"""GGUF's block formats kept packed: blocks to codes, scales and offsets, 4 or 8 bits a weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from aphro_core.checkpoint.gguf import GGUFCheckpoint
from aphro_core.quantization.matrix import PackedMatrix
from aphro_core.quantization.packing import pack_nibbles
from aphro_core.quantization.source import QuantSource

# (codes [blocks, elements], scales [blocks, groups], offsets the same or None), scales and offsets in float32
Decoded = tuple[Tensor, Tensor, Tensor | None]


def read_ggml(source: QuantSource) -> PackedMatrix:
    """The module's rows and columns; columns may begin within a block of 256, as its groups are smaller."""
    checkpoint, name = source.checkpoint, f"{source.module}.weight"
    assert isinstance(checkpoint, GGUFCheckpoint), "the layout is that of GGUF files"
    blocks, first_column = checkpoint.read_blocks(name, source.rows, source.columns)
    num_rows = len(blocks)
    codes, scales, offsets = _DECODERS[source.spec.block_formats[name]](blocks.flatten(0, 1))
    group = codes.shape[1] // scales.shape[1]
    start, stop = source.columns.start - first_column, source.columns.stop - first_column

    def groups_of(values: Tensor) -> Tensor:
        return values.view(num_rows, -1)[:, start // group : stop // group].to(source.scale_dtype).contiguous()

    codes = codes.view(num_rows, -1)[:, start:stop]
    scales = groups_of(scales)
    if offsets is None:
        return PackedMatrix("int8", codes.contiguous(), scales)
    return PackedMatrix("int4", pack_nibbles(codes), scales, groups_of(offsets))


def _q4_0(blocks: Tensor) -> Decoded:
    scales = _halves(blocks, 0)
    return _split_nibbles(blocks[:, 2:]), scales, -8.0 * scales


def _q4_1(blocks: Tensor) -> Decoded:
    return _split_nibbles(blocks[:, 4:]), _halves(blocks, 0), _halves(blocks, 2)


def _q8_0(blocks: Tensor) -> Decoded:
    return blocks[:, 2:].contiguous().view(torch.int8), _halves(blocks, 0), None


def _q4_k(blocks: Tensor) -> Decoded:
    """Scales and minima of eight groups in 6 bits each: the first four whole in a byte, the last four in two parts."""
    low = blocks[:, 4:16]
    first, second, third = low[:, 0:4], low[:, 4:8], low[:, 8:12]
    scales = torch.cat((first & 63, (third & 15) | (first >> 6 << 4)), dim=1)
    minima = torch.cat((second & 63, (third >> 4) | (second >> 6 << 4)), dim=1)
    quarters = blocks[:, 16:].view(-1, 4, 32)  # 64 weights each: the low halves, then the high ones
    codes = torch.stack((quarters & 15, quarters >> 4), dim=2).flatten(1)
    return codes, _halves(blocks, 0) * scales, -_halves(blocks, 2) * minima


def _q6_k(blocks: Tensor) -> Decoded:
    """Four low bits in ``ql``, two high ones in ``qh``, 16 scales of one byte; 128 weights at a time."""
    low, high = blocks[:, :128].view(-1, 2, 2, 32), blocks[:, 128:192].view(-1, 2, 1, 32)
    nibbles = torch.cat((low & 15, low >> 4), dim=2)  # [blocks, halves, 4, 32]
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8).view(1, 1, 4, 1)
    codes = (nibbles | ((high >> shifts) & 3) << 4).flatten(1).to(torch.int8) - 32
    scales = blocks[:, 192:208].contiguous().view(torch.int8)
    return codes, _halves(blocks, 208) * scales, None


_DECODERS: Final[dict[str, Callable[[Tensor], Decoded]]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q4_K": _q4_k,
    "Q8_0": _q8_0,
    "Q6_K": _q6_k,
}


def _halves(blocks: Tensor, at: int) -> Tensor:
    """The float16 at a byte of each block, [blocks, 1] float32."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _split_nibbles(packed: Tensor) -> Tensor:
    """The low halves of all bytes, then the high ones."""
    return torch.cat((packed & 15, packed >> 4), dim=1)
